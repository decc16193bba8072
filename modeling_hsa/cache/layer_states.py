"""What a cache keeps for a layer. Which of these, follows from the kind of the layer: see `kinds.py`."""

import torch

from ..layout import TokenLayout
from .history import TokenHistory
from .ring import TokenRing
from .state import State
from .storage import FixedStorage, GrowingStorage


Storage = GrowingStorage | FixedStorage


class LayerState:
    """An entry of `cache.layers`."""

    is_sliding = False
    is_croppable = True  # whether `crop` can go back in it
    supports_early_init = False  # `Cache.early_initialization` of Transformers leaves it alone

    def parts(self) -> dict[str, State]:
        """The states it consists of, by name."""
        raise NotImplementedError

    def needs(self) -> list[tuple[TokenHistory, int | None]]:
        """For `crop`: the histories, and how many tokens each has to hold (None: all)."""
        raise NotImplementedError


class AttentionState(LayerState):
    """Keys and values, `[B, Hkv, tokens, D]`, of the last `window` tokens (None: of all)."""

    def __init__(self, storage: Storage, window: int | None):
        self.window = window
        self.is_sliding = window is not None
        self.keys, self.values = storage.tokens(window), storage.tokens(window)

    def parts(self):
        return {"keys": self.keys, "values": self.values}

    def needs(self):
        needed = None if self.window is None else self.window - 1
        return [(self.keys, needed), (self.values, needed)]

    def update(self, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Adds key and value [B, Hkv, L, D] in aligned order. Returns those that the new tokens can see, [B, Hkv, up to
        window - 1 + L, D], right-aligned; for a step those of a ring, [B, Hkv, slots, D].
        """
        streams = self.keys.append(key, layout), self.values.append(value, layout)
        if self.window is None or layout.is_step:
            return streams
        visible = self.window - 1 + layout.length
        return tuple(x[..., max(0, x.shape[-2] - visible) :, :] for x in streams)


class RetrievalState(LayerState):
    """Of an HSA layer: its local attention, and with a `retrieval_stride` the queries of the last stride."""

    def __init__(self, storage: Storage, window: int | None, stride: int):
        """`window`: of the local attention; None without one."""
        self.stride = stride
        self.attention = None if window is None else AttentionState(storage, window)
        self.is_sliding = window is not None
        self.queries: TokenHistory | TokenRing | None = storage.tokens(stride, ordered=True) if stride > 1 else None

    def parts(self):
        parts = {} if self.attention is None else self.attention.parts()
        return parts if self.queries is None else {**parts, "queries": self.queries}

    def needs(self):
        needs = [] if self.attention is None else self.attention.needs()
        return needs if self.queries is None else [*needs, (self.queries, self.stride - 1)]

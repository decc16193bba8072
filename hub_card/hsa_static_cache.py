"""
`HSAStaticCache`: an `HSACache` for compiled decoding. Its storage never moves and where a row stands is known to the
device alone, so that a step has fixed shapes and looks at no value: it is compiled once and fits in a CUDA graph.

Prompts are read as by any `HSACache`; what later tokens can still see is then written into the storage.
"""

import torch
from transformers.utils.generic import is_flash_attention_requested

from .hsa_cache import ChunkStore, HSACache, _gather_tokens
from .hsa_layout import TokenLayout


def _fixed(buffer: torch.Tensor) -> torch.Tensor:
    """Tells CUDA graphs that the tensor stays where it is, so that they write into it rather than into a copy."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer)
    return buffer


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    # Tensors made under `torch.inference_mode` could not be written outside of it.
    with torch.inference_mode(False):
        return _fixed(torch.zeros(shape, dtype=like.dtype, device=like.device))


class TokenRing:
    """
    The last tokens of each row, `[B, ..., slots, D]`. The token at position p of its document is in slot
    `-1 - p % slots`: where fewer tokens than slots have been written they are at the end, as in a `TokenHistory`, and
    in attention, to which the order of keys means nothing, one mask serves both.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.buffer: torch.Tensor | None = None

    def _slot(self, position: torch.Tensor) -> torch.Tensor:
        return self.slots - 1 - position % self.slots

    def write(self, new: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Adds new [B, ..., 1, D], the tokens at position [B, 1]. Returns the ring [B, ..., slots, D]."""
        slot = self._slot(position).view(-1, *[1] * (new.dim() - 1))
        self.buffer.scatter_(-2, slot.to(new.device).expand_as(new), new.detach().to(self.buffer.dtype))
        return self.buffer

    def append(self, new: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """As `write`, but returns the tokens in their order, the last one at the end."""
        self.write(new, position)
        return self.tokens(position)

    def tokens(self, position: torch.Tensor) -> torch.Tensor:
        """The tokens [B, ..., slots, D] in their order, the last one, at position [B, 1], at the end."""
        position = position.to(self.buffer.device)
        back = torch.arange(self.slots - 1, -1, -1, device=position.device)
        return _gather_tokens(self.buffer, self._slot(position - back))

    def fill(self, tokens: torch.Tensor, position: torch.Tensor) -> None:
        """Makes the last of tokens [B, ..., n, D], which end with the one at position [B, 1], the content."""
        if self.buffer is None:
            self.buffer = _zeros(tokens, *tokens.shape[:-2], self.slots, tokens.shape[-1])
        position = position.to(tokens.device)
        back = (position - self._slot(torch.arange(self.slots, device=position.device))) % self.slots
        self.buffer.copy_(_gather_tokens(tokens, (tokens.shape[-2] - 1 - back).clamp(min=0)))


class StaticChunkStore(ChunkStore):
    """A `ChunkStore` of fixed size. Its last slot is spare: rows with fewer new chunks than others write there."""

    def __init__(self, max_chunks: int):
        super().__init__()
        self.capacity = max_chunks + 1

    def _grow(self, like: list[torch.Tensor], chunks: int) -> None:
        if self.buffers is None:
            self.buffers = [_zeros(x, x.shape[0], self.capacity, *x.shape[2:]) for x in like]


class HSAStaticCache(HSACache):
    """
    A cache of fixed size whose decoding steps can be compiled, also with `mode="reduce-overhead"` (CUDA graphs) and
    `fullgraph=True`. `generate(cache_implementation="static")` makes it by itself.

    A step is a call with one token per row and no attention mask: every token counts as real. The chunk encoder runs
    at every step, on the last `chunk_size` tokens; what it makes of an unfinished chunk is overwritten before anybody
    sees it. Calls of other shapes (prompts, padding) work as with [`HSACache`] and are not meant to be compiled; the
    first call, which allocates the storage, is one of them. `crop`, offloading and flash attention are not supported.

    Args:
        config ([`HSAConfig`]): the configuration of the model.
        max_length (`int`): the most tokens of a row, padding included.

    Example:

    ```python
    >>> cache = HSAStaticCache(model.config, max_length=input_ids.shape[1] + 100)
    >>> step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    >>> with torch.no_grad():
    ...     token = model(input_ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    ...     for _ in range(100):
    ...         token = step(token, past_key_values=cache).logits.argmax(-1)
    ```"""

    is_compileable = True
    is_croppable = False

    def __init__(self, config, max_length: int):
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"`max_length` must be an integer of at least 1, got {max_length!r}.")
        super().__init__(config)
        self.max_length = max_length
        self.memory = StaticChunkStore(-(-max_length // self.chunk_size))
        window = min(self.window, max_length)
        self.window_rings = [(TokenRing(window), TokenRing(window)) for _ in self.layers]
        self.hidden_ring = TokenRing(self.chunk_size)
        self.query_rings = {i: TokenRing(config.retrieval_stride) for i in self.queries}
        self.state: torch.Tensor | None = None  # [B, 3] the `RowState` of each row
        self.count: torch.Tensor | None = None  # [1] columns of all calls

    def __repr__(self) -> str:
        return f"HSAStaticCache(tokens={self.get_seq_length()}, max_length={self.max_length})"

    @property
    def _rings(self) -> list[tuple]:
        """The rings, each with the history that stands for it while a prompt is read."""
        pairs = [pair for layer, rings in zip(self.layers, self.window_rings) for pair in zip(layer.histories, rings)]
        queries = [(history, self.query_rings[i]) for i, history in self.queries.items()]
        return [*pairs, (self.hidden, self.hidden_ring), *queries]

    # -- used by the model ------------------------------------------------------------------------------------------

    def begin(self, length: int, attention_mask, position_ids) -> TokenLayout | None:
        if is_flash_attention_requested(self.config):
            raise ValueError(
                f"A static cache does not go with `attn_implementation={self.config._attn_implementation!r}`. Use "
                "'sdpa', or an HSACache."
            )
        if length == 1 and attention_mask is None and self.state is not None:
            return self._begin_step(position_ids)
        self._load()
        if self.num_columns + length > self.max_length:
            raise ValueError(
                f"`max_length` of the cache is {self.max_length}, but it would hold {self.num_columns + length} "
                "tokens. Make it with a larger `max_length`."
            )
        return None

    def _begin_step(self, position_ids) -> TokenLayout:
        # Checked on the device. Nobody else would notice before the chunks run out of space.
        torch._assert_async(self.count < self.max_length, f"The cache is full: its `max_length` is {self.max_length}.")
        position, first_chunk, position_id = self.state[:, None].unbind(-1)  # [B, 1] each
        num_chunks = first_chunk + (position + 1) // self.chunk_size
        position = position + 1
        if position_ids is None:
            position_ids = position_id + 1
        else:
            position_ids = position_ids.expand_as(position)
            starts = position_ids <= position_id
            position = position.masked_fill(starts, 0)
            first_chunk = torch.where(starts, num_chunks, first_chunk)
        return TokenLayout(
            position_ids, position, first_chunk, order=None, real=None, past=None, chunk_end=None,
            num_chunks=num_chunks[:, 0], one_document=True, shared={}, is_step=True,
        )  # fmt: skip

    def update(self, key_states, value_states, layer_idx: int, layout: TokenLayout):
        if not layout.is_step:
            return super().update(key_states, value_states, layer_idx, layout)
        rings = self.window_rings[layer_idx]
        return tuple(ring.write(x, layout.position) for ring, x in zip(rings, (key_states, value_states)))

    def append_hidden(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        if not layout.is_step:
            return super().append_hidden(hidden_states, layout)
        return self.hidden_ring.append(hidden_states, layout.position)

    def append_query(self, query: torch.Tensor, layer_idx: int, layout: TokenLayout) -> torch.Tensor:
        if not layout.is_step:
            return super().append_query(query, layer_idx, layout)
        return self.query_rings[layer_idx].append(query, layout.position)

    def update_memory(self, landmarks, keys, values, layout: TokenLayout):
        if not layout.is_step:
            return super().update_memory(landmarks, keys, values, layout)
        self.memory.append(landmarks, keys, values, layout.num_chunks, 0)
        return tuple(self.memory.buffers)

    def commit(self, layout: TokenLayout, batch: int) -> None:
        if not layout.is_step:
            super().commit(layout, batch)
            self._save(batch, layout.position.device)
            return
        state = torch.stack([layout.position, layout.first_chunk, layout.position_ids], dim=-1)
        self.state.copy_(state[:, 0])
        self.count.add_(1)

    def _forget(self) -> None:
        super()._forget()
        for history in self._histories:
            history.reset()

    # -- between steps and other calls ------------------------------------------------------------------------------

    def _save(self, batch: int, device: torch.device) -> None:
        """After a call that is no step: moves what it left in the histories into the storage."""
        state = torch.stack(self.row_state(batch, device), dim=-1)
        if self.state is None:
            self.state, self.count = _zeros(state, *state.shape), _zeros(state, 1)
        self.state.copy_(state)
        self.count.fill_(self.num_columns)
        for history, ring in self._rings:
            if history.buffer is not None:
                ring.fill(history.tokens, state[:, :1])
        self._forget()

    def _load(self) -> None:
        """Before a call that is no step: the reverse. Here the host learns how far the steps have come."""
        if self.state is None:
            return
        self._forget()
        position, first_chunk, _ = self.state.unbind(-1)
        self.num_columns = int(self.count)
        self.max_chunks = int((first_chunk + (position + 1) // self.chunk_size).max())
        past = torch.tensor([self.num_columns - 1, 0, self.num_columns - 1], device=self.state.device)
        self.past = self.num_columns if bool((self.state == past).all()) else None
        if self.past is None:
            self.rows.append(self.state[:, None])
        kept = self.num_columns if self.past is not None else self.max_length
        for history, ring in self._rings:
            if ring.buffer is not None:
                tokens = ring.tokens(position[:, None])
                history.append(tokens[..., max(0, ring.slots - kept) :, :])

    # -- `Cache` ----------------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included. Waits for the device."""
        return 0 if self.count is None else int(self.count)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.shape[0]

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A static cache cannot be cropped. Use an HSACache.")

    def activate_past_recording(self) -> None:
        raise NotImplementedError("A static cache cannot be cropped, so it records no past. Use an HSACache.")

    def _apply(self, function) -> None:
        """In place, as compiled steps know where the storage is; only another number of rows makes it move."""
        for holder, name in [(ring, "buffer") for _, ring in self._rings] + [(self, "state")]:
            setattr(holder, name, self._replaced(getattr(holder, name), function))
        if self.memory.buffers is not None:
            self.memory.buffers = [self._replaced(buffer, function) for buffer in self.memory.buffers]

    @staticmethod
    def _replaced(buffer: torch.Tensor | None, function) -> torch.Tensor | None:
        if buffer is None:
            return None
        new = function(buffer)
        return buffer.copy_(new) if new.shape == buffer.shape else _zeros(new, *new.shape).copy_(new)

    def reset(self) -> None:
        """Forgets all tokens. The storage stays, and with it the number of rows."""
        if self.state is None:
            return
        self.state.copy_(torch.tensor([-1, 0, -1], device=self.state.device))
        self.count.zero_()

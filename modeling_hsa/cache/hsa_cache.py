"""`HSACache`: what an HSA model remembers between calls."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from configuration_hsa import HSAConfig

from ..copies import CACHE_FORMAT
from ..kinds import LAYER_KINDS
from ..layout import Past, TokenLayout
from .fingerprint import device_of_state, fingerprint
from .layer_states import Storage
from .memory import DeviceMemory, StoredMemory
from .page_format import FORMATS
from .paged import PagedMemory
from .places import DiskPlace, HostPlace, Place
from .rows import Rows, StaticRows
from .sessions import Session, config_fields, load_session, save_session
from .state import State
from .storage import GrowingStorage


# Fields of the configuration in which a cache has to agree with the model.
CACHE_FIELDS = (
    "layer_types", "chunk_encoder_layer", "hidden_size", "num_key_value_heads", "head_dim", "sliding_window",
    "chunk_size", "hsa_local_attention", "hsa_num_key_value_heads", "num_retrieval_heads", "retrieval_dim",
    "retrieval_stride", "state_size", "conv_kernel", "expand", "n_groups", "mamba_head_dim",
)  # fmt: skip


class HSACache(Cache):
    """
    Cache of an HSA model: a state per layer, the hidden states of the unfinished chunk, where the rows stand, and the
    chunk memory. `model(..., use_cache=True)` and `generate` make it by themselves.

    Rows may be padded, packed and of different lengths: padding is not stored. Gradients do not flow into the cache. A
    call that fails half way leaves the cache as it was.

    Args:
        config ([`HSAConfig`]): the configuration of the model.
        memory (`str`, *optional*, defaults to `"device"`):
            Where keys and values of the chunk memory are kept: on the `"device"`, in `"host"` memory, or on `"disk"`.
            Landmarks are always on the device; retrieved chunks are copied there. The answers are the same.
        folder (`str` or `os.PathLike`, *optional*):
            Of `memory="disk"`: a folder on the disk. What is written there is gone with the cache.
        kv_dtype (`str`, *optional*):
            `"int8"` keeps keys and values of the chunk memory in 8 bits, with scales for each chunk; by default they
            are kept as they are.
        page_cache_bytes (`int`, *optional*):
            Of retrieved chunks that stay on the device, for `"host"` and `"disk"`: 1 GiB on a GPU by default.
        offloading (`bool`, *optional*, defaults to `False`):
            `memory="host"`. `generate(cache_implementation="offloaded")` sets it.

    Raises:
        ValueError: for arguments that do not go together or name what does not exist.
        MemoryError: later, from a call that the place of the memory has no room for.

    Example:

    ```python
    >>> cache = HSACache(model.config)
    >>> for segment in input_ids.split(4096, dim=1):
    ...     logits = model(segment, past_key_values=cache, logits_to_keep=1).logits
    ```"""

    is_compileable = False
    format_version = CACHE_FORMAT

    def __init__(
        self,
        config: HSAConfig,
        memory: str = "device",
        folder: str | os.PathLike | None = None,
        *,
        kv_dtype: str | None = None,
        page_cache_bytes: int | None = None,
        offloading: bool = False,
    ):
        if offloading and memory == "device":
            memory = "host"
        elif offloading and memory != "host":
            raise ValueError(f"`offloading` means `memory='host'`, got {memory!r}. Leave out one of them.")
        stored = _make_memory(memory, folder, kv_dtype, page_cache_bytes)
        self._assemble(config, GrowingStorage(config.sliding_window), Rows(2 * config.sliding_window), stored)

    def _assemble(self, config: HSAConfig, storage: Storage, rows: Rows | StaticRows, memory: StoredMemory) -> None:
        super().__init__(layers=[LAYER_KINDS[kind].state(config, storage) for kind in config.layer_types])
        self.header = self.fields_of(config)
        self.computed_with = config_fields(config)
        self.rows = rows
        self.memory = memory
        # Of the chunk encoder: the tokens that are in no complete chunk yet.
        self.hidden = storage.tokens(config.chunk_size, ordered=True)
        layers = ((f"layers.{i}.{name}", part) for i, x in enumerate(self.layers) for name, part in x.parts().items())
        # Everything the cache remembers.
        self.states: dict[str, State] = {**dict(layers), "hidden": self.hidden, **rows.parts(), "memory": memory}
        self.session: Session | None = None  # that it was saved to or loaded from last
        self.is_unattached = False  # of a session: until the model is there
        self._before: dict[str, dict] | None = None  # during a call: what the states were at its start
        self._layout: TokenLayout | None = None  # of a call that is finished and not yet committed
        self.lent_to = None  # a [`DecodeSteps`] that goes on from here, and gives back what it adds

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.get_seq_length()}, chunks={self.memory.num_chunks})"

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The tensors and numbers of every state. They are not copies, and change with the cache."""
        self.settle()
        return {name: state.state_dict() for name, state in self.states.items()}

    def load_state_dict(self, states: dict[str, dict[str, Any]]) -> None:
        for name, state in self.states.items():
            state.load_state_dict(states[name])

    @staticmethod
    def fields_of(config: HSAConfig) -> dict[str, Any]:
        """`CACHE_FIELDS` of a configuration."""
        return {name: getattr(config, name) for name in CACHE_FIELDS} | {"layer_types": list(config.layer_types)}

    def check_fits(self, config: HSAConfig) -> None:
        """Raises `ValueError` if the cache was made for a model that keeps something else."""
        for name, theirs in self.header.items():
            if theirs != (ours := getattr(config, name)):
                raise ValueError(
                    f"`past_key_values` was made for a model with `{name}` {theirs}, but this one has {ours}. Make "
                    "it with `HSACache(model.config)`."
                )

    def attach(self, decoder: torch.nn.Module) -> None:
        """
        Of a cache that was loaded, before it is used for the first time: checks that it was made with the weights of
        the `HSAModel`, and moves it to where that is.

        Raises: ValueError for other weights.
        """
        if not self.is_unattached:
            return
        weights = self.session.weights
        if weights is not None and fingerprint(decoder) != weights["sha256"]:
            raise ValueError(
                f"The session in {self.session.folder} was made with other weights, of {weights['dtype']} (this "
                f"model: {next(decoder.parameters()).dtype}). Load that model, in that dtype, or read the document "
                "again into another folder."
            )
        for name, state in self.states.items():
            device = device_of_state(decoder, name)
            if device.type != "meta" and state.device not in (None, device):
                state.apply(lambda x, device=device: x.to(device))
        self.is_unattached = False

    def reserve(self, tokens: int) -> None:
        """
        Makes room for `tokens` tokens per row at once, which saves the copies of growing step by step. `generate` does
        it for long prompts.
        """
        self.memory.reserved = -(-tokens // self.header["chunk_size"])

    def fork(self) -> "HSACache":
        """
        A cache that goes on from here independently of this one, which may be used in turn with it. It shares the
        chunk memory, the only part whose size grows with the tokens, and copies the rest.
        """
        self.settle()
        return copy.deepcopy(self, {id(self.memory): self.memory.fork()})

    # -- sessions ---------------------------------------------------------------------------------------------------

    @property
    def token_ids(self) -> torch.Tensor | None:
        """Of a cache that was loaded or saved: the `token_ids` that were saved with it, if there were any."""
        return None if self.session is None else self.session.token_ids

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        model: torch.nn.Module | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> None:
        """
        Keeps the cache as a session, which goes on in another process with the same numbers. Into the folder that it
        was loaded from or saved to before, only the chunks that are new are written, and what does not grow.

        Args:
            folder: empty, or with the session that this cache goes on with. Whenever the process ends, it holds the
                session before or the one after.
            model: an HSA model, whose weights are then asked for where the session is loaded. By default those that
                the cache was loaded with, if it was.
            token_ids (int64 [B, columns]): all tokens in the cache, so that what was retrieved can be shown. A later
                save needs them again.

        Raises:
            ValueError: if the folder holds something else, or a save of somebody else since, or for `token_ids` of
                another shape.
            BlockingIOError: while somebody else saves there.
        """
        save_session(self, folder, model, token_ids)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        config: HSAConfig,
        model: torch.nn.Module | None = None,
        memory: str = "device",
        device: torch.device | str | None = None,
        verify: bool = False,
    ) -> "HSACache":
        """
        The cache of a session. Files have to be as large as they were; nothing in them is run.

        Args:
            model: that the cache is for, whose weights are then checked at once, else when it is first called.
            memory: where the chunk memory is to be, as of the class. `"disk"` leaves it in the files, of which only
                what is retrieved is read.
            device: of the cache until the model is there; by default that of `model`, or else the CPU.
            verify: whether to read all files and compare their sums.

        Raises:
            FileNotFoundError: if there is no session, or a file of it is missing.
            ValueError: for a session that is damaged, or of another configuration or other weights.
        """
        return load_session(cls, folder, config, model, memory, device, verify)

    # -- used by the model ------------------------------------------------------------------------------------------

    def begin(self, length: int, has_mask: bool, has_positions: bool) -> Past:
        """Starts a call of `length` columns. It takes effect with `commit`, or not at all."""
        self._before = self.state_dict()
        return self.rows.past()

    def finish(self, layout: TokenLayout) -> None:
        """Everything that the call of `layout` adds is there; `commit` makes it take effect."""
        self._layout = layout

    def commit(self) -> None:
        """Ends the call, if it used the cache at all."""
        if self._layout is not None:
            for state in self.states.values():
                state.commit(self._layout)
            self._layout = self._before = None

    def settle(self) -> None:
        """Takes back what a call that failed half way has done, and what was lent."""
        if self.lent_to is not None:
            self.lent_to.finish()
        if self._before is not None:
            self.load_state_dict(self._before)
        self._layout = self._before = None

    def __getstate__(self) -> dict:
        """For `copy.deepcopy` and pickles: without what a call that failed has left, which may have gradients."""
        self.settle()
        return self.__dict__

    # -- `Cache` ----------------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.rows.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    @property
    def batch_size(self) -> int:
        self.settle()
        return next((n for state in self.states.values() if (n := state.batch_size) is not None), -1)

    @property
    def is_croppable(self) -> bool:
        return all(layer.is_croppable for layer in self.layers)

    def _check_croppable(self) -> None:
        if not self.is_croppable:
            raise NotImplementedError(
                "A cache with the state of 'linear_attention' layers cannot forget tokens, as the state cannot go "
                "back. `fork` the cache before the tokens are read, and go on with the fork."
            )

    def activate_past_recording(self) -> None:
        """Keep everything from now on until the next `crop`, so that it can go back any distance."""
        self._check_croppable()
        for history in self._histories():
            history.record()

    def _histories(self) -> list:
        return [state for state in self.states.values() if hasattr(state, "record")]

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forgets the last `-tokens_to_remove` columns (tokens or padding). Exact as far back as the window reaches (any
        distance after `activate_past_recording`).

        Raises: ValueError if `tokens_to_remove` is positive, goes back beyond the first token, or beyond what is kept;
        NotImplementedError with `linear_attention` layers, whose state cannot go back.
        """
        columns = -_as_int("tokens_to_remove", tokens_to_remove)
        if columns < 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative, got {-columns}: pass minus the number of tokens to forget."
            )
        if columns > self.get_seq_length():
            raise ValueError(f"Cannot forget {columns} tokens: the cache holds {self.get_seq_length()}.")
        self.settle()
        if columns:
            self._check_croppable()
            self._crop(columns)
        for history in self._histories():
            history.shrink()

    def _crop(self, columns: int) -> None:
        tokens = self.rows.tokens_of(columns)
        needs = {state: needed for layer in self.layers for state, needed in layer.needs()}
        needs[self.hidden] = self.header["chunk_size"] - 1
        kept = tokens is not None and all(history.can_crop(tokens, needed) for history, needed in needs.items())
        if not kept or not self.rows.can_crop(tokens):
            raise ValueError(
                f"Cannot forget {columns} tokens: what the sliding window of {self.header['sliding_window']} tokens "
                "saw before them is no longer kept. Call `activate_past_recording()` before adding them, or start "
                "again from an empty cache."
            )
        most = tokens if isinstance(tokens, int) else int(tokens.max())
        for history in needs:
            history.crop(tokens, most)
        self.rows.crop(columns, tokens, most)
        self.memory.crop(self.rows.most_chunks(self.header["chunk_size"]))

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.settle()
        for state in self.states.values():
            state.apply(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes row `beam_idx[i]` row i; int64 [B]."""
        if self.batch_size < 0:
            return
        _check_rows("beam_idx", beam_idx, self.batch_size, length=self.batch_size)
        if not torch.equal(beam_idx, torch.arange(self.batch_size, device=beam_idx.device)):
            self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        if (repeats := _as_int("repeats", repeats)) < 1:
            raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, integers [n], or those where `indices`, bool [B], is true."""
        if self.batch_size < 0:
            return
        _check_rows("indices", indices, self.batch_size)
        self._apply(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forgets all tokens."""
        self.session, self.is_unattached = None, False
        self._layout = self._before = None
        for state in self.states.values():
            state.reset()


def _make_memory(memory: str, folder, kv_dtype: str | None, page_cache_bytes: int | None) -> StoredMemory:
    """The chunk memory that the arguments of `HSACache` ask for."""
    if memory not in ("device", "host", "disk"):
        raise ValueError(f"`memory` must be 'device', 'host' or 'disk', got {memory!r}.")
    if kv_dtype not in FORMATS:
        raise ValueError(f"`kv_dtype` must be 'int8', or None for the dtype of the model, got {kv_dtype!r}.")
    if (folder is None) == (memory == "disk"):
        raise ValueError(
            "`memory='disk'` needs a `folder` on the disk." if folder is None else
            f"`folder` is for `memory='disk'`, got {memory!r}. Leave out one of them."
        )  # fmt: skip
    if page_cache_bytes is not None:
        if memory == "device":
            raise ValueError("`page_cache_bytes` is for `memory='host'` and 'disk'. Leave out one of them.")
        if _as_int("page_cache_bytes", page_cache_bytes) < 0:
            raise ValueError(f"`page_cache_bytes` must be at least 0, got {page_cache_bytes}.")
    if memory == "device" and kv_dtype is None:
        return DeviceMemory()
    place = {"device": Place, "host": HostPlace, "disk": lambda: DiskPlace(folder)}[memory]()
    return PagedMemory(place, kv_dtype, page_cache_bytes)


def _as_int(name: str, value) -> int:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()  # assisted generation of Transformers 5.17 passes a tensor
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    return value


def _check_rows(name: str, rows: torch.Tensor, batch: int, length: int | None = None) -> None:
    """
    `length`: how many there have to be. Values are looked at on a CPU only: elsewhere it would wait for the device.
    """
    is_mask = isinstance(rows, torch.Tensor) and rows.dtype == torch.bool and length is None
    is_index = isinstance(rows, torch.Tensor) and rows.dtype in (torch.int64, torch.int32)
    if not (is_mask or is_index) or rows.dim() != 1:
        given = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, torch.Tensor) else repr(rows)
        or_mask = ", or a bool one of all rows" if length is None else ""
        raise ValueError(f"`{name}` must be an int64 tensor [n] of rows{or_mask}, got {given}.")
    if (length or batch) != len(rows) and (is_mask or length is not None):
        raise ValueError(f"`{name}` must have one entry for each of the {batch} rows of the cache, got {len(rows)}.")
    on_cpu = rows.device.type == "cpu"
    if len(rows) == 0 or is_mask and on_cpu and not rows.any():
        raise ValueError(f"`{name}` selects no row. Use `reset` to empty a cache.")
    if is_index and on_cpu and (rows.min() < 0 or rows.max() >= batch):
        raise ValueError(
            f"`{name}` must be in [0, {batch}), the rows of the cache, got {int(rows.min())} to {int(rows.max())}."
        )

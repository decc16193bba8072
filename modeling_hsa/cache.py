"""
`HSACache`: what an HSA model remembers. A short history of each window layer, and one chunk memory that all HSA layers
share and that is the only part that grows with the length of the context.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .copies import CACHE_FORMAT
from .layout import RowState, TokenLayout


def _writable(buffer: torch.Tensor) -> torch.Tensor:
    """A tensor made under `torch.inference_mode` cannot be written outside it; a copy of it can."""
    if torch.compiler.is_compiling():
        return buffer
    return buffer.clone() if buffer.is_inference() and not torch.is_inference_mode_enabled() else buffer


class TokenHistory:
    """
    The last tokens of each row, `[B, ..., tokens, D]`, in preallocated storage through which they slide. Rows are
    right-aligned: the last token of every row is at the end, and a shorter row starts with meaningless entries.

    At least `keep` tokens are kept (all of them while recording), which bounds how far `crop` can go back.
    """

    def __init__(self, keep: int):
        self.keep = keep
        self.recording = False
        self.reset()

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> torch.Tensor:
        return self.buffer[..., self.start : self.end, :]

    def append(self, new: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """
        Adds the tokens `new` [B, ..., L, D], of which the last `counts[b]` of row b are real (None: all). Returns
        everything that was stored and the new tokens, right-aligned.
        """
        length = new.shape[-2]
        self.added = self.added + (length if counts is None else counts)
        with_grad = torch.is_grad_enabled() and new.requires_grad
        if self.size == 0 or counts is not None or length > self.keep or with_grad:
            stream = new
            if self.size:
                stream = torch.cat([self.tokens.to(new.dtype), new], dim=-2)
                if counts is not None:
                    stream = self._close_gaps(stream, length, counts)
            self._store(stream.detach())
            self._note_dropped()
            return stream
        if self.end + length > self.buffer.shape[-2]:
            self._store(self.tokens, room=length)
        self.buffer = _writable(self.buffer)
        self.buffer[..., self.end : self.end + length, :] = new
        self.end += length
        self._note_dropped()
        return self.tokens

    def _close_gaps(self, stream: torch.Tensor, length: int, counts: torch.Tensor) -> torch.Tensor:
        """Between the old and the new tokens of a row lies its padding: takes it out."""
        total = stream.shape[-2]
        from_end = torch.arange(total - 1, -1, -1, device=stream.device)
        counts = counts.to(stream.device)[:, None]
        source = torch.where(from_end < counts, total - 1 - from_end, total - length - 1 - (from_end - counts))
        return _gather_tokens(stream, source.clamp(min=0))

    def _store(self, stream: torch.Tensor, room: int = 64) -> None:
        """Makes the end of `stream` the content, with room for as much again and `room` more tokens."""
        size = stream.shape[-2] if self.recording else min(stream.shape[-2], self.keep)
        kept = stream[..., stream.shape[-2] - size :, :]
        self.buffer = kept.new_empty(*kept.shape[:-2], 2 * size + max(room, 64), kept.shape[-1])
        self.buffer[..., :size, :] = kept
        self.start, self.end = 0, size

    def _note_dropped(self) -> None:
        least = self.added - self.size
        self.dropped = max(self.dropped, least) if isinstance(least, int) else least.clamp(min=self.dropped)

    def can_crop(self, tokens: int | torch.Tensor, need: int) -> bool:
        """Whether without its last `tokens` tokens every row has its `need` last ones, or all that it ever had."""
        left = self.added - tokens
        enough = (left - self.dropped >= need) | (self.dropped == 0)
        return bool(torch.as_tensor(enough).all())

    def crop(self, tokens: int | torch.Tensor, most: int) -> None:
        """Forgets the last `tokens` tokens, of each row or [B] row by row, in which case `most` is their maximum."""
        if self.buffer is None:
            return
        self.added = self.added - tokens
        if isinstance(tokens, int):
            self.end -= tokens
            return
        # The rows move to the right by what they forget. What is then left in all of them is shorter by the maximum.
        stored = self.tokens
        end = torch.arange(most, stored.shape[-2], device=stored.device)
        self._store(_gather_tokens(stored, end - tokens.to(stored.device)[:, None]))
        self._note_dropped()

    def apply(self, function) -> None:
        if self.buffer is None:
            return
        self.buffer = function(self.buffer)
        if isinstance(self.added, torch.Tensor):
            self.added, self.dropped = function(self.added), function(self.dropped)

    def reset(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.start = self.end = 0
        # Tokens that came and were not cropped, and how many of them are no longer stored; [B] once rows differ.
        self.added: int | torch.Tensor = 0
        self.dropped: int | torch.Tensor = 0


def _gather_tokens(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """x [B, ..., N, D], source [B, M] -> [B, ..., M, D]."""
    index = source.view(source.shape[0], *[1] * (x.dim() - 3), source.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], source.shape[1], x.shape[-1]))


class HSAWindowLayer(CacheLayerMixin):
    """
    Keys and values of a sliding-window layer, `[B, Hkv, tokens, D]`. Keeps twice the window, so that `crop` is exact
    at any position that is still in the window.
    """

    is_sliding = True
    is_croppable = True

    def __init__(self, sliding_window: int):
        super().__init__()
        self.sliding_window = sliding_window
        self.histories = (TokenHistory(2 * sliding_window), TokenHistory(2 * sliding_window))
        self.record_past = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, counts: torch.Tensor | None = None):
        """
        Adds key_states and value_states [B, Hkv, L, D] in aligned order (`counts` [B]: how many are real, None for
        all).
        Returns the keys and values the new tokens can see, [B, Hkv, up to W - 1 + L, D], right-aligned.
        """
        self.is_initialized = True
        visible = self.sliding_window - 1 + key_states.shape[-2]
        streams = (h.append(x, counts) for h, x in zip(self.histories, (key_states, value_states)))
        return tuple(x[..., max(0, x.shape[-2] - visible) :, :] for x in streams)

    def activate_past_recording(self) -> None:
        self.record_past = True
        for history in self.histories:
            history.recording = True

    def apply(self, function) -> None:
        for history in self.histories:
            history.apply(function)

    def get_seq_length(self) -> int:
        return self.histories[0].size

    def get_max_length(self) -> int:
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("HSA models build their window masks from the token layout.")

    def reset(self) -> None:
        self.is_initialized = False
        for history in self.histories:
            history.reset()


class ChunkStore:
    """
    Landmarks `[B, C, Hr, d_r]`, keys and values `[B, C, S, Hkv, D]` of all complete chunks, in storage that grows
    geometrically. With `offloading`, keys and values live in host memory and only retrieved chunks are copied to the
    device.
    """

    def __init__(self, offloading: bool = False):
        self.offloading = offloading
        self.reserved = 0  # chunks to make room for at once
        self.buffers: list[torch.Tensor] | None = None

    def append(self, landmarks, keys, values, num_chunks: int | torch.Tensor, max_chunks: int):
        """
        Adds n chunks after the first `num_chunks` of each row (an int, or [B] where rows differ). `max_chunks` is the
        most chunks any row can then have.
        """
        new = [landmarks.detach(), *((x.detach().cpu() if self.offloading else x.detach()) for x in (keys, values))]
        n = landmarks.shape[1]
        # Rows that complete fewer chunks than others write the rest too, beyond their end, where nobody looks.
        self._grow(new, max_chunks + (0 if isinstance(num_chunks, int) else n))
        for i, x in enumerate(new):
            buffer = self.buffers[i] = _writable(self.buffers[i])
            if isinstance(num_chunks, int):
                buffer[:, num_chunks : num_chunks + n] = x
            else:
                slots = num_chunks.to(x.device)[:, None] + torch.arange(n, device=x.device)
                slots = slots.clamp(max=buffer.shape[1] - 1)  # a `StaticChunkStore` does not grow
                buffer[torch.arange(x.shape[0], device=x.device)[:, None], slots] = x

    def _grow(self, like: list[torch.Tensor], chunks: int) -> None:
        capacity = 0 if self.buffers is None else self.buffers[0].shape[1]
        if chunks <= capacity and self.buffers is not None:
            return
        capacity = max(chunks, capacity + capacity // 2, self.reserved, 16)
        grown = []
        for i, x in enumerate(like):
            buffer = x.new_zeros(x.shape[0], capacity, *x.shape[2:])
            if self.buffers is not None:
                buffer[:, : self.buffers[i].shape[1]] = self.buffers[i]
                self.buffers[i] = None  # one copy at a time
            grown.append(buffer)
        self.buffers = grown

    def apply(self, function) -> None:
        if self.buffers is not None:
            self.buffers = [function(buffer) for buffer in self.buffers]


class HSACache(Cache):
    """
    Cache of an HSA model (section 7 of the design): one window history per decoder layer, the hidden states of the
    unfinished chunk, and the chunk memory. `model(..., use_cache=True)` and `generate` make it by themselves.

    Rows may be padded, packed and of different lengths: padding is not stored. Gradients do not flow into the cache.

    Args:
        config ([`HSAConfig`]): the configuration of the model.
        offloading (`bool`, *optional*, defaults to `False`):
            Keep keys and values of the chunk memory in host memory; only retrieved chunks are copied to the device.
            `generate(cache_implementation="offloaded")` sets it.

    Example:

    ```python
    >>> cache = HSACache(model.config)
    >>> for segment in input_ids.split(4096, dim=1):
    ...     logits = model(segment, past_key_values=cache, logits_to_keep=1).logits
    ```"""

    format_version = CACHE_FORMAT

    def __init__(self, config, offloading: bool = False):
        super().__init__(layers=[HSAWindowLayer(config.sliding_window) for _ in range(config.num_hidden_layers)])
        self.offloading = False  # of `Cache`: moves whole layers. Ours moves chunks.
        self.config = config
        self.chunk_size = config.chunk_size
        self.window = config.sliding_window
        self.memory = ChunkStore(offloading)
        self.hidden = TokenHistory(self.window + self.chunk_size)
        self.queries = {}
        if config.retrieval_stride > 1:
            keep = self.window + config.retrieval_stride
            self.queries = {i: TokenHistory(keep) for i, is_hsa in enumerate(config.hsa_layers) if is_hsa}
        self._forget()

    def _forget(self) -> None:
        self.num_columns = 0  # tokens and padding of all calls
        self.past: int | None = 0  # tokens of every row, None once rows differ
        self.max_chunks = 0  # at least the number of chunks of any row
        # Once rows differ: (position, first_chunk, position_id) of the last tokens, and which of the last columns were
        # tokens. What a row has seen follows from its last token, which is what makes `crop` simple.
        self.rows = TokenHistory(2 * self.window)
        self.columns = TokenHistory(2 * self.window)

    def __repr__(self) -> str:
        return f"HSACache(tokens={self.num_columns}, chunks={self.max_chunks})"

    @property
    def _histories(self) -> list[TokenHistory]:
        windows = [history for layer in self.layers for history in layer.histories]
        return [*windows, self.hidden, *self.queries.values(), self.rows, self.columns]

    def reserve(self, tokens: int) -> None:
        """
        Makes room for `tokens` tokens per row at once, which saves the copies of growing step by step. `generate` does
        it for long prompts.
        """
        self.memory.reserved = -(-tokens // self.chunk_size)

    # -- used by the model ------------------------------------------------------------------------------------------

    def begin(self, length: int, attention_mask, position_ids) -> TokenLayout | None:
        """Starts a call. An [`HSAStaticCache`] returns the layout of its steps."""

    def row_state(self, batch: int, device: torch.device) -> RowState:
        """What each row has seen before this call."""
        if self.past is None:
            return RowState(*self.rows.tokens[:, -1].unbind(-1))
        position = torch.full((batch,), self.past - 1, device=device)
        return RowState(position, torch.zeros_like(position), position.clone())

    def update(self, key_states, value_states, layer_idx: int, layout: TokenLayout):
        """Window keys and values of a layer; see [`HSAWindowLayer.update`]."""
        return self.layers[layer_idx].update(key_states, value_states, layout.counts)

    def append_hidden(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Hidden states [B, L, hidden] for the chunk encoder. Returns them after those of earlier calls."""
        return self.hidden.append(hidden_states, layout.counts)

    def append_query(self, query: torch.Tensor, layer_idx: int, layout: TokenLayout) -> torch.Tensor:
        """Retrieval queries [B, L, dim] of a layer with a stride. Returns them after those of earlier calls."""
        return self.queries[layer_idx].append(query, layout.counts)

    def update_memory(self, landmarks, keys, values, layout: TokenLayout):
        """
        Adds the chunks completed by a call, [B, n, Hr, d_r] and [B, n, S, Hkv, D]. Returns the whole memory: landmarks
        [B, C, Hr, d_r], keys and values [B, C, S, Hkv, D].
        """
        n, is_first = landmarks.shape[1], self.max_chunks == 0
        if n or is_first:
            num_chunks = layout.num_chunks if layout.past is None else layout.past // self.chunk_size
            # Rows differ: the bound grows by the most chunks a row completed now.
            self.max_chunks = self.max_chunks + n if layout.past is None else num_chunks + n
            self.memory.append(landmarks, keys, values, num_chunks, self.max_chunks)
        if is_first and not self.memory.offloading:
            return landmarks, keys, values  # through which gradients flow
        memory = tuple(buffer[:, : self.max_chunks] for buffer in self.memory.buffers)
        if torch.is_grad_enabled():
            # Later calls write into the storage, which backward of this one may still have to read.
            memory = tuple(x.clone() for x in memory)
        return memory

    def fetch_chunks(self, keys, values, indices):
        """
        For an offloaded memory: the chunks that `indices` [B, L, Hr, K] names, each once, on the device of `indices`.

        Returns: keys, values [1, U, S, Hkv, D] and the indices into them, [1, B * L, Hr, K].
        """
        num_chunks = keys.shape[1]
        row = torch.arange(keys.shape[0], device=indices.device).view(-1, 1, 1, 1) * num_chunks
        flat = torch.where(indices >= 0, indices.long() + row, -1).flatten(0, 1)[None]
        wanted, position = flat.unique(return_inverse=True)
        absent = int((wanted < 0).sum())  # -1 sorts first
        wanted = wanted[absent:].to(keys.device)
        row, chunk = wanted // max(num_chunks, 1), wanted % max(num_chunks, 1)
        keys, values = (x[row, chunk][None].to(indices.device) for x in (keys, values))
        return keys, values, (position - absent).clamp(min=-1)

    def commit(self, layout: TokenLayout, batch: int) -> None:
        """Ends a call: remembers where its tokens stood."""
        length = layout.position.shape[1]
        if layout.past is None and self.past is not None:
            keep = self.past + 1 if self.rows.recording else self.rows.keep
            position = torch.arange(max(-1, self.past - keep), self.past, device=layout.position.device)
            rows = torch.stack([position, torch.zeros_like(position), position], dim=-1)
            self.rows.append(rows.expand(batch, -1, -1))
            self.columns.append(rows.new_ones(batch, min(self.num_columns, keep), 1))
            self.past = None
        self.num_columns += length
        if layout.past is not None:
            self.past = layout.past + length
            return
        rows = (layout.position, layout.first_chunk, layout.position_ids)
        rows = layout.align(torch.stack([x.expand(batch, -1) for x in rows], dim=-1))
        self.rows.append(rows, layout.counts)
        columns = rows.new_ones(batch, length, 1) if layout.real is None else layout.real.long()[..., None]
        self.columns.append(layout.restore(columns))

    # -- `Cache` ----------------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.num_columns > 0

    @property
    def batch_size(self) -> int:
        history = self.hidden
        return -1 if history.buffer is None else history.buffer.shape[0]

    def activate_past_recording(self) -> None:
        """Keep everything from now on until the next `crop`, so that it can go back any distance."""
        for layer in self.layers:
            layer.activate_past_recording()
        for history in self._histories:
            history.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forgets the last `-tokens_to_remove` columns (tokens or padding). Exact as far back as the window reaches (any
        distance after `activate_past_recording`).

        Raises: ValueError if `tokens_to_remove` is positive, goes back beyond the first token, or beyond what is kept.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative, got {tokens_to_remove}: pass minus the number of "
                "tokens to forget."
            )
        columns = -int(tokens_to_remove)  # assisted generation of Transformers 5.17 passes a tensor
        if columns > self.num_columns:
            raise ValueError(f"Cannot forget {columns} tokens: the cache holds {self.num_columns}.")
        if columns:
            self._crop(columns)
        for history in self._histories:
            if history.recording and history.size > 2 * history.keep:
                history.recording = False
                history._store(history.tokens)
                history._note_dropped()
                history.recording = True

    def _crop(self, columns: int) -> None:
        tokens: int | torch.Tensor = columns
        if self.past is None:
            if columns > self.columns.size:
                raise self._too_far(columns)
            tokens = self.columns.tokens[:, self.columns.size - columns :, 0].sum(1)
        most = columns if isinstance(tokens, int) else int(tokens.max())
        stride = self.config.retrieval_stride
        needs = [(history, self.window - 1) for layer in self.layers for history in layer.histories]
        needs += [(self.hidden, self.chunk_size - 1), *((h, stride - 1) for h in self.queries.values())]
        if not all(history.can_crop(tokens, need) for history, need in needs):
            raise self._too_far(columns)
        # What a row had seen before: its entry must be there, also that from before the first token.
        if self.past is None and bool(torch.as_tensor(self.rows.added - self.rows.dropped - tokens < 1).any()):
            raise self._too_far(columns)
        for history in (*(history for history, _ in needs), self.rows):
            history.crop(tokens, most)
        self.columns.crop(columns, columns)
        self.num_columns -= columns
        if self.past is not None:
            self.past -= columns
            self.max_chunks = self.past // self.chunk_size
        else:
            position, first_chunk, _ = self.rows.tokens[:, -1].unbind(-1)
            self.max_chunks = int((first_chunk + (position + 1) // self.chunk_size).max())

    def _too_far(self, columns: int) -> ValueError:
        return ValueError(
            f"Cannot forget {columns} tokens: what the sliding window of {self.window} tokens saw before them is no "
            "longer kept. Call `activate_past_recording()` before adding them, or start again from an empty cache."
        )

    def _apply(self, function) -> None:
        for history in self._histories:
            history.apply(function)
        self.memory.apply(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.batch_size < 0:
            return
        if not torch.equal(beam_idx, torch.arange(self.batch_size, device=beam_idx.device)):
            self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        for history in self._histories:
            history.reset()
        self.memory.buffers = None
        self._forget()

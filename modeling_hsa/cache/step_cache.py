"""
`StepCache`: what steps of one token need of an `HSACache`, in storage of fixed size that never moves, so that a step
can be a CUDA graph.

The chunk memory is that of the `HSACache` itself, in which room is made for the chunks of the steps; how many chunks a
row has is known to the device alone. The tokens of windows are copied into rings. They are as long as what the
`HSACache` keeps for `crop`, which `write_back` therefore leaves as it would be without the steps.
"""

import torch

from configuration_hsa import HSAConfig

from ..layout import Past
from .hsa_cache import HSACache
from .memory import ChunkMemory, DeviceMemory
from .pages import Pages, grown, store
from .ring import TokenRing
from .rows import StaticRows


class _StepStorage:
    """Makes a ring for each history of an `HSACache` that bounds what it keeps."""

    def __init__(self, slack: int):
        self.slack = slack

    def tokens(self, needed: int | None, ordered: bool = False) -> TokenRing:
        # One more than is kept, as a step that fails half way has written over the oldest token; in whole sixteens, or
        # attention would pad its mask in every layer.
        return TokenRing(-(-(needed + self.slack + 1) // 16) * 16, ordered)


class StepMemory(ChunkMemory):
    """
    The storage of a `DeviceMemory`. A step writes what it makes of the last tokens behind the chunks of each row, over
    what the step before made of a chunk that is still unfinished.
    """

    def __init__(self, memory: DeviceMemory | None, end: int):
        """
        Args:
            memory: None for a model without retrieval.
            end: chunks that a row will have at most; only so many landmarks are to be looked at.
        """
        self.landmarks = self.keys = self.values = self.table = None
        if memory is not None:
            self.landmarks, self.table = memory.stored_landmarks[:, :end], memory.table
            self.keys, self.values = memory.pages.keys, memory.pages.values

    def append(self, landmarks, keys, values, layout):
        chunk = layout.num_chunks[:, None].expand(len(landmarks), -1)
        slot = chunk if self.table is None else self.table.gather(1, chunk)
        for buffer, slots, new in (
            (self.landmarks, chunk, landmarks), (self.keys, slot, keys), (self.values, slot, values)
        ):  # fmt: skip
            store(buffer, slots, new)

    def fetch(self, indices):
        if self.table is None:
            return self.keys, self.values, indices
        slots = self.table.gather(1, indices.clamp(min=0).flatten(1).long()).view(indices.shape)
        return self.keys, self.values, slots.masked_fill(indices < 0, -1)


class StepCache(HSACache):
    """
    Args:
        config ([`HSAConfig`]): of the model, without layers of full attention.
        cache ([`HSACache`]): holds at least one token, keeps its chunk memory on the device, and does not record. Not
            to be used until `write_back`.
        steps (`int`): the most steps.
    """

    def __init__(self, config: HSAConfig, cache: HSACache, steps: int):
        self.cache, self.before = cache, cache.state_dict()
        self.start = cache.get_seq_length()
        hidden = cache.hidden.tokens if cache.hidden.buffer is not None else next(iter(cache._histories())).tokens
        rows = torch.stack(cache.rows.past().row_state(hidden.device), dim=-1).expand(hidden.shape[0], -1).clone()
        memory = cache.memory if any(config.hsa_layers) else None
        chunks = steps // config.chunk_size + 2
        end = cache.memory.num_chunks + chunks
        if memory is not None:
            cache._before = self.before  # what the cache goes back to if this fails
            _make_room(memory, config, hidden, rows, chunks, end)
            cache._before = None
        self._assemble(config, _StepStorage(config.sliding_window), StaticRows(), StepMemory(memory, end))
        self.rows.state = rows
        self.rows.count = torch.full((1,), self.start, device=hidden.device)
        for ring, history in self._rings():
            ring.buffer = ring.laid_out(history.tokens, rows[:, :1])

    def _rings(self) -> list[tuple]:
        """The rings and the histories that they stand for."""
        pairs = ((state, self.cache.states[name]) for name, state in self.states.items())
        return [(ring, history) for ring, history in pairs if isinstance(ring, TokenRing) and history.size]

    def begin(self, length: int, has_mask: bool, has_positions: bool) -> Past:
        """Only for calls with one token per row, which counts as real and goes on with the document of its row."""
        return self.rows.past(is_step=True)

    @property
    def is_current(self) -> bool:
        """Whether the storage is still that of the memory, which a fork of it may have moved."""
        return self.memory.keys is None or self.memory.keys is self.cache.memory.pages.keys

    def write_back(self) -> None:
        """Adds the tokens of all steps that went through to the `HSACache`. Waits for the device."""
        cache, steps = self.cache, int(self.rows.count) - self.start
        if steps == 0:
            return
        cache._before = self.before  # what the cache goes back to if this is interrupted
        position = self.rows.state[:, :1]
        for ring, history in self._rings():
            size = min(history.size + steps, history.keep)
            tokens = ring.tokens(position)
            history.put(tokens[..., ring.slots - size :, :], steps)
        cache.rows.advance(self.start, steps)
        if self.memory.landmarks is not None:
            memory = cache.memory
            memory.num_chunks = max(memory.num_chunks, cache.rows.most_chunks(cache.header["chunk_size"]))
            if memory.table is None:
                memory.pages.used = max(memory.pages.used, memory.num_chunks)
        cache._before = None


def _make_room(
    memory: DeviceMemory, config: HSAConfig, hidden: torch.Tensor, rows: torch.Tensor, chunks: int, end: int
) -> None:
    """Room for `chunks` more chunks in each row, `end` in all; beside forks, in slots that nobody else writes to."""
    batch, pages = hidden.shape[0], memory.pages
    if memory.stored_landmarks is None:  # no chunk yet
        pages = memory.pages = Pages()
        memory.stored_landmarks = hidden.new_empty(batch, 0, config.num_retrieval_heads, config.retrieval_dim)
        shape = (batch, 0, config.chunk_size, config.hsa_num_key_value_heads, config.head_dim)
        pages.keys, pages.values = hidden.new_empty(shape), hidden.new_empty(shape)
    elif memory.is_shared:
        memory._unshare(end)
    memory.stored_landmarks = grown(memory.stored_landmarks, memory.stored_landmarks, end, memory.reserved)
    slots = end
    if memory.table is not None:
        claim = pages.claim(chunks)
        memory.claims, slots = (*memory.claims, claim), pages.used
        number = torch.arange(chunks, dtype=torch.int32, device=hidden.device)
        claimed = (claim.start + number)[None].expand(batch, -1)
        chunk = rows[:, 1:2] + (rows[:, :1] + 1) // config.chunk_size + number
        memory.table = store(grown(memory.table, claimed, end, memory.reserved), chunk, claimed)
    pages.keys = grown(pages.keys, pages.keys, slots, memory.reserved)
    pages.values = grown(pages.values, pages.values, slots, memory.reserved)

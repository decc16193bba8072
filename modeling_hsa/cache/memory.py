"""
The chunk memory: landmarks `[B, C, Hr, d_r]`, keys and values `[B, C, S, Hkv, D]` of all complete chunks. What the
encoder makes is appended; layers are handed it whole, look at `landmarks` and `fetch` what they retrieved, wherever it
is kept: with its landmarks on the device (`DeviceMemory`), or elsewhere (`PagedMemory` in `paged`).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..layout import TokenLayout
from .pages import Claim, Pages, Slots, grown, store
from .ring import fixed_zeros, replace_fixed
from .room import check_room
from .state import State


class ChunkMemory(State):
    """What the upper layers retrieve from. `landmarks` is None before the first call."""

    landmarks: torch.Tensor | None

    def append(self, landmarks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: TokenLayout) -> None:
        """Adds the n chunks that the call of `layout` completes: [B, n, Hr, d_r] and twice [B, n, S, Hkv, D]."""
        raise NotImplementedError

    def prefetch(self, indices: torch.Tensor) -> None:
        """Says what the next `fetch` will ask for, so that it may be brought while the layer does something else."""

    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            indices: [B, L, Hr, K] int32, chunks of each row; -1: none.

        Returns:
            keys, values [n, U, S, Hkv, D] with at least those chunks, and [n, B * L / n, Hr, K], where among the U
            each of them is; n is B, or 1 where the rows were merged into one.
        """
        raise NotImplementedError

    def to(self, device, non_blocking: bool = False) -> "ChunkMemory":
        """For models spread over several devices: the memory as a layer on `device` sees it in this call."""
        if self.landmarks is None or self.landmarks.device == torch.device(device):
            return self
        return _MovedMemory(self, device)


@dataclass(eq=False)
class CallMemory(ChunkMemory):
    """
    The chunks of one call without a cache, as the encoder made them: gradients flow through them. A dataclass, so that
    FSDP sees its tensors among the arguments of a layer.
    """

    landmarks: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def append(self, landmarks, keys, values, layout):
        self.landmarks, self.keys, self.values = landmarks, keys, values

    def fetch(self, indices):
        return self.keys, self.values, indices


# Who looks for tensors in arguments, as reentrant checkpointing does, finds them.
pytree.register_pytree_node(
    CallMemory, lambda memory: ([memory.landmarks, memory.keys, memory.values], None), lambda x, _: CallMemory(*x)
)


class _MovedMemory(ChunkMemory):
    """A memory on another device, from which only the landmarks and what is fetched come over."""

    def __init__(self, memory: ChunkMemory, device):
        self.memory, self.landmarks = memory, memory.landmarks.to(device)

    def fetch(self, indices):
        fetched = self.memory.fetch(indices.to(self.memory.landmarks.device))
        return tuple(x.to(indices.device) for x in fetched)


class CallView(NamedTuple):
    """What the layers of a call see of a stored memory."""

    landmarks: torch.Tensor  # [B, C, Hr, d_r]
    keys: torch.Tensor | None = None  # [B, slots, S, Hkv, D]
    values: torch.Tensor | None = None
    table: torch.Tensor | None = None  # [B, C] the slot of each chunk; None: the chunk itself


def kept(storage: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """What a call sees of the storage: later calls write into it, and backward of this one may still have to read."""
    return [x.clone() for x in storage] if torch.is_grad_enabled() else storage


class StoredMemory(ChunkMemory):
    """
    The chunks of all calls. Gradients do not flow into what earlier calls left.

    A `fork` shares keys and values, which are only ever added to. From then on a chunk of a row is in the slot that
    `table` [B, C] says, and each cache adds its chunks to slots that it alone claims.
    """

    fields = ("stored_landmarks", "num_chunks", "pages", "table", "claims", "is_shared", "saved")
    # Whether the first chunks are seen as they come, so that gradients flow through them.
    shows_new = False
    kv_dtype: str | None = None

    def __init__(self):
        self.reserved = 0  # chunks to make room for at once
        self._clear()

    def _clear(self) -> None:
        self.stored_landmarks: torch.Tensor | None = None
        self.pages = self._make_pages()
        self.num_chunks = 0  # at least the number of chunks of any row
        self.table: torch.Tensor | None = None
        self.claims: tuple[Claim, ...] = ()
        self.is_shared = False  # with a fork that has not added anything yet
        # Once there is a session: the page of it [B, C] that each chunk is, -1 for chunks that are in none.
        self.saved: torch.Tensor | None = None
        self._view: CallView | None = None

    def _make_pages(self) -> Slots:
        raise NotImplementedError

    # -- during a call ----------------------------------------------------------------------------------------------

    @property
    def landmarks(self) -> torch.Tensor | None:
        if self._view is not None:
            return self._view.landmarks
        return None if self.stored_landmarks is None else self.stored_landmarks[:, : self.num_chunks]

    def append(self, landmarks, keys, values, layout):
        n, is_first = landmarks.shape[1], self.num_chunks == 0
        if n:
            start = layout.num_chunks if layout.past is None else layout.past // keys.shape[2]
            # Where rows differ, the bound grows by the most chunks a row completed now.
            end = (self.num_chunks if layout.past is None else start) + n
            completed = None if layout.past is not None else layout.chunk_end.sum(1)
            self._write(landmarks.detach(), keys.detach(), values.detach(), start, end, completed)
            self.num_chunks = end
        new = CallView(landmarks, keys, values)
        if is_first and self.shows_new or self.stored_landmarks is None:
            self._view = new
        else:
            self._view = self._stored_view()

    def _stored_view(self) -> CallView:
        raise NotImplementedError

    def _write(
        self, landmarks, keys, values, start: int | torch.Tensor, end: int, completed: torch.Tensor | None
    ) -> None:
        """
        Adds n chunks after the first `start` of each row, an int, or [B] where rows differ; then only the first
        `completed` [B] of a row are chunks.
        """
        n = landmarks.shape[1]
        if self.stored_landmarks is None:
            self.pages = self._make_pages()
        if isinstance(start, int):
            slots: slice | torch.Tensor = slice(start, end)
        else:
            # Rows that complete fewer chunks than others write the rest too, beyond their end, where nobody looks.
            slots, end = start[:, None] + torch.arange(n, device=start.device), end + n
        if self.is_shared:
            self._unshare(end)
        self._write_pages(keys, values, slots, end, completed)
        self.stored_landmarks = self._added(self.stored_landmarks, slots, landmarks, end)
        if self.saved is not None:
            unsaved = self.saved.new_full(landmarks.shape[:2], -1)
            self.saved = self._added(self.saved, slots, unsaved, end)

    def _write_pages(self, keys, values, slots, end: int, completed) -> None:
        """The part of `_write` that keeps keys and values."""
        raise NotImplementedError

    def _added(self, buffer: torch.Tensor | None, slots, new: torch.Tensor, end: int) -> torch.Tensor:
        return store(grown(buffer, new, end, self.reserved), slots, new)

    def _unshare(self, needed: int) -> None:
        """Before the first chunk that is added after a fork: landmarks and a table of its own."""
        chunks = self.stored_landmarks.shape[1]
        self.stored_landmarks = grown(
            self.stored_landmarks, self.stored_landmarks, max(needed, chunks + 1), self.reserved
        )
        self.table = self._own_table()
        self.is_shared = False

    def _own_table(self) -> torch.Tensor:
        return self.table.clone()

    def commit(self, layout):
        self._view = None

    # -- between calls ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._view = None

    def reset(self) -> None:
        self._clear()

    @property
    def batch_size(self):
        return None if self.stored_landmarks is None else self.stored_landmarks.shape[0]

    def crop(self, num_chunks: int) -> None:
        """Forgets what is beyond the first `num_chunks` chunks of every row."""
        self.num_chunks = num_chunks

    def fork(self) -> "StoredMemory":
        """A memory with the same chunks, which shares their storage. Both can be added to, in any order."""
        self.is_shared = self.stored_landmarks is not None
        other = copy.copy(self)
        other.load_state_dict(self.state_dict())
        return other

    def apply(self, function):
        if self.stored_landmarks is None:
            return
        self.stored_landmarks = function(self.stored_landmarks)
        if self.saved is not None:
            self.saved = function(self.saved)
        if self.table is not None:
            self.table = function(self.table)
        self.is_shared = False

    # -- sessions ---------------------------------------------------------------------------------------------------

    @property
    def content_dtype(self) -> torch.dtype | None:
        """Of keys and values, before they are stored; None as long as there are none."""
        raise NotImplementedError

    def read(self, row: torch.Tensor, chunk: torch.Tensor) -> dict[str, torch.Tensor]:
        """Chunks `chunk` [n] of the rows `row` [n] as they are stored, in host memory: [n, ...] each, by name."""
        raise NotImplementedError

    def restore(self, session, table: torch.Tensor, num_chunks: int, device: torch.device) -> None:
        """
        Makes the pages of a [`SessionPages`] the content of an empty memory; `table` int64 [B, num_chunks], the page
        of each chunk, or -1.
        """
        if session.count == 0:
            return
        self.num_chunks = num_chunks
        # Room for what comes next, so that a question does not copy the document first.
        capacity = num_chunks + num_chunks // 16 + 64
        self.stored_landmarks = session.gather("landmarks", table, capacity, device)
        self.saved = grown(table.to(device), table.to(device), capacity, 0)
        self._restore_pages(session, table, capacity, device)

    def _restore_pages(self, session, table: torch.Tensor, capacity: int, device: torch.device) -> None:
        raise NotImplementedError


class DeviceMemory(StoredMemory):
    """All of it on the device of the encoder, keys and values row by row, as kernels take them."""

    shows_new = True

    def _make_pages(self):
        return Pages()

    def _stored_view(self):
        slots = self.num_chunks if self.table is None else self.pages.used
        view = (self.stored_landmarks[:, : self.num_chunks], self.pages.keys[:, :slots], self.pages.values[:, :slots])
        return CallView(*kept(view), self.table)

    def _write_pages(self, keys, values, slots, end, completed):
        batch, n = keys.shape[:2]
        if self.table is None:
            self.pages.write(slots, keys, values, end, self.reserved)
            return
        claim = self.pages.claim(n)
        self.claims = (*self.claims, claim)
        claimed = torch.arange(claim.start, claim.start + n, dtype=torch.int32, device=self.table.device)
        self.table = self._added(self.table, slots, claimed[None].expand(batch, -1), end)
        self.pages.write(slice(claim.start, claim.start + n), keys, values, self.pages.used, 0)

    def _own_table(self):
        if self.table is not None:
            return super()._own_table()
        chunks = self.pages.keys.shape[1]
        return torch.arange(chunks, dtype=torch.int32, device=self.pages.keys.device).repeat(self.batch_size, 1)

    def fetch(self, indices):
        return self._view.keys, self._view.values, self._slots(indices)

    def _slots(self, indices: torch.Tensor) -> torch.Tensor:
        """The slots of the chunks `indices` [B, L, Hr, K] of each row."""
        table = self._view.table
        if table is None:
            return indices
        slots = table.gather(1, indices.clamp(min=0).flatten(1).long()).view(indices.shape)
        return slots.masked_fill(indices < 0, -1)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The storage of landmarks, keys and values."""
        return [x for x in (self.stored_landmarks, self.pages.keys, self.pages.values) if x is not None]

    def apply(self, function):
        if self.stored_landmarks is not None:
            super().apply(function)
            self.pages, self.claims = self.pages.copy(function), ()

    @property
    def content_dtype(self):
        return None if self.pages.keys is None else self.pages.keys.dtype

    def read(self, row, chunk):
        device = self.stored_landmarks.device
        row, chunk = row.to(device), chunk.to(device)
        slot = chunk if self.table is None else self.table[row, chunk].long()
        parts = {"landmarks": self.stored_landmarks[row, chunk]}
        parts |= {"keys": self.pages.keys[row, slot], "values": self.pages.values[row, slot]}
        return {name: x.cpu() for name, x in parts.items()}

    def _restore_pages(self, session, table, capacity, device):
        check_room(session.nbytes, "device", device, session.nbytes)
        self.pages.used = table.shape[1]
        self.pages.keys = session.gather("keys", table, capacity, device)
        self.pages.values = session.gather("values", table, capacity, device)


class StaticMemory(DeviceMemory):
    """Of fixed size, for steps of fixed shapes. Its last slot is spare: rows with fewer new chunks write there."""

    def __init__(self, max_chunks: int):
        super().__init__()
        self.capacity = max_chunks + 1

    def append(self, landmarks, keys, values, layout):
        if self.stored_landmarks is None:
            self._allocate(landmarks, keys, values)
        if not layout.is_step:
            super().append(landmarks, keys, values, layout)
            return
        self._write(landmarks.detach(), keys.detach(), values.detach(), layout.num_chunks, 0, None)
        self._view = CallView(*kept(self.buffers))

    def _allocate(self, landmarks, keys, values) -> None:
        self.pages = Pages()
        self.stored_landmarks, self.pages.keys, self.pages.values = (
            fixed_zeros(x, x.shape[0], self.capacity, *x.shape[2:]) for x in (landmarks, keys, values)
        )

    def _write(self, landmarks, keys, values, start, end, completed):
        if isinstance(start, int):
            slots: slice | torch.Tensor = slice(start, end)
        else:
            n = landmarks.shape[1]
            slots = (start[:, None] + torch.arange(n, device=start.device)).clamp(max=self.capacity - 1)
        for buffer, new in zip(self.buffers, (landmarks, keys, values)):
            store(buffer, slots, new)

    def reset(self):
        """The storage stays, as compiled steps know where it is."""
        for buffer in self.buffers:
            buffer.zero_()
        self.num_chunks, self._view = 0, None

    def apply(self, function):
        if self.stored_landmarks is not None:
            self.stored_landmarks, self.pages.keys, self.pages.values = (
                replace_fixed(x, function) for x in self.buffers
            )

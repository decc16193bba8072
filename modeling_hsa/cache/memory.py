"""
The chunk memory: landmarks `[B, C, Hr, d_r]`, keys and values `[B, C, S, Hkv, D]` of all complete chunks. What the
encoder makes is appended; layers are handed it whole, look at `landmarks` and `fetch` what they retrieved, wherever it
is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..layout import TokenLayout
from .pages import Claim, Pages, grown, store
from .ring import fixed_zeros, replace_fixed
from .state import State


class ChunkMemory(State):
    """What the upper layers retrieve from. `landmarks` is None before the first call."""

    landmarks: torch.Tensor | None

    def append(self, landmarks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: TokenLayout) -> None:
        """Adds the n chunks that the call of `layout` completes: [B, n, Hr, d_r] and twice [B, n, S, Hkv, D]."""
        raise NotImplementedError

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


class _CallView(NamedTuple):
    """What the layers of a call see of a stored memory."""

    landmarks: torch.Tensor  # [B, C, Hr, d_r]
    keys: torch.Tensor  # [B, slots, S, Hkv, D]
    values: torch.Tensor
    table: torch.Tensor | None = None  # [B, C] the slot of each chunk; None: the chunk itself


def _kept(storage: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """What a call sees of the storage: later calls write into it, and backward of this one may still have to read."""
    return [x.clone() for x in storage] if torch.is_grad_enabled() else storage


class DeviceMemory(ChunkMemory):
    """
    The chunks of all calls, on the device of the encoder. Gradients do not flow into what earlier calls left.

    A `fork` shares keys and values, which are only ever added to. From then on a chunk of a row is in the slot that
    `table` [B, C] says, and each cache adds its chunks to slots that it alone claims.
    """

    fields = ("stored_landmarks", "num_chunks", "pages", "table", "claims", "is_shared")

    def __init__(self):
        self.reserved = 0  # chunks to make room for at once
        self._clear()

    def _clear(self) -> None:
        self.stored_landmarks: torch.Tensor | None = None
        self.pages = Pages()
        self.num_chunks = 0  # at least the number of chunks of any row
        self.table: torch.Tensor | None = None
        self.claims: tuple[Claim, ...] = ()
        self.is_shared = False  # with a fork that has not added anything yet
        self._view: _CallView | None = None

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
            self._write(landmarks.detach(), self._placed(keys.detach()), self._placed(values.detach()), start, end)
            self.num_chunks = end
        new = _CallView(landmarks, keys, values)
        self._view = new if is_first and self._shows_new else self._stored_view(new)

    # Whether the first chunks are seen as they come, so that gradients flow through them.
    _shows_new = True

    def _stored_view(self, new: _CallView) -> _CallView:
        if self.stored_landmarks is None:
            return new  # no chunk
        slots = self.num_chunks if self.table is None else self.pages.used
        view = (self.stored_landmarks[:, : self.num_chunks], self.pages.keys[:, :slots], self.pages.values[:, :slots])
        return _CallView(*_kept(view), self.table)

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        """x where keys and values are kept."""
        return x

    def _write(self, landmarks, keys, values, start: int | torch.Tensor, end: int) -> None:
        """Adds n chunks after the first `start` of each row (an int, or [B] where rows differ)."""
        batch, n = landmarks.shape[:2]
        if self.stored_landmarks is None:
            self.pages = Pages()
        if isinstance(start, int):
            slots: slice | torch.Tensor = slice(start, end)
        else:
            # Rows that complete fewer chunks than others write the rest too, beyond their end, where nobody looks.
            slots, end = start[:, None] + torch.arange(n, device=start.device), end + n
        if self.is_shared:
            self._unshare(end)
        self.stored_landmarks = store(grown(self.stored_landmarks, landmarks, end, self.reserved), slots, landmarks)
        if self.table is None:
            self.pages.write(slots, keys, values, end, self.reserved)
            return
        claim = self.pages.claim(n)
        self.claims = (*self.claims, claim)
        claimed = torch.arange(claim.start, claim.start + n, dtype=torch.int32, device=self.table.device)
        claimed = claimed[None].expand(batch, -1)
        self.table = store(grown(self.table, claimed, end, self.reserved), slots, claimed)
        self.pages.write(slice(claim.start, claim.start + n), keys, values, self.pages.used, 0)

    def _unshare(self, needed: int) -> None:
        """Before the first chunk that is added after a fork: landmarks and a table of its own."""
        batch, chunks = self.stored_landmarks.shape[:2]
        self.stored_landmarks = grown(
            self.stored_landmarks, self.stored_landmarks, max(needed, chunks + 1), self.reserved
        )
        if self.table is None:
            self.table = torch.arange(chunks, dtype=torch.int32, device=self.stored_landmarks.device).repeat(batch, 1)
        else:
            self.table = self.table.clone()
        self.is_shared = False

    def fetch(self, indices):
        return self._view.keys, self._view.values, self._slots(indices)

    def _slots(self, indices: torch.Tensor) -> torch.Tensor:
        """The slots of the chunks `indices` [B, L, Hr, K] of each row."""
        table = self._view.table
        if table is None:
            return indices
        slots = table.gather(1, indices.clamp(min=0).flatten(1).long()).view(indices.shape)
        return slots.masked_fill(indices < 0, -1)

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

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The storage of landmarks, keys and values."""
        return [x for x in (self.stored_landmarks, self.pages.keys, self.pages.values) if x is not None]

    def crop(self, num_chunks: int) -> None:
        """Forgets what is beyond the first `num_chunks` chunks of every row."""
        self.num_chunks = num_chunks

    def fork(self) -> "DeviceMemory":
        """A memory with the same chunks, which shares their storage. Both can be added to, in any order."""
        self.is_shared = self.stored_landmarks is not None
        other = type(self)()
        other.load_state_dict(self.state_dict())
        other.reserved = self.reserved
        return other

    def apply(self, function):
        if self.stored_landmarks is None:
            return
        self.stored_landmarks = function(self.stored_landmarks)
        self.pages, self.claims, self.is_shared = self.pages.copy(function), (), False
        if self.table is not None:
            self.table = function(self.table)


class HostMemory(DeviceMemory):
    """Keys and values are in host memory, and only retrieved chunks are copied to the device, each once."""

    _shows_new = False

    def _placed(self, x):
        return x.cpu()

    def fetch(self, indices):
        keys, values = self._view.keys, self._view.values
        indices, num_slots = self._slots(indices), keys.shape[1]
        row = torch.arange(keys.shape[0], device=indices.device).view(-1, 1, 1, 1) * num_slots
        flat = torch.where(indices >= 0, indices.long() + row, -1).flatten(0, 1)[None]
        wanted, position = flat.unique(return_inverse=True)
        absent = int((wanted < 0).sum())  # -1 sorts first
        wanted = wanted[absent:].to(keys.device)
        row, slot = wanted // max(num_slots, 1), wanted % max(num_slots, 1)
        keys, values = (x[row, slot][None].to(indices.device) for x in (keys, values))
        return keys, values, (position - absent).clamp(min=-1)


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
        self._write(landmarks.detach(), keys.detach(), values.detach(), layout.num_chunks, 0)
        self._view = _CallView(*_kept(self.buffers))

    def _allocate(self, landmarks, keys, values) -> None:
        self.pages = Pages()
        self.stored_landmarks, self.pages.keys, self.pages.values = (
            fixed_zeros(x, x.shape[0], self.capacity, *x.shape[2:]) for x in (landmarks, keys, values)
        )

    def _write(self, landmarks, keys, values, start, end):
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

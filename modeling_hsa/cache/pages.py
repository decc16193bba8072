"""Where the keys and values of chunks are kept, and how caches that were forked from each other share them."""

from collections.abc import Callable

import torch

from .room import check_room
from .state import writable


class Slots:
    """Numbered slots that several caches write to. Each claims those that it alone writes."""

    def __init__(self):
        self.used = 0  # slots, from the first one on, that may hold something
        self.free: list[tuple[int, int]] = []  # (start, count) of slots below that were given back

    def claim(self, count: int, first_chunk: int = 0) -> "Claim":
        """`count` slots in a row that nobody else writes to, for chunks from number `first_chunk` of a row on."""
        for i, (start, size) in enumerate(self.free):
            if size >= count:
                self.free[i : i + 1] = [(start + count, size - count)] if size > count else []
                return Claim(self, start, count, first_chunk)
        self.used += count
        return Claim(self, self.used - count, count, first_chunk)


class Claim:
    """Slots that a cache and its forks hold. They are given back when the last of these is gone."""

    def __init__(self, slots: Slots, start: int, count: int, first_chunk: int):
        self.slots, self.start, self.count, self.first_chunk = slots, start, count, first_chunk

    def __del__(self):
        self.slots.free.append((self.start, self.count))


class Pages(Slots):
    """Keys and values of chunks on a device, [B, slots, S, Hkv, D], in storage that grows geometrically."""

    def __init__(self):
        super().__init__()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def write(
        self, slots: slice | torch.Tensor, keys: torch.Tensor, values: torch.Tensor, needed: int, reserved: int
    ) -> None:
        """
        Writes [B, n, S, Hkv, D] to the slots of every row, or to [B, n] row by row, of `needed` slots in all.

        Raises: MemoryError if there is no room to grow, before anything has changed.
        """
        capacity = grown_capacity(self.keys, needed, reserved)
        if self.keys is None or capacity > self.keys.shape[1]:
            self._check_room(keys, values, capacity, needed)
            self.keys = grown(self.keys, keys, capacity, 0)
            self.values = grown(self.values, values, capacity, 0)
        self.used = max(self.used, needed)
        self.keys, self.values = store(self.keys, slots, keys), store(self.values, slots, values)

    def _check_room(self, keys: torch.Tensor, values: torch.Tensor, capacity: int, needed: int) -> None:
        chunk = sum(x.element_size() * x.shape[0] * x.shape[2:].numel() for x in (keys, values))
        freed = 0 if self.keys is None else self.keys.nbytes  # before the values grow
        check_room(chunk * capacity - freed, "device", keys.device, chunk * needed)

    def copy(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Pages":
        """A copy with `function(x)` for each tensor."""
        other = Pages()
        other.keys, other.values, other.used = function(self.keys), function(self.values), self.used
        return other


def grown_capacity(buffer: torch.Tensor | None, needed: int, reserved: int) -> int:
    """Chunks of a buffer [B, capacity, ...] that has room for `needed` chunks: as many, or geometrically more."""
    capacity = 0 if buffer is None else buffer.shape[1]
    return capacity if needed <= capacity else max(needed, capacity + capacity // 2, reserved, 16)


def grown(buffer: torch.Tensor | None, like: torch.Tensor, needed: int, reserved: int) -> torch.Tensor:
    """`buffer` [B, capacity, ...], or a larger copy of it: room for `needed` chunks, and geometrically more."""
    capacity = grown_capacity(buffer, needed, reserved)
    if buffer is not None and capacity == buffer.shape[1]:
        return buffer
    # Of the dtype of what is there, also if a model of another dtype goes on.
    dtype = like.dtype if buffer is None else buffer.dtype
    larger = like.new_zeros(like.shape[0], capacity, *like.shape[2:], dtype=dtype)
    if buffer is not None:
        larger[:, : buffer.shape[1]] = buffer
    return larger


def store(buffer: torch.Tensor, slots: slice | torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Writes new [B, n, ...] to the slots of every row, or to [B, n] row by row. Returns what was written to."""
    buffer, new = writable(buffer), new.to(buffer.dtype)
    if isinstance(slots, slice):
        buffer[:, slots] = new
    else:
        buffer[torch.arange(new.shape[0], device=new.device)[:, None], slots.to(new.device)] = new
    return buffer

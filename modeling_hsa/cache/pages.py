"""Where the keys and values of chunks are kept, and how caches that were forked from each other share them."""

from collections.abc import Callable

import torch

from .state import writable


class Pages:
    """
    Keys and values of chunks, [B, slots, S, Hkv, D], in storage that grows geometrically. A cache that shares it with
    others claims the slots it writes to.
    """

    def __init__(self):
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.used = 0  # slots, from the first one on, that may hold something
        self.free: list[tuple[int, int]] = []  # (start, count) of slots below that were given back

    def write(
        self, slots: slice | torch.Tensor, keys: torch.Tensor, values: torch.Tensor, needed: int, reserved: int
    ) -> None:
        """Writes [B, n, S, Hkv, D] to the slots of every row, or to [B, n] row by row, of `needed` slots in all."""
        self.used = max(self.used, needed)
        self.keys = store(grown(self.keys, keys, needed, reserved), slots, keys)
        self.values = store(grown(self.values, values, needed, reserved), slots, values)

    def claim(self, count: int) -> "Claim":
        """`count` slots in a row that nobody else writes to."""
        for i, (start, size) in enumerate(self.free):
            if size >= count:
                self.free[i : i + 1] = [(start + count, size - count)] if size > count else []
                return Claim(self, start, count)
        self.used += count
        return Claim(self, self.used - count, count)

    def copy(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Pages":
        """A copy with `function(x)` for each tensor."""
        other = Pages()
        other.keys, other.values, other.used = function(self.keys), function(self.values), self.used
        return other


class Claim:
    """Slots of `pages` that a cache and its forks hold. They are given back when the last of these is gone."""

    def __init__(self, pages: Pages, start: int, count: int):
        self.pages, self.start, self.count = pages, start, count

    def __del__(self):
        self.pages.free.append((self.start, self.count))


def grown(buffer: torch.Tensor | None, like: torch.Tensor, needed: int, reserved: int) -> torch.Tensor:
    """`buffer` [B, capacity, ...], or a larger copy of it: room for `needed` chunks, and geometrically more."""
    capacity = 0 if buffer is None else buffer.shape[1]
    if needed <= capacity:
        return buffer
    capacity = max(needed, capacity + capacity // 2, reserved, 16)
    larger = like.new_zeros(like.shape[0], capacity, *like.shape[2:])
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

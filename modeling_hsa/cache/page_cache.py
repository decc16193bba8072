"""`PageCache`: the pages that were retrieved last, on the device."""

from collections.abc import Sequence

import torch


class PageCache:
    """
    As many pages as fit into a budget of bytes, the least recently used of which make room for others. Who is where is
    known in host memory, so that looking for pages does not wait for the device.

    Args:
        capacity: pages, at least 1.
        like: tensors [n, ...] of which a page consists.
        device: of the copies.
    """

    def __init__(self, capacity: int, like: Sequence[torch.Tensor], device: torch.device):
        with torch.inference_mode(False):
            self.buffers = [torch.empty(capacity, *x.shape[1:], dtype=x.dtype, device=device) for x in like]
            self._slot_in = torch.full((capacity,), -1)  # the slot of the page in each place
            self._used_at = torch.full((capacity,), -1)
            self._place_of = torch.full((0,), -1)  # the place of each slot
        self._clock = 0
        self.copied = 0  # pages brought to the device, ever

    def forget(self, start: int, end: int) -> None:
        """The pages of these slots are written anew."""
        places = self._place_of[start:end]
        held = places[places >= 0]
        self._slot_in[held], self._used_at[held] = -1, -1
        places.fill_(-1)

    def get(self, slots: torch.Tensor, bring) -> list[torch.Tensor]:
        """
        The pages of `slots` int64 [n], all different, on the CPU: tensors [n, ...] on the device. `bring(slots)` is
        asked for those that are missing.
        """
        if len(slots) and (most := int(slots.max())) >= len(self._place_of):
            more = self._place_of.new_full((2 * most + 1 - len(self._place_of),), -1)
            self._place_of = torch.cat([self._place_of, more])
        places = self._place_of[slots]
        absent = (places < 0).nonzero()[:, 0]
        device = self.buffers[0].device
        self._clock += 1
        self._used_at[places[places >= 0]] = self._clock
        found = [x[places.clamp(min=0).to(device, non_blocking=True)] for x in self.buffers]
        if len(absent):
            brought = bring(slots[absent])
            self.copied += len(absent)
            on_device = absent.to(device, non_blocking=True)
            for x, new in zip(found, brought):
                x[on_device] = new
            self._insert(slots[absent], brought)
        return found

    def _insert(self, slots: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
        """As many of the pages as there is room for beside those that are used by the same call."""
        old = self._used_at.argsort()
        places = old[self._used_at[old] < self._clock][: len(slots)]
        slots, held = slots[: len(places)], self._slot_in[places]
        self._place_of[held[held >= 0]] = -1
        self._place_of[slots], self._slot_in[places], self._used_at[places] = places, slots, self._clock
        for buffer, new in zip(self.buffers, pages):
            buffer[places.to(buffer.device, non_blocking=True)] = new[: len(places)]

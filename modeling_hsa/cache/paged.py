"""
`PagedMemory`: a chunk memory whose keys and values are somewhere else than its landmarks, or in another format. A page
holds one chunk, and is written once; rows, forks and beams that have the same chunk share its page.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .memory import CallView, StoredMemory, kept
from .page_cache import PageCache
from .page_format import FORMATS
from .pages import Slots
from .places import Place
from .room import check_call


# Of a block of pages. A block is never moved, so growing copies nothing.
_LARGEST_BLOCK = 1 << 28
_CACHED_BYTES = 1 << 30
_fetcher = ThreadPoolExecutor(1, "hsa-fetch")


class PlacedPages(Slots):
    """
    Pages in blocks of a place.

    Args:
        place: where.
        page_format: an instance of one of `FORMATS`.
        cached_bytes: of a cache of pages on the device, 0 for none; None: 1 GiB on a GPU, else none.
    """

    def __init__(self, place: Place, page_format, cached_bytes: int | None):
        super().__init__()
        self.place, self.format, self.cached_bytes = place, page_format, cached_bytes
        self.dtype: torch.dtype | None = None  # of what was written
        self.blocks: list[tuple[torch.Tensor, ...]] = []  # tensors [pages of the block, ...]
        self.starts: list[int] = []  # the slot of the first page of each block
        self.capacity = 0
        self.cache: PageCache | None = None
        self._written: torch.cuda.Event | None = None  # when the last copy to host memory is there
        self._lock = threading.Lock()  # forks share the pages, and one may be fetching

    def add_block(self, block: tuple[torch.Tensor, ...]) -> None:
        self.blocks.append(block)
        self.starts.append(self.capacity)
        self.capacity += len(block[0])

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor, reserved: int) -> None:
        """
        Writes [n, S, Hkv, D] to the n slots from `start` on, where `reserved` pages are expected in all.

        Raises: MemoryError if there is no room to grow, before anything has changed.
        """
        parts, n = self.format.encode(keys, values), len(keys)
        with self._lock:
            self.dtype = self.dtype or keys.dtype
            if start + n > self.capacity or not self.blocks:
                self._grow(parts, start + n, reserved)
            if self.cache is not None:
                self.cache.forget(start, start + n)
            for first, block in zip(self.starts, self.blocks):
                low, high = max(start, first), min(start + n, first + len(block[0]))
                if low < high:
                    for stored, part in zip(block, parts):
                        stored[low - first : high - first].copy_(part[low - start : high - start], non_blocking=True)
            if keys.is_cuda and self.place.name != "device":
                self._written = torch.cuda.current_stream(keys.device).record_event()

    def _grow(self, parts: tuple[torch.Tensor, ...], needed: int, reserved: int) -> None:
        device, page = parts[0].device, page_bytes(parts)
        count = max(needed - self.capacity, min(max(self.capacity // 2, 16), _LARGEST_BLOCK // page))
        count = max(count, reserved - self.capacity)
        needed = (needed - self.capacity) * page
        self.place.check_room(count * page, needed, device, self.format.kv_dtype is None)
        like = self.blocks[0] if self.blocks else parts
        self.add_block(tuple(self.place.allocate((count, *x.shape[1:]), x.dtype, device) for x in like))

    def read(self, slots: torch.Tensor, device: torch.device, use_cache: bool = True) -> tuple[torch.Tensor, ...]:
        """The pages of the slots int64 [n], all different, on the CPU: tensors [n, ...] on the device."""
        with self._lock:
            if self._written is not None:
                self._written.synchronize()
                self._written = None
            if use_cache and self.cache is None and (capacity := self._cached_pages(device)):
                self.cache = PageCache(capacity, self.blocks[0], device)
            if self.cache is None or not use_cache:
                return self._gather(slots, device)
            return tuple(self.cache.get(slots, lambda missing: self._gather(missing, device)))

    def _cached_pages(self, device: torch.device) -> int:
        if self.place.name == "device" or not self.blocks:
            return 0
        default = _CACHED_BYTES if device.type == "cuda" else 0
        return (default if self.cached_bytes is None else self.cached_bytes) // page_bytes(self.blocks[0])

    def _gather(self, slots: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
        slots = slots.to(self.blocks[0][0].device)
        if len(self.blocks) == 1:
            pages = tuple(torch.index_select(x, 0, slots, out=_staging(x, len(slots), device)) for x in self.blocks[0])
        else:
            starts = torch.tensor(self.starts, device=slots.device)
            block_of = torch.bucketize(slots, starts, right=True) - 1
            pages = tuple(_staging(x, len(slots), device) for x in self.blocks[0])
            for i in block_of.unique().tolist():
                here = (block_of == i).nonzero()[:, 0]
                for page, stored in zip(pages, self.blocks[i]):
                    page[here] = stored[slots[here] - self.starts[i]]
        return tuple(x.to(device, non_blocking=device.type == "cuda") for x in pages)

    def __reduce__(self):
        raise TypeError("A cache in host memory or on disk cannot be pickled. Use `save_pretrained`, or `fork`.")


def _staging(stored: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """Room for `count` pages on their way to a device. From pinned memory, copies to a GPU run beside its work."""
    pinned = device.type == "cuda" and not stored.is_cuda
    return torch.empty(count, *stored.shape[1:], dtype=stored.dtype, device=stored.device, pin_memory=pinned)


def page_bytes(parts: tuple[torch.Tensor, ...]) -> int:
    """Bytes of one page of tensors [n, ...]."""
    return sum(x.element_size() * x.shape[1:].numel() for x in parts)


class PagedMemory(StoredMemory):
    """
    Landmarks on the device of the encoder, keys and values in pages of a place. Of what the tokens of a call retrieve,
    each page is copied once, on a stream of its own while the layer attends to its window, unless it is in the cache
    of pages already. What one call retrieves has to fit on the device.

    Args:
        place: where pages are kept.
        kv_dtype: a key of `FORMATS`.
        cached_bytes: as of [`PlacedPages`].
    """

    def __init__(self, place: Place, kv_dtype: str | None = None, cached_bytes: int | None = None):
        self.place, self.kv_dtype, self.cached_bytes = place, kv_dtype, cached_bytes
        super().__init__()

    def _clear(self):
        super()._clear()
        self._ahead: tuple[torch.Tensor, Future] | None = None

    def _make_pages(self):
        return PlacedPages(self.place, FORMATS[self.kv_dtype](), self.cached_bytes)

    # -- during a call ----------------------------------------------------------------------------------------------

    def _stored_view(self):
        (landmarks,) = kept([self.stored_landmarks[:, : self.num_chunks]])
        return CallView(landmarks, table=self.table)

    def _write_pages(self, keys, values, slots, end, completed):
        batch, n = keys.shape[:2]
        ids = torch.full((batch, n), -1, dtype=torch.int32, device=keys.device)
        if completed is None:
            is_chunk, first = torch.ones_like(ids, dtype=torch.bool), slots.start
        else:
            is_chunk, first = torch.arange(n, device=keys.device) < completed[:, None], int(slots.min())
        keys, values = keys[is_chunk], values[is_chunk]
        claim = self.pages.claim(len(keys), first)
        self.claims = (*self.claims, claim)
        self.pages.write(claim.start, keys, values, batch * self.reserved)
        ids[is_chunk] = torch.arange(claim.start, claim.start + len(keys), dtype=torch.int32, device=ids.device)
        self.table = self._added(self.table, slots, ids, end)

    def prefetch(self, indices):
        if not indices.is_cuda or self.stored_landmarks is None or torch.compiler.is_compiling():
            return
        ready = torch.cuda.current_stream(indices.device).record_event()
        self._ahead = indices, _fetcher.submit(self._bring_beside, indices, self._view, ready)

    def fetch(self, indices):
        if self.stored_landmarks is None:
            return self._view.keys, self._view.values, indices
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not indices:
            return self._bring(indices, self._view)
        fetched, done = ahead[1].result()
        stream = torch.cuda.current_stream(indices.device)
        stream.wait_event(done)
        for x in fetched:
            x.record_stream(stream)
        return fetched

    @torch.no_grad()
    def _bring_beside(self, indices: torch.Tensor, view: CallView, ready: torch.cuda.Event):
        """`_bring`, on a stream of its own, and when it will be done. Runs in a thread of its own, too."""
        stream = _side_stream(indices.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            return self._bring(indices, view), stream.record_event()

    def _bring(self, indices: torch.Tensor, view: CallView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Chunks are told apart by row and number even where rows share a page, so that attention sees the same numbers
        # in the same order wherever they are kept.
        batch, capacity = view.table.shape
        row = torch.arange(batch, device=indices.device).view(-1, 1, 1, 1) * capacity
        flat = torch.where(indices >= 0, indices.long() + row, -1).flatten(0, 1)[None]
        wanted, position = flat.unique(return_inverse=True)
        slots = view.table.flatten()[wanted.clamp(min=0)].long().masked_fill(wanted < 0, -1).cpu()
        absent = int(len(slots) > 0 and bool(slots[0] < 0))  # -1 sorts first
        slots, which = slots[absent:].unique(return_inverse=True)
        check_call(len(slots), page_bytes(self.pages.blocks[0]), indices.device)
        pages = self.pages.read(slots, indices.device)
        if len(which) != len(slots) or not torch.equal(which, torch.arange(len(which))):
            which = which.to(indices.device)
            pages = tuple(x[which] for x in pages)
        keys, values = self.pages.format.decode(pages, self.pages.dtype)
        return keys[None], values[None], (position - absent).clamp(min=-1)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self._ahead is not None:  # of a call that failed
            self._ahead[1].exception()
            self._ahead = None

    # -- between calls ----------------------------------------------------------------------------------------------

    def crop(self, num_chunks):
        super().crop(num_chunks)
        while self.claims and self.claims[-1].first_chunk >= num_chunks:
            self.claims = self.claims[:-1]

    def __deepcopy__(self, memo):
        return self.fork()  # nobody writes to a page twice, so sharing shows nowhere

    @property
    def content_dtype(self):
        return self.pages.dtype

    def read(self, row, chunk):
        row, chunk = row.to(self.table.device), chunk.to(self.table.device)
        parts = {"landmarks": self.stored_landmarks[row, chunk].cpu()}
        slots, which = self.table[row, chunk].long().cpu().unique(return_inverse=True)
        pages = self.pages.read(slots, torch.device("cpu"), use_cache=False)
        return parts | {name: x[which] for name, x in zip(self.pages.format.names, pages)}

    def _restore_pages(self, session, table, capacity, device):
        self.table = self.saved.int()
        self.pages.dtype = session.dtype
        if self.place.name != "disk":
            self.place.check_room(session.nbytes, session.nbytes, device, self.kv_dtype is None)
        for block in session.blocks():
            parts = tuple(block[name] for name in self.pages.format.names)
            if self.place.name != "disk":
                stored = tuple(self.place.allocate(x.shape, x.dtype, device) for x in parts)
                parts = tuple(x.copy_(y) for x, y in zip(stored, parts))
            self.pages.add_block(parts)
        # No claim: what is in a file of a session is not written to again.
        self.pages.used = self.pages.capacity


_side_streams: dict[torch.device, "torch.cuda.Stream"] = {}


def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]

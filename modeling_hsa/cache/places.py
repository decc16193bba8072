"""Where pages of chunk memory can be kept: on the device, in host memory, or in a file."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .room import check_room


class Place:
    """A device, `torch.device`, whose own memory it is."""

    name = "device"

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Storage for a cache on `device`, that can be written in every mode."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)

    def check_room(self, wanted: int, needed: int, device: torch.device, is_exact: bool) -> None:
        """Raises: MemoryError, as `room.check_room`."""
        check_room(wanted, self.name, device, needed, is_exact)


class HostPlace(Place):
    """Host memory, pinned where the device is a GPU, so that copies run beside its work."""

    name = "host"

    def allocate(self, shape, dtype, device):
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


class DiskPlace(Place):
    """
    Files in a folder, mapped into memory: the system keeps in memory what is used and there is room for. They have no
    name once they are open, so nothing of them is left when the process ends, however it ends.
    """

    name = "disk"

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def allocate(self, shape, dtype, device):
        size = torch.Size(shape).numel()
        descriptor, name = tempfile.mkstemp(prefix=".hsa-pages-", dir=self.folder)
        try:
            # A disk that is full is an error here, and would end the process when a page is written.
            allocate = getattr(os, "posix_fallocate", lambda file, start, end: os.ftruncate(file, end))
            allocate(descriptor, 0, max(1, size * dtype.itemsize))
            with torch.inference_mode(False):
                return torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
        finally:
            os.close(descriptor)
            os.unlink(name)

    def check_room(self, wanted, needed, device, is_exact):
        check_room(wanted, self.name, device, needed, is_exact, self.folder)

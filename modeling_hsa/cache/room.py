"""Whether there is room for more chunk memory, asked before it is taken."""

import shutil
from pathlib import Path

import torch


try:
    import psutil
except ImportError:  # it comes with accelerate
    psutil = None

GIB = 2**30
# What the 8-bit format takes of the bytes of half precision, its scales included.
INT8_SHARE = 0.56
# Bytes for which it is not worth asking how many are free.
_SMALL = 1 << 28


def check_room(
    wanted: int, place: str, device: torch.device, needed: int, is_exact: bool = True, folder: Path | None = None
) -> None:
    """
    Raises `MemoryError` if `wanted` bytes do not fit into a place of chunk memory ("device", "host" or "disk"), with
    the bytes that are free and the places that have enough.

    Args:
        wanted: bytes that are about to be taken, with some for what is to come.
        device: of the cache.
        needed: bytes of what there is to keep now.
        is_exact: whether keys and values are not in 8 bits yet.
        folder: of the place "disk".
    """
    if torch.compiler.is_compiling():
        return
    free = free_bytes(place, device, folder)
    if free is None or wanted <= free:
        return
    where = {"device": str(device), "host": "host memory", "disk": f"the folder {folder}"}[place]
    ways = []
    if place == "device" and device.type != "cpu" and (free_bytes("host", device) or 0) >= wanted:
        ways.append("`memory='host'`, where it fits")
    if is_exact and INT8_SHARE * wanted <= free:
        ways.append("`kv_dtype='int8'`, in which it fits")
    ways.append("`memory='disk'` with a `folder` on a disk that has room for it")
    raise MemoryError(
        f"The chunk memory would take {wanted / GIB:.2f} GiB more of {where}, {needed / GIB:.2f} GiB of them at once, "
        f"but {free / GIB:.2f} GiB are free. Make the cache with {', or '.join(ways)}."
    )


def check_call(pages: int, page_bytes: int, device: torch.device) -> None:
    """Raises `MemoryError` if the pages that one call retrieves do not fit on a GPU: twice, for they are gathered."""
    wanted = 2 * pages * page_bytes
    if wanted < _SMALL or (free := free_bytes("device", device)) is None or wanted <= free:
        return
    raise MemoryError(
        f"The tokens of one call retrieve {pages:,} chunks, which take {wanted / GIB:.2f} GiB of {device}, but "
        f"{free / GIB:.2f} GiB are free. Read fewer tokens at a time (`prefill_chunk_size` of `generate`)."
    )


def free_bytes(place: str, device: torch.device, folder: Path | None = None) -> int | None:
    """Bytes that are free in a place; None where nobody knows."""
    if place == "disk":
        return shutil.disk_usage(folder).free
    if place == "device" and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if psutil is None or place == "device" and device.type != "cpu":
        return None
    return psutil.virtual_memory().available

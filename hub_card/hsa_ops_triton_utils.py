"""What the Triton kernels share: the import, with advice where it fails, and what a launch has to know of a device."""

import contextlib
import functools

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "The Triton kernels of HSA need the package `triton`, which CUDA builds of PyTorch install. Without it use "
        "`implementation='torch'` (`hsa_implementation='torch'` in the config)."
    ) from error


def on_device(x: torch.Tensor):
    """Makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# Those of `triton` are functions of kernels: called from Python, they cost microseconds.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least `n`, which is at least 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int, bool]:
    """How many multiprocessors; the bytes of shared memory that a program can have; whether it is a Hopper GPU."""
    if device.type != "cuda":  # in Triton's interpreter, which has one and no limit
        return 1, 1 << 30, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major == 9


__all__ = ["cdiv", "device_limits", "next_power_of_2", "on_device", "tl", "triton"]

"""Which backend runs an operation: what was asked for, or the fastest that can."""

import functools
import importlib.util
import os

import torch
from torch.autograd import forward_ad
from transformers.utils import logging


logger = logging.get_logger(__name__)

IMPLEMENTATIONS = ("auto", "triton", "torch", "naive")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The keys and values of a chunk have to fit into shared memory: most elements of either in fp32.
_CHUNK_ELEMENTS_FP32 = 64 * 256
# What the kernels take: field -> (smallest, largest).
_RANGES = {"head_dim": (16, 256), "chunk_size": (16, 128), "topk": (1, 128), "retrieval_dim": (16, 1024)}


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _obstacle_of_device(kind: str, index: int | None) -> str | None:
    """Why the Triton kernels cannot run on a device at all, or None."""
    if not _has_triton():
        return "the package `triton` is not installed"
    if kind == "cuda":
        if torch.cuda.get_device_capability(index) < (8, 0):
            return "they need a GPU of compute capability 8.0 (Ampere) or newer"
    # With TRITON_INTERPRET=1 Triton runs kernels on the CPU: to test them, so only where asked for by name.
    elif kind != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"they need tensors on a CUDA device, not on {kind!r}"
    return None


def is_transformed(*tensors: torch.Tensor) -> bool:
    """
    Whether derivatives of `tensors` are taken that an operator with a backward of its own does not have: in forward
    mode, or by a transform of `torch.func`. (`torch.func.vmap` alone takes none.)
    """
    if torch._C._are_functorch_transforms_active():
        transforms = torch._C._functorch.get_interpreter_stack()
        if any(transform.key() != torch._C._functorch.TransformType.Vmap for transform in transforms):
            return True
    # Outside of `dual_level()` there are no tangents to look for.
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_batched(x: torch.Tensor) -> bool:
    """Whether `torch.func.vmap` maps over `x`, on any level of nested transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _obstacle(x: torch.Tensor, transformed: bool, shape: dict[str, int]) -> str | None:
    """Why the Triton kernels cannot run on `x` with these sizes, or None."""
    obstacle = _obstacle_of_device(x.device.type, x.device.index)
    if obstacle is not None:
        return obstacle
    if transformed:
        return "they have no derivatives in forward mode or for the transforms of `torch.func`"
    if x.dtype not in _DTYPES:
        return f"they take bfloat16, float16 and float32, not {x.dtype}"
    for field, size in shape.items():
        low, high = _RANGES[field]
        if not low <= size <= high:
            return f"they take `{field}` from {low} to {high}, not {size}"
    elements = shape.get("chunk_size", 0) * shape.get("head_dim", 0)
    if x.dtype == torch.float32 and elements > _CHUNK_ELEMENTS_FP32:
        return f"in float32 they take `chunk_size * head_dim` up to {_CHUNK_ELEMENTS_FP32}, not {elements}"
    return None


def pick_backend(implementation: str, x: torch.Tensor, transformed: bool = False, **shape: int) -> str:
    """
    `"triton"`, `"torch"` or `"naive"` for an operation on `x` (its first tensor) with the sizes `shape`, the tensors
    of which are `transformed` (see `is_transformed`).

    Raises: ValueError for an unknown `implementation`; NotImplementedError if `"triton"` cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` must be one of {IMPLEMENTATIONS}, got {implementation!r}.")
    if implementation in ("torch", "naive") or implementation == "auto" and x.device.type != "cuda":
        return "naive" if implementation == "naive" else "torch"
    obstacle = _obstacle(x, transformed, shape)
    if obstacle is None:
        return "triton"
    if implementation == "triton":
        raise NotImplementedError(
            f"`implementation='triton'` cannot run the Triton kernels: {obstacle}. Use 'auto' or 'torch' instead."
        )
    if not torch.compiler.is_compiling():
        logger.warning_once(
            f"HSA runs in plain PyTorch instead of the Triton kernels, which is right but slow: {obstacle}."
        )
    return "torch"

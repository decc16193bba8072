"""Checks of the arguments of the operations: errors name the argument and what would fit."""

import math

import torch


_INDEX_DTYPES = (torch.int32, torch.int64)


def check_int(name: str, value: int, minimum: int) -> None:
    """Raises: TypeError for what is no int; ValueError below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def check_number(name: str, value: float, wanted: str, above: float = -math.inf, least: float = -math.inf) -> None:
    """Raises: TypeError for what is no number; ValueError unless `above < value < inf` and `least <= value`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not (above < value < math.inf and least <= value):
        raise ValueError(f"`{name}` must be {wanted}, got {value}.")


def check_shape(name: str, tensor: torch.Tensor, *shape: int | str | None) -> None:
    """
    Args:
        shape: a size that is wanted exactly is an int; any other is a name for it, or None.

    Raises: TypeError for what is no tensor; ValueError for another shape.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
    free = (None, *(n for n in shape if isinstance(n, str)))
    if tensor.dim() != len(shape) or any(n not in free and n != m for n, m in zip(shape, tensor.shape)):
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"`{name}` must have the shape [{wanted}], got {list(tensor.shape)}.")


def check_sizes(name: str, tensor: torch.Tensor, **axes: int) -> None:
    """Raises: ValueError if the tensor is empty along one of the named axes."""
    for axis, dim in axes.items():
        if tensor.shape[dim] == 0:
            raise ValueError(f"`{name}` must have at least one of {axis}, got the shape {list(tensor.shape)}.")


def check_device(name: str, tensor: torch.Tensor, other: str, reference: torch.Tensor) -> None:
    """Raises: ValueError if the two tensors are on different devices."""
    if tensor.device != reference.device:
        raise ValueError(f"`{name}` is on {tensor.device} but `{other}` on {reference.device}. Move one of them.")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raises: ValueError for integer, boolean and complex tensors."""
    if not tensor.is_floating_point():
        raise ValueError(f"`{name}` must be of a floating-point dtype, got {tensor.dtype}.")


def check_integer(name: str, tensor: torch.Tensor) -> None:
    """Raises: ValueError for a tensor that is neither int32 nor int64."""
    if tensor.dtype not in _INDEX_DTYPES:
        raise ValueError(f"`{name}` must be int32 or int64, got {tensor.dtype}.")


def check_same(**tensors: torch.Tensor) -> None:
    """Raises: ValueError unless all tensors have the device and the floating-point dtype of the first."""
    (name, reference), *others = tensors.items()
    check_floating(name, reference)
    for other, tensor in others:
        check_device(other, tensor, name, reference)
        if tensor.dtype != reference.dtype:
            raise ValueError(f"`{other}` is {tensor.dtype} but `{name}` {reference.dtype}. Cast one of them.")

"""
In which precision things are computed: scores and softmax as documented, whatever autocast is around them and however
narrow the inputs; what is not ours as autocast would have it.
"""

import functools
from collections.abc import Callable

import torch


def widen(x: torch.Tensor) -> torch.Tensor:
    """Half precision to fp32, wider types as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(function: Callable) -> Callable:
    """Runs `function` with autocast off, on the device of the first tensor among its arguments."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = next(x.device for x in args if isinstance(x, torch.Tensor)).type
        if not torch.is_autocast_enabled(device):  # to enter a context takes time
            return function(*args, **kwargs)
        with torch.autocast(device_type=device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def attention_dtype(query: torch.Tensor) -> torch.dtype:
    """
    The dtype in which `scaled_dot_product_attention` would run: autocast casts for it, as it does not for operators
    that it does not know. Where autocast is on, these are to be given what it would have made of their inputs.
    """
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype

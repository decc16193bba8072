"""Autocast around the operations must not change their precision: scores and softmax are computed as documented."""

import functools

import torch


def without_autocast(function):
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

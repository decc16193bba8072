"""Autocast around the operations must not change their precision: scores and softmax are computed as documented."""

import functools

import torch


def without_autocast(function):
    """Runs `function` with autocast off, on the device of the first tensor among its arguments."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        with torch.autocast(device_type=device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper

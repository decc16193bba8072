"""
Linear layers on a CPU. PyTorch leaves products in fp32 to MKL, which is slower than oneDNN on processors that are not
Intel's. PyTorch brings both along.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.overrides import TorchFunctionMode


# With fewer tokens, what oneDNN does before a product takes longer than what it saves.
_LEAST_TOKENS = 64


class _WithOneDNN(TorchFunctionMode):
    """Gives `torch.nn.functional.linear` of plain fp32 tensors to oneDNN. Has no backward."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and not kwargs and _is_plain(*args):
            return torch.ops.mkldnn._linear_pointwise(*(*args, None)[:3], "none", [], "")
        return func(*args, **(kwargs or {}))


def _is_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return x.numel() > 0 and all(
        type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu"
        for t in given
    )


def fast_linears(x: torch.Tensor, layers: Iterable[torch.nn.Module] = ()) -> AbstractContextManager:
    """
    A context in which the linear layers of what becomes of x [B, L, hidden] in `layers` take the fastest library. Code
    that is compiled is left to the compiler.
    """
    if (
        torch.compiler.is_compiling()
        or any(hasattr(layer, "_orig_mod") or layer._compiled_call_impl is not None for layer in layers)
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.shape[0] * x.shape[1] < _LEAST_TOKENS
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
    ):
        return nullcontext()
    return _WithOneDNN()

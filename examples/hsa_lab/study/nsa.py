"""
NSA (arXiv 2502.11089) of flash-linear-attention. For its window it wants flash-attn; where that is not installed it
gets the flash attention that PyTorch ships.
"""

import importlib.util

import torch

from modeling_hsa import window


def obstacle() -> str | None:
    """Why it cannot run here, or None."""
    if importlib.util.find_spec("fla") is None:
        return "it needs the package `flash-linear-attention`, which is not installed"
    if not torch.cuda.is_available():
        return "its kernels need a GPU"
    if importlib.util.find_spec("flash_attn") is None and window._varlen_attn is None:
        return "it needs flash-attn, or a PyTorch whose `varlen_attn` knows a window"
    return None


def register() -> None:
    """Makes the Auto classes know it."""
    import fla.models  # noqa: F401  # registers its models
    from fla.ops.nsa import parallel

    if parallel.flash_attn_func is None:
        parallel.flash_attn_func = window_attention


def window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, window_size: tuple[int, int]
) -> torch.Tensor:
    """
    In place of `flash_attn_func`: query [B, L, Hq, D], key and value [B, N + L, Hkv, D] -> [B, L, Hq, D]. Causality is
    aligned to the last key.
    """
    if not causal:
        raise NotImplementedError("Only causal attention is needed here.")
    rows = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    lengths = query.shape[1], key.shape[1]
    output = window._varlen_attn(
        *(x.flatten(0, 1) for x in (query, key, value)), *(rows * length for length in lengths), *lengths,
        scale=query.shape[-1] ** -0.5, window_size=window_size,
    )  # fmt: skip
    return output.view_as(query)

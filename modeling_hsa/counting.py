"""Consecutive numbers, for positions that are divided into chunks."""

import torch


def count_from(start: int, length: int, device: torch.device | str | None) -> torch.Tensor:
    """
    int64 [length], `torch.arange(start, start + length)`. `| 0` changes nothing, but hides from torch.compile what the
    numbers are: in PyTorch 2.13 its CPU backend makes `arange // n` in whole blocks of n, and leaves what comes after
    the last one unwritten.
    """
    return torch.arange(start, start + length, device=device) | 0

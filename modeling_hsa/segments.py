"""
How many tokens of a prompt `generate` reads at a time, where nobody says.

A segment costs memory, and launching its kernels costs time that hardly depends on its length. It is to be so long
that the device is busy rather than waiting for launches, and to take no more than a part of the memory that is free.
"""

import math

import torch

from configuration_hsa import HSAConfig


# The value of `prefill_chunk_size` that stands for this choice.
AUTO = "auto"
# On other devices and where the rest says nothing: what fits everywhere.
_PLAIN = 4096
# On a CPU nothing is launched, and what a layer makes had better stay in the caches.
_CPU = 2048
# Multiplications per segment that keep a GPU busy: those of 16,384 tokens in the default configuration.
_BUSY = 16384 * 193e6
_SHORTEST, _LONGEST = 1024, 65536
# Of the memory that the cache of the prompt leaves free.
_SHARE_OF_MEMORY = 0.25


def automatic_segment(config: HSAConfig, device: torch.device, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """
    Tokens of each row to read at a time, a power of two.

    Args:
        rows: of the prompt, B.
        tokens: of a row, those in the cache included.
    """
    if device.type != "cuda":
        return _CPU if device.type == "cpu" else _PLAIN
    wanted = min(max(_BUSY / multiplications(config), _PLAIN), _LONGEST)
    per_token = dtype.itemsize * activations(config)
    left = free_bytes(device) - rows * tokens * dtype.itemsize * remembered(config)
    fits = _SHARE_OF_MEMORY * max(left, 0) / per_token
    return _power_of_two(min(max(min(wanted, fits) / rows, _SHORTEST), _LONGEST))


def multiplications(config: HSAConfig) -> int:
    """By the weights of the decoder layers, for one token."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return len(config.layer_types) * config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def activations(config: HSAConfig) -> int:
    """Numbers that exist at once for one token of a segment while a layer runs; an estimate from above."""
    heads = 3 * config.num_attention_heads + 4 * config.num_key_value_heads
    return 6 * config.hidden_size + heads * config.head_dim + 4 * config.intermediate_size


def remembered(config: HSAConfig) -> int:
    """Numbers that the chunk memory keeps for one token."""
    landmarks = config.num_retrieval_heads * config.retrieval_dim / config.chunk_size
    return 2 * config.hsa_num_key_value_heads * config.head_dim + math.ceil(landmarks)


def free_bytes(device: torch.device) -> int:
    """Of a CUDA device, with what PyTorch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _power_of_two(x: float) -> int:
    return 1 << (int(x).bit_length() - 1)

"""
Which queries retrieved a chunk: the (query, slot) pairs of the indices, grouped by chunk.

Gradients of keys, values and landmarks are sums over the queries that retrieved a chunk. With the pairs in the order
of the chunks, the work of a sum is what was retrieved, O(L * K), and no [chunks x queries] mask exists. A chunk that
very many queries retrieve would keep one program busy for long, so the pairs of a chunk are cut into segments: a chunk
of one segment is finished by its program, the others leave partial sums, which are added in a fixed order. No atomics,
so the result is the same every time.
"""

from typing import NamedTuple

import torch


class InvertedIndex(NamedTuple):
    """
    The pairs of `indices` [B, L, Hr, K] by chunk. Chunks are counted over the batch and the H heads of the index:
    `(row * H + head) * C + chunk`. All sizes follow from shapes, so nothing waits for the device.
    """

    # [B * L * Hr * K] pairs, `((row * L + token) * Hr + retrieval head) * K + slot`, by chunk; absent ones at the end.
    pairs: torch.Tensor
    # [segments] chunk of the segment; B * H * C for segments that do not exist.
    chunk: torch.Tensor
    # [segments] its pairs are `pairs[start:end]`.
    start: torch.Tensor
    end: torch.Tensor
    # [segments] where its partial sum goes, -1 if it is the only segment of its chunk.
    slot: torch.Tensor
    # [B * H * C] the first slot of a chunk, and the number of its segments, at least 1.
    first_slot: torch.Tensor
    num_segments: torch.Tensor
    # Upper bound on the slots.
    num_slots: int


def invert(indices: torch.Tensor, num_chunks: int, heads: int, segment: int) -> InvertedIndex:
    """
    Args:
        indices: int32 [B, L, Hr, K], each in [-1, C).
        num_chunks: C.
        heads: heads H of the index, which divide Hr: consecutive retrieval heads share the chunks of one.
        segment: most pairs in a segment.
    """
    batch, _, retrieval_heads, _ = indices.shape
    device, total = indices.device, batch * heads * num_chunks
    dtype = torch.int32 if max(total, indices.numel()) < 2**31 else torch.int64
    row = torch.arange(batch, device=device)[:, None] * heads
    head = torch.arange(retrieval_heads, device=device) // (retrieval_heads // heads)
    first_chunk = ((row + head) * num_chunks).to(dtype)[:, None, :, None]
    chunk = torch.where(indices >= 0, indices + first_chunk, total).flatten()
    chunk, pairs = chunk.sort(stable=True)
    starts = torch.searchsorted(chunk, torch.arange(total + 1, device=device, dtype=dtype), out_int32=True)

    first, end = starts[:-1], starts[1:]
    num_segments = ((end - first + segment - 1) // segment).clamp(min=1)
    slots = num_segments * (num_segments > 1)
    last_segment = num_segments.cumsum(0)
    ids = torch.arange(total + indices.numel() // segment, device=device)
    chunk = torch.searchsorted(last_segment, ids, right=True, out_int32=True)
    known = chunk.clamp(max=max(total - 1, 0))
    rank = ids - (last_segment - num_segments)[known]
    start = first[known] + rank * segment
    first_slot = slots.cumsum(0) - slots
    slot = torch.where(num_segments[known] > 1, first_slot[known] + rank, -1)
    return InvertedIndex(
        pairs.to(dtype),
        chunk,
        start.to(dtype),
        torch.minimum(start + segment, end[known]).to(dtype),
        slot.to(torch.int32),
        first_slot.to(torch.int32),
        num_segments.to(torch.int32),
        2 * (indices.numel() // segment),
    )

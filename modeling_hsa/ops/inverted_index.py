"""
Which queries retrieved a chunk: the (query, slot) pairs of the indices, grouped by chunk. For the Triton kernels.

Gradients of keys, values and landmarks are sums over the queries that retrieved a chunk. With the pairs in the order
of the chunks, the work of a sum is what was retrieved, O(L * K), and no [chunks x queries] mask exists. A chunk that
very many queries retrieve would keep one program busy for long, so the pairs of a chunk are cut into segments: a chunk
of one segment is finished by its program, the others leave partial sums, which are added in a fixed order. No atomics,
so the result is the same every time.
"""

from typing import NamedTuple

import torch

from .triton_utils import cdiv, on_device, tl, triton


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
    # [B * H * C] the first slot of a chunk (if it has several segments), and the number of its segments, at least 1.
    first_slot: torch.Tensor
    num_segments: torch.Tensor
    # Upper bound on the slots; 0 if no chunk can have several segments.
    num_slots: int


@triton.jit
def _chunk_of_pair_kernel(
    indices, chunk_of_pair, num_pairs, length, num_chunks, absent,
    RETRIEVAL_HEADS: tl.constexpr, HEADS: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (pairs / BLOCK). The chunk of each pair, counted over rows and heads; `absent` for none."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.load(indices + pair, mask=pair < num_pairs, other=-1).to(tl.int64)
    head = (pair // TOPK) % RETRIEVAL_HEADS // (RETRIEVAL_HEADS // HEADS)
    row = pair // TOPK // RETRIEVAL_HEADS // length
    chunk = tl.where(chunk >= 0, (row * HEADS + head) * num_chunks + chunk, absent)
    tl.store(chunk_of_pair + pair, chunk.to(chunk_of_pair.dtype.element_ty), mask=pair < num_pairs)


@triton.jit
def _segments_kernel(
    starts, chunks, segment_start, segment_end, segment_slot, first_slot, num_segments, total, ids,
    SEGMENT: tl.constexpr, SLOT_PER_ID: tl.constexpr,
):  # fmt: skip
    """
    Grid: (chunks + 1). Writes the segments of a chunk whose pairs are `starts[chunk]` to `starts[chunk + 1]`. Where
    they go follows from its number and its start alone, leaving some ids and slots unused: chunk c has the ids from
    `c + start // SEGMENT` on, and the slots of the same numbers, or (fewer, if there are many chunks for few pairs)
    from `2 * start // SEGMENT` on. The last program voids the ids left over.
    """
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + chunk).to(tl.int64)
    end = tl.load(starts + tl.minimum(chunk + 1, total)).to(tl.int64)
    first_id = chunk + start // SEGMENT
    end_id = tl.where(chunk < total, chunk + 1 + end // SEGMENT, ids)
    count = tl.maximum((end - start + SEGMENT - 1) // SEGMENT, 1)
    slot = first_id if SLOT_PER_ID else 2 * start // SEGMENT
    if chunk < total:
        tl.store(first_slot + chunk, slot)
        tl.store(num_segments + chunk, count)
    BLOCK: tl.constexpr = 32
    for i in range(0, end_id - first_id, BLOCK):
        rank = i + tl.arange(0, BLOCK).to(tl.int64)
        inside = rank < end_id - first_id
        exists = (rank < count) & (chunk < total)
        tl.store(chunks + first_id + rank, tl.where(exists, chunk, total), mask=inside)
        tl.store(segment_start + first_id + rank, start + rank * SEGMENT, mask=inside)
        tl.store(segment_end + first_id + rank, tl.minimum(start + rank * SEGMENT + SEGMENT, end), mask=inside)
        tl.store(segment_slot + first_id + rank, tl.where(count > 1, slot + rank, -1), mask=inside)


def invert(indices: torch.Tensor, num_chunks: int, heads: int, segment: int) -> InvertedIndex:
    """
    Args:
        indices: integer [B, L, Hr, K], contiguous, each in [-1, C).
        num_chunks: C, at least 1.
        heads: heads H of the index, which divide Hr: consecutive retrieval heads share the chunks of one.
        segment: most pairs in a segment.
    """
    batch, length, retrieval_heads, topk = indices.shape
    device, num_pairs = indices.device, indices.numel()
    total = batch * heads * num_chunks
    dtype = torch.int32 if max(total, num_pairs) < 2**30 else torch.int64
    sorted_by = torch.int16 if total < 2**15 else dtype  # the narrower the numbers, the faster the sort
    empty = lambda n, dtype=dtype: torch.empty(n, dtype=dtype, device=device)  # noqa: E731

    with on_device(indices):
        chunk = empty(num_pairs, sorted_by)
        _chunk_of_pair_kernel[(cdiv(num_pairs, 1024),)](
            indices, chunk, num_pairs, length, num_chunks, total,
            RETRIEVAL_HEADS=retrieval_heads, HEADS=heads, TOPK=topk, BLOCK=1024,
        )  # fmt: skip
        chunk, pairs = chunk.sort(stable=True)
        every_chunk = torch.arange(total + 1, dtype=sorted_by, device=device)
        starts = torch.searchsorted(chunk, every_chunk, out_int32=dtype == torch.int32)
        ids = total + num_pairs // segment
        slots = 2 * num_pairs // segment + 1
        index = InvertedIndex(
            pairs.to(dtype), *(empty(ids) for _ in range(4)), *(empty(total) for _ in range(2)),
            0 if num_pairs <= segment else min(slots, ids),
        )  # fmt: skip
        _segments_kernel[(total + 1,)](
            starts, *index[1:-1], total, ids, SEGMENT=segment, SLOT_PER_ID=ids < slots, num_warps=1
        )
    return index

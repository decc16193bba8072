"""
Chunk selection as Triton kernels: scores are tiles of a matrix product that never leave the chip, and what is kept of
them are the K best per query. Backward is linear in what was selected, without atomics: the same bits every time.

How the best are kept. Chunks are read from the nearest to the farthest, so that of equal scores the one that is
already there wins, and a chunk is only of interest if its score is greater than the worst kept one. A tile without
such a chunk costs a maximum per query. Otherwise the best chunk of each query's tile takes the place of the worst kept
one until nothing is left to take: that is exact, needs neither sorting nor keys wider than 32 bits, and gets rarer the
more was read, as the K-th best of n random scores changes K / n of the time.
"""

import functools
from typing import NamedTuple

import torch

from .inverted_index import invert


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "The Triton kernels of HSA need the package `triton`, which CUDA builds of PyTorch install. Without it use "
        "`implementation='torch'` (`hsa_implementation='torch'` in the config)."
    ) from error


# Most (query, slot) pairs of one chunk that a program of the backward adds up; more are cut into segments.
_SEGMENT = 128
# Most entries of all splits of a query that are merged: keeps the merge, a single program per query, short.
_MERGE_ENTRIES = 8192


# -- keeping the best ------------------------------------------------------------------------------------------------


@triton.jit
def _empty_best(BM: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """
    Kept scores and chunks [BM, SLOTS] of nothing. Empty slots have distinct negative chunks. The slots beyond K, which
    only round their number up to a power of two, have score +inf, so that nothing ever takes their place.
    """
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros([BM, 1], tl.int32)
    return tl.where(slot < TOPK, float("-inf"), float("inf")), -1 - slot


@triton.jit
def _keep_best(best, kept, scores, chunk):
    """
    Merges candidates into the kept ones. Of equal scores the highest chunk of the candidates is taken first, and none
    that equals a kept score: candidates must be farther than all that was kept before.

    Args: best fp32 and kept int32 [BM, SLOTS]; scores fp32 [BM, BN], -inf for absent; chunk int32 [BM | 1, BN].
    """
    worst = tl.min(best, 1)
    top = tl.max(scores, 1)
    more = tl.max((top > worst).to(tl.int32), 0)
    while more > 0:  # the same for the whole program
        pick = tl.max(tl.where(scores == top[:, None], chunk, -1), 1)
        # Rows with nothing left to take lose a candidate too, but none that they would ever take.
        scores = tl.where(chunk == pick[:, None], float("-inf"), scores)
        # Of equally bad ones the farthest goes.
        out = tl.min(tl.where(best == worst[:, None], kept, 0x7FFFFFFF), 1)
        replace = (kept == out[:, None]) & (top > worst)[:, None]
        best = tl.where(replace, top[:, None], best)
        kept = tl.where(replace, pick[:, None], kept)
        worst = tl.min(best, 1)
        top = tl.max(scores, 1)
        more = tl.max((top > worst).to(tl.int32), 0)
    return best, kept


@triton.jit
def _store_sorted(scores_ptr, indices_ptr, row, valid, best, kept, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """Writes what was kept, nearest chunk first, to the rows `row` int64 [BM] of [.., K] where `valid`."""
    kept = tl.maximum(kept, -1)
    # The chunk decides alone: no two are equal but those of empty slots.
    keys = (kept.to(tl.int64) << 32) | (best.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    keys = tl.sort(keys, descending=True)
    kept = (keys >> 32).to(tl.int32)
    best = tl.where(kept < 0, float("-inf"), keys.to(tl.int32).to(tl.float32, bitcast=True))
    slot = tl.arange(0, SLOTS)[None, :]
    offset = row[:, None] * TOPK + slot
    mask = valid[:, None] & (slot < TOPK)
    tl.store(scores_ptr + offset, best, mask=mask)
    tl.store(indices_ptr + offset, kept, mask=mask)


@triton.jit
def _store_split(scores_ptr, indices_ptr, row, valid, best, kept, split, splits, SLOTS: tl.constexpr):
    """Writes what a split kept, in any order, to the workspace [rows, splits, SLOTS]."""
    offset = (row[:, None] * splits + split) * SLOTS + tl.arange(0, SLOTS)[None, :]
    tl.store(scores_ptr + offset, tl.where(kept < 0, float("-inf"), best), mask=valid[:, None])
    tl.store(indices_ptr + offset, kept, mask=valid[:, None])


@triton.jit
def _split_range(first, end, split, splits, BN: tl.constexpr):
    """The chunks [low, high) of a split, of those that any query sees; split 0 is the nearest."""
    seen = first < end
    low = tl.min(tl.where(seen, first, 0x7FFFFFFF), 0)
    high = tl.max(tl.where(seen, end, 0), 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BN), splits) * BN
    high = high - split * share  # of the splits beyond what is visible, high <= low
    return tl.maximum(low, high - share), high


# -- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length", "num_chunks", "rows", "heads", "splits"])
def _select_block_kernel(
    q_ptr, landmarks_ptr, first_ptr, end_ptr, scores_ptr, indices_ptr,
    length, num_chunks, rows, heads, splits, scale,
    stride_qb, stride_ql, stride_qh, stride_lb, stride_lc, stride_lh, stride_fb, stride_fl, stride_eb, stride_el,
    D: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    The best of a split for a block of BM queries of one head.

    Grid: blocks x rows (batch entries x heads) x splits in one dimension, the last queries, which see most, first.
    Memory: the queries [BM, BD] and the kept ones stay in registers or shared memory; landmarks come in tiles
    [BN, BD], the next one on its way while the best of this one are sought. Where the queries are wider than BD, both
    are read in pieces of BD, asynchronously, through shared memory.
    """
    pid = tl.program_id(0)
    split = pid % splits
    batch = (pid // splits) % rows // heads
    head = (pid // splits) % rows % heads
    block = tl.cdiv(length, BM) - 1 - pid // splits // rows
    token = block * BM + tl.arange(0, BM)
    valid = token < length
    batch, head, token = batch.to(tl.int64), head.to(tl.int64), token.to(tl.int64)

    first = tl.load(first_ptr + batch * stride_fb + token * stride_fl, mask=valid, other=0)
    end = tl.load(end_ptr + batch * stride_eb + token * stride_el, mask=valid, other=0)
    first = tl.maximum(first, 0).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), num_chunks).to(tl.int32)
    low, high = _split_range(first, end, split, splits, BN)
    first = tl.maximum(first, low)
    # All queries see the chunks in [all_first, all_end).
    all_first, all_end = tl.max(first, 0), tl.min(end, 0)

    n, d = tl.arange(0, BN), tl.arange(0, BD)
    q_ptrs = q_ptr + batch * stride_qb + head * stride_qh + token[:, None] * stride_ql + d[None, :]
    landmarks_ptr += batch * stride_lb + head * stride_lh
    tile_offsets = n[:, None].to(tl.int64) * stride_lc + d[None, :]
    best, kept = _empty_best(BM, TOPK, SLOTS)

    start = high - BN
    if D <= BD:
        q = tl.load(q_ptrs, mask=valid[:, None] & (d < D)[None, :], other=0.0)
        tile = tl.load(
            landmarks_ptr + start.to(tl.int64) * stride_lc + tile_offsets,
            mask=((start + n >= low) & (start + n < high))[:, None] & (d < D)[None, :],
            other=0.0,
        )
    for _ in range(tl.cdiv(tl.maximum(high - low, 0), BN)):
        if D <= BD:
            landmarks = tile
            following = start - BN
            tile = tl.load(
                landmarks_ptr + following.to(tl.int64) * stride_lc + tile_offsets,
                mask=(following + n >= low)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            scores = tl.dot(q, tl.trans(landmarks), input_precision=PRECISION)
        else:
            tile_ptrs = landmarks_ptr + start.to(tl.int64) * stride_lc + tile_offsets
            inside = (start + n >= low)[:, None]
            scores = tl.zeros([BM, BN], tl.float32)
            for piece in range(0, D, BD):
                wanted = (d < D - piece)[None, :]
                q = tl.load(q_ptrs + piece, mask=valid[:, None] & wanted, other=0.0)
                landmarks = tl.load(tile_ptrs + piece, mask=inside & wanted, other=0.0)
                scores = tl.dot(q, tl.trans(landmarks), scores, input_precision=PRECISION)
        scores *= scale
        chunk = (start + n)[None, :]
        if (start < all_first) | (start + BN > all_end):
            scores = tl.where((chunk >= first[:, None]) & (chunk < end[:, None]), scores, float("-inf"))
        best, kept = _keep_best(best, kept, scores, chunk)
        start -= BN

    row = (batch * length + token) * heads + head
    if SPLIT:
        _store_split(scores_ptr, indices_ptr, row, valid, best, kept, split, splits, SLOTS)
    else:
        _store_sorted(scores_ptr, indices_ptr, row, valid, best, kept, TOPK, SLOTS)


@triton.jit(do_not_specialize=["num_chunks", "heads", "splits"])
def _select_row_kernel(
    q_ptr, landmarks_ptr, first_ptr, end_ptr, scores_ptr, indices_ptr,
    num_chunks, heads, splits, scale,
    stride_qb, stride_qh, stride_lb, stride_lc, stride_lh, stride_fb, stride_eb,
    D: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """
    The best of a split for the only query (L = 1) of one head: decoding, which is as fast as landmarks can be read.

    Grid: rows (batch entries x heads) x splits in one dimension. How much there is to read is known on the device
    only: the splits share what is visible, whatever the capacity of the landmarks.
    Memory: the query and two tiles [BN, BD] of whole landmarks in registers, one of them still on its way. Products
    are added up without the matrix units, which would need 16 queries.
    """
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits + tl.arange(0, 1).to(tl.int64)  # [1]
    batch, head = (pid // splits // heads).to(tl.int64), (pid // splits % heads).to(tl.int64)

    one = tl.zeros([1], tl.int64)
    first = tl.maximum(tl.load(first_ptr + batch * stride_fb + one), 0).to(tl.int32)
    end = tl.load(end_ptr + batch * stride_eb + one)
    end = tl.minimum(tl.maximum(end, 0), num_chunks).to(tl.int32)
    low, high = _split_range(first, end, split, splits, BN)

    n, d = tl.arange(0, BN), tl.arange(0, BD)
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + d, mask=d < D, other=0.0).to(tl.float32)
    landmarks_ptr += batch * stride_lb + head * stride_lh
    tile_offsets = n[:, None].to(tl.int64) * stride_lc + d[None, :]
    best, kept = _empty_best(1, TOPK, SLOTS)

    start = high - BN
    tile = tl.load(
        landmarks_ptr + start.to(tl.int64) * stride_lc + tile_offsets,
        mask=((start + n >= low) & (start + n < high))[:, None] & (d < D)[None, :],
        other=0.0,
    )
    for _ in range(tl.cdiv(tl.maximum(high - low, 0), BN)):
        landmarks = tile
        following = start - BN
        tile = tl.load(
            landmarks_ptr + following.to(tl.int64) * stride_lc + tile_offsets,
            mask=(following + n >= low)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        scores = tl.sum(landmarks.to(tl.float32) * q[None, :], 1) * scale
        scores = tl.where(start + n >= low, scores, float("-inf"))
        best, kept = _keep_best(best, kept, scores[None, :], (start + n)[None, :])
        start -= BN

    valid = row >= 0
    if SPLIT:
        _store_split(scores_ptr, indices_ptr, row, valid, best, kept, split, splits, SLOTS)
    else:
        _store_sorted(scores_ptr, indices_ptr, row, valid, best, kept, TOPK, SLOTS)


@triton.jit(do_not_specialize=["entries"])
def _merge_splits_kernel(
    split_scores_ptr, split_indices_ptr, scores_ptr, indices_ptr, entries,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """
    The best of all splits of a query. Grid: queries x heads. Reads [splits x SLOTS] entries in tiles [1, BN], the
    splits of the nearest chunks first.
    """
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)  # [1]
    best, kept = _empty_best(1, TOPK, SLOTS)
    for start in range(0, entries, BN):
        entry = start + tl.arange(0, BN)[None, :]
        offset = row[:, None] * entries + entry
        scores = tl.load(split_scores_ptr + offset, mask=entry < entries, other=float("-inf"))
        chunk = tl.load(split_indices_ptr + offset, mask=entry < entries, other=-1)
        best, kept = _keep_best(best, kept, scores, chunk)
    _store_sorted(scores_ptr, indices_ptr, row, row >= 0, best, kept, TOPK, SLOTS)


class _Plan(NamedTuple):
    """Sizes of the blocks of queries, landmarks and dimensions, warps, stages, and the splits of the landmarks."""

    queries: int
    landmarks: int
    dims: int
    warps: int
    stages: int
    splits: int


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _num_splits(blocks: int, num_chunks: int, tile: int, slots: int, processors: int) -> int:
    """
    How many programs share the landmarks of a block of queries: as many as fill the device with four each, if they
    have four tiles to read and the merge stays short.
    """
    if blocks >= processors:
        return 1
    return max(1, min(4 * processors // blocks, num_chunks // (4 * tile), _MERGE_ENTRIES // slots))


def _plan(q: torch.Tensor, num_chunks: int, slots: int) -> _Plan:
    batch, length, heads, dim = q.shape
    processors, wide = _num_processors(q.device), q.element_size() == 4
    padded = max(16, triton.next_power_of_2(dim))
    if length == 1:
        tile = max(16, 8192 // padded)
        warps = 4 if tile * padded * q.element_size() <= 1 << 15 else 8
        return _Plan(1, tile, padded, warps, 1, _num_splits(batch * heads, num_chunks, tile, slots, processors))
    # A warp for 16 queries: no row of scores is spread over warps, and its maximum takes two shuffles.
    queries = min(64, max(16, triton.next_power_of_2(length)))
    dims = padded if padded <= (64 if wide else 256) else (32 if wide else 64)
    tile = 64 if wide or slots > 64 or dims > 128 else 128
    blocks = batch * heads * triton.cdiv(length, queries)
    splits = _num_splits(blocks, num_chunks, tile, slots, processors)
    return _Plan(queries, tile, dims, queries // 16, 3, splits)


def select_chunks_forward(q, landmarks, first, end, topk, scale):
    """
    The operator `select_chunks` of `library`. Where there are too few queries to fill the device, several programs
    share the landmarks of a block of queries, and a second kernel merges what they kept.
    """
    batch, length, heads, dim = q.shape
    num_chunks = landmarks.shape[1]
    q, landmarks = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, landmarks))
    scores = torch.empty(batch, length, heads, topk, dtype=torch.float32, device=q.device)
    indices = torch.empty(batch, length, heads, topk, dtype=torch.int32, device=q.device)
    if indices.numel() == 0:
        return scores, indices
    slots = triton.next_power_of_2(topk)
    plan = _plan(q, num_chunks, slots)
    found = scores, indices
    if plan.splits > 1:
        shape = (batch * length * heads, plan.splits, slots)
        found = tuple(torch.empty(shape, dtype=x.dtype, device=q.device) for x in found)
    first_stride, end_stride = ((x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)) for x in (first, end))
    sizes = {"D": dim, "TOPK": topk, "SLOTS": slots, "BN": plan.landmarks, "BD": plan.dims, "SPLIT": plan.splits > 1}
    with torch.cuda.device(q.device if q.is_cuda else -1):
        if length == 1:
            _select_row_kernel[(batch * heads * plan.splits,)](
                q, landmarks, first, end, *found, num_chunks, heads, plan.splits, scale,
                q.stride(0), q.stride(2), *landmarks.stride()[:3], first_stride[0], end_stride[0],
                **sizes, num_warps=plan.warps,
            )  # fmt: skip
        else:
            rows = batch * heads
            _select_block_kernel[(triton.cdiv(length, plan.queries) * rows * plan.splits,)](
                q, landmarks, first, end, *found, length, num_chunks, rows, heads, plan.splits, scale,
                *q.stride()[:3], *landmarks.stride()[:3], *first_stride, *end_stride,
                **sizes, BM=plan.queries, PRECISION="ieee", num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
        if plan.splits > 1:
            entries = plan.splits * slots
            tile = min(4096, triton.next_power_of_2(entries))
            _merge_splits_kernel[(batch * length * heads,)](
                *found, scores, indices, entries, TOPK=topk, SLOTS=slots, BN=tile, num_warps=8 if tile > 1024 else 4
            )
    return scores, indices


# -- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "length", "heads"])
def _query_gradient_kernel(
    d_scores_ptr, landmarks_ptr, indices_ptr, d_q_ptr,
    num_rows, length, heads, scale, stride_lb, stride_lc, stride_lh,
    D: tl.constexpr, TOPK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """
    `d_q[row] = scale * sum_k d_scores[row, k] * landmark[indices[row, k]]` for BM rows (a row is a query of a head).

    Grid: blocks of rows x blocks of dimensions. Memory: the sums [BM, BD] in registers; landmarks are gathered.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    valid, inside = row < num_rows, (d < D)[None, :]
    base = row // heads // length * stride_lb + row % heads * stride_lh
    total = tl.zeros([BM, BD], tl.float32)
    for k in tl.range(0, TOPK, loop_unroll_factor=4 if TOPK % 4 == 0 else 1):
        chunk = tl.load(indices_ptr + row * TOPK + k, mask=valid, other=-1)
        present = chunk >= 0
        # What arrives for absent chunks is arbitrary, so not read.
        weight = tl.load(d_scores_ptr + row * TOPK + k, mask=present, other=0.0)
        offset = (base + chunk.to(tl.int64) * stride_lc)[:, None] + d[None, :]
        landmark = tl.load(landmarks_ptr + offset, mask=present[:, None] & inside, other=0.0)
        total += weight[:, None] * landmark.to(tl.float32)
    tl.store(d_q_ptr + row[:, None] * D + d[None, :], total * scale, mask=valid[:, None] & inside)


@triton.jit(do_not_specialize=["num_chunks", "length", "heads", "total_chunks"])
def _landmark_gradient_kernel(
    d_scores_ptr, q_ptr, pairs_ptr, chunk_ptr, start_ptr, end_ptr, slot_ptr, d_landmarks_ptr, partial_ptr,
    num_chunks, total_chunks, length, heads, scale, stride_qb, stride_ql, stride_qh,
    D: tl.constexpr, TOPK: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """
    `d_landmark = scale * sum of d_scores[pair] * q[pair]` over a segment of the (query, slot) pairs of one chunk.

    Grid: segments x blocks of dimensions. Memory: sums [BP, BD] in registers over tiles of BP pairs, whose queries are
    gathered. The only segment of a chunk writes its gradient, [B, C, Hr, d] in its dtype, others a partial sum, fp32
    [slots, d].
    """
    segment = tl.program_id(0)
    place = tl.load(chunk_ptr + segment).to(tl.int64)
    if place < total_chunks:
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        inside = (d < D)[None, :]
        chunk, head = place % num_chunks, place // num_chunks % heads
        batch = place // num_chunks // heads
        q_ptr += batch * stride_qb + head * stride_qh
        begin, end = tl.load(start_ptr + segment).to(tl.int64), tl.load(end_ptr + segment).to(tl.int64)
        total = tl.zeros([BP, BD], tl.float32)
        for start in range(begin, end, BP):
            position = start + tl.arange(0, BP)
            known = position < end
            pair = tl.load(pairs_ptr + position, mask=known, other=0).to(tl.int64)
            weight = tl.load(d_scores_ptr + pair, mask=known, other=0.0)
            token = pair // TOPK // heads - batch * length
            q = tl.load(q_ptr + token[:, None] * stride_ql + d[None, :], mask=known[:, None] & inside, other=0.0)
            total += weight[:, None] * q.to(tl.float32)
        gradient = tl.sum(total, 0) * scale
        slot = tl.load(slot_ptr + segment).to(tl.int64)
        if slot < 0:
            tl.store(d_landmarks_ptr + ((batch * num_chunks + chunk) * heads + head) * D + d, gradient, mask=d < D)
        else:
            tl.store(partial_ptr + slot * D + d, gradient, mask=d < D)


@triton.jit(do_not_specialize=["num_chunks", "heads"])
def _add_partial_kernel(
    partial_ptr, first_slot_ptr, num_segments_ptr, d_landmarks_ptr, num_chunks, heads,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """
    Adds the partial sums of the chunks of several segments, in tiles [BS, BD]. Grid: chunks of all batch entries and
    heads x blocks of dimensions; those of one segment, most of them, leave at once.
    """
    place = tl.program_id(0).to(tl.int64)
    segments = tl.load(num_segments_ptr + place)
    if segments > 1:
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        inside = (d < D)[None, :]
        chunk, head = place % num_chunks, place // num_chunks % heads
        batch = place // num_chunks // heads
        partial_ptr += tl.load(first_slot_ptr + place).to(tl.int64) * D
        total = tl.zeros([BS, BD], tl.float32)
        for start in range(0, segments, BS):
            segment = start + tl.arange(0, BS)
            offset = segment[:, None].to(tl.int64) * D + d[None, :]
            total += tl.load(partial_ptr + offset, mask=(segment < segments)[:, None] & inside, other=0.0)
        gradient = tl.sum(total, 0)
        tl.store(d_landmarks_ptr + ((batch * num_chunks + chunk) * heads + head) * D + d, gradient, mask=d < D)


def _query_gradient(d_scores, q, landmarks, indices, scale):
    """d_q, contiguous, in the dtype of q."""
    _, length, heads, dim = q.shape
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows, dims = q.numel() // dim, min(128, max(16, triton.next_power_of_2(dim)))
    block = 2048 // dims
    _query_gradient_kernel[(triton.cdiv(rows, block), triton.cdiv(dim, dims))](
        d_scores, landmarks, indices, d_q, rows, length, heads, scale, *landmarks.stride()[:3],
        D=dim, TOPK=indices.shape[-1], BM=block, BD=dims, num_warps=4,
    )  # fmt: skip
    return d_q


def _landmark_gradient(d_scores, q, landmarks, indices, scale):
    """d_landmarks, contiguous, in the dtype of landmarks."""
    _, num_chunks, heads, dim = landmarks.shape
    index = invert(indices, num_chunks, heads, _SEGMENT)
    d_landmarks = torch.empty(landmarks.shape, dtype=landmarks.dtype, device=q.device)
    partial = torch.empty(max(1, index.num_slots), dim, dtype=torch.float32, device=q.device)
    chunks, dims = landmarks.numel() // dim, min(128, max(16, triton.next_power_of_2(dim)))
    blocks = triton.cdiv(dim, dims)
    _landmark_gradient_kernel[(len(index.chunk), blocks)](
        d_scores, q, index.pairs, index.chunk, index.start, index.end, index.slot, d_landmarks, partial,
        num_chunks, chunks, q.shape[1], heads, scale, *q.stride()[:3],
        D=dim, TOPK=indices.shape[-1], BP=32, BD=dims, num_warps=4,
    )  # fmt: skip
    if index.num_slots > 0:
        _add_partial_kernel[(chunks, blocks)](
            partial, index.first_slot, index.num_segments, d_landmarks, num_chunks, heads,
            D=dim, BS=16, BD=dims, num_warps=4,
        )  # fmt: skip
    return d_landmarks


def select_chunks_backward(d_scores, q, landmarks, indices, scale):
    """The operator `select_chunks_backward` of `library`."""
    if indices.numel() == 0 or landmarks.numel() == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, landmarks))
    q, landmarks = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, landmarks))
    d_scores, indices = d_scores.float().contiguous(), indices.contiguous()
    with torch.cuda.device(q.device if q.is_cuda else -1):
        arguments = d_scores, q, landmarks, indices, scale
        return _query_gradient(*arguments), _landmark_gradient(*arguments)

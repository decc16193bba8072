"""
Chunk selection as Triton kernels: scores are tiles of a matrix product that never leave the chip, and what is kept of
them are the K best per query. Backward is linear in what was selected, without atomics: the same bits every time.

How the best are kept. Chunks are read from the nearest to the farthest, so that of equal scores the one that is
already there wins, and a chunk is only of interest if its score is greater than the worst kept one. A tile without
such a chunk costs a maximum per query. Otherwise the best chunk of each query's tile takes the place of the worst kept
one until nothing is left to take: that is exact, needs neither sorting nor keys wider than 32 bits, and gets rarer the
more was read, as the K-th best of n random scores changes K / n of the time.
"""

import torch

from .inverted_index import invert
from .triton_utils import cdiv, device_limits, next_power_of_2, on_device, tl, triton


# Most (query, slot) pairs of one chunk that a program of the backward adds up; more are cut into segments.
_SEGMENT = 128
# Most keys that a program merges.
_MERGED = 4096
# The key of no chunk, less than all others.
ABSENT = tl.constexpr(-(2**63))


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
def _ordered_keys(scores, chunk):
    """
    One int64 per (score, chunk) that sorts by score, then by chunk: the upper 32 bits are the fp32 score mapped to an
    integer of the same order, the lower ones the chunk. ABSENT, the least of all, for a score of -inf.
    """
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes one zero of -0.0 and 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(scores == float("-inf"), ABSENT, (bits.to(tl.int64) << 32) | chunk.to(tl.int64))


@triton.jit
def _store_sorted(scores_ptr, indices_ptr, row, valid, keys, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """Writes the best K of `keys` [BM, SLOTS], sorted by score if K < SLOTS, nearest chunk first, where `valid`."""
    slot = tl.arange(0, SLOTS)[None, :]
    bits = (keys >> 32).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    present = (keys != ABSENT) & (slot < TOPK)
    # Now the chunk on top, which decides alone: no two are equal but the -1 of what is absent.
    chunk = tl.where(present, keys & 0xFFFFFFFF, -1)
    keys = tl.sort((chunk << 32) | (bits.to(tl.int64) & 0xFFFFFFFF), descending=True)
    chunk = (keys >> 32).to(tl.int32)
    scores = tl.where(chunk < 0, float("-inf"), keys.to(tl.int32).to(tl.float32, bitcast=True))
    offset = row[:, None] * TOPK + slot
    mask = valid[:, None] & (slot < TOPK)
    tl.store(scores_ptr + offset, scores, mask=mask)
    tl.store(indices_ptr + offset, chunk, mask=mask)


@triton.jit
def _distance_octaves(end, chunk):
    """
    `floor(log2(end - chunk))` as fp32, 0 where `chunk` is not below `end`: the exponent of a float, so exact for
    distances below 2^24.
    """
    bits = tl.maximum(end - chunk, 1).to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits >> 23) - 127).to(tl.float32)


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
    q_ptr, landmarks_ptr, first_ptr, end_ptr, keys_ptr, scores_ptr, indices_ptr,
    length, num_chunks, rows, heads, splits, scale, distance_penalty,
    stride_qb, stride_ql, stride_qh, stride_lb, stride_lc, stride_lh, stride_fb, stride_fl, stride_eb, stride_el,
    D: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, PENALIZE: tl.constexpr,
):  # fmt: skip
    """
    The best of a split for a block of BM queries of one head.

    Grid: blocks x rows (batch entries x heads) x splits in one dimension, the last queries, which see most, first.
    Memory: the queries [BM, BD] and the kept ones stay in registers or shared memory; landmarks come in tiles
    [BN, BD], the next one on its way while the best of this one are sought. Where the queries are wider than BD, both
    are read in pieces of BD, asynchronously, through shared memory. WIDEN is for Triton's interpreter, which takes the
    bits of bf16 for integers.
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
        if WIDEN:
            q = q.to(tl.float32)
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
            if WIDEN:
                landmarks = landmarks.to(tl.float32)
            scores = tl.dot(q, tl.trans(landmarks), input_precision=PRECISION)
        else:
            tile_ptrs = landmarks_ptr + start.to(tl.int64) * stride_lc + tile_offsets
            inside = (start + n >= low)[:, None]
            scores = tl.zeros([BM, BN], tl.float32)
            for piece in range(0, D, BD):
                wanted = (d < D - piece)[None, :]
                q = tl.load(q_ptrs + piece, mask=valid[:, None] & wanted, other=0.0)
                landmarks = tl.load(tile_ptrs + piece, mask=inside & wanted, other=0.0)
                if WIDEN:
                    q, landmarks = q.to(tl.float32), landmarks.to(tl.float32)
                scores = tl.dot(q, tl.trans(landmarks), scores, input_precision=PRECISION)
        scores *= scale
        chunk = (start + n)[None, :]
        if PENALIZE:
            scores -= distance_penalty * _distance_octaves(end[:, None], chunk)
        if (start < all_first) | (start + BN > all_end):
            scores = tl.where((chunk >= first[:, None]) & (chunk < end[:, None]), scores, float("-inf"))
        best, kept = _keep_best(best, kept, scores, chunk)
        start -= BN

    row = (batch * length + token) * heads + head
    keys = _ordered_keys(tl.where(kept < 0, float("-inf"), best), kept)
    if SPLIT:
        offset = (row * splits + split)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
        tl.store(keys_ptr + offset, keys, mask=valid[:, None])
    else:
        if TOPK < SLOTS:
            keys = tl.sort(keys, descending=True)
        _store_sorted(scores_ptr, indices_ptr, row, valid, keys, TOPK, SLOTS)


@triton.jit(do_not_specialize=["num_chunks", "heads", "groups"])
def _select_row_kernel(
    q_ptr, landmarks_ptr, first_ptr, end_ptr, keys_ptr, scores_ptr, indices_ptr,
    num_chunks, heads, groups, scale, distance_penalty,
    stride_qb, stride_qh, stride_lb, stride_lc, stride_lh, stride_fb, stride_eb,
    D: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, PENALIZE: tl.constexpr,
):  # fmt: skip
    """
    The best of a group of TILES * BN chunks for the only query (L = 1) of one head: decoding, which is as fast as
    landmarks can be read.

    Grid: rows (batch entries x heads) x groups in one dimension, group 0 the nearest. How much is visible is known on
    the device only: groups beyond leave at once, whatever the capacity of the landmarks.
    Memory: the query, two tiles [BN, BD] of whole landmarks, one of them still on its way, and the scores of the group
    in registers. Products are added up without the matrix units, which would need 16 queries, and the best are found
    by one partial sort: one query has too little to do at a time for taking one chunk after the other.
    """
    pid = tl.program_id(0)
    group = pid % groups
    row = pid // groups + tl.arange(0, 1).to(tl.int64)  # [1]
    batch, head = (pid // groups // heads).to(tl.int64), (pid // groups % heads).to(tl.int64)

    low = tl.maximum(tl.load(first_ptr + batch * stride_fb), 0)
    end = tl.minimum(tl.load(end_ptr + batch * stride_eb), num_chunks).to(tl.int32)
    high = end - group * TILES * BN
    low = tl.maximum(tl.minimum(low, num_chunks).to(tl.int32), high - TILES * BN)

    n, d, t = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, TILES)
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + d, mask=d < D, other=0.0).to(tl.float32)
    landmarks_ptr += batch * stride_lb + head * stride_lh
    tile_offsets = n[:, None].to(tl.int64) * stride_lc + d[None, :]
    scores = tl.full([TILES, BN], float("-inf"), tl.float32)

    start = high - BN
    tile = tl.load(
        landmarks_ptr + start.to(tl.int64) * stride_lc + tile_offsets,
        mask=((start + n >= low) & (start + n < high))[:, None] & (d < D)[None, :],
        other=0.0,
    )
    for i in range(tl.cdiv(tl.maximum(high - low, 0), BN)):
        landmarks = tile
        start -= BN
        tile = tl.load(
            landmarks_ptr + start.to(tl.int64) * stride_lc + tile_offsets,
            mask=(start + n >= low)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        products = tl.sum(landmarks.to(tl.float32) * q[None, :], 1)
        scores = tl.where(t[:, None] == i, products[None, :], scores)

    chunk = high - BN - t[:, None] * BN + n[None, :]
    scores *= scale
    if PENALIZE:
        scores -= distance_penalty * _distance_octaves(end, chunk)
    keys = tl.reshape(_ordered_keys(tl.where(chunk >= low, scores, float("-inf")), chunk), [1, TILES * BN])
    # Without a single visible chunk all keys are equal: nothing to sort.
    if high > low:
        best = tl.topk(keys, SLOTS)
    else:
        best = tl.full([1, SLOTS], ABSENT, tl.int64)
    if SPLIT:
        tl.store(keys_ptr + (row * groups + group)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :], best)
    else:
        _store_sorted(scores_ptr, indices_ptr, row, row >= 0, best, TOPK, SLOTS)


@triton.jit(do_not_specialize=["entries", "groups"])
def _merge_kernel(
    keys_ptr, merged_ptr, scores_ptr, indices_ptr, entries, groups,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """
    The best of BN of the keys int64 [rows, entries] that programs found for a row (a query of a head). Grid: rows x
    groups of BN keys. Several groups write keys to merge once more, [rows, groups, SLOTS], a single one the result.
    """
    pid = tl.program_id(0)
    group = pid % groups
    row = pid // groups + tl.arange(0, 1).to(tl.int64)  # [1]
    entry = group * BN + tl.arange(0, BN)[None, :]
    keys = tl.load(keys_ptr + row[:, None] * entries + entry, mask=entry < entries, other=ABSENT)
    best = tl.topk(keys, SLOTS)
    if SPLIT:
        tl.store(merged_ptr + (row * groups + group)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :], best)
    else:
        _store_sorted(scores_ptr, indices_ptr, row, row >= 0, best, TOPK, SLOTS)


@triton.jit(do_not_specialize=["num_rows", "length", "heads"])
def _score_kernel(
    q_ptr, landmarks_ptr, indices_ptr, scores_ptr, num_rows, length, heads, scale,
    stride_qb, stride_ql, stride_qh, stride_lb, stride_lc, stride_lh,
    D: tl.constexpr, TOPK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """
    `scores[row, k] = scale * q[row] . landmark[indices[row, k]]` for BM rows (a row is a query of a head), where there
    is a chunk; the scores of the others are -inf already. After a selection by other numbers than the scores.

    Grid: blocks of rows. Memory: the products [BM, BD] in registers; landmarks are gathered.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = row < num_rows
    batch, token, head = row // heads // length, row // heads % length, row % heads
    q_ptrs = q_ptr + (batch * stride_qb + token * stride_ql + head * stride_qh)[:, None]
    base = batch * stride_lb + head * stride_lh
    for k in range(TOPK):
        chunk = tl.load(indices_ptr + row * TOPK + k, mask=valid, other=-1)
        present = chunk >= 0
        landmark_ptrs = landmarks_ptr + (base + chunk.to(tl.int64) * stride_lc)[:, None]
        total = tl.zeros([BM, BD], tl.float32)
        for piece in range(0, D, BD):
            d = (piece + tl.arange(0, BD))[None, :]
            inside = present[:, None] & (d < D)
            q = tl.load(q_ptrs + d, mask=inside, other=0.0).to(tl.float32)
            landmark = tl.load(landmark_ptrs + d, mask=inside, other=0.0).to(tl.float32)
            total += q * landmark
        tl.store(scores_ptr + row * TOPK + k, tl.sum(total, 1) * scale, mask=present)


def _select_row(q, landmarks, bounds, topk, slots, scale, distance_penalty, found):
    """One query per row. Returns the keys to merge, int64 [rows, groups, slots], or None if `found` is complete."""
    batch, _, heads, dim = q.shape
    num_chunks, rows = landmarks.shape[1], batch * heads
    dims = max(16, next_power_of_2(dim))
    tile = max(8, 4096 // dims)
    # As many landmarks per program as leave four programs for each processor, and something to choose from.
    share = next_power_of_2(cdiv(rows * num_chunks, 4 * device_limits(q.device)[0]))
    size = max(tile, min(1024, max(128, 4 * slots, share)))
    groups = cdiv(num_chunks, size)
    keys = torch.empty(rows, groups, slots, dtype=torch.int64, device=q.device) if groups > 1 else None
    (first, first_stride), (end, end_stride) = bounds
    _select_row_kernel[(rows * groups,)](
        q, landmarks, first, end, keys, *found, num_chunks, heads, groups, scale, distance_penalty,
        q.stride(0), q.stride(2), *landmarks.stride()[:3], first_stride[0], end_stride[0],
        D=dim, TOPK=topk, SLOTS=slots, TILES=size // tile, BN=tile, BD=dims, SPLIT=groups > 1,
        PENALIZE=distance_penalty != 0, num_warps=4 if tile * dims * q.element_size() <= 1 << 14 else 8,
    )  # fmt: skip
    return keys


def _select_blocks(q, landmarks, bounds, topk, slots, scale, distance_penalty, found):
    """Several queries per row. Returns the keys to merge, int64 [rows, splits, slots], or None, see `_select_row`."""
    batch, length, heads, dim = q.shape
    num_chunks, rows, wide = landmarks.shape[1], batch * heads, q.element_size() > 2
    # A warp for 16 queries: no row of scores is spread over warps, and its maximum takes two shuffles.
    queries, processors = min(64, max(16, next_power_of_2(length))), device_limits(q.device)[0]
    while queries > 16 and 2 * rows * cdiv(length, queries) <= processors:
        queries //= 2
    warps, dims = queries // 16, max(16, next_power_of_2(dim))
    tile = 128 if queries == 64 and not wide else 64
    tile = tile // 2 if slots > 64 else tile
    # Queries stay if they are no wider than this, and then a tile of landmarks takes at most 64 registers of a thread.
    if dims <= min(64 if wide else 256, 256 * warps // q.element_size()):
        tile = min(tile, 8192 * warps // (dims * q.element_size()))
    else:
        dims = 32 if wide else 64
    # Where even small blocks leave half of the processors idle, four programs for each, if they have four tiles each.
    blocks, splits = rows * cdiv(length, queries), 1
    if 2 * blocks <= processors:
        splits = max(1, min(4 * processors // blocks, num_chunks // (4 * tile), 4 * _MERGED // slots))
    keys = torch.empty(rows * length, splits, slots, dtype=torch.int64, device=q.device) if splits > 1 else None
    (first, first_stride), (end, end_stride) = bounds
    _select_block_kernel[(blocks * splits,)](
        q, landmarks, first, end, keys, *found, length, num_chunks, rows, heads, splits, scale, distance_penalty,
        *q.stride()[:3], *landmarks.stride()[:3], *first_stride, *end_stride,
        D=dim, TOPK=topk, SLOTS=slots, BM=queries, BN=tile, BD=dims, SPLIT=splits > 1, PRECISION="ieee",
        WIDEN=not q.is_cuda, PENALIZE=distance_penalty != 0, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return keys


def select_chunks_forward(q, landmarks, first, end, topk, scale, distance_penalty=0.0):
    """
    The operator `select_chunks` of `library`. Where there are too few queries to fill the device, several programs
    share the landmarks of a query, and a second kernel merges what they found. With a distance penalty, what was kept
    is not the score, which is computed anew for the selected chunks: the same products in another order of their sum.
    """
    q, landmarks = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, landmarks))
    shape = (*q.shape[:3], topk)
    found = tuple(torch.empty(shape, dtype=dtype, device=q.device) for dtype in (torch.float32, torch.int32))
    if found[0].numel() == 0:
        return found
    slots = max(2, next_power_of_2(topk))
    bounds = [(x, (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))) for x in (first, end)]
    with on_device(q):
        select = _select_row if q.shape[1] == 1 else _select_blocks
        keys = select(q, landmarks, bounds, topk, slots, scale, distance_penalty, found)
        while keys is not None:
            rows, entries = keys.shape[0], keys.shape[1] * slots
            tile = min(_MERGED, next_power_of_2(entries))
            groups = cdiv(entries, tile)
            merged = keys.new_empty(rows, groups, slots) if groups > 1 else None
            _merge_kernel[(rows * groups,)](
                keys, merged, *found, entries, groups,
                TOPK=topk, SLOTS=slots, BN=tile, SPLIT=groups > 1, num_warps=min(8, max(1, tile // 256)),
            )  # fmt: skip
            keys = merged
        if distance_penalty:
            scores, indices = found
            rows, dim = scores.numel() // topk, q.shape[3]
            dims = min(128, max(16, next_power_of_2(dim)))
            block = 2048 // dims
            _score_kernel[(cdiv(rows, block),)](
                q, landmarks, indices, scores, rows, *q.shape[1:3], scale, *q.stride()[:3], *landmarks.stride()[:3],
                D=dim, TOPK=topk, BM=block, BD=dims, num_warps=4,
            )  # fmt: skip
    return found


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
    rows, dims = q.numel() // dim, min(128, max(16, next_power_of_2(dim)))
    block = 2048 // dims
    _query_gradient_kernel[(cdiv(rows, block), cdiv(dim, dims))](
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
    chunks, dims = landmarks.numel() // dim, min(128, max(16, next_power_of_2(dim)))
    blocks = cdiv(dim, dims)
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
    with on_device(q):
        arguments = d_scores, q, landmarks, indices, scale
        return _query_gradient(*arguments), _landmark_gradient(*arguments)

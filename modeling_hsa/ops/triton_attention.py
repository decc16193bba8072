"""
Chunk attention in Triton.

Query heads that share both their chunks and their keys and values form a group of G heads: there are
`GROUPS = max(Hr, Hkv)` groups, and group g has key/value head `g * Hkv // GROUPS` and the chunks of retrieval head
`g * Hr // GROUPS`.

Forward and the gradient of q: neighbouring queries retrieve mostly the same chunks, so a program takes a block of
queries of one group, as many as fill the tensor cores, and walks the union of their chunks. A chunk is read once for
the block; rows that did not retrieve it give it the weight 0. Blocks whose queries share too few chunks for that are
left to a second launch, which takes their queries one at a time (the results differ by rounding at most). The softmax
of a chunk is complete when the chunk is read, so nothing has to be rescaled later (but for `joint`, which is one
softmax, kept online).

Gradients of k and v: a program takes the (query, slot) pairs that retrieved one chunk from the inverted index, in
tiles of as many rows, and sums over them: time is linear in the pairs. This gives the gradients of the weights, too.

Nothing uses atomics: results are the same every time.

What differs from flash attention:
- A query has its own list of chunks. Which keys a tile reads is data, not a function of its place: each block of
  queries walks the union of its lists, and masks by list, not by position.
- Every chunk has a softmax of its own, complete when the chunk is read, and a weight that comes from outside and has a
  gradient. Only `joint` is the online softmax of flash attention.
- No log-sum-exp is kept for backward (but for `joint`): the softmax of a chunk is computed anew from the chunk alone.
- Rows of a tile are queries times the heads of a group, so that few queries fill the tensor cores.
- Gradients of keys and values run over an inverted index, chunk -> queries, not over all queries after the keys.
- As there, scores and sums are fp32, and probabilities and their gradients are rounded to the dtype of the inputs
  where they are multiplied with values, keys or queries.
- As there, a masked row of a tile multiplies what it masks with 0: a chunk that holds NaN reaches the queries of a
  block of which one retrieved it. What no query of the block retrieved is not read.
"""

from collections.abc import Iterator

import torch

from .inverted_index import invert
from .triton_utils import cdiv, device_limits, next_power_of_2, on_device, tl, triton


_LOG2E = tl.constexpr(1.4426950408889634)
# A block whose union has more than this part of the chunks of its queries is computed one query at a time.
_SCATTERED = tl.constexpr(0.7)


# -- the union of the chunks of a block of queries --------------------------------------------------------------------


@triton.jit
def _union_kernel(
    indices, union, counts, blocks_in_all, blocks, length,
    HEADS: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """
    Grid: (blocks of queries of all rows and retrieval heads / ROWS). Sorts the BLOCK * TOPK indices of each of ROWS
    blocks, descending, and keeps each once. They go through `union` to be compared with their neighbours.

    The barriers are all that this exchange needs. A program is one thread block, and no other touches its part of
    `union`; `tl.debug_barrier` is the barrier of a thread block (`bar.sync`), which not only waits for its threads but
    makes what each wrote to global memory before visible to all of them after. The first lets the sorted indices
    arrive before neighbours are read, the second lets all be read before the ones kept overwrite them.
    """
    program = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = program < blocks_in_all
    block = program % blocks
    head = (program // blocks) % HEADS
    row = program // (blocks * HEADS)

    entry = tl.arange(0, SIZE)
    in_block = known[:, None] & (entry < BLOCK * TOPK)[None, :]
    token = block[:, None] * BLOCK + (entry // TOPK)[None, :]
    source = ((row[:, None] * length + token) * HEADS + head[:, None]) * TOPK + (entry % TOPK)[None, :]
    chunks = tl.load(indices + source, mask=in_block & (token < length), other=-1).to(tl.int32)
    chunks = tl.sort(chunks, descending=True)

    target = union + program[:, None] * (BLOCK * TOPK) + entry[None, :]
    tl.store(target, chunks, mask=in_block)
    tl.debug_barrier()
    nearer = tl.load(target - 1, mask=in_block & (entry > 0)[None, :], other=-1)
    tl.debug_barrier()
    new = in_block & (chunks >= 0) & (chunks != nearer)
    place = tl.cumsum(new.to(tl.int32), 1) - 1
    tl.store(union + program[:, None] * (BLOCK * TOPK) + place, chunks, mask=new)
    tl.store(counts + program, tl.sum(new.to(tl.int32), 1), mask=known)


# -- parts of the kernels ---------------------------------------------------------------------------------------------


@triton.jit
def _place(
    counts, length, blocks,
    GROUPS: tl.constexpr, RETRIEVAL_HEADS: tl.constexpr, TOPK: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    What falls to a program whose first axis of the grid counts the blocks of QUERIES queries of all groups and rows.

    Returns: the row, the group and the first query; how many chunks the block has in all; whether it is for this
    launch, that of whole blocks (BLOCK = QUERIES) or that of single queries (BLOCK = 1); and how many tiles of BLOCK
    queries it has. Where few chunks are shared, reading each once does not pay for computing it for all queries.
    """
    block = tl.program_id(0) % blocks
    group = (tl.program_id(0) // blocks) % GROUPS
    row = (tl.program_id(0) // blocks // GROUPS).to(tl.int64)
    count, mine, tiles = TOPK, True, 1
    if QUERIES > 1:
        count = tl.load(counts + (row * RETRIEVAL_HEADS + group * RETRIEVAL_HEADS // GROUPS) * blocks + block)
        scattered = count > _SCATTERED * (QUERIES * TOPK)
        mine = scattered if BLOCK < QUERIES else not scattered
        if BLOCK < QUERIES:
            tiles = tl.minimum(QUERIES, length - block * QUERIES)
    return row, group, block * QUERIES, count, mine, tiles


@triton.jit
def _query_tile(
    indices, weights, union, row, group, first, count, length, blocks,
    GROUPS: tl.constexpr, RETRIEVAL_HEADS: tl.constexpr, G: tl.constexpr,
    TOPK: tl.constexpr, TOPK_: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """
    For each line of the tile of `_place` the place of its (token, head) in [B, L, Hq] and whether there is one; the
    chunks and (but for `joint`) the weights of the queries, [BLOCK, TOPK_]; where the chunks to walk are listed, and
    how many.
    """
    retrieval_head = group * RETRIEVAL_HEADS // GROUPS
    first_token = row * length + first

    query, slot = tl.arange(0, BLOCK), tl.arange(0, TOPK_)
    retrieved = ((first_token + query[:, None]) * RETRIEVAL_HEADS + retrieval_head) * TOPK + slot[None, :]
    known = (first + query < length)[:, None] & (slot < TOPK)[None, :]
    chunks = tl.load(indices + retrieved, mask=known, other=-1).to(tl.int32)
    chunk_weights = chunks
    if not JOINT:
        chunk_weights = tl.load(weights + retrieved, mask=known, other=0.0).to(tl.float32)

    line = tl.arange(0, BLOCK * LINES)
    seen = (first + line // LINES < length) & (line % LINES < G)
    offset = (first_token + line // LINES) * (GROUPS * G) + group * G + line % LINES
    if BLOCK == 1:  # the chunks of the query as they are, absent ones with the weight 0
        walk = indices + (first_token * RETRIEVAL_HEADS + retrieval_head) * TOPK
        count = TOPK
    else:
        walk = union + ((row * RETRIEVAL_HEADS + retrieval_head) * blocks + first // BLOCK) * (BLOCK * TOPK)
    return offset, seen, chunks, chunk_weights, walk, count


@triton.jit
def _load_tile(x, stride, position, column, rows, D: tl.constexpr):
    """The first `rows` rows of x, [rows, D], `stride` apart, as [S_, D_]; 0 beyond."""
    mask = (position < rows)[:, None] & (column < D)[None, :]
    return tl.load(x + position[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _per_line(x, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """x [BLOCK], one per query -> [BLOCK * LINES], one per row of the tile."""
    return tl.reshape(tl.broadcast_to(x[:, None], [BLOCK, LINES]), [BLOCK * LINES])


@triton.jit
def _scores(q, keys, position, S: tl.constexpr, S_: tl.constexpr, PRECISION: tl.constexpr):
    """Scores before scaling, [rows, S_]; -inf beyond S."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if S != S_:
        scores = tl.where((position < S)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _exponentials(scores, scale):
    """
    The softmax of `scale * scores`, for a scale of more than 0, but for its division: exponentials [rows, S_], and 1 /
    their sum [rows].
    """
    scale *= _LOG2E
    exponentials = tl.exp2(scores * scale - (tl.max(scores, 1) * scale)[:, None])
    return exponentials, 1.0 / tl.sum(exponentials, 1)


# -- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    q, k, v, weights, indices, union, counts, out, lse,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, batch, length, blocks, scale,
    GROUPS: tl.constexpr, RETRIEVAL_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr,
    TOPK: tl.constexpr, TOPK_: tl.constexpr, S: tl.constexpr, S_: tl.constexpr, D: tl.constexpr, D_: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, SPLITS: tl.constexpr, JOINT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    Grid: (blocks of queries of all rows and groups, SPLITS). A program keeps a tile of queries [BLOCK * LINES, D] and
    its output, and streams its part of their chunks, K and V of STAGES chunks at a time in shared memory. A query has
    LINES >= G rows, one per head of the group.

    With SPLITS > 1 (few queries) `out` is fp32 [SPLITS, B, L, Hq, D] and `lse` [SPLITS, B, L, Hq], for
    `_combine_kernel`.
    """
    row, group, first, count, mine, tiles = _place(
        counts, length, blocks, GROUPS, RETRIEVAL_HEADS, TOPK, QUERIES, BLOCK
    )  # fmt: skip
    if not mine:
        return
    kv_head = (group * KV_HEADS // GROUPS).to(tl.int64)
    k += row * stride_kb + kv_head * stride_kh
    v += row * stride_vb + kv_head * stride_vh
    column, position = tl.arange(0, D_), tl.arange(0, S_)
    for tile in range(tiles):
        offset, seen, chunks, chunk_weights, walk, present = _query_tile(
            indices, weights, union, row, group, first + tile, count, length, blocks,
            GROUPS, RETRIEVAL_HEADS, G, TOPK, TOPK_, BLOCK, LINES, JOINT,
        )  # fmt: skip
        elements = offset[:, None] * D + column[None, :]
        inside = seen[:, None] & (column < D)[None, :]
        q_tile = tl.load(q + elements, mask=inside, other=0.0)
        split = tl.program_id(1)
        part = (present + SPLITS - 1) // SPLITS

        acc = tl.zeros([BLOCK * LINES, D_], dtype=tl.float32)
        top = tl.full([BLOCK * LINES], float("-inf"), dtype=tl.float32)
        mass = tl.zeros([BLOCK * LINES], dtype=tl.float32)
        for j in tl.range(split * part, tl.minimum(split * part + part, present), num_stages=STAGES):
            chunk = tl.load(walk + j).to(tl.int32)
            first_row = tl.maximum(chunk, 0).to(tl.int64) * S
            rows = tl.where(chunk >= 0, S, 0)
            keys = _load_tile(k + first_row * stride_kt, stride_kt, position, column, rows, D)
            values = _load_tile(v + first_row * stride_vt, stride_vt, position, column, rows, D)
            scores = _scores(q_tile, keys, position, S, S_, PRECISION)
            has = (chunks == chunk) & (chunks >= 0)
            if JOINT:
                has_line = _per_line(tl.max(has.to(tl.int32), 1), BLOCK, LINES) > 0
                scores = tl.where(has_line[:, None], scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1) * (scale * _LOG2E))
                finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
                probs = tl.exp2(scores * (scale * _LOG2E) - finite_top[:, None])
                shrink = tl.exp2(top - finite_top)
                acc = acc * shrink[:, None]
                mass = mass * shrink + tl.sum(probs, 1)
                top = new_top
            else:
                weight = _per_line(tl.sum(tl.where(has, chunk_weights, 0.0), 1), BLOCK, LINES)
                probs, inverse = _exponentials(scores, scale)
                probs *= (weight * inverse)[:, None]
            acc = tl.dot(probs.to(values.dtype), values, acc, input_precision=PRECISION)

        if SPLITS > 1:
            offset += split.to(tl.int64) * batch * length * (GROUPS * G)
            elements = offset[:, None] * D + column[None, :]
        if JOINT:
            acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]
            tl.store(lse + offset, tl.where(mass > 0, top + tl.log2(mass), float("-inf")), mask=seen)
        tl.store(out + elements, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_kernel(
    parts, part_lse, out, lse, rows,
    SPLITS: tl.constexpr, SPLITS_: tl.constexpr, D: tl.constexpr, D_: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Grid: (rows of [B, L, Hq]). Adds up the parts [SPLITS, rows, D] of the output; `joint` by their masses."""
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS_), tl.arange(0, D_)
    source = split.to(tl.int64) * rows + row
    inside = (split < SPLITS)[:, None] & (column < D)[None, :]
    x = tl.load(parts + source[:, None] * D + column[None, :], mask=inside, other=0.0)
    if JOINT:
        lses = tl.load(part_lse + source, mask=split < SPLITS, other=float("-inf"))
        top = tl.max(lses, 0)
        finite_top = tl.where(top == float("-inf"), 0.0, top)
        mass = tl.exp2(lses - finite_top)
        total = tl.sum(mass, 0)
        x = x * (mass / tl.where(total > 0, total, 1.0))[:, None]
        tl.store(lse + row, tl.where(total > 0, top + tl.log2(total), float("-inf")))
    tl.store(out + row * D + column, tl.sum(x, 0).to(out.dtype.element_ty), mask=column < D)


# -- gradient of the queries ------------------------------------------------------------------------------------------


@triton.jit
def _query_gradient_kernel(
    q, k, v, weights, indices, union, counts, out, lse, d_out, d_q, delta,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, length, blocks, scale,
    GROUPS: tl.constexpr, RETRIEVAL_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr,
    TOPK: tl.constexpr, TOPK_: tl.constexpr, S: tl.constexpr, S_: tl.constexpr, D: tl.constexpr, D_: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, JOINT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    Grid and memory plan as in `_forward_kernel`, without splits; d_out stays beside the queries. `joint` leaves
    `delta = d_out . out` [B, L, Hq] for the gradients of keys and values.
    """
    row, group, first, count, mine, tiles = _place(
        counts, length, blocks, GROUPS, RETRIEVAL_HEADS, TOPK, QUERIES, BLOCK
    )  # fmt: skip
    if not mine:
        return
    kv_head = (group * KV_HEADS // GROUPS).to(tl.int64)
    k += row * stride_kb + kv_head * stride_kh
    v += row * stride_vb + kv_head * stride_vh
    column, position = tl.arange(0, D_), tl.arange(0, S_)
    for tile in range(tiles):
        offset, seen, chunks, chunk_weights, walk, present = _query_tile(
            indices, weights, union, row, group, first + tile, count, length, blocks,
            GROUPS, RETRIEVAL_HEADS, G, TOPK, TOPK_, BLOCK, LINES, JOINT,
        )  # fmt: skip
        elements = offset[:, None] * D + column[None, :]
        inside = seen[:, None] & (column < D)[None, :]
        q_tile = tl.load(q + elements, mask=inside, other=0.0)
        d_out_tile = tl.load(d_out + elements, mask=inside, other=0.0)
        if JOINT:
            line_lse = tl.load(lse + offset, mask=seen, other=0.0)
            out_tile = tl.load(out + elements, mask=inside, other=0.0)
            line_delta = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)
            tl.store(delta + offset, line_delta, mask=seen)

        acc = tl.zeros([BLOCK * LINES, D_], dtype=tl.float32)
        for j in tl.range(0, present, num_stages=STAGES):
            chunk = tl.load(walk + j).to(tl.int32)
            first_row = tl.maximum(chunk, 0).to(tl.int64) * S
            rows = tl.where(chunk >= 0, S, 0)
            keys = _load_tile(k + first_row * stride_kt, stride_kt, position, column, rows, D)
            values = _load_tile(v + first_row * stride_vt, stride_vt, position, column, rows, D)
            scores = _scores(q_tile, keys, position, S, S_, PRECISION)
            d_probs = tl.dot(d_out_tile, tl.trans(values), input_precision=PRECISION)
            has = (chunks == chunk) & (chunks >= 0)
            if JOINT:
                has_line = _per_line(tl.max(has.to(tl.int32), 1), BLOCK, LINES) > 0
                scores = tl.where(has_line[:, None], scores * (scale * _LOG2E) - line_lse[:, None], float("-inf"))
                d_scores = tl.exp2(scores) * (d_probs - line_delta[:, None])
            else:
                weight = _per_line(tl.sum(tl.where(has, chunk_weights, 0.0), 1), BLOCK, LINES)
                probs, inverse = _exponentials(scores, scale)
                chunk_delta = tl.sum(probs * d_probs, 1) * inverse
                d_scores = probs * (weight * inverse)[:, None] * (d_probs - chunk_delta[:, None])
            acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)
        tl.store(d_q + elements, (acc * scale).to(d_q.dtype.element_ty), mask=inside)


# -- gradients of keys, values and weights ----------------------------------------------------------------------------


@triton.jit
def _chunk_gradient_kernel(
    q, k, v, weights, lse, delta, d_out, d_k, d_v, d_weights, partial_k, partial_v,
    pairs, segment_chunk, segment_start, segment_end, segment_slot,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, chunks_in_all, num_chunks, scale,
    GROUPS: tl.constexpr, RETRIEVAL_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr,
    HEADS: tl.constexpr, SHARE: tl.constexpr,
    TOPK: tl.constexpr, S: tl.constexpr, S_: tl.constexpr, D: tl.constexpr, D_: tl.constexpr,
    BLOCK: tl.constexpr, LINES: tl.constexpr, JOINT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    Grid: (segments of the inverted index, SHARE). A program keeps K and V of its chunk and their gradients, and
    streams q and d_out of BLOCK pairs at a time, [BLOCK * LINES, D]. The index has HEADS = min(Hr, Hkv) heads, and
    SHARE = GROUPS / Hr groups share a retrieval head.
    """
    segment = tl.program_id(0)
    chunk_id = tl.load(segment_chunk + segment).to(tl.int64)
    if chunk_id >= chunks_in_all:
        return
    share = tl.program_id(1)
    chunk = chunk_id % num_chunks
    row = chunk_id // (num_chunks * HEADS)
    kv_head = (chunk_id // num_chunks) % HEADS * (KV_HEADS // HEADS) + share

    column, position = tl.arange(0, D_), tl.arange(0, S_)
    k += row * stride_kb + chunk * S * stride_kt + kv_head * stride_kh
    v += row * stride_vb + chunk * S * stride_vt + kv_head * stride_vh
    in_chunk = (position < S)[:, None] & (column < D)[None, :]
    keys = _load_tile(k, stride_kt, position, column, S, D)
    values = _load_tile(v, stride_vt, position, column, S, D)

    acc_k = tl.zeros([S_, D_], dtype=tl.float32)
    acc_v = tl.zeros([S_, D_], dtype=tl.float32)
    start, end = tl.load(segment_start + segment), tl.load(segment_end + segment)
    line, query = tl.arange(0, BLOCK * LINES), tl.arange(0, BLOCK)
    for i in tl.range(start, end, BLOCK, num_stages=STAGES):
        pair = tl.load(pairs + i + line // LINES, mask=i + line // LINES < end, other=0)
        seen = (i + line // LINES < end) & (line % LINES < G)
        group = (pair // TOPK) % RETRIEVAL_HEADS * SHARE + share
        offset = (pair // (TOPK * RETRIEVAL_HEADS)).to(tl.int64) * (GROUPS * G) + group * G + line % LINES
        elements = offset[:, None] * D + column[None, :]
        inside = seen[:, None] & (column < D)[None, :]
        q_tile = tl.load(q + elements, mask=inside, other=0.0)
        d_out_tile = tl.load(d_out + elements, mask=inside, other=0.0)
        scores = _scores(q_tile, keys, position, S, S_, PRECISION)
        d_probs = tl.dot(d_out_tile, tl.trans(values), input_precision=PRECISION)
        if JOINT:
            line_lse = tl.load(lse + offset, mask=seen, other=float("inf"))
            line_delta = tl.load(delta + offset, mask=seen, other=0.0)
            probs = tl.exp2(scores * (scale * _LOG2E) - line_lse[:, None])
            d_scores = probs * (d_probs - line_delta[:, None])
        else:
            weight = tl.load(weights + pair, mask=seen, other=0.0).to(tl.float32)
            probs, inverse = _exponentials(scores, scale)
            chunk_delta = tl.sum(probs * d_probs, 1) * inverse
            probs *= (weight * inverse)[:, None]
            d_scores = probs * (d_probs - chunk_delta[:, None])
            target = tl.load(pairs + i + query, mask=i + query < end, other=0).to(tl.int64) * SHARE + share
            d_weight = tl.sum(tl.reshape(chunk_delta, [BLOCK, LINES]), 1)
            tl.store(d_weights + target, d_weight, mask=i + query < end)
        acc_v = tl.dot(tl.trans(probs.to(d_out_tile.dtype)), d_out_tile, acc_v, input_precision=PRECISION)
        acc_k = tl.dot(tl.trans(d_scores.to(q_tile.dtype)), q_tile, acc_k, input_precision=PRECISION)

    acc_k *= scale
    place = tl.load(segment_slot + segment).to(tl.int64)
    if place < 0:
        head_row = ((row * num_chunks + chunk) * S + position) * KV_HEADS + kv_head
        elements = head_row[:, None] * D + column[None, :]
        tl.store(d_k + elements, acc_k.to(d_k.dtype.element_ty), mask=in_chunk)
        tl.store(d_v + elements, acc_v.to(d_v.dtype.element_ty), mask=in_chunk)
    else:
        elements = ((place * SHARE + share) * S + position)[:, None] * D + column[None, :]
        tl.store(partial_k + elements, acc_k, mask=in_chunk)
        tl.store(partial_v + elements, acc_v, mask=in_chunk)


@triton.jit
def _add_segments_kernel(
    d_k, d_v, partial_k, partial_v, first_slot, num_segments, num_chunks,
    SHARE: tl.constexpr, HEADS: tl.constexpr, S: tl.constexpr, S_: tl.constexpr, D: tl.constexpr, D_: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks of the index, SHARE, 2). Adds up the segments of a chunk that has several, for k or for v."""
    chunk_id, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(num_segments + chunk_id)
    if count == 1:
        return
    if tl.program_id(2) == 0:
        partial, gradient = partial_k, d_k
    else:
        partial, gradient = partial_v, d_v
    slot = tl.load(first_slot + chunk_id).to(tl.int64)
    column, position = tl.arange(0, D_), tl.arange(0, S_)
    total = tl.zeros([S_, D_], dtype=tl.float32)
    for i in range(count):
        total += _load_tile(partial + ((slot + i) * SHARE + share) * (S * D), D, position, column, S, D)
    kv_heads = HEADS * SHARE
    head = (chunk_id // num_chunks) % HEADS * SHARE + share
    token = (chunk_id // (num_chunks * HEADS) * num_chunks + chunk_id % num_chunks) * S + position
    elements = (token[:, None] * kv_heads + head) * D + column[None, :]
    in_chunk = (position < S)[:, None] & (column < D)[None, :]
    tl.store(gradient + elements, total.to(gradient.dtype.element_ty), mask=in_chunk)


# -- launches ---------------------------------------------------------------------------------------------------------


class _Plan:
    """Sizes of the kernels for a call."""

    def __init__(self, q, k, indices, chunk_size: int):
        self.batch, self.length, num_heads, head_dim = q.shape
        retrieval_heads, topk = indices.shape[2:]
        kv_heads = k.shape[2]
        groups = max(retrieval_heads, kv_heads)
        self.multiprocessors, self.shared_memory, self.hopper = device_limits(q.device)
        self.element = q.element_size()
        self.num_chunks = k.shape[1] // chunk_size
        self.group = num_heads // groups
        self.lines = next_power_of_2(self.group)
        self.sizes = {
            "GROUPS": groups,
            "RETRIEVAL_HEADS": retrieval_heads,
            "KV_HEADS": kv_heads,
            "G": self.group,
            "TOPK": topk,
            "S": chunk_size,
            "S_": next_power_of_2(chunk_size),
            "D": head_dim,
            "D_": next_power_of_2(head_dim),
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }
        self.chunk_bytes = 2 * self.element * self.sizes["S_"] * self.sizes["D_"]  # keys and values

    @property
    def topk(self) -> int:
        return self.sizes["TOPK"]

    @property
    def programs(self) -> int:
        """Programs if each has one query."""
        return self.batch * self.length * self.sizes["GROUPS"]

    def tile(self, rows: int, most: int = 1 << 20) -> dict[str, int]:
        """BLOCK and LINES of a tile of `rows` rows, with at most `most` queries. The tensor cores need 16 rows."""
        block = min(max(1, rows // self.lines), most)
        return {"BLOCK": block, "LINES": max(self.lines, 16 // block)}

    def streaming(
        self, tile: dict[str, int], stage_bytes: int, fixed_bytes: int, most: int = 3, resident: int | None = None
    ) -> dict[str, int]:
        """
        How many stages of `stage_bytes` fit beside `fixed_bytes` of shared memory, how many warps, and, for `resident`
        programs to run side by side on a multiprocessor, the most registers of a thread: on Hopper, in half precision
        with dims and chunks of up to 64, one program more at the price of a few registers in memory is a gain.
        """
        rows = tile["BLOCK"] * tile["LINES"]
        scores = 2 * rows * self.sizes["S_"] * self.element
        stages = max(1, min(most, (self.shared_memory - fixed_bytes - scores) // stage_bytes))
        sizes = {"STAGES": stages, "num_warps": 8 if rows * self.sizes["D_"] > 64 * 128 else 4}
        if resident and self.hopper and self.element == 2 and max(self.sizes["D_"], self.sizes["S_"]) <= 64:
            sizes["maxnreg"] = 65536 // (resident * 32 * sizes["num_warps"]) // 8 * 8
        return sizes

    def launches(self, tile: dict[str, int], tensors: int, resident: int | None = None) -> Iterator[dict[str, int]]:
        """
        Sizes for a kernel that walks the chunks of blocks of queries, a program a block: for the blocks whose queries
        share chunks (`resident`: see `streaming`), and for the others, if there can be any, whose queries it takes one
        at a time. It keeps `tensors` tiles of queries.
        """
        scattered = tile["BLOCK"] > 1 and self.num_chunks > _SCATTERED.value * (tile["BLOCK"] * self.topk)
        for part in [tile, self.tile(16, 1)] if scattered else [tile]:
            kept = tensors * part["BLOCK"] * part["LINES"] * self.sizes["D_"] * self.element
            limit = resident if part is tile else None
            sizes = {"QUERIES": tile["BLOCK"]} | part | self.streaming(part, self.chunk_bytes, kept, resident=limit)
            if part is not tile:  # a warp for 16 rows of 64 halves: many programs hide the way to the chunks
                widest = max(self.sizes["D_"], self.sizes["S_"])
                sizes["num_warps"] = min(max(1, part["LINES"] * widest * self.element // 2048), 8)
            yield sizes


def _rows(plan: _Plan) -> int:
    """Rows of a tile: what fills the tensor cores; fewer in fp32, which has no use for them."""
    wide = plan.sizes["D_"] > 128 or plan.sizes["S_"] > 64
    return (16 if wide else 32) if plan.element == 4 else 64


def _strides(k: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    return (*k.stride()[:3], *v.stride()[:3])


def _union(indices: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks of every block of queries, each once: int32 [B, Hr, blocks, block * K]; how many: [B, Hr, blocks]."""
    batch, length, heads, topk = indices.shape
    if block == 1:
        return indices, indices  # not looked at
    blocks = cdiv(length, block)
    union = torch.empty(batch, heads, blocks, block * topk, dtype=torch.int32, device=indices.device)
    counts = torch.empty(batch, heads, blocks, dtype=torch.int32, device=indices.device)
    size = next_power_of_2(block * topk)
    rows = max(1, 256 // size)
    _union_kernel[(cdiv(counts.numel(), rows),)](
        indices, union, counts, counts.numel(), blocks, length,
        HEADS=heads, TOPK=topk, BLOCK=block, SIZE=size, ROWS=rows, num_warps=4 if size > 256 else 1,
    )  # fmt: skip
    return union, counts


def _most_queries(topk: int, length: int) -> int:
    """Queries of a block whose indices can still be sorted by one program."""
    return min(max(1, next_power_of_2(1024 // topk + 1) // 2), next_power_of_2(length))


def chunk_attention_forward(q, k, v, weights, indices, chunk_size, scale):
    """The operator `chunk_attention` of `library`; the log-sum-exp of `joint` is to the base 2."""
    q, indices = q.contiguous(), indices.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    joint = weights is None
    weights = indices if joint else weights.contiguous()  # not looked at for `joint`
    plan = _Plan(q, k, indices, chunk_size)
    # Few queries, as in decoding: a program per query and part of its chunks.
    few = plan.programs <= plan.multiprocessors
    splits = min(plan.topk, max(1, 2 * plan.multiprocessors // plan.programs)) if few else 1
    tile = plan.tile(16 if few else _rows(plan), 1 if few else _most_queries(plan.topk, plan.length))
    blocks = cdiv(plan.length, tile["BLOCK"])
    resident = None if joint or few or tile["BLOCK"] * plan.topk > 128 else 5  # with more to keep, it is no gain

    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3] if joint else 0, dtype=torch.float32, device=q.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
    with on_device(q):
        union, counts = _union(indices, tile["BLOCK"])
        for sizes in plan.launches(tile, tensors=1, resident=resident):
            _forward_kernel[(plan.batch * plan.sizes["GROUPS"] * blocks, splits)](
                q, k, v, weights, indices, union, counts, parts, part_lse,
                *_strides(k, v), plan.batch, plan.length, blocks, scale,
                TOPK_=next_power_of_2(plan.topk), SPLITS=splits, JOINT=joint, **plan.sizes, **sizes,
            )  # fmt: skip
        if splits > 1:
            rows = out.numel() // out.shape[-1]
            _combine_kernel[(rows,)](
                parts, part_lse, out, lse, rows, SPLITS=splits, SPLITS_=next_power_of_2(splits),
                D=plan.sizes["D"], D_=plan.sizes["D_"], JOINT=joint, num_warps=1,
            )  # fmt: skip
    return out, lse


def chunk_attention_backward(d_out, q, k, v, weights, indices, out, lse, chunk_size, scale):
    """The operator `chunk_attention_backward` of `library`."""
    q, indices, d_out, out = (x.contiguous() for x in (q, indices, d_out, out))
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    joint = weights is None
    given, weights = weights, indices if joint else weights.contiguous()
    plan = _Plan(q, k, indices, chunk_size)
    tile = plan.tile(_rows(plan), _most_queries(plan.topk, plan.length))
    blocks = cdiv(plan.length, tile["BLOCK"])
    d_q = torch.empty_like(q)
    delta = torch.empty_like(lse)
    with on_device(q):
        union, counts = _union(indices, tile["BLOCK"])
        for sizes in plan.launches(tile, tensors=2, resident=4):
            _query_gradient_kernel[(plan.batch * plan.sizes["GROUPS"] * blocks,)](
                q, k, v, weights, indices, union, counts, out, lse, d_out, d_q, delta,
                *_strides(k, v), plan.length, blocks, scale,
                TOPK_=next_power_of_2(plan.topk), JOINT=joint, **plan.sizes, **sizes,
            )  # fmt: skip
        del union, counts
        gradients = _chunk_gradients(plan, q, k, v, weights, indices, lse, delta, d_out, scale, joint)
    d_k, d_v, d_weights = gradients
    if not joint:
        d_weights = (d_weights.sum(-1) if d_weights.shape[-1] > 1 else d_weights.squeeze(-1)).to(given.dtype)
    return d_q, d_k, d_v, d_weights


def _chunk_gradients(plan: _Plan, q, k, v, weights, indices, lse, delta, d_out, scale, joint: bool):
    """The gradients of k, v and the weights, the last fp32 [B, L, Hr, K, SHARE], to be added up over SHARE."""
    sizes = plan.sizes
    heads = min(sizes["RETRIEVAL_HEADS"], sizes["KV_HEADS"])
    share = sizes["GROUPS"] // sizes["RETRIEVAL_HEADS"]
    num_chunks = k.shape[1] // sizes["S"]
    # Segments of 32 to 256 tiles (of 64 rows): some per multiprocessor, so that none of them is idle for long, and
    # about as many of a row as run side by side, so that q and d_out of a short row are read from the L2 cache.
    pairs, rows = indices.numel() * share, plan.batch * heads
    segment = min(cdiv(pairs, 8 * plan.multiprocessors), cdiv(pairs, 2 * plan.multiprocessors * rows))
    segment = min(max(next_power_of_2(segment), 2048 // plan.lines), max(16384 // plan.lines, 1))
    index = invert(indices, num_chunks, heads, segment)

    tile = plan.tile(_rows(plan))
    rows_bytes = 2 * tile["BLOCK"] * tile["LINES"] * sizes["D_"] * plan.element
    d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    d_weights = torch.zeros(0 if joint else (*indices.shape, share), dtype=torch.float32, device=q.device)
    partial_k, partial_v = torch.empty(
        2, index.num_slots, share, sizes["S"], sizes["D"], dtype=torch.float32, device=q.device
    )
    _chunk_gradient_kernel[(len(index.chunk), share)](
        q, k, v, weights, lse, delta, d_out, d_k, d_v, d_weights, partial_k, partial_v,
        index.pairs, index.chunk, index.start, index.end, index.slot,
        *_strides(k, v), len(index.num_segments), num_chunks, scale,
        HEADS=heads, SHARE=share, JOINT=joint, **sizes, **tile,
        **plan.streaming(tile, rows_bytes, plan.chunk_bytes, most=2, resident=3),
    )  # fmt: skip
    if index.num_slots:
        _add_segments_kernel[(len(index.num_segments), share, 2)](
            d_k, d_v, partial_k, partial_v, index.first_slot, index.num_segments, num_chunks,
            HEADS=heads, SHARE=share, S=sizes["S"], S_=sizes["S_"], D=sizes["D"], D_=sizes["D_"],
        )  # fmt: skip
    return d_k, d_v, d_weights

"""
The PyTorch backend of chunk attention, for any device.

Queries are taken in bounded blocks. In a block, the (token, chunk) pairs are sorted by chunk and cut into tiles of up
to 64 pairs that share one chunk, so that a tile is a dense [pairs * heads, D] x [D, S] product and a chunk is read
once per tile, not once per token. Every chunk has its own softmax, hence its own output and log-sum-exp per pair; the
outputs of a token are combined afterwards. Backward recomputes the tiles: nothing of size L x K x S is ever kept.

Half precision is widened tile by tile, and all products are made and kept in fp32: a score that was rounded to bf16
would move a softmax by percents, and in fp16 `q . k` overflows before it is scaled.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..precision import widen


# entries of a temporary tensor held at once
_BLOCK_ELEMENTS = 1 << 23
# The same of tiles on a CPU, so few that they stay in its caches: less time, and no new pages for each of them.
_CACHED_ELEMENTS = 1 << 20
_TILE_PAIRS = 64


class _Tiles(NamedTuple):
    """The pairs of a block of queries, grouped by chunk. A pair is `query * K + slot`."""

    pairs: torch.Tensor  # [tiles, T] pair, the first of the tile again where that is not full
    filled: torch.Tensor  # [tiles, T] bool
    chunk: torch.Tensor  # [tiles] chunk shared by the tile, counted over the whole batch: row * C + chunk

    def split(self, size: int) -> "Iterator[_Tiles]":
        return (_Tiles(*parts) for parts in zip(*(x.split(size) for x in self)))


def _group_by_chunk(chunk: torch.Tensor) -> _Tiles:
    """chunk [queries, K] int64, counted over the whole batch, -1 for absent."""
    flat = chunk.flatten()
    pairs = (flat >= 0).nonzero().squeeze(1)
    pairs = pairs[flat[pairs].argsort(stable=True)]
    touched, counts = flat[pairs].unique_consecutive(return_counts=True)
    if len(touched) == 0:
        empty = pairs.new_empty(0, 1)
        return _Tiles(empty, empty.bool(), pairs)
    mean = -(-len(pairs) // len(touched))
    width = min(_TILE_PAIRS, 1 << (mean - 1).bit_length())
    tiles_per_chunk = (counts + width - 1) // width
    first_tile = tiles_per_chunk.cumsum(0) - tiles_per_chunk
    rank = torch.arange(len(pairs), device=chunk.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    slot = first_tile.repeat_interleave(counts) * width + rank
    table = torch.full((int(tiles_per_chunk.sum()) * width,), -1, dtype=torch.int64, device=chunk.device)
    table[slot] = pairs
    table = table.view(-1, width)
    return _Tiles(torch.where(table >= 0, table, table[:, :1]), table >= 0, touched.repeat_interleave(tiles_per_chunk))


class _Block:
    """A block of queries of one retrieval head, q [n, kv heads, G, D], its chunks [n, K], and k, v [B, C, S, ...]."""

    def __init__(
        self, q: torch.Tensor, k_chunks: torch.Tensor, v_chunks: torch.Tensor, chunk: torch.Tensor, scale: float
    ):
        self.q, self.k_chunks, self.v_chunks, self.scale = widen(q), k_chunks, v_chunks, scale
        self.num_pairs = chunk.numel()
        self.topk = chunk.shape[-1]
        _, self.kv_heads, self.group, self.head_dim = q.shape
        tiles = _group_by_chunk(chunk)
        chunk_size = k_chunks.shape[2]
        heads = self.kv_heads * self.group
        tile_elements = tiles.pairs.shape[1] * heads * max(chunk_size, self.head_dim) + 2 * chunk_size * self.head_dim
        held = _CACHED_ELEMENTS if q.device.type == "cpu" else _BLOCK_ELEMENTS
        self.tiles = list(tiles.split(max(1, held // tile_elements)))

    def _per_tile(self, x: torch.Tensor, tiles: _Tiles) -> torch.Tensor:
        """x [n, kv heads, G, D] per query -> [tiles, kv heads, T * G, D]."""
        x = x[tiles.pairs // self.topk]
        return x.permute(0, 2, 1, 3, 4).flatten(2, 3)

    def _per_pair(self, x: torch.Tensor) -> torch.Tensor:
        """x [tiles, kv heads, T * G, ...] -> [tiles, T, kv heads, G, ...]."""
        return x.unflatten(2, (-1, self.group)).transpose(1, 2)

    def _scores(self, tiles: _Tiles) -> tuple[torch.Tensor, ...]:
        """Queries [tiles, kv heads, T * G, D], keys and values [tiles, kv heads, S, D], and their scores."""
        num_chunks = self.k_chunks.shape[1]
        row, chunk = tiles.chunk // num_chunks, tiles.chunk % num_chunks
        keys, values = (widen(x[row, chunk]).transpose(1, 2) for x in (self.k_chunks, self.v_chunks))
        queries = self._per_tile(self.q, tiles)
        return queries, keys, values, queries @ keys.transpose(-1, -2) * self.scale

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [n, K, kv heads, G, D] and log-sum-exps [n, K, kv heads, G] of all pairs; absent: 0, -inf."""
        pairs = (self.num_pairs, self.kv_heads, self.group)
        outputs = self.q.new_zeros(*pairs, self.head_dim)
        lse = self.q.new_full(pairs, float("-inf"))
        for tiles in self.tiles:
            _, _, values, scores = self._scores(tiles)
            tile_lse = scores.logsumexp(-1)
            tile_outputs = torch.exp(scores - tile_lse[..., None]) @ values
            pair = tiles.pairs[tiles.filled]
            outputs[pair] = self._per_pair(tile_outputs)[tiles.filled]
            lse[pair] = self._per_pair(tile_lse)[tiles.filled]
        return outputs.unflatten(0, (-1, self.topk)), lse.unflatten(0, (-1, self.topk))

    def backward(
        self, d_outputs: torch.Tensor, d_lse: torch.Tensor | None, d_k: torch.Tensor, d_v: torch.Tensor
    ) -> torch.Tensor:
        """
        Gradient of `forward`: d_outputs [n, K, kv heads, G, D], d_lse [n, K, kv heads, G] or None. Adds to d_k, d_v
        [B * C, S, kv heads, D] and returns d_q [n, kv heads, G, D]. All of them fp32.
        """
        d_outputs = d_outputs.flatten(0, 1)
        d_pairs = torch.zeros_like(d_outputs)
        for tiles in self.tiles:
            queries, keys, values, scores = self._scores(tiles)
            probs = scores.softmax(-1)
            d_out = (d_outputs[tiles.pairs] * tiles.filled[..., None, None, None]).permute(0, 2, 1, 3, 4).flatten(2, 3)
            d_probs = d_out @ values.transpose(-1, -2)
            d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdim=True))
            if d_lse is not None:
                tile_d_lse = (d_lse.flatten(0, 1)[tiles.pairs] * tiles.filled[..., None, None]).transpose(1, 2)
                d_scores = d_scores + probs * tile_d_lse.flatten(2, 3)[..., None]
            d_scores = d_scores * self.scale
            d_pairs[tiles.pairs[tiles.filled]] = self._per_pair(d_scores @ keys)[tiles.filled]
            d_k.index_add_(0, tiles.chunk, (d_scores.transpose(-1, -2) @ queries).transpose(1, 2))
            d_v.index_add_(0, tiles.chunk, (probs.transpose(-1, -2) @ d_out).transpose(1, 2))
        return d_pairs.unflatten(0, (-1, self.topk)).sum(1)


def _joint_weights(lse: torch.Tensor) -> torch.Tensor:
    """One softmax over all retrieved tokens gives each chunk its share of the attention mass: [n, K, kv heads, G]."""
    top = lse.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    mass = torch.exp(lse - top)
    return mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor | None, indices: torch.Tensor,
    chunk_size: int, scale: float,
) -> Iterator[tuple[slice, int, slice, _Block, torch.Tensor | None]]:  # fmt: skip
    """Yields (rows, retrieval head, its kv heads, block, weights or None) for every block of queries."""
    batch, length, num_heads, head_dim = q.shape
    retrieval_heads, topk, kv_heads = indices.shape[2], indices.shape[3], k.shape[2]
    k_chunks, v_chunks = (x.reshape(batch, -1, chunk_size, kv_heads, head_dim) for x in (k, v))
    num_chunks = k_chunks.shape[1]
    heads = num_heads // retrieval_heads  # query heads of a retrieval head
    kv_per_retrieval = max(1, kv_heads // retrieval_heads)
    q = q.reshape(batch * length, retrieval_heads, kv_per_retrieval, -1, head_dim)
    row = torch.arange(batch, device=q.device)[:, None, None, None] * num_chunks
    chunk = torch.where(indices >= 0, indices.long() + row, -1).flatten(0, 1)
    if weights is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = weights.flatten(0, 1).masked_fill(chunk < 0, 0.0).to(wide)
    step = max(1, _BLOCK_ELEMENTS // (topk * heads * head_dim))
    for r in range(retrieval_heads):
        first = r * kv_heads // retrieval_heads
        kv = slice(first, first + kv_per_retrieval)
        for t in range(0, batch * length, step):
            rows = slice(t, t + step)
            block = _Block(q[rows, r], k_chunks[..., kv, :], v_chunks[..., kv, :], chunk[rows, r], scale)
            yield rows, r, kv, block, None if weights is None else weights[rows, r]


def chunk_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor | None, indices: torch.Tensor,
    chunk_size: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The operator `chunk_attention` of `library`. Backward computes what it needs anew, so no log-sum-exp is kept."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows_out = out.view(-1, indices.shape[2], q.shape[2] // indices.shape[2], q.shape[3])
    for rows, r, _, block, w in _blocks(q, k, v, weights, indices, chunk_size, scale):
        outputs, lse = block.forward()
        w = _joint_weights(lse) if w is None else w[:, :, None, None]
        rows_out[rows, r] = (outputs * w[..., None]).sum(1).flatten(1, 2).to(q.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, q.new_empty(q.shape[:3] if weights is None else 0, dtype=wide)


def chunk_attention_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor | None,
    indices: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, chunk_size: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The operator `chunk_attention_backward` of `library`."""
    num_heads, head_dim = q.shape[2:]
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = (
        torch.zeros(x.shape[0] * x.shape[1] // chunk_size, chunk_size, *x.shape[2:],
                    dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) for x in (k, v)
    )  # fmt: skip
    d_weights = q.new_empty(0, dtype=torch.float32) if weights is None else torch.zeros_like(weights)
    retrieval_heads = indices.shape[2]
    rows_q, rows_out = (x.reshape(-1, retrieval_heads, num_heads // retrieval_heads, head_dim) for x in (d_q, d_out))
    for rows, r, kv, block, w in _blocks(q, k, v, weights, indices, chunk_size, scale):
        d_block = widen(rows_out[rows, r]).unflatten(1, (block.kv_heads, block.group))[
            :, None
        ]  # [n, 1, kv heads, G, D]
        outputs, lse = block.forward()
        d_pair_weights = (outputs * d_block).sum(-1)  # [n, K, kv heads, G]
        d_lse = None
        if w is None:
            w = _joint_weights(lse)
            d_lse = w * (d_pair_weights - (w * d_pair_weights).sum(1, keepdim=True))
        else:
            d_weights.flatten(0, 1)[rows, r] = d_pair_weights.sum((-1, -2)).to(weights.dtype)
            w = w[:, :, None, None]
        d_q_block = block.backward(w[..., None] * d_block, d_lse, d_k[..., kv, :], d_v[..., kv, :])
        rows_q[rows, r] = d_q_block.flatten(1, 2).to(q.dtype)
    if weights is not None:
        d_weights = d_weights.masked_fill(indices < 0, 0.0)
    return d_q, d_k.view(k.shape).to(k.dtype), d_v.view(v.shape).to(v.dtype), d_weights

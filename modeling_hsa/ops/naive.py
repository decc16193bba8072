"""
The oracle: selection, weighting and chunk attention of arXiv 2510.17196 (section 3) in fp32, by their definition.

Short and obviously right rather than fast: it materialises all scores and gathers every chunk for every token. The
other backends are held to it, outputs and gradients. Arguments are those of `modeling_hsa.ops`, checked there.

What is absent (index -1, or not visible) is replaced by zeros before anything is multiplied with it, so that it may
hold NaN, and its gradient is zero.
"""

# b batch, l queries, c chunks, k retrieved chunks, s tokens of a chunk, h query heads, r retrieval heads, d head dim

import torch

from ..precision import widen


def select_chunks(
    q: torch.Tensor,
    landmarks: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    *,
    topk: int,
    scale: float,
    distance_penalty: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each query the `topk` chunks of highest score, less `distance_penalty` for every doubling of the distance
    `end - i`, among `first <= i < end`; equal ones: the nearest (highest i).

    Args: q [b, l, r, d]; landmarks [b, c, r, d]; first, end int64 [1 | b, l].
    Returns: scores (without the penalty) [b, l, r, topk] fp32 and indices int32, nearest chunk first; absent: index
        -1, score -inf.
    """
    batch, num_chunks, heads, _ = landmarks.shape
    q, landmarks = q.float(), landmarks.float()
    chunk = torch.arange(num_chunks, device=q.device)
    visible = ((chunk >= first[..., None]) & (chunk < end[..., None]))[:, :, None]
    distance = (end.clamp(max=num_chunks)[..., None] - chunk).clamp(min=1)
    powers = 2 ** torch.arange(1, 63, device=q.device)
    octaves = torch.bucketize(distance, powers, right=True)  # floor(log2(distance)); log2 is not exact on CUDA
    preference = torch.einsum("blrd,bcrd->blrc", q.detach(), landmarks.detach()) * scale
    preference = (preference - distance_penalty * octaves[:, :, None]).masked_fill(~visible, float("-inf"))

    # A stable descending sort over the chunks from the nearest to the farthest breaks ties towards the nearest.
    best, order = (x[..., :topk] for x in preference.flip(-1).sort(dim=-1, descending=True, stable=True))
    indices = (num_chunks - 1 - order).masked_fill(best == float("-inf"), -1)
    indices = torch.nn.functional.pad(indices, (0, topk - indices.shape[-1]), value=-1)
    indices = indices.sort(dim=-1, descending=True).values

    absent = indices < 0
    row, head = torch.arange(batch, device=q.device)[:, None, None, None], torch.arange(heads, device=q.device)
    selected = landmarks[row, indices.clamp(min=0), head[:, None]]  # [b, l, r, k, d]
    selected = selected.masked_fill(absent[..., None], 0.0)
    scores = torch.einsum("blrd,blrkd->blrk", q, selected) * scale
    return scores.masked_fill(absent, float("-inf")), indices.to(torch.int32)


def chunk_weights(scores: torch.Tensor, indices: torch.Tensor, kind: str) -> torch.Tensor:
    """
    Weights of the retrieved chunks: `softmax` over the scores, or `stick_breaking`,
    `w_i = sigmoid(s_i) * prod_{j nearer than i} (1 - sigmoid(s_j))`. Absent chunks weigh 0.

    Args: scores [b, l, r, k]; indices [b, l, r, k], -1 for absent.
    Returns: weights [b, l, r, k] fp32.
    """
    present = indices >= 0
    scores = widen(scores)
    if kind == "softmax":
        scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True)) * present
        return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    take = torch.sigmoid(scores.masked_fill(~present, 0.0)) * present
    nearer = indices[..., None, :] > indices[..., :, None]  # [.., i, j]: j is nearer than i
    leave = torch.where(nearer, 1 - take[..., None, :], 1.0).prod(-1)
    return take * leave


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None,
    indices: torch.Tensor,
    *,
    chunk_size: int,
    scale: float,
) -> torch.Tensor:
    """
    `O_t = sum_i w[t, i] * softmax(scale * q_t K_i^T) V_i` over the retrieved chunks; with `weights` None (`joint`),
    one softmax over all retrieved tokens. A token without chunks gets 0.

    Args: q [b, l, h, d]; k, v [b, c * s, kv heads, d]; weights, indices [b, l, r, k], -1 for absent.
    Returns: [b, l, h, d] in the dtype of q.
    """
    batch, _, num_heads, head_dim = q.shape
    chunks = (batch, -1, chunk_size, k.shape[2], head_dim)
    k_chunks, v_chunks = widen(k).reshape(chunks), widen(v).reshape(chunks)
    row = torch.arange(batch, device=q.device)[:, None, None]
    outputs = []
    for head in range(num_heads):
        retrieval_head = head * indices.shape[2] // num_heads
        kv_head = head * k.shape[2] // num_heads
        absent = indices[:, :, retrieval_head] < 0
        chunk = indices[:, :, retrieval_head].long().clamp(min=0)
        keys, values = (
            x[row, chunk, :, kv_head].masked_fill(absent[..., None, None], 0.0) for x in (k_chunks, v_chunks)
        )  # [b, l, k, s, d]
        scores = torch.einsum("bld,blksd->blks", widen(q[:, :, head]), keys) * scale
        if weights is None:
            scores = scores.masked_fill(absent[..., None], torch.finfo(torch.float32).min)
            probs = scores.flatten(-2).softmax(-1).view_as(scores).masked_fill(absent[..., None], 0.0)
        else:
            weight = weights[:, :, retrieval_head].to(scores.dtype).masked_fill(absent, 0.0)
            probs = scores.softmax(-1) * weight[..., None]
        outputs.append(torch.einsum("blks,blksd->bld", probs, values))
    return torch.stack(outputs, dim=2).to(q.dtype)

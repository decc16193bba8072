"""
The oracle: selection, weighting and chunk attention of arXiv 2510.17196 (section 3) in fp32, by their definition.

Short and obviously right rather than fast: it materialises all scores and gathers every chunk for every token. The
other backends are held to it, outputs and gradients. Signatures and errors are those of `modeling_hsa.ops`.
"""

# b batch, l queries, c chunks, k retrieved chunks, s tokens of a chunk, h query heads, r retrieval heads, d head dim

import torch


def _widen(x):
    """Half precision to fp32, wider types as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def select_chunks(q, landmarks, first, end, *, topk, scale, distance_penalty=0.0):
    """
    For each query the `topk` chunks of highest score, less `distance_penalty` for every doubling of the distance
    `end - i`, among `first <= i < end`; equal ones: the nearest (highest i).

    Args: q [b, l, r, d]; landmarks [b, c, r, d]; first, end int64 [1 | b, l].
    Returns: scores [b, l, r, topk] fp32 and indices int32, nearest chunk first; absent: index -1, score -inf.
    """
    num_chunks = landmarks.shape[1]
    scores = torch.einsum("blrd,bcrd->blrc", q.float(), landmarks.float()) * scale
    chunk = torch.arange(num_chunks, device=q.device)
    visible = (chunk >= first[..., None]) & (chunk < end[..., None])
    scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    distance = (end.clamp(max=num_chunks)[..., None] - chunk).clamp(min=1)
    powers = 2 ** torch.arange(1, 63, device=q.device)
    octaves = torch.bucketize(distance, powers, right=True)  # floor(log2(distance)); log2 is not exact on CUDA
    preference = scores.detach() - distance_penalty * octaves[:, :, None]

    # A stable descending sort over the chunks from the nearest to the farthest breaks ties towards the nearest.
    order = preference.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    indices = (num_chunks - 1 - order).sort(dim=-1, descending=True).values
    scores = scores.gather(-1, indices)
    missing = topk - indices.shape[-1]
    scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
    indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    indices = indices.masked_fill(scores == float("-inf"), -1)
    # Absent chunks go last, whatever the index of the masked chunk that took their place.
    order = indices.argsort(dim=-1, descending=True, stable=True)
    return scores.gather(-1, order), indices.gather(-1, order).to(torch.int32)


def chunk_weights(scores, indices, kind):
    """
    Weights of the retrieved chunks: `softmax` over the scores, or `stick_breaking`,
    `w_i = sigmoid(s_i) * prod_{j nearer than i} (1 - sigmoid(s_j))`. Absent chunks weigh 0.

    Args: scores [b, l, r, k]; indices [b, l, r, k], -1 for absent.
    Returns: weights [b, l, r, k] fp32.
    """
    present = indices >= 0
    scores = _widen(scores)
    if kind == "softmax":
        scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True)) * present
        return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    take = torch.sigmoid(scores.masked_fill(~present, 0.0)) * present
    nearer = indices[..., None, :] > indices[..., :, None]  # [.., i, j]: j is nearer than i
    leave = torch.where(nearer, 1 - take[..., None, :], 1.0).prod(-1)
    return take * leave


def chunk_attention(q, k, v, weights, indices, *, chunk_size, scale):
    """
    `O_t = sum_i w[t, i] * softmax(scale * q_t K_i^T) V_i` over the retrieved chunks; with `weights` None (`joint`),
    one softmax over all retrieved tokens. A token without chunks gets 0.

    Args: q [b, l, h, d]; k, v [b, c * s, kv heads, d]; weights, indices [b, l, r, k], -1 for absent.
    Returns: [b, l, h, d] in the dtype of q.
    """
    batch, _, num_heads, head_dim = q.shape
    chunks = (batch, -1, chunk_size, k.shape[2], head_dim)
    k_chunks, v_chunks = _widen(k).reshape(chunks), _widen(v).reshape(chunks)
    row = torch.arange(batch, device=q.device)[:, None, None]
    outputs = []
    for head in range(num_heads):
        retrieval_head = head * indices.shape[2] // num_heads
        kv_head = head * k.shape[2] // num_heads
        present = indices[:, :, retrieval_head] >= 0
        chunk = indices[:, :, retrieval_head].long().clamp(min=0)
        keys, values = k_chunks[row, chunk, :, kv_head], v_chunks[row, chunk, :, kv_head]  # [b, l, k, s, d]
        scores = torch.einsum("bld,blksd->blks", _widen(q[:, :, head]), keys) * scale
        if weights is None:
            scores = scores.masked_fill(~present[..., None], torch.finfo(torch.float32).min)
            probs = scores.flatten(-2).softmax(-1).view_as(scores) * present[..., None]
        else:
            probs = scores.softmax(-1) * (_widen(weights[:, :, retrieval_head]) * present)[..., None]
        outputs.append(torch.einsum("blks,blksd->bld", probs, values))
    return torch.stack(outputs, dim=2).to(q.dtype)

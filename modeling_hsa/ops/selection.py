"""
Chunk selection in plain PyTorch, for any device: streams over blocks of landmarks and keeps the best K, so that the
[queries x chunks] scores never exist beyond one block. Backward goes through the K selected scores only.
"""

import torch


_BLOCK_ELEMENTS = 1 << 22  # scores (or gathered landmark entries) held at once


def _ordered_keys(scores: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """
    One int64 per (score, chunk) that sorts by score, then by chunk: the upper 32 bits are the fp32 score mapped to an
    integer of the same order, the lower ones the chunk. Makes top-K deterministic, the nearest chunk winning a tie.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 makes one zero of -0.0 and 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits << 32) | chunk


def _best_keys(q, landmarks, first, end, topk, scale):
    """q [n, d], landmarks [c, d] fp32, first and end [n] -> the `topk` best keys [n, topk] of each query."""
    absent = torch.iinfo(torch.int64).min
    best = torch.full((q.shape[0], topk), absent, dtype=torch.int64, device=q.device)
    block = max(topk, _BLOCK_ELEMENTS // max(q.shape[0], 1))
    start, stop = (int(first.min()), min(int(end.max()), landmarks.shape[0])) if q.shape[0] else (0, 0)
    for c in range(start, stop, block):
        chunk = torch.arange(c, min(c + block, stop), device=q.device)
        scores = (q @ landmarks[c : c + len(chunk)].T) * scale
        keys = _ordered_keys(scores, chunk)
        keys.masked_fill_((chunk < first[:, None]) | (chunk >= end[:, None]), absent)
        best = torch.cat([best, keys], dim=-1).topk(topk, dim=-1).values
    return best


class _SelectChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, landmarks, first, end, topk, scale):
        batch, length, heads, _ = q.shape
        best = torch.empty(batch, length, heads, topk, dtype=torch.int64, device=q.device)
        # A block of queries sees a block of landmarks at a time, so both are bounded.
        step = max(1, min(length, _BLOCK_ELEMENTS // max(1024, 2 * topk)))
        for b in range(batch):
            for r in range(heads):
                keys = landmarks[b, :, r].float()
                for t in range(0, length, step):
                    block = slice(t, t + step)
                    best[b, block, r] = _best_keys(
                        q[b, block, r].float(), keys, first[b, block], end[b, block], topk, scale
                    )
        absent = best == torch.iinfo(torch.int64).min
        indices = (best & 0xFFFFFFFF).masked_fill_(absent, -1)
        indices, order = indices.sort(dim=-1, descending=True)
        bits = best.gather(-1, order) >> 32
        scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)
        scores = scores.masked_fill(indices < 0, float("-inf"))
        indices = indices.to(torch.int32)
        ctx.save_for_backward(q, landmarks, indices)
        ctx.scale = scale
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    def backward(ctx, d_scores, _):
        q, landmarks, indices = ctx.saved_tensors
        batch, length, heads, dim = q.shape
        d_scores = (d_scores * ctx.scale).masked_fill(indices < 0, 0.0)
        d_q = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        d_landmarks = torch.zeros(landmarks.shape, dtype=torch.float32, device=q.device)
        step = max(1, _BLOCK_ELEMENTS // (indices.shape[-1] * dim))
        for b in range(batch):
            for r in range(heads):
                keys, d_keys = landmarks[b, :, r].float(), torch.zeros_like(d_landmarks[b, :, r])
                for t in range(0, length, step):
                    block = slice(t, t + step)
                    chunk = indices[b, block, r].long().clamp(min=0)
                    ds = d_scores[b, block, r]
                    d_q[b, block, r] = torch.einsum("lk,lkd->ld", ds, keys[chunk])
                    contributions = ds[..., None] * q[b, block, r].float()[:, None]
                    d_keys.index_add_(0, chunk.flatten(), contributions.flatten(0, 1))
                d_landmarks[b, :, r] = d_keys
        return d_q.to(q.dtype), d_landmarks.to(landmarks.dtype), None, None, None, None


def select_chunks(q, landmarks, first, end, *, topk, scale):
    """See `modeling_hsa.ops.select_chunks`; `first` and `end` are int64 [1 | B, L]."""
    first, end = (x.expand(q.shape[0], -1) for x in (first, end))
    with torch.autocast(device_type=q.device.type, enabled=False):
        return _SelectChunks.apply(q, landmarks, first, end, topk, scale)

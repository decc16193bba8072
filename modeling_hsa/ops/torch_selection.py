"""
The PyTorch backend of chunk selection, for any device: streams over blocks of landmarks and keeps the best K, so that
the [queries x chunks] scores never exist beyond one block. Backward goes through the K selected scores only.
"""

import torch


# Scores, or gathered landmark entries, held at once.
_BLOCK_ELEMENTS = 1 << 20
_ABSENT = torch.iinfo(torch.int64).min


def _ordered_keys(scores: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """
    One int64 per (score, chunk) that sorts by score, then by chunk: the upper 32 bits are the fp32 score mapped to an
    integer of the same order, the lower ones the chunk. Makes top-K deterministic, the nearest chunk winning a tie.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 makes one zero of -0.0 and 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits << 32) | chunk


def _split_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores and chunks of `_ordered_keys`, nearest chunk first; -inf and -1 where there is none."""
    chunk = (keys & 0xFFFFFFFF).masked_fill(keys == _ABSENT, -1)
    chunk, order = chunk.sort(dim=-1, descending=True)
    bits = keys.gather(-1, order) >> 32
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)
    return scores.masked_fill(chunk < 0, float("-inf")), chunk.to(torch.int32)


def distance_octaves(end: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """
    `floor(log2(end - chunk))`, how often the distance to a chunk has doubled, int32: 0 for the newest visible one, and
    where `chunk` is not below `end`. Exact for distances below 2^24, as it is read from the exponent of a float.
    """
    return torch.frexp((end - chunk).clamp(min=1).float()).exponent - 1


def _top_keys(scores: torch.Tensor, first_chunk: int, topk: int) -> torch.Tensor:
    """
    The `topk` best keys (fewer if there are fewer) of scores [rows, n, c] of the chunks from `first_chunk` on.

    Keys are eight bytes and cost several passes, maxima of the scores one: the best are sought in those `topk` groups
    of chunks alone whose best is among the `topk` best of all groups. Of groups with equal maxima the nearest are
    taken, whose chunks are nearer than all chunks of the others.
    """
    width = scores.shape[-1]
    group = 1 << (width // topk).bit_length() // 2  # about sqrt(width / topk), which makes the fewest keys
    chunk = torch.arange(first_chunk, first_chunk + width, device=scores.device)
    if width > 4 * topk * group:
        groups = torch.nn.functional.pad(scores, (0, -width % group), value=float("-inf")).unflatten(-1, (-1, group))
        number = torch.arange(groups.shape[-2], device=scores.device)
        chosen = _ordered_keys(groups.amax(-1), number).topk(topk, dim=-1).values & 0xFFFFFFFF  # [rows, n, topk]
        scores = groups.gather(-2, chosen[..., None].expand(*chosen.shape, group)).flatten(-2)
        chunk = (first_chunk + chosen[..., None] * group + torch.arange(group, device=scores.device)).flatten(-2)
    keys = _ordered_keys(scores, chunk).masked_fill(scores == float("-inf"), _ABSENT)
    return keys.topk(min(topk, keys.shape[-1]), dim=-1).values


def _best_keys(
    q: torch.Tensor, landmarks: torch.Tensor, first: torch.Tensor, end: torch.Tensor, topk: int, scale: float,
    distance_penalty: float,
) -> torch.Tensor:  # fmt: skip
    """q [rows, n, d], landmarks [rows, c, d], first and end [rows, n] -> the `topk` best keys of each query."""
    rows, length, _ = q.shape
    best = torch.full((rows, length, topk), _ABSENT, dtype=torch.int64, device=q.device)
    start, stop = 0, landmarks.shape[1]
    block = max(topk, _BLOCK_ELEMENTS // (rows * length))
    if stop > block:  # worth a look at what is visible at all
        start, stop = int(first.min()), min(int(end.max()), stop)
    for c in range(start, stop, block):
        chunk = torch.arange(c, min(c + block, stop), device=q.device)
        scores = (q.float() @ landmarks[:, c : c + len(chunk)].float().transpose(1, 2)) * scale
        if distance_penalty:
            scores -= distance_penalty * distance_octaves(end[..., None], chunk)
        scores.masked_fill_((chunk < first[..., None]) | (chunk >= end[..., None]), float("-inf"))
        best = torch.cat([best, _top_keys(scores, c, topk)], dim=-1).topk(topk, dim=-1).values
    return best


def selected_scores(q: torch.Tensor, landmarks: torch.Tensor, indices: torch.Tensor, scale: float) -> torch.Tensor:
    """
    `scale * q . landmark` of the chunks `indices` [B, L, Hr, K], fp32; -inf where there is none (-1). Made of plain
    operations, so differentiable in every mode. Differs from the scores that selected by the order of an fp32 sum.
    """
    batch, length, heads, dim = q.shape
    row = torch.arange(batch, device=q.device)[:, None, None, None]
    head = torch.arange(heads, device=q.device)[:, None]
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * indices.shape[-1] * dim))
    scores = []
    for t in range(0, max(1, length), step):
        block = slice(t, t + step)
        absent = indices[:, block] < 0
        selected = landmarks[row, indices[:, block].long().clamp(min=0), head].float()  # [B, block, Hr, K, d]
        selected = selected.masked_fill(absent[..., None], 0.0)  # what stands in for no chunk may hold anything
        products = (selected @ q[:, block].float()[..., None]).squeeze(-1) * scale
        scores.append(products.masked_fill(absent, float("-inf")))
    return torch.cat(scores, dim=1)


def select_chunks_forward(
    q: torch.Tensor, landmarks: torch.Tensor, first: torch.Tensor, end: torch.Tensor, topk: int, scale: float,
    distance_penalty: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The operator `select_chunks` of `library`."""
    batch, length, heads, _ = q.shape
    # A row is a retrieval head of a batch entry: [rows, L, d], landmarks [rows, C, d], first and end [rows, L].
    row_q, row_landmarks = (x.transpose(1, 2).flatten(0, 1) for x in (q, landmarks))
    rows, num_chunks = row_landmarks.shape[:2]
    end = end.clamp(max=num_chunks)
    first, end = (x.expand(batch, length).repeat_interleave(heads, dim=0) for x in (first, end))
    best = torch.empty(rows, length, topk, dtype=torch.int64, device=q.device)
    # As many queries as leave room for a thousand landmarks at a time, and as many rows as then fit.
    step = max(1, min(length, _BLOCK_ELEMENTS // max(1024, 2 * topk)))
    row_step = max(1, _BLOCK_ELEMENTS // (step * (num_chunks + topk)))
    for b in range(0, rows, row_step):
        row = slice(b, b + row_step)
        for t in range(0, length, step):
            block = slice(t, t + step)
            best[row, block] = _best_keys(
                row_q[row, block], row_landmarks[row], first[row, block], end[row, block],
                topk, scale, distance_penalty,
            )  # fmt: skip
    scores, indices = (x.unflatten(0, (batch, heads)).transpose(1, 2).contiguous() for x in _split_keys(best))
    if distance_penalty:  # the keys hold the scores less the penalty
        scores = selected_scores(q, landmarks, indices, scale)
    return scores, indices


def select_chunks_backward(
    d_scores: torch.Tensor, q: torch.Tensor, landmarks: torch.Tensor, indices: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `select_chunks_backward` of `library`."""
    batch, num_chunks, heads, dim = landmarks.shape
    # Absent chunks read any landmark, which may hold NaN, and write to a row of their own, beyond the last.
    rows = batch * heads * num_chunks
    row = torch.arange(batch * heads, device=q.device).view(batch, 1, heads, 1) * num_chunks
    absent = (indices < 0).flatten(0, 2)
    chunk = (indices + row).flatten(0, 2).masked_fill(absent, rows)
    d_scores = (d_scores * scale).flatten(0, 2).masked_fill(absent, 0.0)
    flat_q, flat_landmarks = q.reshape(-1, dim), landmarks.transpose(1, 2).reshape(-1, dim)
    d_q = torch.empty(flat_q.shape, dtype=torch.float32, device=q.device)
    d_landmarks = torch.zeros(rows + 1, dim, dtype=torch.float32, device=q.device)
    step = max(1, _BLOCK_ELEMENTS // (indices.shape[-1] * dim))
    for t in range(0, len(flat_q), step):
        block = slice(t, t + step)
        ds = d_scores[block]
        selected = flat_landmarks[chunk[block].clamp(max=rows - 1)].float()
        selected = selected.masked_fill_(absent[block][..., None], 0.0)
        d_q[block] = (ds[:, None] @ selected).squeeze(1)
        contributions = ds[..., None] * flat_q[block].float()[:, None]
        d_landmarks.index_add_(0, chunk[block].flatten(), contributions.flatten(0, 1))
    d_landmarks = d_landmarks[:-1].view(batch, heads, num_chunks, dim).transpose(1, 2)
    return d_q.view(q.shape).to(q.dtype), d_landmarks.to(landmarks.dtype, memory_format=torch.contiguous_format)

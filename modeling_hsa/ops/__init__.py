"""
The three operations of Hierarchical Sparse Attention and the one place that picks their backend.

`implementation` is `"auto"` (the fastest backend that runs on the device of the tensors), `"triton"` (fused CUDA
kernels), `"torch"` (plain PyTorch, any device) or `"naive"` (the fp32 oracle). A backend that was asked for by name
and cannot run raises; where `"auto"` cannot use the kernels on a CUDA device, it says why, once.
"""

import math

import torch

from .availability import pick_backend
from .library import chunk_attention as _chunk_attention
from .library import count_from
from .library import select_chunks as _select_chunks
from .naive import chunk_attention as _naive_chunk_attention
from .naive import chunk_weights as _naive_chunk_weights
from .naive import select_chunks as _naive_select_chunks
from .precision import without_autocast
from .selection import distance_octaves


_KINDS = ("softmax", "stick_breaking", "joint")


def _check_same(**tensors: torch.Tensor) -> None:
    (name, reference), *others = tensors.items()
    for other, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"`{other}` is on {tensor.device} but `{name}` on {reference.device}. Move one of them.")
        if tensor.dtype != reference.dtype:
            raise ValueError(f"`{other}` is {tensor.dtype} but `{name}` {reference.dtype}. Cast one of them.")


def _check_shape(name: str, tensor: torch.Tensor, *shape: int | None) -> None:
    if tensor.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, tensor.shape)):
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"`{name}` must have the shape [{wanted}], got {list(tensor.shape)}.")


def _zeros_connected_to(*tensors: torch.Tensor) -> torch.Tensor:
    """
    Zeros like the first tensor, connected to all in the autograd graph: an input too short to have a chunk still gives
    every parameter a (zero) gradient, which data-parallel training needs.
    """
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return torch.zeros_like(tensors[0])
    return tensors[0] * 0 + sum(x[..., :0].sum() for x in tensors).to(tensors[0].dtype)


def visible_chunks(length: int, chunk_size: int, q_start: int | torch.Tensor = 0, device=None):
    """
    The chunks visible to queries at the positions `q_start + t`: chunk i iff all its tokens are strictly in the past,
    `(i + 1) * chunk_size <= q_start + t` (section 3 of arXiv 2510.17196).

    Returns: `(first, end)`, int64 [1 | B, L]: chunk i is visible iff `first <= i < end`.
    """
    if isinstance(q_start, torch.Tensor):
        position = count_from(0, length, device) + q_start[:, None]
    else:
        position = count_from(q_start, length, device)[None]
    end = position // chunk_size
    return torch.zeros_like(end), end


def select_chunks(
    q: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    topk: int,
    chunk_size: int,
    q_start: int | torch.Tensor = 0,
    visible: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    distance_penalty: float = 0.0,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `topk` chunks with the highest scores `scale * q_t . landmark_i` among those visible to each query (eq. of
    section 3, arXiv 2510.17196). Deterministic: of equal scores, the nearest chunk. Differentiable in `q` and
    `landmarks` through the selected scores.

    Args:
        q: retrieval queries [B, L, Hr, d_r], any float dtype; scores are computed in fp32.
        landmarks: [B, C, Hr, d_r], of the dtype and on the device of `q`.
        topk: chunks to keep, K >= 1. May exceed C.
        chunk_size: tokens per chunk, S.
        q_start: position of the first query in its sequence, an int or an int64 tensor [B]. Chunk i is visible to the
            query at position p iff `(i + 1) * S <= p`.
        visible: replaces `q_start`: `(first, end)`, each int64 [1 | B, L]; chunk i is visible iff `first <= i < end`.
        scale: defaults to `d_r ** -0.5`.
        distance_penalty: at least 0. Chunks are selected by their score less this for every doubling of their
            distance, `floor(log2(n - i))` for chunk i if chunk n - 1 is the newest visible one. The scores returned
            are those without it, to rounding. (Not in the paper, where it is 0.)
        implementation: see the module.

    Returns:
        scores [B, L, Hr, K] fp32 and indices [B, L, Hr, K] int32, ordered from the nearest chunk to the farthest.
        Where fewer than K chunks are visible the rest has index -1 and score -inf.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit. NotImplementedError: no such backend.
    """
    if q.dim() != 4:
        raise ValueError(f"`q` must have the shape [B, L, Hr, d_r], got {list(q.shape)}.")
    if topk < 1:
        raise ValueError(f"`topk` must be at least 1, got {topk}.")
    if not 0 <= distance_penalty < math.inf:
        raise ValueError(f"`distance_penalty` must be a number of at least 0, got {distance_penalty}.")
    batch, length, heads, dim = q.shape
    _check_shape("landmarks", landmarks, batch, None, heads, dim)
    _check_same(q=q, landmarks=landmarks)
    backend = pick_backend(implementation, q, retrieval_dim=dim, topk=topk)
    if visible is None:
        visible = visible_chunks(length, chunk_size, q_start, q.device)
    for name, bound in zip(("visible[0]", "visible[1]"), visible):
        _check_shape(name, bound, batch if bound.shape[0] != 1 else 1, length)
    if landmarks.shape[1] == 0:
        absent = torch.full((batch, length, heads, topk), -1, dtype=torch.int32, device=q.device)
        scores = torch.full(absent.shape, float("-inf"), device=q.device)
        return scores + _zeros_connected_to(q, landmarks).float()[..., :1], absent
    scale = dim**-0.5 if scale is None else scale
    if backend == "naive":
        options = {"topk": topk, "scale": scale, "distance_penalty": distance_penalty}
        return without_autocast(_naive_select_chunks)(q, landmarks, *visible, **options)
    scores, indices = _select_chunks(q, landmarks, *visible, topk, scale, float(distance_penalty), backend)
    if distance_penalty:
        newest = visible[1].clamp(max=landmarks.shape[1])[..., None, None]
        scores = scores + distance_penalty * distance_octaves(newest, indices)
    return scores, indices


def chunk_weights(scores: torch.Tensor, indices: torch.Tensor, kind: str, implementation: str = "auto"):
    """
    Weights of the retrieved chunks from their scores.

    Args:
        scores, indices: [B, L, Hr, K] as `select_chunks` returns them, nearest chunk first; index -1 for absent.
        kind: `"softmax"` over the scores; `"stick_breaking"` from the nearest chunk on,
            `w_i = sigmoid(s_i) * prod_{j nearer} (1 - sigmoid(s_j))`; or `"joint"`, for which the weights depend on
            the tokens of the chunks and are left to `chunk_attention`.

    Returns:
        weights [B, L, Hr, K] fp32, 0 for absent chunks; None for `"joint"`.

    Raises:
        ValueError: unknown `kind` or shapes that differ.
    """
    backend = pick_backend(implementation, scores)
    if kind not in _KINDS:
        raise ValueError(f"`kind` must be one of {_KINDS}, got {kind!r}.")
    _check_shape("indices", indices, *scores.shape)
    if kind == "joint":
        return None
    if backend == "naive" or kind == "softmax":
        return _naive_chunk_weights(scores, indices, kind)
    present = indices >= 0
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~present, 0.0)
    leave = torch.nn.functional.logsigmoid(-scores).masked_fill(~present, 0.0)
    log_weights = torch.nn.functional.logsigmoid(scores) + leave.cumsum(-1) - leave
    return log_weights.exp() * present


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None,
    indices: torch.Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """
    Attention inside each retrieved chunk, fused with the weights of the chunks (section 3, arXiv 2510.17196):
    `O_t = sum_i w[t, i] * softmax(scale * q_t K_i^T) V_i`.

    Args:
        q: [B, L, Hq, D].
        k, v: [B, C * S, Hkv, D], of the dtype and on the device of `q`; Hkv divides Hq. Query head h attends with
            key/value head `h // (Hq / Hkv)` to the chunks of retrieval head `h // (Hq / Hr)`.
        weights: [B, L, Hr, K], or None for `joint`: one softmax over all tokens of the retrieved chunks.
        indices: [B, L, Hr, K] integer, each in [-1, C), no chunk twice for a query; -1: none. Hr divides Hq, and
            one of Hr and Hkv the other. Not range-checked, as that would stall the device.
        chunk_size: S.
        scale: more than 0 and finite, defaults to `D ** -0.5`.
        implementation: see the module.

    Returns:
        [B, L, Hq, D] in the dtype of `q`; exactly 0 for a token without chunks. Differentiable in q, k, v and weights.

    Raises:
        ValueError: for shapes, dtypes, devices or a scale that do not fit. NotImplementedError: no such backend.
    """
    if q.dim() != 4:
        raise ValueError(f"`q` must have the shape [B, L, Hq, D], got {list(q.shape)}.")
    batch, length, heads, dim = q.shape
    _check_shape("k", k, batch, None, None, dim)
    _check_shape("v", v, *k.shape)
    _check_same(q=q, k=k, v=v)
    _check_shape("indices", indices, batch, length, None, None)
    if weights is not None:
        _check_shape("weights", weights, *indices.shape)
    if k.shape[1] % chunk_size:
        raise ValueError(f"The length of `k` ({k.shape[1]}) must be a multiple of `chunk_size` ({chunk_size}).")
    kv_heads, retrieval_heads = k.shape[2], indices.shape[2]
    few, many = sorted((kv_heads, retrieval_heads))
    if heads % kv_heads or heads % retrieval_heads or many % few:
        raise ValueError(
            f"The {heads} heads of `q` must be a multiple of the {kv_heads} of `k` and of the {retrieval_heads} of "
            "`indices`, and one of these two a multiple of the other."
        )
    scale = dim**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be more than 0 and finite, got {scale}. None is `D ** -0.5`.")
    backend = pick_backend(implementation, q, head_dim=dim, chunk_size=chunk_size, topk=indices.shape[3])
    if k.shape[1] == 0 or length == 0:
        return _zeros_connected_to(q, k, v, *(() if weights is None else (weights,)))
    if backend == "naive":
        function = without_autocast(_naive_chunk_attention)
        return function(q, k, v, weights, indices, chunk_size=chunk_size, scale=scale)
    out, _ = _chunk_attention(q, k, v, weights, indices, chunk_size, scale, backend)
    return out


__all__ = ["chunk_attention", "chunk_weights", "select_chunks", "visible_chunks"]

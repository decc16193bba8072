"""
The three operations of Hierarchical Sparse Attention and the one place that picks their backend.

`implementation` is `"auto"` (the fastest backend that runs on the device of the tensors), `"triton"` (fused CUDA
kernels), `"torch"` (plain PyTorch, any device) or `"naive"` (the fp32 oracle). A backend that was asked for by name
and cannot run raises; where `"auto"` cannot use the kernels on a CUDA device, it says why, once.
"""

import torch

from ..counting import count_from
from ..precision import without_autocast
from .availability import is_batched, is_transformed, pick_backend
from .checks import (
    check_device,
    check_floating,
    check_int,
    check_integer,
    check_number,
    check_same,
    check_shape,
    check_sizes,
)
from .library import chunk_attention as _chunk_attention
from .library import select_chunks as _select_chunks
from .naive import chunk_attention as _naive_chunk_attention
from .naive import chunk_weights as _naive_chunk_weights
from .naive import select_chunks as _naive_select_chunks
from .torch_attention import chunk_attention_forward as _torch_chunk_attention
from .torch_selection import selected_scores
from .torch_weights import stick_breaking_weights


_KINDS = ("softmax", "stick_breaking", "joint")


def _zeros_connected_to(*tensors: torch.Tensor) -> torch.Tensor:
    """
    Zeros like the first tensor, connected to all in the autograd graph: an input too short to have a chunk still gives
    every parameter a (zero) gradient, which data-parallel training needs.
    """
    zeros = torch.zeros_like(tensors[0])
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return zeros
    # Sums of nothing: whatever the tensors hold.
    return zeros + sum(x[..., :0].sum() for x in tensors).to(zeros.dtype)


def _check_start(q_start: int | torch.Tensor, batch: int | None = None) -> None:
    if isinstance(q_start, torch.Tensor):
        check_shape("q_start", q_start, "B" if batch is None else batch)
        check_integer("q_start", q_start)
    else:
        check_int("q_start", q_start, minimum=0)


def visible_chunks(
    length: int,
    chunk_size: int,
    q_start: int | torch.Tensor = 0,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The chunks visible to queries at the positions `q_start + t`: chunk i iff all its tokens are strictly in the past,
    `(i + 1) * chunk_size <= q_start + t` (section 3 of arXiv 2510.17196).

    Args:
        length: queries, L.
        chunk_size: tokens per chunk, at least 1.
        q_start: position of the first query, at least 0: an int, or int32 or int64 [B].
        device: of the result; by default that of `q_start`.

    Returns: `(first, end)`, int64 [1 | B, L]: chunk i is visible iff `first <= i < end`.

    Raises: TypeError, ValueError: for arguments of another type or size.
    """
    check_int("length", length, minimum=0)
    check_int("chunk_size", chunk_size, minimum=1)
    _check_start(q_start)
    if isinstance(q_start, torch.Tensor):
        position = count_from(0, length, q_start.device if device is None else device) + q_start[:, None]
    else:
        position = count_from(q_start, length, device)[None]
    end = position // chunk_size
    return torch.zeros_like(end), end


def _check_visible(visible: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, q_start: int | torch.Tensor) -> None:
    if isinstance(q_start, torch.Tensor) or q_start != 0:
        raise ValueError("`visible` replaces `q_start`. Leave out one of them.")
    if not isinstance(visible, (tuple, list)) or len(visible) != 2:
        raise TypeError("`visible` must be a pair of tensors, `(first, end)`.")
    batch, length = q.shape[:2]
    for name, bound in zip(("visible[0]", "visible[1]"), visible):
        one = isinstance(bound, torch.Tensor) and bound.dim() > 0 and bound.shape[0] == 1
        check_shape(name, bound, 1 if one else batch, length)
        check_integer(name, bound)
        check_device(name, bound, "q", q)


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
        chunk_size: tokens per chunk, S >= 1.
        q_start: position of the first query in its sequence, at least 0: an int, or int32 or int64 [B]. Chunk i is
            visible to the query at position p iff `(i + 1) * S <= p`.
        visible: replaces `q_start`: `(first, end)`, each int32 or int64 [1 | B, L]; chunk i is visible iff
            `first <= i < end`. Landmarks of other chunks may hold anything, also NaN.
        scale: finite, defaults to `d_r ** -0.5`.
        distance_penalty: at least 0. Chunks are selected by their score less this for every doubling of their
            distance, `floor(log2(n - i))` for chunk i if chunk n - 1 is the newest visible one. The scores returned
            are those without it: computed anew, in fp32, for the chunks that were selected. (Not in the paper, where
            it is 0.)
        implementation: see the module.

    Returns:
        scores [B, L, Hr, K] fp32 and indices [B, L, Hr, K] int32, ordered from the nearest chunk to the farthest.
        Where fewer than K chunks are visible the rest has index -1 and score -inf.

    Derivatives in forward mode and by the transforms of `torch.func` are those of plain PyTorch: right, of any order,
    but keeping what backward else computes anew. Second derivatives by `torch.autograd` need the implementation
    `"naive"`; the others refuse them.

    Raises:
        TypeError, ValueError: for types, shapes, dtypes, devices or numbers that do not fit.
        NotImplementedError: the implementation cannot run here.
    """
    check_shape("q", q, "B", "L", "Hr", "d_r")
    check_sizes("q", q, Hr=2, d_r=3)
    check_int("topk", topk, minimum=1)
    check_int("chunk_size", chunk_size, minimum=1)
    check_number("distance_penalty", distance_penalty, "a number of at least 0", least=0.0)
    batch, length, heads, dim = q.shape
    check_shape("landmarks", landmarks, batch, None, heads, dim)
    check_same(q=q, landmarks=landmarks)
    scale = dim**-0.5 if scale is None else scale
    check_number("scale", scale, "finite")
    transformed = is_transformed(q, landmarks)
    backend = pick_backend(implementation, q, transformed, retrieval_dim=dim, topk=topk)
    if visible is None:
        _check_start(q_start, batch)
        if isinstance(q_start, torch.Tensor):
            check_device("q_start", q_start, "q", q)
        visible = visible_chunks(length, chunk_size, q_start, q.device)
    else:
        _check_visible(visible, q, q_start)
    if landmarks.shape[1] == 0 or batch == 0:
        absent = torch.full((batch, length, heads, topk), -1, dtype=torch.int32, device=q.device)
        scores = torch.full(absent.shape, float("-inf"), device=q.device)
        return scores + _zeros_connected_to(q, landmarks).float()[..., :1], absent
    if backend == "naive":
        options = {"topk": topk, "scale": scale, "distance_penalty": distance_penalty}
        return without_autocast(_naive_select_chunks)(q, landmarks, *visible, **options)
    options = topk, scale, float(distance_penalty), backend
    if not transformed:
        return _select_chunks(q, landmarks, *visible, *options)
    _, indices = _select_chunks(q.detach(), landmarks.detach(), *visible, *options)
    return without_autocast(selected_scores)(q, landmarks, indices, scale), indices


def chunk_weights(
    scores: torch.Tensor, indices: torch.Tensor, kind: str, implementation: str = "auto"
) -> torch.Tensor | None:
    """
    Weights of the retrieved chunks from their scores.

    Args:
        scores: [B, L, Hr, K] as `select_chunks` returns them, nearest chunk first; not looked at where absent.
        indices: int32 or int64 [B, L, Hr, K]; -1 for absent.
        kind: `"softmax"` over the scores; `"stick_breaking"` from the nearest chunk on,
            `w_i = sigmoid(s_i) * prod_{j nearer} (1 - sigmoid(s_j))`; or `"joint"`, for which the weights depend on
            the tokens of the chunks and are left to `chunk_attention`.
        implementation: see the module. The weights are plain PyTorch in all but `"naive"`.

    Returns:
        weights [B, L, Hr, K] fp32, 0 for absent chunks; None for `"joint"`.

    Raises:
        TypeError, ValueError: unknown `kind`, or shapes, dtypes or devices that do not fit.
        NotImplementedError: the implementation cannot run here.
    """
    check_shape("scores", scores, "B", "L", "Hr", "K")
    backend = pick_backend(implementation, scores)
    if kind not in _KINDS:
        raise ValueError(f"`kind` must be one of {_KINDS}, got {kind!r}.")
    check_floating("scores", scores)
    check_shape("indices", indices, *scores.shape)
    check_sizes("indices", indices, Hr=2, K=3)
    check_integer("indices", indices)
    check_device("indices", indices, "scores", scores)
    if kind == "joint":
        return None
    if backend == "naive" or kind == "softmax":
        return _naive_chunk_weights(scores, indices, kind)
    return stick_breaking_weights(scores, indices)


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
        weights: [B, L, Hr, K] of any float dtype, or None for `joint`: one softmax over all tokens of the retrieved
            chunks. Not looked at where the index is -1.
        indices: int32 or int64 [B, L, Hr, K], each in [-1, C), no chunk twice for a query; -1: none. Hr divides Hq,
            and one of Hr and Hkv the other. Not range-checked, as that would stall the device.
        chunk_size: S >= 1.
        scale: more than 0 and finite, defaults to `D ** -0.5`.
        implementation: see the module.

    Returns:
        [B, L, Hq, D] in the dtype of `q`; exactly 0 for a token without chunks. Differentiable in q, k, v and weights
        (in which modes: see `select_chunks`). Chunks that no query retrieved may hold anything, also NaN.

    Raises:
        TypeError, ValueError: for types, shapes, dtypes, devices or a scale that do not fit.
        NotImplementedError: the implementation cannot run here.
    """
    check_int("chunk_size", chunk_size, minimum=1)
    _check_attention(q, k, v, weights, indices, chunk_size)
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    check_number("scale", scale, "more than 0 and finite", above=0.0)
    tensors = (q, k, v) if weights is None else (q, k, v, weights)
    transformed = is_transformed(*tensors)
    shape = {"head_dim": dim, "chunk_size": chunk_size, "topk": indices.shape[3]}
    backend = pick_backend(implementation, q, transformed, **shape)
    if k.numel() == 0 or q.numel() == 0:
        return _zeros_connected_to(*tensors)
    if backend == "naive":
        function = without_autocast(_naive_chunk_attention)
        return function(q, k, v, weights, indices, chunk_size=chunk_size, scale=scale)
    if transformed:
        if is_batched(indices):
            raise NotImplementedError(
                "`torch.func.vmap` over derivatives of chunk attention, where each example has `indices` of its own, "
                "needs `implementation='naive'` (`hsa_implementation='naive'` in the config)."
            )
        out, _ = without_autocast(_torch_chunk_attention)(q, k, v, weights, indices, chunk_size, scale)
    else:
        out, _ = _chunk_attention(q, k, v, weights, indices, chunk_size, scale, backend)
    return out


def _check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor | None,
    indices: torch.Tensor,
    chunk_size: int,
) -> None:
    check_shape("q", q, "B", "L", "Hq", "D")
    batch, length, heads, dim = q.shape
    check_shape("k", k, batch, None, None, dim)
    check_shape("v", v, *k.shape)
    check_same(q=q, k=k, v=v)
    check_sizes("q", q, Hq=2, D=3)
    check_sizes("k", k, Hkv=2)
    check_shape("indices", indices, batch, length, None, None)
    check_sizes("indices", indices, Hr=2, K=3)
    if weights is not None:
        check_shape("weights", weights, *indices.shape)
        check_floating("weights", weights)
        check_device("weights", weights, "q", q)
    if k.shape[1] % chunk_size:
        raise ValueError(f"The length of `k` ({k.shape[1]}) must be a multiple of `chunk_size` ({chunk_size}).")
    kv_heads, retrieval_heads = k.shape[2], indices.shape[2]
    few, many = sorted((kv_heads, retrieval_heads))
    if heads % kv_heads or heads % retrieval_heads or many % few:
        raise ValueError(
            f"The {heads} heads of `q` must be a multiple of the {kv_heads} of `k` and of the {retrieval_heads} of "
            "`indices`, and one of these two a multiple of the other."
        )
    check_integer("indices", indices)
    check_device("indices", indices, "q", q)

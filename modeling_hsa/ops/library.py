"""
Selection and chunk attention as operators of PyTorch: `torch.compile` sees one node of known shapes, autograd its
backward. The operators are the same for every backend, which is an argument: four functions of plain tensors.
"""

import re
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from ..precision import without_autocast
from .torch_attention import chunk_attention_backward as torch_attention_backward
from .torch_attention import chunk_attention_forward as torch_attention
from .torch_selection import select_chunks_backward as torch_selection_backward
from .torch_selection import select_chunks_forward as torch_selection


# A copy of this file that was loaded from the Hub registers operators of its own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


def _selection(backend: str) -> tuple[Callable, Callable]:
    """Forward and backward of the selection; Triton is imported where it is used."""
    if backend == "torch":
        return torch_selection, torch_selection_backward
    from .triton_selection import select_chunks_backward, select_chunks_forward

    return select_chunks_forward, select_chunks_backward


def _attention(backend: str) -> tuple[Callable, Callable]:
    """Forward and backward of chunk attention."""
    if backend == "torch":
        return torch_attention, torch_attention_backward
    from .triton_attention import chunk_attention_backward, chunk_attention_forward

    return chunk_attention_forward, chunk_attention_backward


@torch.library.custom_op(f"{_NAMESPACE}::select_chunks", mutates_args=())
def select_chunks(
    q: Tensor, landmarks: Tensor, first: Tensor, end: Tensor, topk: int, scale: float, distance_penalty: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `modeling_hsa.ops.select_chunks`; `first` and `end` are integers [1 | B, L]."""
    return without_autocast(_selection(backend)[0])(q, landmarks, first, end, topk, scale, distance_penalty)


@torch.library.custom_op(f"{_NAMESPACE}::select_chunks_backward", mutates_args=())
def select_chunks_backward(
    d_scores: Tensor, q: Tensor, landmarks: Tensor, indices: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """d_scores [B, L, Hr, K] fp32 -> the gradients of q and landmarks."""
    return without_autocast(_selection(backend)[1])(d_scores, q, landmarks, indices, scale)


@torch.library.custom_op(f"{_NAMESPACE}::chunk_attention", mutates_args=())
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, indices: Tensor, chunk_size: int, scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    See `modeling_hsa.ops.chunk_attention`. Returns the output and, for `joint`, [B, L, Hq] fp32 (else empty) for
    backward alone: from Triton the log-sum-exp of the scaled scores to the base 2, from PyTorch nothing of use.
    """
    return without_autocast(_attention(backend)[0])(q, k, v, weights, indices, chunk_size, scale)


@torch.library.custom_op(f"{_NAMESPACE}::chunk_attention_backward", mutates_args=())
def chunk_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, indices: Tensor, out: Tensor, lse: Tensor,
    chunk_size: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d_out [B, L, Hq, D] -> the gradients of q, k, v and the weights (for `joint` the last is empty)."""
    function = without_autocast(_attention(backend)[1])
    return function(d_out, q, k, v, weights, indices, out, lse, chunk_size, scale)


# -- shapes ----------------------------------------------------------------------------------------------------------


@select_chunks.register_fake
def _(q, landmarks, first, end, topk, scale, distance_penalty, backend):
    shape = (*q.shape[:3], topk)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.int32)


@select_chunks_backward.register_fake
def _(d_scores, q, landmarks, indices, scale, backend):
    return q.new_empty(q.shape), landmarks.new_empty(landmarks.shape)


@chunk_attention.register_fake
def _(q, k, v, weights, indices, chunk_size, scale, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if weights is None else 0, dtype=wide)


@chunk_attention_backward.register_fake
def _(d_out, q, k, v, weights, indices, out, lse, chunk_size, scale, backend):
    d_weights = q.new_empty(0, dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_weights


# -- autograd --------------------------------------------------------------------------------------------------------


def _save_selection(ctx, inputs, output):
    q, landmarks, _, _, _, scale, _, backend = inputs
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(q, landmarks, indices)
    ctx.arguments = scale, backend


def _selection_gradients(ctx, d_scores, _):
    d_q, d_landmarks = select_chunks_backward(d_scores, *ctx.saved_tensors, *ctx.arguments)
    return d_q, d_landmarks, *[None] * 6


def _save_attention(ctx, inputs, output):
    *tensors, chunk_size, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    # Without `joint`, backward needs nothing of the output: not kept alive.
    ctx.save_for_backward(*tensors, lse if tensors[3] is not None else out, lse)
    ctx.arguments = chunk_size, scale, backend


def _attention_gradients(ctx, d_out, _):
    saved = ctx.saved_tensors  # checkpointing lets them be read once
    d_q, d_k, d_v, d_weights = chunk_attention_backward(d_out, *saved, *ctx.arguments)
    return d_q, d_k, d_v, None if saved[3] is None else d_weights, *[None] * 4


def _refuse_second_derivatives(ctx, *gradients) -> NoReturn:
    raise NotImplementedError(
        "Selection and chunk attention have first derivatives only in the backends 'torch' and 'triton'. For second "
        "ones use `implementation='naive'` (`hsa_implementation='naive'` in the config), or `torch.func.grad` twice."
    )


select_chunks.register_autograd(_selection_gradients, setup_context=_save_selection)
chunk_attention.register_autograd(_attention_gradients, setup_context=_save_attention)
select_chunks_backward.register_autograd(_refuse_second_derivatives)
chunk_attention_backward.register_autograd(_refuse_second_derivatives)

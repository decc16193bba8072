"""The losses: of chosen tokens, without ever holding the logits of all of them, and of retrieval."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from modeling_hsa.retrieval import ChunkRetrieval

from .batches import Tokens


class TokenLosses(NamedTuple):
    """Of N tokens: the weighted sum of all, and what it is made of, without gradients."""

    loss: torch.Tensor  # fp32 []
    entropy: torch.Tensor  # fp32 [N] cross-entropy
    divergence: torch.Tensor  # fp32 [N] of the model from its teacher, 0 without one
    right: torch.Tensor  # bool [N] whether it is the most likely one


def terms(logits, target, weight, taught, teacher_logits=None):
    """
    Of n tokens with `logits` [n, V]: cross-entropy, divergence from the teacher, whether they are the most likely
    ones, and the gradient of the weighted sum with respect to the logits.
    """
    log_p = logits.float().log_softmax(-1)
    entropy = -log_p.gather(-1, target[:, None])[:, 0]
    right = log_p.argmax(-1) == target
    is_target = torch.arange(logits.shape[-1], device=logits.device) == target[:, None]
    gradient = log_p.exp() * (weight + taught)[:, None] - is_target * weight[:, None]
    if teacher_logits is None:
        divergence = torch.zeros_like(entropy)
    else:
        log_t = teacher_logits.float().log_softmax(-1)
        divergence = (log_t.exp() * (log_t - log_p)).sum(-1)
        gradient = gradient - log_t.exp() * taught[:, None]
    return entropy, divergence, right, gradient.to(logits.dtype)


class _TokenLosses(torch.autograd.Function):
    """Computes the gradient along with the loss, so that the logits of a part are made once and dropped."""

    @staticmethod
    def forward(ctx, hidden, head, tokens: Tokens, teacher, teacher_head, at_once: int, terms: Callable):
        gradient = torch.empty_like(hidden)
        of_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        found = []
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            _, target, weight, taught, _ = (x[part] for x in tokens)
            known = None if teacher is None else teacher[part] @ teacher_head.T
            *measured, of_logits = terms(hidden[part] @ head.T, target, weight, taught, known)
            found.append(measured)
            gradient[part] = of_logits @ head
            if of_head is not None:
                of_head += of_logits.T @ hidden[part]
        entropy, divergence, right = (torch.cat(x) for x in zip(*found))
        ctx.save_for_backward(gradient, of_head)
        ctx.mark_non_differentiable(entropy, divergence, right)
        return (entropy * tokens.weight).sum() + (divergence * tokens.taught).sum(), entropy, divergence, right

    @staticmethod
    def backward(ctx, factor, *_):
        gradient, of_head = ctx.saved_tensors
        return gradient * factor, None if of_head is None else of_head * factor, *[None] * 5


def token_losses(
    hidden: torch.Tensor,
    head: torch.Tensor,
    tokens: Tokens,
    teacher: torch.Tensor | None = None,
    teacher_head: torch.Tensor | None = None,
    at_once: int = 4096,
    terms: Callable = terms,
) -> TokenLosses:
    """
    Args:
        hidden: [N, hidden], what the model says of every token of `tokens`.
        head: [V, hidden], of the logits.
        teacher, teacher_head: the same of the teacher.
        at_once: tokens whose logits are made at once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not len(hidden):
        nothing = hidden.new_zeros(0, dtype=torch.float32)
        return TokenLosses(hidden.float().sum(), nothing, nothing, nothing.bool())
    with torch.autocast(device, enabled=False):
        return TokenLosses(
            *_TokenLosses.apply(hidden.to(dtype), head.to(dtype), tokens, teacher, teacher_head, at_once, terms)
        )


class RetrievalLoss(NamedTuple):
    loss: torch.Tensor  # fp32 []
    recall: torch.Tensor  # fp32 [layers] of places, whether a chunk with evidence was retrieved by any head
    weight: torch.Tensor  # fp32 [layers] what such chunks count among the retrieved, the mean of places and heads


def retrieval_loss(retrieved: list[ChunkRetrieval], seekers: torch.Tensor, evidence: torch.Tensor) -> RetrievalLoss:
    """
    Mean over HSA layers of the mean, over heads and places that retrieved a chunk with evidence, of -log of what such
    chunks count. Where none was retrieved there is nothing to learn from: those are left out.

    Args:
        seekers: int64 [P], as in `Batch`.
        evidence: int64 [P, C].
    """
    if not len(seekers):
        nothing = torch.zeros(len(retrieved), device=seekers.device)
        return RetrievalLoss(nothing.sum(), nothing, nothing)
    losses, recalls, weights = [], [], []
    for layer in retrieved:
        indices, of_chunks = (x.flatten(0, 1)[seekers] for x in (layer.indices, layer.weights))  # [P, Hr, K]
        wanted = (indices[..., None] == evidence[:, None, None]).any(-1)
        weight = (of_chunks * wanted).sum(-1)
        found = weight > 0
        losses.append(-(weight.clamp(min=1e-20).log() * found).sum() / found.sum().clamp(min=1))
        recalls.append(found.any(-1).float().mean())
        weights.append(weight.detach().mean())
    return RetrievalLoss(torch.stack(losses).mean(), torch.stack(recalls), torch.stack(weights))

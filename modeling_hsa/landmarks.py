"""
Landmarks that stand for the attention mass of their chunk (`chunk_landmark="mass"`), as those of HiLS-Attention (arXiv
2607.02980) are meant to.

One softmax over the tokens j of all chunks i factorises, `p(j) = p(i) p(j | i)`, where `p(i)` is a softmax over the
logarithms of the masses, `log sum_j exp(q . k_j)`: this is what the scores of retrieval have to be. Now for any
distribution p over the tokens of a chunk

    log sum_j exp(q . k_j)  >=  q . (sum_j p_j k_j) + H(p),

and p = softmax(q . k) makes both sides equal. So a landmark is the mean of the keys under the attention of a learned
query of the chunk's own, its anchor, and the entropy of that attention. The score is the log of the mass for queries
like the anchor, and for all others a bound that it never exceeds. The queries of retrieval are calibrated to the keys
by a projection of their own.
"""

import torch
from torch.nn import functional as F

from .precision import widen, without_autocast


@without_autocast
def mass_landmarks(anchors: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """
    Args:
        anchors: [N, Hr, D].
        keys: [N, S, Hkv, D], where Hkv divides Hr.

    Returns:
        [N, Hr, D + 1], which give the bound as `mass_queries(q) . landmark / sqrt(D)`.
    """
    dim, dtype = keys.shape[-1], keys.dtype
    keys = widen(keys).transpose(1, 2).repeat_interleave(anchors.shape[1] // keys.shape[2], dim=1)  # [N, Hr, S, D]
    log_probs = (keys @ anchors.to(keys.dtype)[..., None])[..., 0].mul(dim**-0.5).log_softmax(-1)
    probs = log_probs.exp()
    mean = (probs[..., None, :] @ keys)[..., 0, :]
    entropy = -(probs * log_probs).sum(-1, keepdim=True)
    return torch.cat([mean, entropy * dim**0.5], dim=-1).to(dtype)


def mass_queries(queries: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [..., D + 1]: what landmarks of `mass_landmarks` are multiplied with."""
    return F.pad(queries, (0, 1), value=1.0)

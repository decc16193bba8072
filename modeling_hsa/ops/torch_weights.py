"""
The PyTorch backend of the weights of retrieved chunks: stick-breaking in logarithms and a cumulative sum, which does
not compare every chunk with every other. The softmax needs no more than what `naive` says.
"""

import torch

from ..precision import widen


def stick_breaking_weights(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    `w_i = sigmoid(s_i) * prod_{j nearer} (1 - sigmoid(s_j))`, 0 for absent chunks.

    Args: scores, indices [B, L, Hr, K], nearest chunk first; -1 for absent.
    Returns: weights [B, L, Hr, K], fp32 (fp64 if the scores are).
    """
    present = indices >= 0
    scores = widen(scores).masked_fill(~present, 0.0)
    leave = torch.nn.functional.logsigmoid(-scores).masked_fill(~present, 0.0)
    left = torch.nn.functional.pad(leave, (1, 0))[..., :-1].cumsum(-1)  # by the nearer ones
    return (torch.nn.functional.logsigmoid(scores) + left).exp() * present

"""
The recurrence of Mamba-2 (arXiv 2405.21060):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t

On a GPU by the kernels of `mamba_ssm`, where that is installed, else in plain PyTorch. Unlike the PyTorch path of
Transformers this starts anew at documents that begin inside a row, continues from a state, and needs memory that is
linear in the length. Within chunks of 64 tokens it is a masked matrix product, between chunks a second one, and blocks
of 64 chunks follow each other.

Names: b rows, L tokens, H heads of P channels, G groups of heads that share B and C, N the size of the state, c chunks
of Q tokens.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F


_CHUNK = 64  # tokens
_BLOCK = 64 * _CHUNK  # tokens
_KERNEL_CHUNK = 256  # tokens, as in Mamba-2


@functools.cache
def _load_kernel() -> Callable | None:
    """The scan of `mamba_ssm`, or None."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    return mamba_chunk_scan_combined


def _takes_kernel(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and not torch.compiler.is_compiling() and _load_kernel() is not None


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        x: [b, L, H, P].
        dt: fp32 [b, L, H], 0 for padding, which then leaves no trace.
        A: fp32 [H], negative.
        B, C: [b, L, G, N].
        documents: int64 [b, L], counts the documents that started in the call, so 0 where that of the state goes on;
            None: that one only.
        state: fp32 [b, H, P, N] after the last token of earlier calls; None: zeros.

    Returns:
        y fp32 [b, L, H, P], and the state after the last token, fp32 [b, H, P, N].
    """
    batch, length, heads, channels = x.shape
    if state is None:
        state = torch.zeros(batch, heads, channels, B.shape[-1], device=x.device)
    if documents is not None:
        state = _continued(state, documents, 0)
    if length > 1 and _takes_kernel(x):
        output, state = _load_kernel()(
            x, dt, A, B, C, chunk_size=_KERNEL_CHUNK, initial_states=state, return_final_states=True,
            seq_idx=None if documents is None else documents.int(),
        )  # fmt: skip
        return output.float(), state.float()
    x, B, C = x.float() * dt[..., None], B.float(), C.float()
    decay = dt * A
    if length == 1:
        return _step(x, decay, B, C, state)
    before = None if documents is None else documents.new_zeros(batch)  # the document that the state is of
    outputs = []
    for start in range(0, length, _BLOCK):
        tokens = slice(start, start + _BLOCK)
        in_block = None if documents is None else documents[:, tokens]
        if start and documents is not None:
            state = _continued(state, in_block, before[:, None])
        inputs = (value[:, tokens] for value in (x, decay, B, C))
        output, state = _scan_block(*inputs, in_block, before, state)
        before = None if documents is None else in_block[:, -1]
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def _continued(state: torch.Tensor, documents: torch.Tensor, document) -> torch.Tensor:
    """The state [b, ...] where its document goes on, else zeros: it may hold anything, also NaN."""
    return torch.where((documents == document).any(1)[:, None, None, None], state, 0.0)


def _step(x, decay, B, C, state) -> tuple[torch.Tensor, torch.Tensor]:
    """One token, `x` being dt x and `decay` dt A."""
    ratio = x.shape[2] // B.shape[2]
    B, C = (value[:, 0].repeat_interleave(ratio, dim=1) for value in (B, C))  # [b, H, N]
    state = state * decay[:, 0].exp()[..., None, None] + x[:, 0, ..., None] * B[:, :, None]
    return (state @ C[..., None])[..., 0][:, None], state


def _scan_block(x, decay, B, C, documents, before, state) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As `selective_scan` for at most a block, `x` being dt x and `decay` dt A; `before` [b] is the document of `state`.
    """
    batch, length, heads, channels = x.shape
    groups, size = B.shape[2], min(_CHUNK, length)
    missing = -length % size
    # Like padding, what fills the last chunk leaves no trace. [b, c, H or G, Q, P or N]
    x, B, C = (F.pad(v, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size)).transpose(2, 3) for v in (x, B, C))
    decay = F.pad(decay, (0, 0, 0, missing)).unflatten(1, (-1, size))  # [b, c, Q, H]
    masks = _Masks(documents, before, missing, size, x.device)
    if documents is None:
        total = decay.cumsum(2).transpose(2, 3)  # [b, c, H, Q]
    else:
        # As a matrix product, so that no rounding of the gradient reaches another document.
        total = (masks.inside[:, :, 0].float() @ decay).transpose(2, 3)

    # Inside the chunks: [b, c, H, Q, Q].
    weights = _masked_exp(total[..., :, None] - total[..., None, :], masks.inside)
    scores = (C @ B.mT)[:, :, :, None]  # [b, c, G, 1, Q, Q]
    output = (weights.unflatten(2, (groups, -1)) * scores).flatten(2, 3) @ x

    # What each chunk adds to the state at its end, and the state that enters each: [b, c, H, P, N].
    added = x * _masked_exp(total[..., -1:] - total, masks.to_end)[..., None]
    added = added.unflatten(2, (groups, -1)).transpose(-1, -2).flatten(3, 4) @ B  # [b, c, G, H/G P, N]
    states = torch.cat([state[:, None], added.unflatten(3, (-1, channels)).flatten(2, 3)], dim=1)
    carried = _masked_exp(_sums_between(total[..., -1].transpose(1, 2)), masks.between)  # [b, H, c + 1, c + 1]
    states = (carried @ states.flatten(3).transpose(1, 2)).unflatten(-1, (channels, -1)).transpose(1, 2)
    entering = states[:, :-1].unflatten(2, (groups, -1)).flatten(3, 4)  # [b, c, G, H/G P, N]
    recalled = (C @ entering.mT).unflatten(-1, (-1, channels)).transpose(3, 4).flatten(2, 3)  # [b, c, H, Q, P]
    output = output + recalled * _masked_exp(total, masks.from_start)[..., None]

    output = output.transpose(2, 3).reshape(batch, length + missing, heads, channels)
    return output[:, :length], states[:, -1]


class _Masks:
    """
    Where a document goes on, so that something is carried. None each, but for `inside`, where there is only one.

    Attributes, all bool:
        inside: [b | 1, c | 1, 1, Q, Q], from a token (column) to itself and to later ones of its chunk (row).
        from_start, to_end: [b, c, 1, Q], from the state that enters a chunk to its tokens, and from these to its end.
        between: [b, 1, c + 1, c + 1], from one end of chunks to another, the first being the start of the block.
    """

    def __init__(self, documents: torch.Tensor | None, before, missing: int, size: int, device: torch.device):
        self.inside = torch.ones(1, 1, 1, size, size, dtype=torch.bool, device=device).tril()
        self.from_start = self.to_end = self.between = None
        if documents is None:
            return
        documents = torch.cat([documents, documents[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, size))
        ends = torch.cat([before[:, None], documents[:, :, -1]], dim=1)  # [b, c + 1]
        self.inside = self.inside & (documents[..., :, None] == documents[..., None, :])[:, :, None]
        self.from_start = (documents == ends[:, :-1, None])[:, :, None]
        self.to_end = (documents == ends[:, 1:, None])[:, :, None]
        self.between = (ends[:, :, None] == ends[:, None, :])[:, None]


def _masked_exp(exponent: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return exponent.exp() if mask is None else exponent.masked_fill(~mask, -torch.inf).exp()


def _sums_between(total: torch.Tensor) -> torch.Tensor:
    """
    total [b, H, c] -> [b, H, c + 1, c + 1]: in row z and column k the sum of total[k:z], -inf where k > z. Each is
    summed by itself, as differences of the sums from the start would lose the small ones.
    """
    every = torch.ones(total.shape[-1] + 1, total.shape[-1] + 1, dtype=torch.bool, device=total.device)
    terms = F.pad(total, (1, 0))[..., None].expand(*total.shape[:-1], *every.shape)  # in row z: total[z - 1]
    return terms.masked_fill(~every.tril(-1), 0.0).cumsum(-2).masked_fill(~every.tril(), -torch.inf)

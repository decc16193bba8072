"""
The kind of layers `linear_attention`: Mamba-2 (arXiv 2405.21060), with the parameters of the mixer of Transformers.
With HSA layers on top of them a model is a RAMba (arXiv 2504.16795).

The PyTorch path of that mixer knows no documents that begin inside a row and needs memory that is quadratic in the
length: the recurrence is in `scan.py`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from configuration_hsa import HSAConfig

from .cache.layer_states import LayerState, Storage
from .cache.ring import fixed_zeros, replace_fixed
from .cache.state import State, writable
from .cache.storage import FixedStorage
from .layers import HSALayer
from .layout import TokenLayout
from .modules import HSARMSNorm
from .scan import selective_scan


# Steps that the heads take at the start, spread evenly on a logarithmic scale, as in Mamba-2.
_TIME_STEPS = (0.001, 0.1)


class RecurrentState(State):
    """
    The state of a recurrence after the last token of each row, fp32 [B, ...]. `in_place`: its storage never moves.
    """

    fields = ("value",)

    def __init__(self, in_place: bool):
        self.in_place = in_place
        self.reset()

    def store(self, value: torch.Tensor) -> None:
        """`value` takes the place of what was there, with `in_place` only when the call is committed."""
        if self.in_place:
            self.pending = value.detach()
        else:
            self.value = value.detach()

    def read(self) -> torch.Tensor | None:
        """The state, as a tensor that gradients may be computed with: the storage is written to when a call ends."""
        if self.value is None:
            return None
        return self.value.clone() if self.in_place and torch.is_grad_enabled() else writable(self.value)

    def commit(self, layout: TokenLayout) -> None:
        if self.pending is not None:
            if self.value is None:
                self.value = fixed_zeros(self.pending, *self.pending.shape)
            self.value.copy_(self.pending)
            self.pending = None

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.pending = None

    def apply(self, function) -> None:
        if self.value is not None:
            self.value = replace_fixed(self.value, function) if self.in_place else function(self.value)

    def reset(self) -> None:
        self.pending: torch.Tensor | None = None
        if self.in_place and getattr(self, "value", None) is not None:
            self.value.zero_()
        else:
            self.value: torch.Tensor | None = None


class LinearAttentionState(LayerState):
    """The last inputs of the convolution, [B, tokens, channels], and the state of the recurrence."""

    is_croppable = False

    def __init__(self, config: HSAConfig, storage: Storage):
        self.inputs = storage.tokens(config.conv_kernel, ordered=True)
        self.recurrence = RecurrentState(in_place=isinstance(storage, FixedStorage))

    def parts(self):
        return {"inputs": self.inputs, "recurrence": self.recurrence}

    def needs(self):
        return []


class HSACausalConv1d(nn.Conv1d):
    """A convolution of every channel with its last tokens, of the document only."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, groups=channels, padding=kernel_size - 1)

    def initialize(self, std: float) -> None:
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, stream: torch.Tensor, reach: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            stream: [B, kernel_size - 1 + L, channels], the tokens of the call after those before them.
            reach: int64 [B, L], how many tokens back each one sees; None: all that there are.

        Returns: fp32 [B, L, channels].
        """
        width = self.kernel_size[0]
        length = stream.shape[1] - (width - 1)
        output = self.bias.float()
        for back in range(width):
            start = width - 1 - back
            tokens = stream[:, start : start + length]
            if reach is not None:
                tokens = torch.where((reach >= back)[..., None], tokens, 0.0)
            output = output + tokens.float() * self.weight[:, 0, start].float()
        return output


class HSAGatedRMSNorm(nn.Module):
    """The RMS norm of each group of channels, after they are multiplied by a gate."""

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps = groups, eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x fp32 [..., channels], gate of any dtype -> fp32, the same shape."""
        x = (x * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight.float()


class HSALinearAttention(nn.Module):
    """The mixer of Mamba-2."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.mamba_head_dim
        self.channels = config.expand * config.hidden_size
        self.num_heads = self.channels // self.head_dim
        self.conv_channels = self.channels + 2 * config.n_groups * config.state_size
        self.in_proj = nn.Linear(config.hidden_size, self.channels + self.conv_channels + self.num_heads, bias=False)
        self.conv1d = HSACausalConv1d(self.conv_channels, config.conv_kernel)
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        self.A_log = nn.Parameter(torch.ones(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = HSAGatedRMSNorm(self.channels, config.n_groups, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.channels, config.hidden_size, bias=False)

    def initialize(self, std: float) -> None:
        low, high = (math.log(step) for step in _TIME_STEPS)
        step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        heads = torch.arange(1, self.num_heads + 1, device=self.A_log.device, dtype=torch.float32)
        init.copy_(self.A_log, heads.log())
        init.ones_(self.D)

    def forward(
        self, hidden_states: torch.Tensor, layout: TokenLayout, state: LinearAttentionState | None = None
    ) -> torch.Tensor:
        """hidden_states [B, L, hidden] -> the same; `state`: what a cache keeps for the layer."""
        projected = layout.align(self.in_proj(hidden_states))
        gate, inputs, dt = projected.split([self.channels, self.conv_channels, self.num_heads], dim=-1)
        position, real, documents = layout.share(("linear_attention",), lambda: _document_tokens(layout))
        # In fp32 also under autocast: rounding would add up in the state.
        with torch.autocast(projected.device.type, enabled=False):
            convolved = F.silu(self.conv1d(self._with_earlier(inputs, layout, state), position)).to(inputs.dtype)
            x, B, C = convolved.split([self.channels, *[(self.conv_channels - self.channels) // 2] * 2], dim=-1)
            x = x.unflatten(-1, (-1, self.head_dim))
            B, C = (y.unflatten(-1, (-1, self.config.state_size)) for y in (B, C))
            dt = F.softplus(dt.float() + self.dt_bias.float())
            if real is not None:
                dt = dt.masked_fill(~real[..., None], 0.0)
            before = None if state is None else state.recurrence.read()
            output, after = selective_scan(x, dt, -self.A_log.float().exp(), B, C, documents, before)
            if state is not None:
                state.recurrence.store(after)
            output = self.norm((output + x.float() * self.D.float()[:, None]).flatten(2), gate)
        return self.out_proj(layout.restore(output.to(projected.dtype)))

    def _with_earlier(
        self, inputs: torch.Tensor, layout: TokenLayout, state: LinearAttentionState | None
    ) -> torch.Tensor:
        """The inputs of the convolution after those of the tokens before: [B, conv_kernel - 1 + L, channels]."""
        stream = inputs if state is None else state.inputs.append(inputs, layout)
        wanted = self.config.conv_kernel - 1 + inputs.shape[1]
        return F.pad(stream[:, max(0, stream.shape[1] - wanted) :], (0, 0, max(0, wanted - stream.shape[1]), 0))


def _document_tokens(layout: TokenLayout) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    In aligned order: how many tokens of its document come before a token, int64 [B, L]; whether it is real, bool
    [B, L], None if all are; and the number of its document, as `selective_scan` takes it. All None where there is only
    one in every row, which goes on or starts with the call.
    """
    if layout.past is not None:
        return None, None, None
    position = layout.aligned_rows()[0]
    real = layout.is_real.expand(layout.batch, -1)
    starts = real & (position == 0)
    # Padding at the left belongs to the document that follows: what came before the call then ends with the call.
    starts_row = (starts & (real.cumsum(1) == 1)).any(1)
    documents = torch.maximum(starts.cumsum(1), starts_row[:, None].long())
    return position, None if layout.real is None else real, documents


class HSALinearAttentionLayer(HSALayer):
    """A layer of Mamba-2: the mixer alone, without an MLP."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = HSALinearAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: LinearAttentionState | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states [B, L, hidden] -> the same; `state`: what a cache keeps for the layer."""
        return hidden_states + self.mixer(self.input_layernorm(hidden_states), layout, state)

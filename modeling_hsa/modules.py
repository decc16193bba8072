"""What layers are made of: norms, RoPE and the MLP, as in Llama but for what their docstrings say."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from configuration_hsa import HSAConfig


class HSARMSNorm(LlamaRMSNorm):
    """The RMS norm of Llama as one operator of PyTorch: one kernel instead of six, and less to keep for backward."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


class HSARotaryEmbedding(LlamaRotaryEmbedding):
    """
    RoPE whose angles are computed in fp64: in fp32, positions of millions leave an error of tenths of a radian between
    neighbouring tokens.
    """

    def _apply(self, fn, recurse=True):
        """`model.to(torch.bfloat16)` moves the frequencies but does not round them, as `from_pretrained` does not."""
        exact = {name: x for name, x in self.named_buffers(recurse=False) if not x.is_meta}
        super()._apply(fn, recurse)
        for name, x in exact.items():
            setattr(self, name, x.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [n, L] -> cos and sin [n, L, D] for `rotate`, in the dtype of x."""
        # Apple's GPUs have no fp64.
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        angles = position_ids.to(device)[..., None].double() * self.inv_freq.to(device=device, dtype=torch.float64)
        angles = torch.remainder(angles, 2 * torch.pi).float().to(x.device)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    RoPE as in Llama, in three kernels instead of five: x [B, H, L, D], cos and sin [n, L, D], the first half of sin
    with the sign that rotating by half would give to x.
    """
    cos, sin = cos[:, None], sin[:, None]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class HSAMLP(nn.Module):
    """The gated MLP of Llama, of any width."""

    def __init__(self, config: HSAConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def head_norm(config: HSAConfig, enabled: bool, dim: int) -> nn.Module:
    """The norm of queries or keys [..., dim] of a head."""
    return HSARMSNorm(dim, eps=config.rms_norm_eps) if enabled else nn.Identity()

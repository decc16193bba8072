"""Attention to the window, to the whole document and inside a chunk, through the interface of Transformers."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from configuration_hsa import HSAConfig

from .cache.layer_states import AttentionState
from .layout import TokenLayout
from .modules import head_norm, rotate
from .window import window_attention


class HSAAttention(nn.Module):
    """Queries, keys and values with QK-norm and RoPE; what they see is up to the subclass."""

    is_causal: bool
    rotates = True

    def __init__(self, config: HSAConfig, bias: bool, output_bias: bool, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=output_bias)
        self.q_norm = head_norm(config, config.qk_norm, self.head_dim)
        self.k_norm = head_norm(config, config.qk_norm, self.head_dim)

    def project(self, hidden_states: torch.Tensor, position_embeddings):
        """hidden_states [B, L, hidden] -> query [B, Hq, L, D], key and value [B, Hkv, L, D], rotated."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.rotates:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        return query, key, value

    @property
    def attention_interface(self) -> Callable:
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    @property
    def attention_kwargs(self) -> dict:
        return {"dropout": self.config.attention_dropout if self.training else 0.0, "scaling": self.scaling}


class HSAWindowAttention(HSAAttention):
    """Causal attention to the last `sliding_window` tokens of the document."""

    is_causal = True

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__(config, config.attention_bias, config.attention_output_bias, layer_idx)

    @property
    def window(self) -> int | None:
        return self.config.sliding_window

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: AttentionState | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (layout.align(x) for x in self.project(hidden_states, position_embeddings))
        if state is not None:
            key, value = state.update(key, value, layout)
        output, weights = window_attention(
            self.attention_interface, self, query, key, value, layout, self.window, **self.attention_kwargs, **kwargs
        )
        output = layout.restore(output.flatten(2))
        return self.o_proj(output), weights


class HSAFullAttention(HSAWindowAttention):
    """Causal attention to all earlier tokens of the document."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.rotates = config.full_attention_rope

    @property
    def window(self):
        return None


class HSAEncoderAttention(HSAAttention):
    """Attention of all tokens of a chunk to each other."""

    is_causal = False

    def __init__(self, config: HSAConfig):
        super().__init__(config, config.encoder_attention_bias, output_bias=False)

    def forward(self, hidden_states: torch.Tensor, position_embeddings, **kwargs) -> torch.Tensor:
        query, key, value = self.project(hidden_states, position_embeddings)
        output, _ = self.attention_interface(
            self, query, key, value, None, is_causal=False, **self.attention_kwargs, **kwargs
        )
        return self.o_proj(output.flatten(2))

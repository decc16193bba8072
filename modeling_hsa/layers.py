"""The layers of the decoder, one class a kind: see `kinds.py`."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from configuration_hsa import HSAConfig

from .attention import HSAFullAttention, HSAWindowAttention
from .cache.layer_states import AttentionState, RetrievalState
from .cache.memory import ChunkMemory
from .layout import TokenLayout
from .modules import HSAMLP, HSARMSNorm, head_norm
from .ops import chunk_attention
from .precision import attention_dtype
from .retrieval import ChunkRetrieval, HSARetrieval


class HSALayer(GradientCheckpointingLayer):
    """A layer of the decoder, of any kind."""

    retrieves = False  # whether its second argument is the chunk memory


class HSADecoderLayer(HSALayer):
    """A Llama layer with window attention."""

    attention = HSAWindowAttention

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = self.attention(config, layer_idx)
        self.mlp = HSAMLP(config, config.intermediate_size)
        self.input_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: AttentionState | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states [B, L, hidden] -> the same; `state`: what a cache keeps for the layer."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), layout, position_embeddings, state, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HSAFullAttentionLayer(HSADecoderLayer):
    """A Llama layer."""

    attention = HSAFullAttention


class HSARetrievalLayer(HSALayer):
    """
    Hierarchical sparse attention: attends inside each retrieved chunk and fuses the results with the weights of the
    chunks, `O_t = sum_i w[t, i] softmax(q_t K_i / sqrt(D)) V_i` (eq. of section 3.1).

    With the bypassing residual (section 3.3) what was retrieved reaches the stream through the MLP only: it comes from
    the middle of the model, and added directly it would overwrite, or be overwritten by, what the upper layers built.
    """

    retrieves = True

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.retrieval = HSARetrieval(config, layer_idx)
        if config.hsa_local_attention:
            self.input_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = HSAWindowAttention(config, layer_idx)
        self.hsa_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.q_norm = head_norm(config, config.hsa_qk_norm, config.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        if config.hsa_intermediate_size:
            self.post_attention_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = HSAMLP(config, config.hsa_intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: ChunkMemory,
        layout: TokenLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: RetrievalState | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states [B, L, hidden] -> the same; `state`: what a cache keeps for the layer."""
        queries, attention = (None, None) if state is None else (state.queries, state.attention)
        (retrieved,) = self.retrieval(hidden_states, memory, layout, queries)
        memory.prefetch(retrieved.indices)
        if self.config.hsa_local_attention:
            attended, _ = self.self_attn(
                self.input_layernorm(hidden_states), layout, position_embeddings, attention, **kwargs
            )
            hidden_states = hidden_states + attended
        attended = self.attend(self.hsa_layernorm(hidden_states), memory, retrieved)
        if self.config.hsa_residual == "bypass":
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states + attended))
        hidden_states = hidden_states + attended
        if not self.config.hsa_intermediate_size:
            return hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def attend(self, hidden_states: torch.Tensor, memory: ChunkMemory, retrieved: ChunkRetrieval) -> torch.Tensor:
        """hidden_states [B, L, hidden] -> what the layer retrieved for each token, the same shape."""
        batch, length, _ = hidden_states.shape
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.config.head_dim)))  # [B, L, Hq, D]
        query, weights = query.to(attention_dtype(query)), retrieved.weights
        keys, values, indices = memory.fetch(retrieved.indices)
        if indices.shape[0] != batch:  # the memory merged the rows into one
            query = query.flatten(0, 1)[None]
            weights = None if weights is None else weights.flatten(0, 1)[None]
        keys, values = (x.to(query.dtype).flatten(1, 2) for x in (keys, values))
        output = chunk_attention(
            query, keys, values, weights, indices,
            chunk_size=self.config.chunk_size,
            implementation=self.config.hsa_implementation,
        )  # fmt: skip
        output = output.view(batch, length, -1)
        if weights is None and retrieved.scores.requires_grad:
            # `joint` does not use the scores; data-parallel training wants a (zero) gradient for their projections.
            scores = retrieved.scores.masked_fill(retrieved.indices < 0, 0.0)
            output = output + (0.0 * scores.sum()).to(output.dtype)
        return self.o_proj(output)

"""Layers of HSA models. What is as in Llama comes from Llama; see `modeling_hsa.py` for how they fit together."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from configuration_hsa import HSAConfig

from .cache import HSACache
from .layout import TokenLayout, cut_chunks
from .ops import chunk_attention, chunk_weights, select_chunks
from .ops.precision import attention_dtype
from .window import window_attention


class ChunkMemory(NamedTuple):
    """What the upper decoder retrieves from; C complete chunks of S tokens."""

    landmarks: torch.Tensor  # [B, C, Hr, d_r]
    keys: torch.Tensor  # [B, C, S, Hkv, D]
    values: torch.Tensor  # [B, C, S, Hkv, D]


class ChunkRetrieval(NamedTuple):
    """What the tokens of a call retrieved in one HSA layer, nearest chunk first."""

    indices: torch.Tensor  # [B, L, Hr, K] int32 chunk of the row, counted from its first token; -1: none
    weights: torch.Tensor | None  # [B, L, Hr, K] fp32; None with `chunk_weighting="joint"`
    scores: torch.Tensor  # [B, L, Hr, K] fp32 before weighting; -inf: none


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
        """position_ids [n, L] -> cos and sin [n, L, D] in the dtype of x."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        angles = position_ids[..., None].to(wide) * self.inv_freq.to(device=x.device, dtype=wide)
        angles = torch.remainder(angles, 2 * torch.pi).float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class HSAMLP(nn.Module):
    """The gated MLP of Llama, with a width of its own for the chunk encoder."""

    def __init__(self, config: HSAConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _head_norm(config: HSAConfig, enabled: bool, dim: int) -> nn.Module:
    return HSARMSNorm(dim, eps=config.rms_norm_eps) if enabled else nn.Identity()


class HSAAttention(nn.Module):
    """Queries, keys and values with QK-norm and RoPE; what they see is up to the subclass."""

    is_causal: bool

    def __init__(self, config: HSAConfig, bias: bool, layer_idx: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias and self.is_causal
        )
        self.q_norm = _head_norm(config, config.qk_norm, self.head_dim)
        self.k_norm = _head_norm(config, config.qk_norm, self.head_dim)

    def project(self, hidden_states: torch.Tensor, position_embeddings):
        """hidden_states [B, L, hidden] -> query [B, Hq, L, D], key and value [B, Hkv, L, D], rotated."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return query, key, value

    @property
    def attention_interface(self) -> Callable:
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    @property
    def attention_kwargs(self) -> dict:
        return {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}


class HSAWindowAttention(HSAAttention):
    """Causal attention to the last `sliding_window` tokens of the document."""

    is_causal = True

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__(config, bias=config.attention_bias, layer_idx=layer_idx)
        self.sliding_window = config.sliding_window

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: HSACache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (layout.align(x) for x in self.project(hidden_states, position_embeddings))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, layout)
        output, weights = window_attention(
            self.attention_interface, self, query, key, value, layout, self.sliding_window,
            **self.attention_kwargs, **kwargs,
        )  # fmt: skip
        output = layout.restore(output.flatten(2))
        return self.o_proj(output), weights


class HSALayer(GradientCheckpointingLayer):
    """A layer of the decoder, of either kind."""

    # The model itself leaves out the cache, and only where there are gradients: see `HSAModel.forward`.
    _can_checkpoint_with_cache = True


class HSADecoderLayer(HSALayer):
    """A Llama layer with window attention."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HSAWindowAttention(config, layer_idx)
        self.mlp = HSAMLP(config, config.intermediate_size)
        self.input_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: HSACache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), layout, position_embeddings, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HSAEncoderAttention(HSAAttention):
    """Attention of all tokens of a chunk to each other."""

    is_causal = False

    def forward(self, hidden_states: torch.Tensor, position_embeddings, **kwargs) -> torch.Tensor:
        query, key, value = self.project(hidden_states, position_embeddings)
        output, _ = self.attention_interface(
            self, query, key, value, None, is_causal=False, **self.attention_kwargs, **kwargs
        )
        return self.o_proj(output.flatten(2))


class HSAEncoderLayer(GradientCheckpointingLayer):
    """A bidirectional layer over the tokens of one chunk, [chunks, tokens, hidden]."""

    def __init__(self, config: HSAConfig):
        super().__init__()
        self.self_attn = HSAEncoderAttention(config, bias=config.encoder_attention_bias)
        self.mlp = HSAMLP(config, config.encoder_intermediate_size)
        self.input_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, position_embeddings) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), position_embeddings)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HSAChunkEncoder(nn.Module):
    """
    Turns every complete chunk of hidden states into a landmark and into keys and values (section 3.2).

    A query's score with the landmark has to stand for the attention mass the query would give the chunk,
    `sum_j exp(q . k_j)`, which is not linear in the keys: hence an encoder rather than pooling, and a CLS token of its
    own rather than making the content serve retrieval too.
    """

    def __init__(self, config: HSAConfig):
        super().__init__()
        self.config = config
        self.chunk_size = config.chunk_size
        self.use_cls = config.chunk_landmark == "cls"
        if self.use_cls:
            self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList([HSAEncoderLayer(config) for _ in range(config.num_encoder_layers)])
        self.norm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.landmark_proj = nn.Linear(
            config.hidden_size, config.num_retrieval_heads * config.retrieval_dim, bias=False
        )
        self.landmark_norm = _head_norm(config, config.landmark_norm, config.retrieval_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.hsa_num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hsa_num_key_value_heads * config.head_dim, bias=False)
        self.k_norm = _head_norm(config, config.qk_norm, config.head_dim)
        self.rotary_emb = HSARotaryEmbedding(config)

    def forward(
        self, hidden_states: torch.Tensor, layout: TokenLayout, past_key_values: HSACache | None = None
    ) -> ChunkMemory:
        """hidden_states [B, L, hidden] -> the chunk memory of everything up to here; no position across chunks."""
        hidden_states = layout.align(hidden_states)
        if past_key_values is not None:
            hidden_states = past_key_values.append_hidden(hidden_states, layout)
        has_history = past_key_values is not None and past_key_values.num_columns > 0
        chunks = cut_chunks(hidden_states, layout, self.chunk_size, has_history)  # [B, n, S, hidden]
        batch, num_chunks = chunks.shape[:2]

        chunks = chunks.flatten(0, 1)
        total = len(chunks)
        if total == 0 and self.training and torch.is_grad_enabled():
            # Attention takes no empty batch: a chunk of zeros, dropped below, still gives every parameter a (zero)
            # gradient, which data-parallel training needs.
            chunks = torch.nn.functional.pad(chunks, (0, 0, 0, 0, 0, 1))
        if self.use_cls:
            chunks = torch.cat([chunks, self.cls_token.to(chunks.dtype).expand(len(chunks), 1, -1)], dim=1)
        if len(chunks):
            positions = torch.arange(chunks.shape[1], device=chunks.device)[None]
            position_embeddings = self.rotary_emb(chunks, positions)
            for layer in self.layers:
                chunks = layer(chunks, position_embeddings)
        chunks = self.norm(chunks)[:total]

        tokens = chunks[:, : self.chunk_size]
        summary = chunks[:, -1] if self.use_cls else tokens.mean(dim=1)
        landmarks = self.landmark_norm(self.landmark_proj(summary).unflatten(-1, (-1, self.config.retrieval_dim)))
        keys = self.k_norm(self.k_proj(tokens).unflatten(-1, (-1, self.config.head_dim)))
        values = self.v_proj(tokens).unflatten(-1, (-1, self.config.head_dim))
        new = ChunkMemory(*(x.unflatten(0, (batch, num_chunks)) for x in (landmarks, keys, values)))
        if past_key_values is None:
            return new
        return ChunkMemory(*past_key_values.update_memory(*new, layout))


class HSARetrieval(nn.Module):
    """Which chunks each token retrieves: the K best by `q_t . landmark_i / sqrt(d_r)` (section 3.1)."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.stride = config.retrieval_stride
        self.norm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, config.num_retrieval_heads * config.retrieval_dim, bias=False)
        self.q_norm = _head_norm(config, config.landmark_norm, config.retrieval_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        landmarks: torch.Tensor,
        layout: TokenLayout,
        past_key_values: HSACache | None = None,
    ) -> tuple[ChunkRetrieval]:
        query = self.q_proj(self.norm(hidden_states))
        if self.stride > 1:
            query = self._query_of_stride(query, layout, past_key_values)
        query = self.q_norm(query.unflatten(-1, (-1, self.config.retrieval_dim)))
        scores, indices = select_chunks(
            query, landmarks.to(query.dtype),
            topk=self.config.chunk_topk,
            chunk_size=self.config.chunk_size,
            visible=layout.visible(self.config.chunk_size, self.stride),
            distance_penalty=self.config.retrieval_distance_penalty,
            implementation=self.config.hsa_implementation,
        )  # fmt: skip
        weights = chunk_weights(scores, indices, self.config.chunk_weighting, self.config.hsa_implementation)
        return (ChunkRetrieval(indices, weights, scores),)

    def _query_of_stride(self, query: torch.Tensor, layout: TokenLayout, past_key_values: HSACache | None):
        """Replaces the query of each token by that of the first token of its stride."""
        batch, length, dim = query.shape
        stream = layout.align(query)
        if past_key_values is not None:
            stream = past_key_values.append_query(stream, self.layer_idx, layout)
        offset = layout.align((layout.position % self.stride).expand(batch, -1)[..., None])
        slot = torch.arange(stream.shape[1] - length, stream.shape[1], device=query.device)[:, None]
        first = (slot - offset).clamp(min=0)
        return layout.restore(stream.gather(1, first.expand(-1, -1, dim)))


class HSARetrievalLayer(HSALayer):
    """
    Hierarchical sparse attention: attends inside each retrieved chunk and fuses the results with the weights of the
    chunks, `O_t = sum_i w[t, i] softmax(q_t K_i / sqrt(D)) V_i` (eq. of section 3.1).

    With the bypassing residual (section 3.3) what was retrieved reaches the stream through the MLP only: it comes from
    the middle of the model, and added directly it would overwrite, or be overwritten by, what the upper layers built.
    """

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.bypass = config.hsa_residual == "bypass"
        self.retrieval = HSARetrieval(config, layer_idx)
        if config.hsa_local_attention:
            self.input_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = HSAWindowAttention(config, layer_idx)
        self.hsa_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.q_norm = _head_norm(config, config.qk_norm, config.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.post_attention_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = HSAMLP(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        landmarks: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: TokenLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: HSACache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        (retrieved,) = self.retrieval(hidden_states, landmarks, layout, past_key_values)
        if self.config.hsa_local_attention:
            attended, _ = self.self_attn(
                self.input_layernorm(hidden_states), layout, position_embeddings, past_key_values, **kwargs
            )
            hidden_states = hidden_states + attended
        attended = self.attend(self.hsa_layernorm(hidden_states), keys, values, retrieved, past_key_values)
        if self.bypass:
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states + attended))
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def attend(
        self, hidden_states: torch.Tensor, keys, values, retrieved: ChunkRetrieval, past_key_values
    ) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.config.head_dim)))  # [B, L, Hq, D]
        query = query.to(attention_dtype(query))
        indices, weights = retrieved.indices, retrieved.weights
        if past_key_values is not None and past_key_values.memory.offloading:
            keys, values, indices = past_key_values.fetch_chunks(keys, values, indices)
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

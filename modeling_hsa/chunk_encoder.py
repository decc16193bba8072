"""The chunk encoder: every complete chunk of hidden states becomes a landmark, keys and values (section 3.2)."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from configuration_hsa import HSAConfig

from .attention import HSAEncoderAttention
from .cache.history import TokenHistory
from .cache.ring import TokenRing
from .landmarks import mass_landmarks
from .layout import TokenLayout, cut_chunks
from .modules import HSAMLP, HSARMSNorm, HSARotaryEmbedding, head_norm


class EncodedChunks(NamedTuple):
    """What goes into the chunk memory. Plain tensors, as FSDP looks for those among the outputs of a module."""

    landmarks: torch.Tensor  # [B, n, Hr, d_r]
    keys: torch.Tensor  # [B, n, S, Hkv, D]
    values: torch.Tensor  # [B, n, S, Hkv, D]


class HSAEncoderLayer(GradientCheckpointingLayer):
    """A bidirectional layer over the tokens of one chunk, [chunks, tokens, hidden]."""

    def __init__(self, config: HSAConfig):
        super().__init__()
        self.self_attn = HSAEncoderAttention(config)
        self.mlp = HSAMLP(config, config.encoder_intermediate_size)
        self.input_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, position_embeddings) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), position_embeddings)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HSAChunkEncoder(nn.Module):
    """
    A query's score with the landmark has to stand for the attention mass the query would give the chunk,
    `sum_j exp(q . k_j)`, which is not linear in the keys: hence an encoder rather than pooling, and a CLS token of its
    own rather than making the content serve retrieval too.
    """

    def __init__(self, config: HSAConfig):
        super().__init__()
        self.config = config
        self.use_cls = config.chunk_landmark != "mean"
        if self.use_cls:
            self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList([HSAEncoderLayer(config) for _ in range(config.num_encoder_layers)])
        self.norm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.landmark_proj = nn.Linear(
            config.hidden_size, config.num_retrieval_heads * config.retrieval_query_dim, bias=False
        )
        self.landmark_norm = head_norm(config, config.landmark_norm, config.retrieval_query_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.hsa_num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hsa_num_key_value_heads * config.head_dim, bias=False)
        self.k_norm = head_norm(config, config.hsa_qk_norm, config.head_dim)
        self.rotary_emb = HSARotaryEmbedding(config)

    def initialize(self, std: float) -> None:
        if self.use_cls:
            init.normal_(self.cls_token, mean=0.0, std=std)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        history: TokenHistory | TokenRing | None = None,
    ) -> EncodedChunks:
        """
        The n chunks that the call completes in each row; where rows complete different numbers, the rest is arbitrary.

        Args:
            hidden_states: [B, L, hidden].
            history: of a cache, the hidden states of the tokens that are in no complete chunk yet.
        """
        hidden_states = layout.align(hidden_states)
        if history is not None:
            hidden_states = history.append(hidden_states, layout)
        chunks = cut_chunks(hidden_states, layout, self.config.chunk_size)  # [B, n, S, hidden]
        batch, num_chunks = chunks.shape[:2]
        if batch * num_chunks:
            new = self.encode(chunks.flatten(0, 1))
        elif self.training and torch.is_grad_enabled():
            # A chunk of zeros, dropped at once, gives every parameter a (zero) gradient, which data-parallel training
            # needs. Added to the empty chunks it hangs on `hidden_states`: the backward of the encoder has to come
            # where it comes in processes that have chunks, or the collectives of FSDP are out of order.
            padded = nn.functional.pad(chunks.flatten(0, 1), (0, 0, 0, 0, 0, 1))
            new = tuple(x[:0] for x in self.encode(padded))
        else:
            new = self._no_chunks(chunks)
        return EncodedChunks(*(x.unflatten(0, (batch, num_chunks)) for x in new))

    def encode(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """chunks [N, S, hidden] -> landmarks [N, Hr, d_r], keys and values [N, S, Hkv, D]; no position across."""
        if self.use_cls:
            chunks = torch.cat([chunks, self.cls_token.to(chunks.dtype).expand(chunks.shape[0], 1, -1)], dim=1)
        positions = torch.arange(chunks.shape[1], device=chunks.device)[None]
        position_embeddings = self.rotary_emb(chunks, positions)
        for layer in self.layers:
            chunks = layer(chunks, position_embeddings)
        chunks = self.norm(chunks)
        tokens = chunks[:, : self.config.chunk_size]
        summary = chunks[:, -1] if self.use_cls else tokens.mean(dim=1)
        landmarks = self.landmark_proj(summary).unflatten(-1, (-1, self.config.retrieval_query_dim))
        landmarks = self.landmark_norm(landmarks)
        keys = self.k_norm(self.k_proj(tokens).unflatten(-1, (-1, self.config.head_dim)))
        values = self.v_proj(tokens).unflatten(-1, (-1, self.config.head_dim))
        if self.config.chunk_landmark == "mass":
            landmarks = mass_landmarks(landmarks, keys)
        return landmarks, keys, values

    def _no_chunks(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `encode` of no chunks: not every layer that takes the place of `nn.Linear` takes empty inputs."""
        config = self.config
        landmarks = chunks.new_empty(0, config.num_retrieval_heads, config.retrieval_dim)
        keys = chunks.new_empty(0, config.chunk_size, config.hsa_num_key_value_heads, config.head_dim)
        return landmarks, keys, keys

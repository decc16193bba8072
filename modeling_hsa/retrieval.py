"""Which chunks each token retrieves, and what it makes of them: the HSA layer without its local attention and MLP."""

from typing import NamedTuple

import torch
from torch import nn

from configuration_hsa import HSAConfig

from .cache.history import TokenHistory
from .cache.memory import ChunkMemory
from .cache.ring import TokenRing
from .landmarks import mass_queries
from .layout import TokenLayout
from .modules import HSARMSNorm, head_norm
from .ops import chunk_weights, select_chunks


class ChunkRetrieval(NamedTuple):
    """What the tokens of a call retrieved in one HSA layer, nearest chunk first."""

    indices: torch.Tensor  # [B, L, Hr, K] int32 chunk of the row, counted from its first token; -1: none
    weights: torch.Tensor | None  # [B, L, Hr, K] fp32; None with `chunk_weighting="joint"`
    scores: torch.Tensor  # [B, L, Hr, K] fp32 before weighting; -inf: none


class HSARetrieval(nn.Module):
    """Which chunks each token retrieves: the K best by `q_t . landmark_i / sqrt(d_r)` (section 3.1)."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.norm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dim = config.retrieval_query_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_retrieval_heads * self.dim, bias=False)
        # Queries for the mass of keys are like the queries of attention to them.
        is_normed = config.hsa_qk_norm if config.chunk_landmark == "mass" else config.landmark_norm
        self.q_norm = head_norm(config, is_normed, self.dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: ChunkMemory,
        layout: TokenLayout,
        history: TokenHistory | TokenRing | None = None,
    ) -> tuple[ChunkRetrieval]:
        """
        Args:
            hidden_states: [B, L, hidden].
            history: of a cache, with a `retrieval_stride`: the queries of the last stride.

        Returns: a tuple of one, as `output_retrieval` records the first element of what modules return.
        """
        query = self.q_proj(self.norm(hidden_states))
        stride = self.config.retrieval_stride
        if stride > 1:
            query = self._query_of_stride(query, layout, history)
        query = self.q_norm(query.unflatten(-1, (-1, self.dim)))
        if self.config.chunk_landmark == "mass":
            query = mass_queries(query)
        scores, indices = select_chunks(
            query, memory.landmarks.to(query.dtype),
            topk=self.config.chunk_topk,
            chunk_size=self.config.chunk_size,
            visible=layout.visible(self.config.chunk_size, stride),
            scale=self.dim**-0.5,
            distance_penalty=self.config.retrieval_distance_penalty,
            implementation=self.config.hsa_implementation,
        )  # fmt: skip
        weights = chunk_weights(scores, indices, self.config.chunk_weighting, self.config.hsa_implementation)
        return (ChunkRetrieval(indices, weights, scores),)

    def _query_of_stride(
        self, query: torch.Tensor, layout: TokenLayout, history: TokenHistory | TokenRing | None
    ) -> torch.Tensor:
        """Replaces the query [B, L, dim] of each token by that of the first token of its stride."""
        batch, length, dim = query.shape
        stride = self.config.retrieval_stride
        stream = layout.align(query)
        if history is not None:
            stream = history.append(stream, layout)
        offset = layout.align((layout.position % stride).expand(batch, -1)[..., None])
        slot = torch.arange(stream.shape[1] - length, stream.shape[1], device=query.device)[:, None]
        first = (slot - offset).clamp(min=0)
        return layout.restore(stream.gather(1, first.expand(-1, -1, dim)))

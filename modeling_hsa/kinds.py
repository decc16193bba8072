"""
The kinds of layers that `HSAConfig.layer_types` names. A kind brings the layer and what a cache keeps for it; to add
one, add it here and to `LAYER_TYPES` of the configuration.
"""

from collections.abc import Callable
from typing import NamedTuple

from configuration_hsa import HSAConfig

from .cache.layer_states import AttentionState, LayerState, RetrievalState, Storage
from .layers import HSADecoderLayer, HSAFullAttentionLayer, HSALayer, HSARetrievalLayer
from .linear_attention import HSALinearAttentionLayer, LinearAttentionState


class LayerKind(NamedTuple):
    layer: type[HSALayer]  # made with (config, layer_idx)
    state: Callable[[HSAConfig, Storage], LayerState]


def _retrieval_state(config: HSAConfig, storage: Storage) -> RetrievalState:
    window = config.sliding_window if config.hsa_local_attention else None
    return RetrievalState(storage, window, config.retrieval_stride)


LAYER_KINDS = {
    "sliding_attention": LayerKind(
        HSADecoderLayer, lambda config, storage: AttentionState(storage, config.sliding_window)
    ),
    "full_attention": LayerKind(HSAFullAttentionLayer, lambda config, storage: AttentionState(storage, None)),
    "linear_attention": LayerKind(HSALinearAttentionLayer, LinearAttentionState),
    "hsa": LayerKind(HSARetrievalLayer, _retrieval_state),
}

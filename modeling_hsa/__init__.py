"""
Hierarchical Sparse Attention models for Transformers.

Importing this package registers `HSAConfig` and the models with the Auto classes.
"""

from configuration_hsa import HSAConfig  # isort: skip  # checks the versions of PyTorch and Transformers

from transformers import AutoConfig

from .cache import HSACache
from .layers import ChunkRetrieval
from .modeling_hsa import (
    HSAForCausalLM,
    HSAForQuestionAnswering,
    HSAForSequenceClassification,
    HSAForTokenClassification,
    HSAModel,
    HSAPreTrainedModel,
)
from .static_cache import HSAStaticCache


AutoConfig.register(HSAConfig.model_type, HSAConfig, exist_ok=True)

__all__ = [
    "ChunkRetrieval",
    "HSACache",
    "HSAConfig",
    "HSAForCausalLM",
    "HSAForQuestionAnswering",
    "HSAForSequenceClassification",
    "HSAForTokenClassification",
    "HSAModel",
    "HSAPreTrainedModel",
    "HSAStaticCache",
]

"""
Hierarchical Sparse Attention models for Transformers.

Importing this package registers `HSAConfig` and the models with the Auto classes.
"""

from configuration_hsa import HSAConfig, __version__  # isort: skip  # checks the versions of PyTorch and Transformers

from transformers import AutoConfig

from .cache.hsa_cache import HSACache
from .cache.static_cache import HSAStaticCache
from .conversion import convert_to_hsa, new_parameters
from .modeling_hsa import (
    HSAForCausalLM,
    HSAForQuestionAnswering,
    HSAForSequenceClassification,
    HSAForTokenClassification,
    HSAModel,
    HSAPreTrainedModel,
)
from .retrieval import ChunkRetrieval


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
    "__version__",
    "convert_to_hsa",
    "new_parameters",
]

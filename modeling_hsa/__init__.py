"""
Hierarchical Sparse Attention models for Transformers.

Importing this package registers `HSAConfig` and the models with the Auto classes.
"""

from .versions import check_versions  # isort: skip

check_versions()

from transformers import AutoConfig  # noqa: E402

from configuration_hsa import HSAConfig  # noqa: E402

from .cache import HSACache  # noqa: E402
from .layers import ChunkRetrieval  # noqa: E402
from .modeling_hsa import (  # noqa: E402
    HSAForCausalLM,
    HSAForQuestionAnswering,
    HSAForSequenceClassification,
    HSAForTokenClassification,
    HSAModel,
    HSAPreTrainedModel,
)


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
]

"""`HSAConfig`, the configuration of Hierarchical Sparse Attention models."""

from .configuration_hsa import HSAConfig


__all__ = ["HSAConfig"]

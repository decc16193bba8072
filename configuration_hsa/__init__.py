"""`HSAConfig`, the configuration of Hierarchical Sparse Attention models."""

from .configuration_hsa import HSAConfig
from .versions import __version__


__all__ = ["HSAConfig", "__version__"]

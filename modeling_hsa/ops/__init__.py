"""
The three operations of Hierarchical Sparse Attention, and what is visible: see `dispatch` for what they mean, `naive`
for their definition in a page of code, and `torch_*` and `triton_*` for the backends.
"""

from .dispatch import chunk_attention, chunk_weights, select_chunks, visible_chunks


__all__ = ["chunk_attention", "chunk_weights", "select_chunks", "visible_chunks"]

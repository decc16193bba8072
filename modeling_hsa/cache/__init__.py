"""
What an HSA model remembers: one state per layer, which follows from the kind of the layer, where the rows stand, and
one chunk memory. [`HSACache`] in `hsa_cache` holds them together.
"""

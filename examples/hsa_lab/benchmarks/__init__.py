"""Time and memory, and what a small model learns; `benchmark.py` runs them."""

"""The study: which parts of chunk-based sparse attention make it extrapolate. `study.py` runs it."""

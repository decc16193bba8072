"""Evaluations of models on long contexts; `evaluate.py` runs them."""

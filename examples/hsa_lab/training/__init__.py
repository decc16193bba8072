"""Pretraining by a recipe, and the data of both ways to train."""

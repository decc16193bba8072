"""Texts to hide things in, and what is hidden in them: one module a family of tasks."""

"""
Recipes of pretraining: the model, the optimizer and the stages, as JSON.

With "like", a recipe has the fields of that other recipe (a path relative to its own) except those it has itself. The
model's fields are those of its configuration: of HSA, or of the "model_type" among them. A stage has a length, a
mixture of tasks, and ends when its tasks are mastered (`accuracy`) or its tokens are used up; its `chunk_topk` and
`retrieval_weight` are for HSA models and others ignore them, so that the same stages serve all. A task is "text" or of
`hsa_lab/tasks/retrieval.py`, and may have `options`.
"""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig


SECTIONS = {
    "recipe": {"model", "optimizer", "stages"},
    "optimizer": {"name", "learning_rate", "weight_decay", "warmup_tokens", "answer_weight"},
    "stage": {"name", "length", "batch_tokens", "mixture", "most_tokens"},
    "task": {"name", "task", "share"},
}
OPTIONAL = {
    "stage": {"accuracy", "chunk_topk", "final_learning_rate", "retrieval_weight"},
    "task": {"options"},
}


def read_recipe(file: Path) -> dict:
    """Raises: ValueError for a field that is unknown or missing."""
    try:
        recipe = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: {error}") from None
    if "like" in recipe:
        recipe = read_recipe(file.parent / recipe.pop("like")) | recipe
    stages = recipe.get("stages", [])
    sections = [("recipe", recipe), ("optimizer", recipe.get("optimizer", {}))]
    sections += [("stage", stage) for stage in stages]
    sections += [("task", task) for stage in stages for task in stage.get("mixture", [])]
    for name, fields in sections:
        unknown = fields.keys() - SECTIONS[name] - OPTIONAL.get(name, set())
        missing = SECTIONS[name] - fields.keys()
        if unknown or missing:
            problems = {"lacks": sorted(missing), "does not take": sorted(unknown)}
            text = " and ".join(f"{verb} {names}" for verb, names in problems.items() if names)
            label = f"{name} {fields['name']!r}" if "name" in fields else name
            raise ValueError(f"{file}: the {label} {text}.")
    if recipe["model"].get("chunk_weighting") == "joint" and any(stage.get("retrieval_weight") for stage in stages):
        raise ValueError(
            f"{file}: with `chunk_weighting` 'joint' chunks have no weight: no `retrieval_weight` either."
        )
    return recipe


def make_config(fields: dict, tokenizer) -> PreTrainedConfig:
    """
    The configuration of a recipe's "model", with the vocabulary and the special tokens of the tokenizer.

    Raises: ValueError for a field that such a model does not have.
    """
    fields = {"model_type": "hsa"} | fields
    if unknown := fields.keys() - vars(AutoConfig.for_model(fields["model_type"])).keys() - {"model_type"}:
        raise ValueError(f"A model of type {fields['model_type']!r} does not take {sorted(unknown)}.")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(**fields, **special, vocab_size=len(tokenizer))

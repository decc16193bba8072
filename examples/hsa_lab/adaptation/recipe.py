"""
Recipes of adaptation, as JSON:

    model       arguments of `convert_to_hsa`
    train       `base`: "lora" (low-rank changes of the matrices of the base, of `rank`, times `alpha` / `rank`),
                "all" or "none". What is new is always trained
    optimizer   `muon_learning_rate` of new matrices, `learning_rate` of the rest (AdamW); `warmup` and `decay`: the
                shares of all tokens in which they rise from 0 and fall to 0
    losses      what each counts, all of them means: `answers`, in which tokens that were asked for count
                `value_weight` times; `text`; `distill_text` and `distill_chat`, the divergence from the base on rows
                of text alone and on answers of chats; `retrieval`, -log of the weight of the chunks with the evidence
    sampled     the shares of the tokens of text that these losses are computed for: `text`, in rows with questions,
                and `distill`, in rows without
    stages      each with `name`, `length` and `batch_tokens`, `tokens` in all, `families` and `questions` as in
                `chat_rows.mixture.RECIPE`, and what else is to be changed in the configuration (`chunk_topk`,
                `sliding_window`); that of the last stage is saved
"""

import json
from pathlib import Path


FIELDS = {
    "recipe": {"model", "train", "optimizer", "losses", "sampled", "stages"},
    "train": {"base", "rank", "alpha"},
    "optimizer": {"muon_learning_rate", "learning_rate", "weight_decay", "warmup", "decay"},
    "losses": {"answers", "value_weight", "text", "distill_text", "distill_chat", "retrieval"},
    "sampled": {"text", "distill"},
    "stage": {"name", "length", "batch_tokens", "tokens", "families", "questions"},
}
CHANGEABLE = {"chunk_topk", "sliding_window"}  # fields of the configuration that a stage may set


def read_recipe(file: Path) -> dict:
    """Raises: ValueError for a field that is unknown or missing."""
    recipe = json.loads(file.read_text(encoding="utf-8"))
    parts = [
        ("recipe", recipe),
        *((name, recipe.get(name, {})) for name in ("train", "optimizer", "losses", "sampled")),
    ]
    parts += [("stage", stage) for stage in recipe.get("stages", [])]
    for name, fields in parts:
        missing = FIELDS[name] - fields.keys()
        unknown = fields.keys() - FIELDS[name] - (CHANGEABLE if name == "stage" else set())
        if missing or unknown:
            problems = {"lacks": sorted(missing), "does not take": sorted(unknown)}
            text = " and ".join(f"{verb} {names}" for verb, names in problems.items() if names)
            raise ValueError(f"{file}: `{name}` {text}.")
    if recipe["train"]["base"] not in ("lora", "all", "none"):
        raise ValueError(f"{file}: `train.base` must be 'lora', 'all' or 'none', got {recipe['train']['base']!r}.")
    return recipe


def rate_at(optimizer: dict, done: float) -> float:
    """What the learning rates are multiplied with when a share `done` of all tokens was seen."""
    rise = done / optimizer["warmup"] if optimizer["warmup"] else 1.0
    fall = (1 - done) / optimizer["decay"] if optimizer["decay"] else 1.0
    return max(0.0, min(1.0, rise, fall))

"""
The models of the study, one beside the other: fields of a configuration, away from those of the reference.

All but NSA are `HSAConfig`s, whose kinds of layers make them up, so that they share embeddings, norms, MLPs, initial
weights and the code that trains and reads them. All are as large as the reference to 2 %: the one field that a model
names as `sized_by` is set so.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_hsa  # noqa: F401  # registers HSA models with the Auto classes

from . import nsa


# 9.6M parameters; 4 layers below the chunk encoder, and 2 groups of 2 above it with an HSA layer each.
REFERENCE = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_lower_layers": 4, "num_upper_layers": 4, "num_upper_groups": 2, "num_encoder_layers": 1,
    "sliding_window": 128, "chunk_size": 64, "chunk_topk": 8, "retrieval_dim": 128, "hsa_num_key_value_heads": 2,
    "state_size": 128, "mamba_head_dim": 64, "vocab_size": 4096,
}  # fmt: skip
TOLERANCE = 0.02
# What the number of parameters is changed by, and in which steps.
_STEPS = {"intermediate_size": 8, "state_size": 8}


def layers(*kinds_and_counts: tuple[str, int]) -> dict:
    """The field `layer_types`, in place of the counts of the paper's pattern."""
    kinds = [kind for kind, count in kinds_and_counts for _ in range(count)]
    return {"layer_types": kinds, **dict.fromkeys(("num_lower_layers", "num_upper_layers", "num_upper_groups"))}


@dataclass(frozen=True)
class Model:
    """
    Attributes:
        what: one sentence.
        fields: of its configuration, away from the reference.
        sized_by: the field that makes it as large as the reference.
        longest: the longest text that it is tried on, in lengths of training; attention to everything is quadratic.
        tests: how it is tried, by name: fields that are changed after training.
    """

    what: str
    fields: dict = field(default_factory=dict)
    sized_by: str = "intermediate_size"
    longest: int = 256
    tests: dict[str, dict] = field(default_factory=lambda: {"": {}})

    @property
    def is_nsa(self) -> bool:
        """Of another family, to which the fields of HSA mean nothing, and which not every machine can run."""
        return self.fields.get("model_type") == "nsa"


def _yarn(factor: float, length: int = 4096) -> dict:
    return {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "original_max_position_embeddings": length,
        }
    }  # fmt: skip


MODELS = {
    "hsa": Model("HSA on window attention, the reference."),
    "ramba": Model(
        "HSA on Mamba-2, with the chunk encoder, CLS and the bypassing residual (RAMba).",
        {
            **layers(("linear_attention", 6), *(2 * (("hsa", 1), ("linear_attention", 3)))),
            "hsa_local_attention": False,
        },
    ),
    "mass": Model(
        "HSA with landmarks that stand for the attention mass of their chunk (as in HiLS-Attention).",
        {"chunk_landmark": "mass", "retrieval_dim": 65, "num_retrieval_heads": 2},
    ),
    "landmark": Model(
        "The grouped softmax of Landmark Attention as far as one chunk memory expresses it: weights by the landmark, "
        "added to the stream, and every chunk retrieved in training. (Its own landmarks are tokens of every layer.)",
        {"hsa_residual": "standard", "chunk_topk": 64},
        tests={"8 chunks": {"chunk_topk": 8}, "64 chunks": {}},
    ),
    "full": Model(
        "Full attention with RoPE, as it was trained and with YaRN.",
        layers(("full_attention", 10)),
        longest=16,
        tests={"RoPE": {}, "YaRN x4": _yarn(4.0), "YaRN x16": _yarn(16.0)},
    ),
    "nope": Model(
        "Full attention without position.",
        {**layers(("full_attention", 10)), "full_attention_rope": False},
        longest=16,
    ),
    "window": Model("Window attention only.", layers(("sliding_attention", 10))),
    "mamba2": Model("Mamba-2 only.", layers(("linear_attention", 18)), sized_by="state_size"),
    "nsa": Model(
        "NSA of flash-linear-attention, whose kernels want 16 query heads per key/value head.",
        {
            "model_type": "nsa", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 10,
            "num_heads": 16, "num_kv_heads": 1, "head_dim": 32, "block_size": 64, "block_counts": 8,
            "window_size": 128, "tie_word_embeddings": True, "max_position_embeddings": 4096, "vocab_size": 4096,
        },
        longest=16,
    ),
    "hsa 16:1": Model(
        "HSA with the heads of NSA.",
        {
            "num_attention_heads": 16, "num_key_value_heads": 1, "hsa_num_key_value_heads": 1, "head_dim": 32,
        },
    ),
}  # fmt: skip


def missing(model: Model) -> str | None:
    """Why the model cannot be made here, or None, after which the Auto classes know it."""
    if not model.is_nsa:
        return None
    reason = nsa.obstacle()
    if reason is None:
        nsa.register()
    return reason


def count_parameters(fields: dict) -> int:
    with torch.device("meta"):
        config = AutoConfig.for_model(**{"model_type": "hsa"} | fields)
        return AutoModelForCausalLM.from_config(config).num_parameters()


def make_fields(model: Model, base: dict, changes: dict | None = None, is_sized: bool = True) -> dict:
    """
    The fields of the configuration: those of `base`, of the model, and `changes`. `is_sized`: with `sized_by` so that
    it has as many parameters as `base`.

    Raises: ValueError where no value of that field makes them as many, to 2 %.
    """
    fields = {**({} if model.is_nsa else base), **model.fields, **(changes or {})}
    if not is_sized:
        return fields
    wanted, count = count_parameters(base), partial(_with, fields, model.sized_by)
    step = _STEPS[model.sized_by]
    least = count(step)
    best = step * (1 + max(0, round((wanted - least) / (count(2 * step) - least))))
    if abs(count(best) / wanted - 1) > TOLERANCE:
        raise ValueError(
            f"No `{model.sized_by}` gives the model of {sorted(model.fields)} as many parameters as the reference, "
            f"{wanted:,}, to 2 %."
        )
    return {**fields, model.sized_by: best}


def _with(fields: dict, name: str, value: int) -> int:
    return count_parameters({**fields, name: value})

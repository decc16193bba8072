"""Small models: the tiny configuration and every switch of the architecture away from its default."""

import torch

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM


MAMBA = {"state_size": 8, "mamba_head_dim": 16}

# Every switch of the architecture, each away from its default.
VARIANTS = {
    "default": {},
    "stick_breaking": {"chunk_weighting": "stick_breaking"},
    "joint": {"chunk_weighting": "joint"},
    "standard_residual": {"hsa_residual": "standard"},
    "no_local_attention": {"hsa_local_attention": False},
    "mean_landmark": {"chunk_landmark": "mean"},
    "mass_landmark": {"chunk_landmark": "mass", "retrieval_dim": 9},
    "mass_landmark_stride_3": {
        "chunk_landmark": "mass",
        "retrieval_dim": 9,
        "num_retrieval_heads": 4,
        "hsa_num_key_value_heads": 2,
        "retrieval_stride": 3,
    },
    "no_encoder": {"chunk_landmark": "mean", "num_encoder_layers": 0},
    "stride_3": {"retrieval_stride": 3},
    "stride_16": {"retrieval_stride": 16, "chunk_weighting": "stick_breaking"},
    "stride_20": {"retrieval_stride": 20, "hsa_local_attention": False},
    "distance_penalty": {"retrieval_distance_penalty": 0.3, "chunk_topk": 2},
    "two_retrieval_heads": {"num_retrieval_heads": 2},
    "four_retrieval_heads": {"num_retrieval_heads": 4, "hsa_num_key_value_heads": 2, "retrieval_stride": 3},
    "two_memory_heads": {"hsa_num_key_value_heads": 2, "chunk_weighting": "joint"},
    "landmark_norm": {"landmark_norm": True},
    "no_qk_norm": {"qk_norm": False},
    "more_topk_than_chunks": {"chunk_topk": 50},
    "window_of_one": {"sliding_window": 1},
    "window_of_100": {"sliding_window": 100},
    "window_beyond_the_input": {"sliding_window": 1000},
    "no_lower_layers": {"num_lower_layers": 0},
    "eager_attention": {"attn_implementation": "eager"},
    "full_attention": {"layer_types": ["full_attention", "sliding_attention", "hsa", "full_attention", "hsa"]},
    "early_encoder": {
        "layer_types": ["sliding_attention"] * 3 + ["hsa", "sliding_attention"],
        "chunk_encoder_layer": 1,
    },
    "hsa_qk_norm_only": {"qk_norm": False, "hsa_qk_norm": True},
    "narrow_hsa_mlp": {"hsa_intermediate_size": 16},
    "no_hsa_mlp": {"hsa_intermediate_size": 0, "hsa_residual": "standard"},
    "qwen2_biases": {"attention_bias": True, "attention_output_bias": False},
    "no_position": {
        "layer_types": ["full_attention", "sliding_attention", "hsa", "full_attention"],
        "full_attention_rope": False,
    },
    "ramba": {"layer_types": ["linear_attention", "linear_attention", "hsa", "linear_attention", "hsa"], **MAMBA},
    "linear_attention_only": {"layer_types": ["linear_attention"] * 3, **MAMBA, "n_groups": 2},
    "baseline": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}

# Those whose cache can forget tokens.
CROPPABLE = tuple(name for name in VARIANTS if "linear_attention" not in VARIANTS[name].get("layer_types", ()))

# Those of the fast tier: together they take every way through the code.
FAST_VARIANTS = ("default", "joint", "stride_3", "no_local_attention", "early_encoder", "ramba")


def tiny_config(**overrides) -> HSAConfig:
    """A configuration whose window and chunks are so small that a hundred tokens exercise everything."""
    fields = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_lower_layers": 1,
        "num_upper_layers": 2,
        "num_upper_groups": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 12,
        "chunk_size": 16,
        "chunk_topk": 2,
        "retrieval_dim": 16,
        # Larger than usual, so that attention and retrieval are far from uniform and a mistake shows in the logits.
        "initializer_range": 0.2,
    }
    if "layer_types" in overrides:
        fields.update(num_lower_layers=None, num_upper_layers=None, num_upper_groups=None)
    return HSAConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides) -> HSAForCausalLM:
    """A randomly initialised model of `tiny_config`, in eval mode and fp32."""
    torch.manual_seed(seed)
    return HSAForCausalLM(tiny_config(**overrides)).eval()


def make_variant(name: str, **more) -> HSAForCausalLM:
    """The tiny model with the switches of `VARIANTS[name]`, and more."""
    overrides = {**VARIANTS[name], **more}
    attn_implementation = overrides.pop("attn_implementation", "sdpa")
    model = tiny_model(**overrides)
    model.set_attn_implementation(attn_implementation)
    return model

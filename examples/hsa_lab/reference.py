"""
Checkpoints of the authors' public code (`DRTForCausalLM`), as HSA models.

A file holds the parameters under the authors' names (`param.backbone.layers.3.q_proj.weight`, or without `param.`) and
the configuration as JSON in its metadata. Every field of it is read, refused by name, or known to change nothing.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM


ENCODER_WIDTH_MULTIPLE = 64  # the authors round 8/3 of the hidden size down to a multiple of this

WINDOW_LAYER = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn": "self_attn",
    "mlp": "mlp",
}
CHUNKING_LAYER = {
    "cls_emb": "cls_token",
    "encoder.layers": "layers",
    "encoder.norm": "norm",
    "norm": "norm",  # without an encoder
    "k_rmsnorm": "k_norm",
    "lmk_ln": "landmark_proj",
    "proj_k": "k_proj",
    "proj_v": "v_proj",
}
RETRIEVAL_LAYER = {
    "ln": "retrieval.q_proj",
    "pre_norm": "retrieval.norm",
    "lmk_q_norm": "retrieval.q_norm",
    "lmk_k_norm": "retrieval.lmk_k_norm",  # goes into `retrieval.q_norm`, see `fold_landmark_norms`
}
HSA_LAYER = {
    "swa_prenorm": "input_layernorm",
    "attn": "self_attn",
    "pre_norm": "hsa_layernorm",
    "q_proj": "q_proj",
    "q_norm": "q_norm",
    "o_proj": "o_proj",
    "_mlp_norm": "post_attention_layernorm",
    "_mlp": "mlp",
}


# Fields of which one value alone can be converted, and why. It is the default there, but for `enable_qk_norm`.
ONLY = {
    "enable_qk_norm": (True, "without it their HSA layers alone have no norm of queries and keys"),
    "enable_softmax1": (False, "a softmax with one more in its sum has no counterpart"),
    "enable_pos_decay": (False, "a learned decay of the scores has no counterpart"),
    "enc_prenorm": (False, "a norm before the chunk encoder has no counterpart"),
    "mask_slide_window": (False, "chunks in the window are not hidden from retrieval here"),
    "hsa_sliding_window": (None, "all window attention has the same window here"),
    "skip_hsa": (False, "HSA layers without retrieval have no counterpart"),
    "flash_inference": (False, "it leaves retrieval out of the prompt, which has no counterpart"),
    "rope_scaling": (None, "it is of the window attention alone there, and of the chunk encoder too here"),
    "rope_theta": (10000.0, "that of their chunk encoder is always 10000, and here it is the same"),
    "rms_norm_eps": (1e-6, "that of their HSA layers and chunk encoder is always 1e-6, and here it is the same"),
    "layer_norm_epsilon": (1e-6, "that of their other norms is 1e-6, and here it is the same"),
    "hidden_act": ("silu", "their MLPs have no other"),
}
READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_lower_layers", "num_upper_layers", "num_upper_groups",
    "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim", "sliding_window", "chunk_size",
    "chunk_topk", "enable_softmax", "encoder_layers", "enable_enc_cls", "hsa_only", "reset_hsa_residual",
    "singlehead_retrieval", "retrieval_dim", "enable_lmk_norm", "max_position_embeddings", "initializer_range",
    "attention_bias", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
# Of training only, of how and not what is computed, derived, or never read by the authors' code.
NO_MATTER = {
    "attention_dropout", "encoder_dropout", "enable_gumbel_noise", "enable_stable_enc", "reg_lamda", "reg_C",
    "offloading_to_cpu", "inference_segment", "lmk_token_id", "slide_window", "num_hidden_layers", "mlp_bias",
    "residual_in_fp32", "pretraining_tp", "model_type",
}  # fmt: skip
# What Transformers 4 wrote into every configuration; of generation, of outputs and of classification.
OF_TRANSFORMERS = {
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
    "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip


def check_config(reference: dict) -> None:
    """Raises: ValueError for a field that has no counterpart here, whose value or name the message says."""
    for name, (value, why) in ONLY.items():
        given = reference.get(name, False if name == "enable_qk_norm" else value)
        if given != value:
            raise ValueError(f"`{name}` of the authors' code must be {value!r} to be converted, got {given!r}: {why}.")
    if unknown := sorted(reference.keys() - ONLY.keys() - READ - NO_MATTER - OF_TRANSFORMERS):
        raise ValueError(
            f"It is not known what {', '.join(f'`{name}`' for name in unknown)} of the configuration does."
        )
    if reference["head_dim"] * reference["num_attention_heads"] != reference["hidden_size"]:
        raise ValueError(
            f"`head_dim` of the authors' code must be `hidden_size` / `num_attention_heads` to be converted, got "
            f"{reference['head_dim']}: that of their HSA layers always is."
        )


def convert_config(reference: dict) -> HSAConfig:
    """
    The `HSAConfig` of a configuration of the authors' code, whose defaults are those of that code.

    Raises: ValueError for a field that cannot be converted.
    """
    check_config(reference)
    kv_heads, encoder_layers = reference["num_kv_heads"], reference["encoder_layers"]
    retrieval_heads = 1 if reference.get("singlehead_retrieval", False) else kv_heads
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_lower_layers", "num_upper_layers", "num_upper_groups",
        "num_attention_heads", "num_key_value_heads", "head_dim", "chunk_size", "chunk_topk",
        "max_position_embeddings", "initializer_range", "attention_bias", "tie_word_embeddings", "pad_token_id",
        "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return HSAConfig(
        **{name: reference[name] for name in same},
        sliding_window=reference["sliding_window"] + 1,  # theirs does not count the token itself
        chunk_weighting="softmax" if reference.get("enable_softmax", False) else "stick_breaking",
        chunk_landmark="cls" if reference.get("enable_enc_cls", encoder_layers > 0) else "mean",
        num_encoder_layers=encoder_layers,
        encoder_intermediate_size=reference["hidden_size"] * 8 // 3 // ENCODER_WIDTH_MULTIPLE * ENCODER_WIDTH_MULTIPLE,
        encoder_attention_bias=True,
        hsa_local_attention=not reference.get("hsa_only", True),
        hsa_residual="standard" if reference.get("reset_hsa_residual", False) else "bypass",
        hsa_num_key_value_heads=kv_heads,
        num_retrieval_heads=retrieval_heads,
        retrieval_dim=reference["retrieval_dim"] // retrieval_heads,
        landmark_norm=reference.get("enable_lmk_norm", False),
        qk_norm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
    )


def reference_layers(config: HSAConfig) -> list[tuple[str, dict[str, str]]]:
    """For each entry of the authors' flat layer list, the module it becomes and the names inside it."""
    layers = [(f"model.layers.{i}", WINDOW_LAYER) for i in range(config.num_lower_layers)]
    layers.append(("model.chunk_encoder", CHUNKING_LAYER))
    for i in range(config.num_lower_layers, config.num_hidden_layers):
        if config.hsa_layers[i]:
            layers += [(f"model.layers.{i}", RETRIEVAL_LAYER), (f"model.layers.{i}", HSA_LAYER)]
        else:
            layers.append((f"model.layers.{i}", WINDOW_LAYER))
    return layers


def convert_name(name: str, layers: list[tuple[str, dict[str, str]]]) -> str:
    """Our name of a parameter of the authors' code."""
    top = {"backbone.embeddings": "model.embed_tokens", "backbone.norm_f": "model.norm", "lm_head": "lm_head"}
    for theirs, ours in top.items():
        if name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    index, rest = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name).groups()
    module, names = layers[int(index)]
    for theirs, ours in names.items():
        if rest == theirs or rest.startswith(theirs + "."):
            return f"{module}.{ours}{rest.removeprefix(theirs)}"
    raise ValueError(f"`{name}` is not a known parameter of the authors' code.")


def fold_landmark_norms(state: dict[str, torch.Tensor]) -> None:
    """
    With `enable_lmk_norm`, each retrieval layer of the authors' code norms the landmarks with weights of its own. Here
    the norm of the landmarks is shared: theirs gets weight 1, and as a score is a product, the weights of the
    landmarks go to the queries.
    """
    for name in [name for name in state if name.endswith("retrieval.lmk_k_norm.weight")]:
        weight = state.pop(name)
        state[name.replace("lmk_k_norm", "q_norm")] *= weight
        state["model.chunk_encoder.landmark_norm.weight"] = torch.ones_like(weight)


def convert(file: str | Path) -> HSAForCausalLM:
    """Loads a checkpoint of the authors' code as an [`HSAForCausalLM`] in fp32."""
    with safe_open(file, "pt") as checkpoint:
        metadata = checkpoint.metadata() or {}
        if "config" not in metadata:
            raise ValueError(
                f"{file} has no `config` in its metadata, so it is not a checkpoint of the authors' code."
            )
        config = convert_config(json.loads(metadata["config"]))
        layers = reference_layers(config)
        state = {
            convert_name(key.removeprefix("param."), layers): checkpoint.get_tensor(key).float()
            for key in checkpoint.keys()
            if key.startswith(("param.", "backbone.", "lm_head."))
        }
    if config.chunk_landmark == "cls":
        state["model.chunk_encoder.cls_token"] = state["model.chunk_encoder.cls_token"].flatten()
    fold_landmark_norms(state)
    model = HSAForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"The checkpoint does not fit its configuration: missing {missing}, unexpected {unexpected}.")
    return model.to(torch.float32).eval()

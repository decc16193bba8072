"""
Convert a checkpoint of the authors' public code (`DRTForCausalLM`) into a model folder.

    python examples/convert_reference_checkpoint.py FILE.safetensors --output DIR

The file holds the parameters under the authors' names (`param.backbone.layers.3.q_proj.weight`, or without `param.`)
and the configuration as JSON in its metadata.
"""

import argparse
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


def convert_config(reference: dict) -> HSAConfig:
    """The `HSAConfig` of a configuration of the authors' code."""
    if reference.get("enable_softmax1"):
        raise ValueError("`enable_softmax1` of the authors' code has no counterpart here.")
    kv_heads = reference.get("num_kv_heads", 1)
    retrieval_heads = 1 if reference.get("singlehead_retrieval") else kv_heads
    return HSAConfig(
        vocab_size=reference["vocab_size"],
        hidden_size=reference["hidden_size"],
        intermediate_size=reference["intermediate_size"],
        num_lower_layers=reference["num_lower_layers"],
        num_upper_layers=reference["num_upper_layers"],
        num_upper_groups=reference["num_upper_groups"],
        num_attention_heads=reference["num_attention_heads"],
        num_key_value_heads=reference["num_key_value_heads"],
        head_dim=reference["head_dim"],
        sliding_window=reference["sliding_window"] + 1,  # theirs does not count the token itself
        chunk_size=reference["chunk_size"],
        chunk_topk=reference["chunk_topk"],
        chunk_weighting="softmax" if reference["enable_softmax"] else "stick_breaking",
        num_encoder_layers=reference["encoder_layers"],
        encoder_intermediate_size=reference["hidden_size"] * 8 // 3 // ENCODER_WIDTH_MULTIPLE * ENCODER_WIDTH_MULTIPLE,
        encoder_attention_bias=True,
        hsa_local_attention=not reference["hsa_only"],
        hsa_num_key_value_heads=kv_heads,
        num_retrieval_heads=retrieval_heads,
        retrieval_dim=reference["retrieval_dim"] // retrieval_heads,
        landmark_norm=bool(reference.get("enable_lmk_norm")),
        qk_norm=reference["enable_qk_norm"],
        hidden_act=reference["hidden_act"],
        max_position_embeddings=reference["max_position_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": reference["rope_theta"]},
        initializer_range=reference["initializer_range"],
        rms_norm_eps=reference["rms_norm_eps"],
        attention_bias=reference["attention_bias"],
        mlp_bias=reference["mlp_bias"],
        tie_word_embeddings=reference["tie_word_embeddings"],
        pad_token_id=reference["pad_token_id"],
        bos_token_id=reference["bos_token_id"],
        eos_token_id=reference["eos_token_id"],
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
    raise ValueError(f"`{name}` is not a parameter of the authors' code this script knows.")


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
                f"{file} has no `config` in its metadata, so it is not a checkpoint this script can read."
            )
        config = convert_config(json.loads(metadata["config"]))
        layers = reference_layers(config)
        state = {
            convert_name(key.removeprefix("param."), layers): checkpoint.get_tensor(key).float()
            for key in checkpoint.keys()
            if key.startswith(("param.", "backbone.", "lm_head."))
        }
    state["model.chunk_encoder.cls_token"] = state["model.chunk_encoder.cls_token"].flatten()
    fold_landmark_norms(state)
    model = HSAForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"The checkpoint does not fit its configuration: missing {missing}, unexpected {unexpected}.")
    return model.to(torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="checkpoint of the authors' code, .safetensors")
    parser.add_argument("--output", required=True, help="folder for the converted model")
    arguments = parser.parse_args()
    model = convert(arguments.file)
    model.save_pretrained(arguments.output)
    print(f"{model.num_parameters():,} parameters written to {arguments.output}")


if __name__ == "__main__":
    main()

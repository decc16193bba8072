"""
Pretrained Llama-like models to HSA: their layers keep their weights and see a window, and new HSA layers, which start
so that they change nothing, give the upper half a memory of everything before.

What becomes of the fields of a configuration is in `CARRIED` and `EXPRESSED` below, of the weights in `_fill`.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.utils import quantization_config

from configuration_hsa import HSAConfig

from .chunk_encoder import HSAChunkEncoder
from .layers import HSARetrievalLayer
from .modeling_hsa import HSAForCausalLM, HSAModel, HSAPreTrainedModel


FAMILIES = {
    model.config_class.model_type: model
    for model in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}
MODES = ("insert", "replace")

# Fields of the source that have the same name and meaning in `HSAConfig`; with those that all configurations of
# Transformers share.
CARRIED = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "mlp_bias",
    "pretraining_tp",
})  # fmt: skip
# Fields of the source that other words say in `HSAConfig`, and where.
EXPRESSED = {
    "num_hidden_layers": "`layer_types`",
    "layer_types": "`layer_types`: full attention becomes window attention too",
    "sliding_window": "the most that `sliding_window` may be",
    "use_sliding_window": "as `layer_types` and `sliding_window` of the source follow from it",
    "max_window_layers": "as `layer_types` of the source follows from it",
    "attention_bias": "`attention_bias`, `attention_output_bias` and `encoder_attention_bias`",
    "architectures": "the class of the new model",
    "dtype": "the dtype of the new model",
    "transformers_version": "the version that saves the new model",
}
# What no field of HSAConfig can say.
_REFUSED = {
    "quantization_config": "Its weights are quantized. Load it without quantization, or dequantize it",
    "per_layer_config": "Its layers differ in their configuration, which those of HSA cannot",
}
# Fields of HSAConfig that the source or another argument determines, and that overrides may not name.
_DETERMINED = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "hidden_act", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "attention_bias",
            "attention_output_bias", "mlp_bias", "qk_norm",
        ),
        "It is as in the source",
    ),
    **dict.fromkeys(
        ("layer_types", "num_hidden_layers", "num_lower_layers", "num_upper_layers", "num_upper_groups"),
        "It follows from `placement`",
    ),
    "hsa_local_attention": "It follows from `mode`",
}  # fmt: skip


def convert_to_hsa(
    model_or_name: PreTrainedModel | str | os.PathLike,
    *,
    mode: str = "insert",
    placement: int | Sequence[int] | None = None,
    sliding_window: int = 512,
    dtype: torch.dtype | str | None = None,
    gguf_file: str | None = None,
    **overrides,
) -> HSAForCausalLM:
    """
    Makes an HSA model of a Llama, Mistral, Qwen2 or Qwen3, with new weights of its own: the source stays as it is.

    It starts as the same function: where `sliding_window` covers the input, its logits are those of the source. What
    was inserted retrieves nothing of use before it is trained. Retrieval itself is initialised at random: call
    `transformers.set_seed` before, to get the same model again.

    Args:
        model_or_name: a model, a folder, a Hub id, or a GGUF file (which needs the package `gguf`).
        mode: `"insert"` adds HSA layers without local attention before layers of the source; `"replace"` makes layers
            of the source HSA layers, which keep their window attention as local attention.
        placement: before (insert) or instead of (replace) which layers of the source, counted from 0; or how many,
            evenly spaced over its upper half. By default 3, or as many layers as that has, if fewer.
        sliding_window: tokens that each layer sees, at most those that it sees in the source.
        dtype: of the new model, and what a source that is loaded by its name is loaded in; by default as the source.
        gguf_file: the name of a GGUF file in the folder or the repository `model_or_name`.
        overrides: other fields of [`HSAConfig`]. By default, the chunk memory has as many key/value heads as the
            source, `hsa_qk_norm` is on, and the rest is as in `HSAConfig`.

    Returns: the model, on the device, in the mode (training or evaluation) and with the generation config of the
        source.

    Raises:
        TypeError: for what is not a model of one of the four families.
        ValueError: for fields of its configuration that an HSA model cannot express, for weights that have no place in
            it, and for arguments out of range; the message names the field or argument.
    """
    if isinstance(model_or_name, (str, os.PathLike)):
        source = _load(model_or_name, gguf_file, dtype)
    elif gguf_file is not None:
        raise ValueError(
            f"`gguf_file` ({gguf_file!r}) needs the name of a folder or repository, but a model was given."
        )
    else:
        source = model_or_name
    _check_source(source)
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    places = _places(placement, source.config.num_hidden_layers)
    config = _hsa_config(source.config, mode, places, {"sliding_window": sliding_window, **overrides})
    with source.device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or source.dtype, attn_implementation=source.config._attn_implementation
        )
    _fill(model, source, mode, places)
    prefill_chunk_size = model.generation_config.prefill_chunk_size
    model.generation_config = copy.deepcopy(source.generation_config)
    if model.generation_config.prefill_chunk_size is None:
        model.generation_config.prefill_chunk_size = prefill_chunk_size
    return model.train(source.training)


def new_parameters(model: HSAPreTrainedModel, modules: bool = False) -> list[str]:
    """
    The names of the parameters that a model without retrieval of the same layers would not have: those of the chunk
    encoder, and those of the HSA layers except, where they have local attention, for their window attention, MLP and
    the norms of these. Of a converted model, before and after it is saved, these are the ones that its source did not
    have. For groups of an optimizer.

    Args:
        model: any HSA model, not wrapped by another module.
        modules: return the names of the modules that hold them instead, none inside of another, which is what
            `modules_to_save` of PEFT takes.

    Raises: TypeError for what is no HSA model.
    """
    if not isinstance(model, HSAPreTrainedModel):
        raise TypeError(f"`model` must be an HSA model, got {type(model).__name__}. Unwrap it, or call this before.")
    new = [new for module in model.modules() for new in _new_modules(module)]
    names = {module: name for name, module in model.named_modules()}
    if modules:
        return [names[module] for module in new]
    return [f"{names[module]}.{name}" for module in new for name, _ in module.named_parameters()]


def _new_modules(module: nn.Module) -> list[nn.Module]:
    """What is new about a module, looked at without those that it is part of."""
    if isinstance(module, HSAChunkEncoder):
        return [module]
    if not isinstance(module, HSARetrievalLayer):
        return []
    if not module.config.hsa_local_attention:
        return [module]
    parts = (module.retrieval, module.hsa_layernorm, module.q_proj, module.q_norm, module.o_proj)
    return [part for part in parts if any(True for _ in part.parameters())]


# The source.


def _load(name: str | os.PathLike, gguf_file: str | None, dtype: torch.dtype | str | None) -> PreTrainedModel:
    name = os.fspath(name)
    if gguf_file is None and name.endswith(".gguf"):
        name, gguf_file = str(Path(name).parent), Path(name).name
    kwargs = {} if gguf_file is None else {"gguf_file": gguf_file}
    _check_family(AutoConfig.from_pretrained(name, **kwargs).model_type)  # before its weights are loaded
    if gguf_file is not None and hasattr(quantization_config, "GgufConfig"):  # of versions that can keep it packed
        kwargs["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", **kwargs)


def _check_family(model_type: Any) -> None:
    if model_type not in FAMILIES:
        raise TypeError(
            f"Models of type {model_type!r} cannot be converted: HSA models have no layers like theirs. These can: "
            f"{', '.join(model.__name__ for model in FAMILIES.values())}."
        )


def _check_source(source: Any) -> None:
    if not isinstance(source, PreTrainedModel):
        raise TypeError(
            f"`model_or_name` must be a model of Transformers or the name of one, got {type(source).__name__}. Unwrap "
            "it; merge adapters first (`merge_and_unload()`)."
        )
    _check_family(getattr(source.config, "model_type", None))
    family = FAMILIES[source.config.model_type]
    if type(source) is not family:
        raise TypeError(f"`model_or_name` must be a {family.__name__} itself, got {type(source).__name__}.")
    devices = {x.device for x in source.parameters()}
    if len(devices) > 1 or source.device.type == "meta":
        raise ValueError(
            f"The source is on {', '.join(sorted(map(str, devices)))}. Load it on one device, without `device_map`."
        )
    dtypes = {x.dtype for x in source.parameters()}
    if len(dtypes) > 1 or not source.dtype.is_floating_point:
        raise ValueError(f"The source is in {', '.join(sorted(map(str, dtypes)))}. Load it in one floating dtype.")
    if source.config.tie_word_embeddings and source.lm_head.weight is not source.model.embed_tokens.weight:
        raise ValueError("`tie_word_embeddings` of the source is True, but its weights differ. Set it to False.")


# The configuration.


def _places(placement: int | Sequence[int] | None, num_layers: int) -> list[int]:
    """The layers of the source that `placement` of `convert_to_hsa` means, in order."""
    upper = num_layers - num_layers // 2
    if placement is None:
        placement = min(3, upper)
    if isinstance(placement, int) and not isinstance(placement, bool):
        if not 1 <= placement <= upper:
            raise ValueError(
                f"`placement` as a number must be from 1 to {upper}, the layers of the upper half of the source, got "
                f"{placement}."
            )
        return [num_layers // 2 + i * upper // placement for i in range(placement)]
    places = list(placement) if isinstance(placement, Sequence) and not isinstance(placement, str) else None
    if not places or not all(type(place) is int and 0 <= place < num_layers for place in places):
        raise ValueError(
            f"`placement` must be a number of layers, or a list of layers of the source from 0 to {num_layers - 1}, "
            f"got {placement!r}."
        )
    if len(set(places)) != len(places):
        raise ValueError(f"`placement` names a layer twice: {places}.")
    return sorted(places)


def _plan(mode: str, places: list[int], num_layers: int) -> list[tuple[int, bool]]:
    """For each layer of the new model, the one of the source that it is made from, and whether it is an HSA layer."""
    plan = []
    for layer in range(num_layers):
        if layer in places:
            plan.append((layer, True))
        if mode == "insert" or layer not in places:
            plan.append((layer, False))
    return plan


def _hsa_config(source: PreTrainedConfig, mode: str, places: list[int], overrides: dict) -> HSAConfig:
    known = {field.name for field in fields(HSAConfig)}
    for name, value in overrides.items():
        if name not in known:
            raise ValueError(f"Neither `convert_to_hsa` nor HSAConfig knows {name!r} (given {value!r}).")
        if name in _DETERMINED:
            raise ValueError(f"`{name}` cannot be given ({value!r}). {_DETERMINED[name]}.")
    carried, extra = _carried(source)
    bias, output_bias = _biases(source)
    plan = _plan(mode, places, source.num_hidden_layers)
    config = HSAConfig(
        **{
            **carried,
            "attention_bias": bias,
            "attention_output_bias": output_bias,
            "encoder_attention_bias": bias,
            "qk_norm": source.model_type == "qwen3",
            "hsa_qk_norm": True,
            "hsa_num_key_value_heads": source.num_key_value_heads,
            "hsa_local_attention": mode == "replace",
            "layer_types": ["hsa" if is_hsa else "sliding_attention" for _, is_hsa in plan],
            **{name: value for name, value in extra.items() if name not in known},
            **overrides,
        }
    )
    for name in extra.keys() & known:
        if (value := extra[name]) != getattr(config, name):
            raise ValueError(
                f"The configuration of the source has `{name}` ({value!r}), which {type(source).__name__} does not "
                f"declare, and which would be {getattr(config, name)!r} in the HSA model. Delete it there."
            )
    _check_window(source, config.sliding_window)
    _check_fits(config, mode)
    return config


def _carried(source: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields to be taken over, and attributes of the configuration that are no fields and that nobody reads."""
    shared = {field.name for field in fields(PreTrainedConfig)}
    declared = {field.name for field in fields(source)}
    read = declared | {"head_dim"}  # which Qwen2 does not declare
    written = source.to_dict()
    if (written.get("quantization_config") or {}).get("quant_method") == "gguf":
        del written["quantization_config"]  # says where it is from: it was dequantized, or its weights will not fit
    for name, fix in _REFUSED.items():
        if written.pop(name, None):
            raise ValueError(f"The source has a `{name}`. {fix}.")
    carried, extra = {}, {}
    for name in sorted(declared | written.keys() - {"model_type"}):
        value = copy.deepcopy(getattr(source, name))
        if name in EXPRESSED and name in declared:
            continue
        if name in shared or name in CARRIED & read:
            carried[name] = value
        elif name in declared:
            raise ValueError(
                f"`{name}` ({value!r}) of {type(source).__name__} is not known to HSA for Transformers, so that it is "
                "unclear what the source does. Upgrade the package, or use an older version of Transformers."
            )
        elif not name.startswith("_"):
            extra[name] = value
    return carried, extra


def _biases(source: PreTrainedConfig) -> tuple[bool, bool]:
    """Whether the projections of attention to queries, keys and values have biases, and whether the last one has."""
    if source.model_type == "qwen2":
        return True, False
    bias = source.model_type != "mistral" and source.attention_bias
    return bias, bias


def _check_window(source: PreTrainedConfig, sliding_window: int) -> None:
    kinds = source.layer_types if source.model_type.startswith("qwen") else ["sliding_attention"]
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"`layer_types` of the source has {kind!r}, which an HSA model cannot express.")
    window = getattr(source, "sliding_window", None) if source.model_type != "llama" else None
    if window is not None and "sliding_attention" in kinds and sliding_window > window:
        raise ValueError(
            f"`sliding_window` must be at most {window}, the window of the source, whose layers know no longer one, "
            f"got {sliding_window}."
        )


def _check_fits(config: HSAConfig, mode: str) -> None:
    if config.num_encoder_layers > config.chunk_encoder_layer:
        raise ValueError(
            f"`num_encoder_layers` ({config.num_encoder_layers}) must be at most {config.chunk_encoder_layer}, the "
            "number of layers below the chunk encoder, as its layers are copies of those. Give a `placement` further "
            "up, or fewer encoder layers."
        )
    if mode == "replace" and config.hsa_intermediate_size != config.intermediate_size:
        raise ValueError(
            f"`hsa_intermediate_size` ({config.hsa_intermediate_size}) must be {config.intermediate_size} with "
            "mode='replace', as the MLP of the HSA layers is the source's. Leave it out, or insert layers."
        )


# The weights.


@torch.no_grad()
def _fill(model: HSAForCausalLM, source: PreTrainedModel, mode: str, places: list[int]) -> None:
    """The weights of the source, and the first ones of what is new."""
    decoder, old = model.model, source.model
    try:
        decoder.embed_tokens.load_state_dict(old.embed_tokens.state_dict())
        decoder.norm.load_state_dict(old.norm.state_dict())
        model.lm_head.load_state_dict(source.lm_head.state_dict())
        for layer, (index, is_hsa) in zip(decoder.layers, _plan(mode, places, len(old.layers))):
            if not is_hsa:
                layer.load_state_dict(old.layers[index].state_dict())
            elif mode == "insert":
                _fill_inserted(layer, old.layers[index])
            else:
                _fill_replaced(layer, old.layers[index])
    except RuntimeError as error:
        raise ValueError(
            f"The weights of the source are not those of a {type(source).__name__} of its configuration. Merge "
            f"adapters into it first (`merge_and_unload()`), and load GGUF files dequantized. {error}"
        ) from error
    _fill_encoder(decoder, old)


def _fill_inserted(layer: HSARetrievalLayer, old: nn.Module) -> None:
    """All of it is as in the layer above, but nothing reaches the stream: the last projection of each way is zero."""
    _fill_retrieval(layer, old)
    if layer.config.hsa_residual == "standard":
        nn.init.zeros_(layer.o_proj.weight)
    if layer.config.hsa_intermediate_size:
        _copy_part(layer.post_attention_layernorm, old.post_attention_layernorm)
        _copy_part(layer.mlp, old.mlp)
        for parameter in layer.mlp.down_proj.parameters():
            nn.init.zeros_(parameter)


def _fill_replaced(layer: HSARetrievalLayer, old: nn.Module) -> None:
    """The layer itself, and what is retrieved is added to the input of its MLP by a projection that is zero."""
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        getattr(layer, name).load_state_dict(getattr(old, name).state_dict())
    _fill_retrieval(layer, old)
    nn.init.zeros_(layer.o_proj.weight)


def _fill_retrieval(layer: HSARetrievalLayer, old: nn.Module) -> None:
    _copy_part(layer.retrieval.norm, old.input_layernorm)
    _copy_part(layer.hsa_layernorm, old.input_layernorm)
    _copy_part(layer.q_proj, old.self_attn.q_proj)
    _copy_part(layer.q_norm, getattr(old.self_attn, "q_norm", nn.Identity()))
    _copy_part(layer.o_proj, old.self_attn.o_proj)


def _fill_encoder(decoder: HSAModel, old: nn.Module) -> None:
    """Layers as the ones below the chunk encoder; its norm, keys and values as in the layer above."""
    encoder, config = decoder.chunk_encoder, decoder.config
    start = config.chunk_encoder_layer  # layers below the first HSA layer have the same index in the source
    for layer, below in zip(encoder.layers, old.layers[start - len(encoder.layers) :]):
        _copy_part(layer, below)
    above = old.layers[start]
    _copy_part(encoder.norm, above.input_layernorm)
    _copy_part(encoder.k_norm, getattr(above.self_attn, "k_norm", nn.Identity()))
    for new, projection in ((encoder.k_proj, above.self_attn.k_proj), (encoder.v_proj, above.self_attn.v_proj)):
        # To one head for each query head, and the mean of those that share one from now on.
        heads = projection.weight.unflatten(0, (config.num_key_value_heads, config.head_dim))
        heads = heads.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=0)
        new.weight.copy_(heads.unflatten(0, (config.hsa_num_key_value_heads, -1)).mean(1).flatten(0, 1))


def _copy_part(new: nn.Module, old: nn.Module) -> None:
    """The parameters that both have; of those that are of unequal size, what both have room for."""
    given = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in given:
            part = tuple(slice(min(sizes)) for sizes in zip(parameter.shape, given[name].shape))
            parameter[part].copy_(given[name][part])

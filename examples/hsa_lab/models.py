"""Loading models of any family, and making baselines of the same size."""

import argparse
import importlib.util
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .built import build_once, is_adapter
from .commands import find_device


# Registers HSA models with the Auto classes. Where the package is not installed, a model folder brings its code along.
if importlib.util.find_spec("modeling_hsa"):
    import modeling_hsa  # noqa: F401


def load(arguments: argparse.Namespace, hsa_only: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model that the flags of `add_model_flags` name, in eval mode on its device, and its tokenizer.

    Raises: ValueError if it cannot be loaded, or is not an HSA model although `hsa_only` asks for one.
    """
    device, changes = find_device(arguments.device), dict(arguments.config)
    options = {"trust_remote_code": arguments.trust_remote_code}
    try:
        if is_adapter(arguments.model):
            arguments.model = str(build_once(Path(arguments.model)))
        config = AutoConfig.from_pretrained(arguments.model, **options)
        if hsa_only and config.model_type != "hsa":
            raise ValueError(f"`--model` must be an HSA model, not one of type {config.model_type!r}")
        if unknown := changes.keys() - config.to_dict():
            raise ValueError(f"`--config`: a model of type {config.model_type!r} has no field {sorted(unknown)}")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, **options)
        if arguments.attn_implementation:
            options["attn_implementation"] = arguments.attn_implementation
        dtype = "float32" if arguments.dtype == "auto" and device.type == "cpu" else arguments.dtype
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **options, **changes)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`--model`: cannot load {arguments.model}: {error}") from None
    return model.to(device).eval(), tokenizer


def count_parameters(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return model_class(config).num_parameters()


def llama_like(config: PreTrainedConfig, parameters: int) -> LlamaConfig:
    """
    A Llama as wide and deep as a model with `config`; its MLP is as wide as makes the parameters as many.

    Raises: ValueError where no width gives as many to 2 %.
    """
    make = partial(
        LlamaConfig, vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, max_position_embeddings=1 << 20, tie_word_embeddings=True,
        attn_implementation="sdpa",
    )  # fmt: skip
    step = 16
    narrow = count_parameters(LlamaForCausalLM, make(intermediate_size=step))
    per_step = count_parameters(LlamaForCausalLM, make(intermediate_size=2 * step)) - narrow
    llama = make(intermediate_size=step * (1 + round((parameters - narrow) / per_step)))
    if abs(count_parameters(LlamaForCausalLM, llama) / parameters - 1) > 0.02:
        raise ValueError("No Llama of this depth and width has as many parameters, to 2 %.")
    return llama

"""
What the package overrides, calls or reads of Transformers without a promise that it stays: the one list of it.

A test fails as soon as a version of Transformers changes an entry, or the package uses one that is not listed.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import (
    GenerationMixin,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    candidate_generator,
)
from transformers.generation import utils as generation_utils
from transformers.modeling_layers import GradientCheckpointingLayer

import configuration_hsa
import modeling_hsa
from modeling_hsa.naming import CACHE
from tests.models import tiny_model
from tests.rows import random_ids


VERSION = Version(transformers.__version__)

# Methods that are overridden or called, with their parameters. Where these differ between versions there is one entry
# for each, with the version from which on it holds.
SIGNATURES = [
    (GenerationMixin, "_prepare_cache_for_generation", {
        "5.17": "self generation_config model_kwargs generation_mode batch_size max_cache_length",
    }),
    (GenerationMixin, "_prepare_generated_length", {
        "5.17": "self generation_config has_default_max_length has_default_min_length model_input_name "
                "input_ids_length inputs_tensor",
    }),
    (GenerationMixin, "_get_stopping_criteria", {"5.17": "self generation_config stopping_criteria tokenizer"}),
    (GenerationMixin, "_prefill", {"5.17": "self input_ids generation_config model_kwargs is_first_iteration"}),
    (GenerationMixin, "_assisted_decoding", {
        "5.17": "self input_ids logits_processor stopping_criteria generation_config synced_gpus streamer "
                "inputs_tensor assistant_model assistant_tokenizer tokenizer model_kwargs",
    }),
    (GenerationMixin, "_get_logits_processor", {
        "5.17": "self generation_config input_ids_seq_length encoder_input_ids prefix_allowed_tokens_fn "
                "logits_processor device model_kwargs negative_prompt_ids negative_prompt_attention_mask",
    }),
    (GenerationMixin, "_sample", {
        "5.17": "self input_ids logits_processor stopping_criteria generation_config synced_gpus streamer "
                "model_kwargs",
    }),
    (GenerationMixin, "_valid_auto_compile_criteria", {"5.17": "self model_kwargs generation_config"}),
    # Public, but called by Transformers alone.
    (PreTrainedModel, "get_compiled_call", {"5.17": "self compile_config"}),
    (GenerationMixin, "prepare_inputs_for_generation", {
        "5.17": "self input_ids next_sequence_length past_key_values attention_mask inputs_embeds is_first_iteration "
                "kwargs",
        "5.24": "self input_ids next_sequence_length cache attention_mask inputs_embeds is_first_iteration kwargs",
    }),
    (GenerationMixin, "init_continuous_batching", {
        "5.17": "self generation_config continuous_batching_config workload_hints",
    }),
    (transformers.masking_utils, "create_masks_for_generate", {
        "5.17": "config inputs_embeds attention_mask past_key_values position_ids or_mask_function and_mask_function "
                "block_sequence_ids kwargs",
        "5.24": "config inputs_embeds attention_mask cache position_ids or_mask_function and_mask_function "
                "block_sequence_ids kwargs",
    }),
    (PreTrainedModel, "_init_weights", {"5.17": "self module"}),
    (PreTrainedModel, "_set_gradient_checkpointing", {
        "5.17": "self enable gradient_checkpointing_func every_n_layers",
    }),
    (PreTrainedModel, "maybe_distribute_model", {
        "5.17": "model distributed_config device_mesh", "5.24": "model distributed_config mesh_manager",
    }),
    (PreTrainedModel, "_upload_modified_files", {
        "5.17": "self working_dir repo_id files_timestamps commit_message token create_pr revision "
                "commit_description",
    }),
    (transformers.utils.generic, "merge_with_config_defaults", {"5.17": "func"}),
    (transformers.utils.output_capturing, "capture_outputs", {"5.17": "func tie_last_hidden_states"}),
]  # fmt: skip

# Attributes that are set or read.
ATTRIBUTES = [
    (PreTrainedConfig, "_attn_implementation"),
    (PreTrainedModel, "_can_compile_fullgraph"),
    (PreTrainedModel, "_can_record_outputs"),
    (PreTrainedModel, "_no_split_modules"),
    (PreTrainedModel, "_skip_keys_device_placement"),
    (PreTrainedModel, "_supports_flash_attn"),
    (PreTrainedModel, "_supports_flex_attn"),
    (PreTrainedModel, "_supports_sdpa"),
    (PreTrainedModel, "_tied_weights_keys"),
    (PreTrainedModel, "_fsdp_plan"),
    (PreTrainedModel, "_tp_plan"),
    (GradientCheckpointingLayer, "gradient_checkpointing"),
    (generation_utils, "ALL_CACHE_NAMES"),
]

# Made by `generate` in its copy of the `GenerationConfig`, where it leaves out a mask of ones.
MASK_LENGTH = "_mask_length"

# Private parts of PyTorch, which has a range of its own.
OF_PYTORCH = {
    "_are_functorch_transforms_active", "_assert_async", "_compiled_call_impl", "_current_level", "_dynamo",
    "_forward_hooks", "_forward_pre_hooks", "_functorch", "_linear_pointwise", "_orig_mod", "_parameters",
}  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "recorded"), SIGNATURES, ids=[name for _, name, _ in SIGNATURES])
def test_a_method_has_the_parameters_that_were_recorded(owner, name, recorded):
    since = max((version for version in recorded if Version(version) <= VERSION), key=Version)
    assert " ".join(inspect.signature(getattr(owner, name)).parameters) == recorded[since]


@pytest.mark.parametrize(("owner", "name"), ATTRIBUTES, ids=[name for _, name in ATTRIBUTES])
def test_an_attribute_exists(owner, name):
    assert hasattr(owner, name)


def test_overrides_take_what_transformers_passes():
    """Overrides are called by name or by position, so they have the parameters of what they override, or any."""
    for owner, name, _ in SIGNATURES:
        override = getattr(modeling_hsa.HSAForCausalLM, name, None)
        if owner not in (GenerationMixin, PreTrainedModel) or override is getattr(owner, name):
            continue
        parameters = inspect.signature(getattr(owner, name)).parameters
        signature = inspect.signature(override, follow_wrapped=False)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
        assert takes_any or list(signature.parameters) == list(parameters), name


def test_the_gradient_checkpointing_of_a_model_is_that_of_its_layers():
    """`HSAModel` asks its first layer, and has no such attribute itself."""
    model = tiny_model()
    assert not hasattr(model.model, "gradient_checkpointing")
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_generate_says_how_long_the_mask_is():
    seen = {}

    def custom(
        model, input_ids, logits_processor, stopping_criteria, generation_config, attention_mask=None, **kwargs
    ):
        seen.update(mask=attention_mask, length=getattr(generation_config, MASK_LENGTH, None), cache=kwargs[CACHE])
        return input_ids

    tiny_model().generate(random_ids(1, 9), max_new_tokens=2, pad_token_id=0, custom_generate=custom)
    assert isinstance(seen["cache"], modeling_hsa.HSACache)
    assert seen["length"] == 9 if seen["mask"] is None else seen["mask"].shape == (1, 9)


def test_an_assistant_with_a_cut_vocabulary_is_known_by_its_embedding():
    """The first call is then the whole prompt: see `HSAGenerationMixin._read_prompt`."""
    overlap = torch.tensor([1, 2])
    embedding = candidate_generator._MapInputEmbedding(torch.nn.Embedding(4, 2), overlap)
    assert embedding.assistant_overlap_token_ids is overlap


def test_guidance_keeps_its_context_under_these_names():
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model=None, unconditional_ids=torch.ones(1, 2))
    assert {"input_ids", "attention_mask", "use_cache", CACHE} <= processor.unconditional_context.keys()


# -- the list is complete ---------------------------------------------------------------------------------------------


def _is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-z]\w*", name) is not None


def _files() -> dict[str, ast.Module]:
    """The files of the package, by the names of their modules."""
    found = {}
    for package in (configuration_hsa, modeling_hsa):
        root = Path(package.__file__).parent
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def _names_bound_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _used_of_transformers() -> set[str]:
    """Private names that a class of the package overrides, or that it uses without defining them."""
    files = _files()
    defined, used, overridden = set(), set(), set()
    for module, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt):
                defined.update(filter(_is_private, _names_bound_by(node)))
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                (defined if of_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr"):
                used.update(filter(_is_private, (x.value for x in node.args[1:2] if isinstance(x, ast.Constant))))
            if isinstance(node, ast.ClassDef):
                bases = getattr(importlib.import_module(module), node.name).__mro__[1:]
                bases = [base for base in bases if base.__module__.startswith("transformers.")]
                names = [name for statement in node.body for name in _names_bound_by(statement)]
                overridden.update(n for n in names if _is_private(n) and any(n in vars(base) for base in bases))
    of_tuples = {"_replace", "_asdict", "_fields"}
    return overridden | (used - defined - of_tuples - OF_PYTORCH)


def test_the_list_is_complete():
    listed = {name for _, name, _ in SIGNATURES} | {name for _, name in ATTRIBUTES} | {MASK_LENGTH}
    used = _used_of_transformers()
    assert used - listed == set()
    assert {name for name in listed if _is_private(name)} - used == set()  # and nothing that is no longer used


def test_settings_of_generate_exist():
    settings = GenerationConfig()
    for name in (
        "prefill_chunk_size", "cache_implementation", "cache_config", "max_cache_len", "is_assistant", "use_cache",
        "assistant_early_exit", "use_mtp", "speculation_type", "output_hidden_states", "output_attentions",
    ):  # fmt: skip
        assert hasattr(settings, name), name

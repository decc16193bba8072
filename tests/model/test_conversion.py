"""
Contract 10 of the design: a conversion starts as the same function, for every family that it takes; what it cannot
express is refused by name; and what it makes is a model like any other.
"""

import re
import sys
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import examples.convert as command
from hsa_lab.commands import run
from modeling_hsa import HSAForCausalLM, convert_to_hsa, new_parameters
from modeling_hsa.conversion import CARRIED, EXPRESSED
from tests.commands import run_example
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error, run_without_the_package
from tests.rows import random_ids, read


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Of every family, what its configuration can say that changes what the model computes.
SOURCES = {
    "llama": (LlamaForCausalLM, {}),
    "llama_tied_with_biases": (
        LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama3": (LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "hidden_act": "gelu", "rms_norm_eps": 0.1}),
    "mistral": (MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "mistral_with_a_window": (MistralForCausalLM, {"sliding_window": 24}),
    "qwen2": (Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2_with_a_window": (
        Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3_with_biases": (Qwen3ForCausalLM, {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 4}),
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HSA_FIELDS = {"chunk_size": 16, "chunk_topk": 2, "retrieval_dim": 16}
WINDOW = 150  # covers the inputs


def make_source(name: str = "llama", **overrides):
    """A tiny source with random weights, also where they start as ones or zeros."""
    torch.manual_seed(1)
    model_class, changes = SOURCES[name]
    config = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    model = model_class(model_class.config_class(**{**config, **changes, **overrides})).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0, std=0.3)
    return model


def convert(source, **arguments) -> HSAForCausalLM:
    window = getattr(source.config, "sliding_window", None) or WINDOW
    return convert_to_hsa(source, **{"sliding_window": window, **HSA_FIELDS, **arguments})


@torch.no_grad()
def perturb(model: HSAForCausalLM) -> HSAForCausalLM:
    """As after training: all that is new is away from where it starts."""
    new = set(new_parameters(model))
    for name, parameter in model.named_parameters():
        if name in new:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits_of(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


# -- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_conversion_starts_as_the_same_function(name, mode):
    source = make_source(name)
    model = convert(source, mode=mode)
    # Where all layers have the window, it need not cover the input.
    ids = random_ids(2, 24 if name == "qwen2_with_a_window" else 129)
    expected = logits_of(source, ids)
    assert relative_error(logits_of(model, ids), expected) < SAME_ARITHMETIC
    if ids.shape[1] > HSA_FIELDS["chunk_size"]:
        assert relative_error(logits_of(perturb(model), ids), expected) > 1e-2  # so it does retrieve


@pytest.mark.parametrize(
    "arguments",
    [
        {"hsa_residual": "standard"},
        {"hsa_residual": "standard", "mode": "replace"},
        {"hsa_residual": "standard", "hsa_intermediate_size": 0},
        {"hsa_intermediate_size": 16},
        {"hsa_intermediate_size": 64},
        {"encoder_intermediate_size": 16, "num_encoder_layers": 2},
        {"hsa_num_key_value_heads": 1},
        {"hsa_num_key_value_heads": 4, "num_retrieval_heads": 2},
        {"chunk_weighting": "stick_breaking", "landmark_norm": True, "hsa_qk_norm": False},
        {"placement": 1},
        {"placement": [1, 3], "chunk_encoder_layer": 1},
        {"placement": [0, 1, 2, 3], "chunk_landmark": "mean", "num_encoder_layers": 0},
        {"placement": [3], "chunk_encoder_layer": 1, "mode": "replace"},
        {"retrieval_stride": 4, "encoder_attention_bias": True},
    ],
    ids=str,
)
def test_so_it_does_with_every_switch(arguments):
    source = make_source("llama_tied_with_biases")
    model = convert(source, **arguments)
    for name, value in arguments.items():
        assert name in ("mode", "placement") or getattr(model.config, name) == value
    ids = random_ids(2, 129)
    assert relative_error(logits_of(model, ids), logits_of(source, ids)) < SAME_ARITHMETIC


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_prompts_generate_the_same(name):
    source = make_source(name)
    model = convert(source)
    ids, mask = random_ids(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[0, :25], mask[1, :7] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    torch.testing.assert_close(model.generate(ids, **options), source.generate(ids, **options))
    options["num_beams"] = 3
    torch.testing.assert_close(model.generate(ids, **options), source.generate(ids, **options))


@pytest.mark.parametrize("placement, expected", [(None, [15, 20, 25]), (2, [15, 22]), (15, list(range(15, 30)))])
def test_layers_are_spaced_over_the_upper_half(placement, expected):
    source = make_source(num_hidden_layers=30)
    kinds = convert(source, placement=placement, mode="replace").config.layer_types
    assert [layer for layer, kind in enumerate(kinds) if kind == "hsa"] == expected


# -- what is made from what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_new_is_the_sources(name, mode):
    source = make_source(name)
    model = convert(source, mode=mode)
    new, parameters = set(new_parameters(model)), dict(model.named_parameters())
    old = dict(source.named_parameters())
    assert new < parameters.keys() and len(parameters) - len(new) == len(old)
    if mode == "replace":
        assert parameters.keys() - new == old.keys()
        for parameter_name, parameter in old.items():
            assert torch.equal(parameters[parameter_name], parameter)
    storages = {parameter.data_ptr() for parameter in old.values()}
    assert not storages & {parameter.data_ptr() for parameter in parameters.values()}


def test_what_is_new_starts_as_its_neighbours():
    source = make_source("qwen3")
    decoder, layers = convert(source).model, source.model.layers
    assert decoder.config.layer_types == ["sliding_attention"] * 2 + ["hsa", "sliding_attention"] * 2
    inserted, encoder = decoder.layers[2], decoder.chunk_encoder
    for new, old in (
        (inserted.q_proj, layers[2].self_attn.q_proj),
        (inserted.q_norm, layers[2].self_attn.q_norm),
        (inserted.o_proj, layers[2].self_attn.o_proj),
        (inserted.hsa_layernorm, layers[2].input_layernorm),
        (inserted.retrieval.norm, layers[2].input_layernorm),
        (inserted.mlp.gate_proj, layers[2].mlp.gate_proj),
        (inserted.mlp.up_proj, layers[2].mlp.up_proj),
        (encoder.layers[0].self_attn.v_proj, layers[1].self_attn.v_proj),
        (encoder.layers[0].self_attn.q_norm, layers[1].self_attn.q_norm),
        (encoder.layers[0].mlp.down_proj, layers[1].mlp.down_proj),
        (encoder.norm, layers[2].input_layernorm),
        (encoder.k_proj, layers[2].self_attn.k_proj),
        (encoder.v_proj, layers[2].self_attn.v_proj),
        (encoder.k_norm, layers[2].self_attn.k_norm),
    ):
        assert torch.equal(new.weight, old.weight)
    assert not inserted.mlp.down_proj.weight.any()


def test_heads_of_the_memory_are_means_of_those_that_they_stand_for():
    source = make_source()
    values = source.model.layers[2].self_attn.v_proj.weight.unflatten(0, (2, 8))
    one = convert(source, hsa_num_key_value_heads=1).model.chunk_encoder.v_proj.weight
    torch.testing.assert_close(one, values.mean(0))
    four = convert(source, hsa_num_key_value_heads=4).model.chunk_encoder.v_proj.weight.unflatten(0, (4, 8))
    torch.testing.assert_close(four, values[[0, 0, 1, 1]])


def test_dtype_mode_and_generation_config_are_kept():
    source = make_source().bfloat16().train()
    source.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[5, 6])
    source.set_attn_implementation("eager")
    model = convert(source)
    assert model.dtype == torch.bfloat16 and model.training and model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.temperature == 0.3 and model.generation_config.eos_token_id == [5, 6]
    assert model.generation_config.prefill_chunk_size == "auto"
    assert model.generation_config is not source.generation_config
    source.generation_config.prefill_chunk_size = 32
    assert convert(source).generation_config.prefill_chunk_size == 32
    assert convert(source, dtype=torch.float32).dtype == torch.float32


# -- every field of the source ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_every_field_of_a_family_is_known(config):
    own = {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}
    assert not own - CARRIED - EXPRESSED.keys()


def test_fields_are_carried():
    changes = {
        "attention_dropout": 0.25, "max_position_embeddings": 77, "initializer_range": 0.5, "use_cache": False,
        "bos_token_id": 3, "eos_token_id": [4, 5], "rms_norm_eps": 0.01, "pretraining_tp": 2,
        "id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2},
        "return_dict": False, "chunk_size_feed_forward": 3, "unknown_to_everybody": [1, 2],
    }  # fmt: skip
    config = convert(make_source(**changes)).config
    for name, value in changes.items():
        assert getattr(config, name) == value, name
    assert convert(make_source("llama3")).config.rope_parameters == LLAMA3_ROPE


def test_overrides_are_obeyed():
    config = convert(make_source(), attention_dropout=0.5, pad_token_id=None, max_position_embeddings=5).config
    assert (config.attention_dropout, config.pad_token_id, config.max_position_embeddings) == (0.5, None, 5)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"sliding_window": 5}, "`sliding_window` (5)"),
        ("llama", {"qk_norm": True}, "`qk_norm` (True)"),
        ("mistral", {"attention_bias": True}, "`attention_bias` (True)"),
        ("mistral", {"chunk_what": 1}, "chunk_what"),
        ("qwen2", {"pad_token_id": -1}, "pad_token_id"),
    ],
)
def test_what_cannot_be_expressed_is_refused(name, changes, message):
    source = make_source(name)
    source.config.update(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_to_hsa(source, sliding_window=WINDOW)


def test_a_field_of_a_later_version_is_refused():
    class LaterConfig(LlamaConfig):
        attention_scale_of_tomorrow: float = 1.0

    source = make_source()
    source.config = LaterConfig(**source.config.to_dict())
    with pytest.raises(ValueError, match="attention_scale_of_tomorrow"):
        convert(source)


def test_an_attribute_that_agrees_is_no_trouble():
    source = make_source("mistral")
    source.config.update({"attention_bias": False, "mlp_bias": False})
    assert not convert(source).config.attention_bias


@pytest.mark.parametrize("name", ["mistral_with_a_window", "qwen2_with_a_window"])
def test_a_window_beyond_that_of_the_source_is_refused(name):
    source = make_source(name)
    with pytest.raises(ValueError, match="`sliding_window` must be at most 24"):
        convert(source, sliding_window=25)
    assert convert(source, sliding_window=8).config.sliding_window == 8


# -- other things that are refused ------------------------------------------------------------------------------------


def test_other_models_are_refused_with_the_list_of_what_works(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    gpt2.save_pretrained(tmp_path)
    for model in (gpt2, tmp_path, convert(make_source())):
        with pytest.raises(TypeError, match="'(gpt2|hsa)'.*LlamaForCausalLM, Mistral.*Qwen2.*Qwen3ForCausalLM"):
            convert_to_hsa(model)
    with pytest.raises(TypeError, match="LlamaForCausalLM itself, got LlamaForSequenceClassification"):
        convert_to_hsa(LlamaForSequenceClassification(make_source().config))
    with pytest.raises(TypeError, match="got PeftModelForCausalLM"):
        convert_to_hsa(get_peft_model(make_source(), LoraConfig(task_type="CAUSAL_LM")))
    with pytest.raises(TypeError, match="got Linear"):
        convert_to_hsa(torch.nn.Linear(1, 1))


def test_weights_without_a_place_are_refused():
    source = make_source()
    get_peft_model(source, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))  # puts adapters into it
    with pytest.raises(ValueError, match="Merge adapters"):
        convert(source)
    source = make_source("qwen2")
    source.lm_head.weight = torch.nn.Parameter(source.lm_head.weight + 1)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        convert(source)
    source = make_source()
    source.model.norm.bfloat16()
    with pytest.raises(ValueError, match=r"torch.bfloat16, torch.float32. Load it in one"):
        convert(source)
    with pytest.raises(ValueError, match="on one device"):
        convert(make_source().to("meta"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "append"}, "`mode` must be one of 'insert', 'replace', got 'append'"),
        ({"placement": 0}, "`placement` as a number must be from 1 to 2"),
        ({"placement": 3}, "`placement` as a number must be from 1 to 2"),
        ({"placement": [4]}, "from 0 to 3, got [4]"),
        ({"placement": []}, "got []"),
        ({"placement": "2"}, "got '2'"),
        ({"placement": True}, "got True"),
        ({"placement": [2, 2]}, "names a layer twice"),
        ({"placement": [0]}, "`num_encoder_layers` (1) must be at most 0"),
        ({"hidden_size": 64}, "`hidden_size` cannot be given (64). It is as in the source"),
        ({"layer_types": ["hsa"]}, "It follows from `placement`"),
        ({"num_upper_groups": 3}, "It follows from `placement`"),
        ({"hsa_local_attention": True}, "It follows from `mode`"),
        ({"slidingwindow": 3}, "knows 'slidingwindow'"),
        ({"chunk_topk": 0}, "`chunk_topk`"),
        ({"chunk_encoder_layer": 3}, "`chunk_encoder_layer`"),
        ({"hsa_intermediate_size": 0}, "`hsa_intermediate_size=0`"),
        ({"mode": "replace", "hsa_intermediate_size": 16}, "`hsa_intermediate_size` (16) must be 48"),
        ({"gguf_file": "x.gguf"}, "`gguf_file` ('x.gguf')"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(make_source(), **arguments)


# -- what is new ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_new_parameters_are_the_same_after_saving(mode, tmp_path):
    model = perturb(convert(make_source("qwen3"), mode=mode))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, 100)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert new_parameters(loaded) == new_parameters(model)
    assert {f"model.{name}" for name in new_parameters(loaded.model)} == set(new_parameters(model))

    modules = new_parameters(model, modules=True)
    held = [f"{name}.{inner}" for name in modules for inner, _ in model.get_submodule(name).named_parameters()]
    assert sorted(held) == sorted(new_parameters(model))


def test_new_parameters_of_what_is_no_hsa_model():
    with pytest.raises(TypeError, match="got LlamaForCausalLM"):
        new_parameters(make_source())


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_training_reaches_what_is_new(mode, tmp_path):
    model = convert(make_source("qwen2"), mode=mode)
    new = new_parameters(model)
    before = {name: model.get_parameter(name).detach().clone() for name in new}
    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 80).tolist()]
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    arguments.update(use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=data).train()
    assert not [name for name in new if torch.equal(model.get_parameter(name), before[name])]


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_lora_on_the_rest_saves_loads_and_merges(mode, tmp_path):
    base = convert(make_source("qwen3"), mode=mode)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules="all-linear",
        exclude_modules=[name.rpartition(".")[0] for name in new_parameters(base)],
        modules_to_save=new_parameters(base, modules=True),
    )
    new = set(new_parameters(base))
    model = get_peft_model(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = {
        re.sub(r"\.modules_to_save\.default", "", name.removeprefix("base_model.model."))
        for name in trained
        if "lora_" not in name
    }
    assert saved == new
    assert not any("lora_" in name and "modules_to_save" in name for name in trained)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = random_ids(2, 80)
    before = logits_of(model, ids)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits_of(model.eval(), ids)
    assert relative_error(expected, before) > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(HSAForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, ids), expected)
    merged = loaded.merge_and_unload()
    assert relative_error(logits_of(merged, ids), expected) < OTHER_ORDER
    assert set(new_parameters(merged)) == new
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(HSAForCausalLM.from_pretrained(tmp_path / "merged"), ids), logits_of(merged, ids))


# -- a model like any other -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(name, mode) for name in FAMILIES for mode in ("insert", "replace")], ids=str)
def trained(request) -> HSAForCausalLM:
    """A converted model, with a short window, whose new parameters do something."""
    name, mode = request.param
    torch.manual_seed(0)
    return perturb(convert(make_source(name), mode=mode, sliding_window=12))


def test_segments_and_steps_equal_one_pass(trained):
    ids = random_ids(2, 100)
    expected = logits_of(trained, ids)
    for sizes in ([1], [33, 1, 7], [64]):
        with torch.no_grad():
            assert relative_error(read(trained, ids, sizes)[0], expected) < OTHER_ORDER


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_same_rows_alone(trained, side):
    ids, mask = random_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    span = slice(0, 21) if side == "left" else slice(69, 90)
    mask[0, span] = 0
    with torch.no_grad():
        logits = trained(ids, attention_mask=mask).logits
    for row in range(2):
        real = mask[row].bool()
        assert relative_error(logits[row, real], logits_of(trained, ids[row, real][None])[0]) < OTHER_ORDER


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_equals_that_without_a_cache(trained, options):
    ids = random_ids(2, 60)
    expected = {**options, "use_cache": False}
    expected.pop("cache_implementation", None)
    tokens = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(trained.generate(ids, **tokens, **options), trained.generate(ids, **tokens, **expected))


LOAD_AND_RUN = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
torch.save(model(torch.load("ids.pt")).logits.detach(), "logits.pt")
"""


@pytest.mark.parametrize("mode", ["insert", pytest.param("replace", marks=pytest.mark.slow)])
def test_the_folder_needs_no_package(mode, tmp_path):
    model, ids = perturb(convert(make_source("qwen2"), mode=mode)), random_ids(2, 60)
    model.save_pretrained(tmp_path / "saved")
    torch.save(ids, tmp_path / "ids.pt")
    run_without_the_package(LOAD_AND_RUN, tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits_of(model, ids))


# -- where sources come from ------------------------------------------------------------------------------------------


def save_source(folder, name: str = "llama"):
    """A source with a tokenizer that has a chat template. Returns the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    source = make_source(name)
    source.generation_config.update(do_sample=True, temperature=0.5)
    source.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(98)} | {"?": 98}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="w0")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return source


def write_gguf(source: LlamaForCausalLM, file) -> None:
    """Writes a Llama with tied embeddings as llama.cpp does, with pairs of a head next to each other for its RoPE."""
    gguf = pytest.importorskip("gguf")
    config = source.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {"token_embd.weight": source.model.embed_tokens.weight, "output_norm.weight": source.model.norm.weight}
    for index, layer in enumerate(source.model.layers):
        for old, new in names.items():
            weight = layer.get_submodule(old).weight
            if new in ("attn_q", "attn_k"):
                weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            tensors[f"blk.{index}.{new}.weight"] = weight
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_a_source_too(name, tmp_path):
    make_source(name).bfloat16().save_pretrained(tmp_path)
    assert convert_to_hsa(str(tmp_path), sliding_window=WINDOW, **HSA_FIELDS).dtype == torch.bfloat16
    model = convert_to_hsa(tmp_path, sliding_window=WINDOW, dtype="float32", **HSA_FIELDS)
    source, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32"), random_ids(2, 60)
    assert relative_error(logits_of(model, ids), logits_of(source, ids)) < SAME_ARITHMETIC


def test_a_gguf_file_is_a_source_too(tmp_path):
    source, ids = make_source(tie_word_embeddings=True), random_ids(2, 60)
    write_gguf(source, tmp_path / "source.gguf")
    for name, file in ((tmp_path / "source.gguf", None), (tmp_path, "source.gguf")):
        model = convert_to_hsa(name, gguf_file=file, sliding_window=WINDOW, **HSA_FIELDS)
        assert relative_error(logits_of(model, ids), logits_of(source, ids)) < SAME_ARITHMETIC
    assert not hasattr(model.config, "quantization_config")


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_saves_model_tokenizer_and_generation_config(tmp_path):
    source = save_source(tmp_path / "source")
    output = tmp_path / "converted"
    run = run_example(
        "convert.py", tmp_path, str(tmp_path / "source"), "--placement", "1", "3", "--set", "landmark_norm=true",
        output=output, sliding_window=WINDOW, chunk_size=16, retrieval_dim=16,
    )  # fmt: skip
    assert "6 layers" in run.stdout and "inserted: 1, 4" in run.stdout
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.landmark_norm and model.generation_config.temperature == 0.5
    ids = tokenizer.apply_chat_template([{"content": "w5 w7 w9"}], return_tensors="pt", return_dict=True)["input_ids"]
    assert ids.tolist() == [[5, 7, 9]]
    assert relative_error(logits_of(model, ids), logits_of(source, ids)) < SAME_ARITHMETIC


@pytest.mark.parametrize(
    "words, message",
    [
        (("missing", "--output", "new"), "cannot load missing"),
        (("source", "--output", "source"), "source is not an empty folder"),
        (("source", "--output", "new", "--chunk_topk", "0"), "`chunk_topk` must be"),
        (("source", "--output", "new", "--set", "landmark_norm"), "takes NAME=VALUE"),
        (("source", "--output", "new", "--set", "nothing=1"), "knows 'nothing'"),
    ],
)
def test_mistakes_get_one_line(words, message, tmp_path, monkeypatch, capsys):
    save_source(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert.py", *words])
    monkeypatch.setattr(command.logging, "set_verbosity_error", lambda: None)
    with pytest.raises(SystemExit) as stop:
        run(command.main)
    error = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("convert.py: ") and message in error and "\n" not in error
    assert not (tmp_path / "new").exists()

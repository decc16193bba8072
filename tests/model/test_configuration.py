"""`HSAConfig`: the paper's setting by default, refuses what is out of range or unknown by name, and survives JSON."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM
from tests.models import tiny_config


INTEGERS = {  # field: smallest good value
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_lower_layers": 0,
    "num_upper_layers": 0,
    "num_upper_groups": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "sliding_window": 1,
    "chunk_size": 16,
    "chunk_topk": 1,
    "num_encoder_layers": 0,
    "encoder_intermediate_size": 1,
    "hsa_num_key_value_heads": 1,
    "num_retrieval_heads": 1,
    "retrieval_dim": 1,
    "retrieval_stride": 1,
    "max_position_embeddings": 1,
}
BOOLEANS = (
    "encoder_attention_bias",
    "hsa_local_attention",
    "landmark_norm",
    "qk_norm",
    "attention_bias",
    "mlp_bias",
    "use_cache",
    "tie_word_embeddings",
)
CHOICES = {
    "chunk_landmark": ("cls", "mean"),
    "chunk_weighting": ("softmax", "stick_breaking", "joint"),
    "hsa_residual": ("bypass", "standard"),
    "hsa_implementation": ("auto", "triton", "torch", "naive"),
}
NUMBERS = {
    "initializer_range": ("0.02", None, True, -0.1, float("nan")),
    "rms_norm_eps": ("1e-6", None, True, -1e-6, float("nan")),
    "attention_dropout": ("0", None, True, -0.1, 1.5, float("nan")),
    "retrieval_distance_penalty": ("0", None, True, -0.1, float("inf"), float("nan")),
}
DERIVED_BY_DEFAULT = ("head_dim", "encoder_intermediate_size")  # None means: derive it


def bad_integers():
    for field, minimum in INTEGERS.items():
        for value in ("8", True, 2.0, [4], float("nan"), -1, minimum - 1, None):
            if not (value is None and field in DERIVED_BY_DEFAULT):
                yield field, value


def a_choice_of_everything() -> HSAConfig:
    """A configuration none of whose fields of the design's section 4 has its default value."""
    return HSAConfig(
        vocab_size=77,
        hidden_size=48,
        intermediate_size=80,
        num_lower_layers=3,
        num_upper_layers=4,
        num_upper_groups=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=10,
        sliding_window=5,
        chunk_size=32,
        chunk_topk=7,
        chunk_landmark="mean",
        chunk_weighting="joint",
        num_encoder_layers=0,
        encoder_intermediate_size=20,
        encoder_attention_bias=True,
        hsa_residual="standard",
        hsa_local_attention=False,
        hsa_num_key_value_heads=2,
        hsa_implementation="torch",
        num_retrieval_heads=4,
        retrieval_dim=9,
        retrieval_stride=3,
        retrieval_distance_penalty=0.5,
        landmark_norm=True,
        qk_norm=False,
        hidden_act="gelu",
        max_position_embeddings=123,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        initializer_range=0.1,
        rms_norm_eps=1e-5,
        attention_bias=True,
        attention_dropout=0.1,
        mlp_bias=True,
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_setting_of_the_paper():
    config = HSAConfig()
    assert (config.sliding_window, config.chunk_size, config.chunk_topk) == (512, 64, 8)
    assert config.max_position_embeddings == 4096
    with torch.device("meta"):
        parameters = HSAForCausalLM(config).num_parameters()
    assert 230e6 <= parameters <= 250e6


def test_layers_are_derived():
    config = HSAConfig(num_lower_layers=3, num_upper_layers=4, num_upper_groups=2)
    assert config.num_hidden_layers == 9
    assert config.hsa_layers == [False] * 3 + [True, False, False] * 2
    assert HSAConfig(num_lower_layers=3, num_upper_layers=4, num_upper_groups=2, num_hidden_layers=9) == config


def test_upper_groups_may_be_of_hsa_layers_alone():
    assert tiny_config(num_upper_layers=0, num_upper_groups=3).hsa_layers == [False, True, True, True]


def test_sizes_left_out_are_derived():
    config = HSAConfig(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, intermediate_size=200)
    assert config.head_dim == 24 and config.encoder_intermediate_size == 200
    config = HSAConfig(hidden_size=96, num_attention_heads=4, head_dim=32, encoder_intermediate_size=64)
    assert config.head_dim == 32 and config.encoder_intermediate_size == 64


@pytest.mark.parametrize("field", INTEGERS)
def test_smallest_values_are_good(field):
    # Fields that constrain each other: one head and one upper layer per group suit every smallest value.
    fields = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "num_upper_layers": 0}
    fields |= {"chunk_landmark": "mean"} if field == "num_encoder_layers" else {}
    config = HSAConfig(**{**fields, field: INTEGERS[field]})
    assert getattr(config, field) == INTEGERS[field]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), bad_integers())
def test_integers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError) as error:
        HSAConfig(**{field: value})
    assert f"`{field}`" in str(error.value) and repr(value) in str(error.value)
    assert f"at least {INTEGERS[field]}" in str(error.value)


@pytest.mark.parametrize("value", [1, 0, "true", "False", None, 1.0])
@pytest.mark.parametrize("field", BOOLEANS)
def test_switches_are_true_or_false(field, value):
    with pytest.raises(ValueError) as error:
        HSAConfig(**{field: value})
    assert f"`{field}` must be True or False, got {value!r}" in str(error.value)


@pytest.mark.parametrize("value", ["gumbel", "", "CLS", None, 1, True, ["cls"]])
@pytest.mark.parametrize("field", CHOICES)
def test_unknown_choices_are_refused(field, value):
    with pytest.raises(ValueError) as error:
        HSAConfig(**{field: value})
    message = str(error.value)
    assert f"`{field}`" in message and f"got {value!r}" in message and "upgrade" in message
    assert all(repr(choice) in message for choice in CHOICES[field])


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in NUMBERS for value in NUMBERS[field]])
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError) as error:
        HSAConfig(**{field: value})
    assert f"`{field}`" in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("value", ["sillu", "", None, 3])
def test_unknown_activation_is_refused(value):
    with pytest.raises(ValueError) as error:
        HSAConfig(hidden_act=value)
    assert "`hidden_act`" in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"chunk_size": 24}, ("`chunk_size`", "multiple of 16", "24")),
        ({"chunk_size": 65}, ("`chunk_size`", "multiple of 16", "65")),
        ({"head_dim": 33}, ("`head_dim`", "even", "33")),
        ({"num_key_value_heads": 3}, ("`num_key_value_heads` (3)", "divide", "`num_attention_heads` (16)")),
        ({"num_key_value_heads": 32}, ("`num_key_value_heads` (32)", "divide", "`num_attention_heads` (16)")),
        ({"hsa_num_key_value_heads": 5}, ("`hsa_num_key_value_heads` (5)", "divide", "(16)")),
        ({"num_retrieval_heads": 6}, ("`num_retrieval_heads` (6)", "divide", "(16)")),
        (
            {
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_retrieval_heads": 3,
                "hsa_num_key_value_heads": 2,
            },
            ("`hsa_num_key_value_heads` (2)", "`num_retrieval_heads` (3)", "divide the other"),
        ),
        ({"num_upper_groups": 4}, ("`num_upper_groups` (4)", "divide", "`num_upper_layers` (6)")),
        ({"num_hidden_layers": 12}, ("`num_hidden_layers` (12)", "derived", "16", "Leave it out")),
        ({"num_encoder_layers": 0}, ("`num_encoder_layers`", "chunk_landmark='cls'", "'mean'")),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ("rope_parameters", "'dynamic'", "'yarn'")),
        ({"rope_parameters": {"rope_type": "longrope"}}, ("rope_parameters", "'longrope'", "'default'")),
        ({"rope_parameters": {"type": "dynamic"}}, ("rope_parameters", "'dynamic'")),
        ({"rope_parameters": {"rope_type": "linear"}}, ("rope_parameters", "factor")),
        ({"rope_parameters": {"rope_type": "yarn"}}, ("rope_parameters", "factor")),
        ({"rope_parameters": {"rope_theta": "10000"}}, ("rope_theta", "'10000'")),
        ({"rope_parameters": {"rope_theta": -1.0}}, ("rope_theta", "-1.0")),
        ({"rope_parameters": "default"}, ("rope_parameters", "'default'")),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_together_is_refused(fields, parts):
    with pytest.raises(ValueError) as error:
        HSAConfig(**fields)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "field", ["chunk_sise", "hsa_gate", "retrieval_temperature", "num_retrieval_head", "num_upper", "encoder_layers"]
)
def test_unknown_hsa_fields_are_refused(field):
    # A typing mistake, or a configuration of a newer version: ignoring it would give another model.
    with pytest.raises(ValueError, match=f"no field '{field}'.*given 3.*spelling.*upgrade"):
        HSAConfig(**{field: 3})


def test_fields_of_transformers_are_not_taken_for_unknown_hsa_fields():
    config = HSAConfig(chunk_size_feed_forward=0, num_labels=3, dtype="bfloat16", architectures=["HSAModel"])
    assert config.num_labels == 3 and config.dtype == torch.bfloat16


def test_the_model_checks_what_was_changed_after_construction():
    config = tiny_config()
    config.chunk_topk = 0
    with pytest.raises(ValueError, match="`chunk_topk` must be an integer of at least 1, got 0"):
        HSAForCausalLM(config)


# -- RoPE -------------------------------------------------------------------------------------------------------------


def test_rope_theta_defaults_to_10000():
    assert HSAConfig().rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert HSAConfig(rope_parameters={"rope_theta": 5e5}).rope_parameters["rope_type"] == "default"


def test_the_older_spelling_of_rope_is_understood():
    assert HSAConfig(rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    config = HSAConfig(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_types_change_the_model(rope):
    x = torch.arange(40)[None]
    torch.manual_seed(0)
    plain = HSAForCausalLM(tiny_config()).eval()
    scaled = HSAForCausalLM(tiny_config(rope_parameters=rope)).eval()
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert not torch.allclose(plain(x).logits, scaled(x).logits, atol=1e-3)


# -- JSON and the Auto classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [HSAConfig, tiny_config, a_choice_of_everything])
def test_json_round_trip(make, tmp_path):
    config = make()
    assert HSAConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    assert HSAConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = HSAConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_nothing_of_the_round_trip_test_is_a_default():
    config, default = a_choice_of_everything(), HSAConfig()
    for field in (*INTEGERS, *BOOLEANS, *CHOICES, *NUMBERS, "hidden_act", "rope_parameters", "eos_token_id"):
        assert getattr(config, field) != getattr(default, field), field


def test_auto_config_round_trip(tmp_path):
    a_choice_of_everything().save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HSAConfig
    assert loaded.chunk_topk == 7 and loaded.num_hidden_layers == 11
    assert isinstance(AutoConfig.for_model("hsa", chunk_topk=3), HSAConfig)


@pytest.mark.parametrize("changes", [{"chunk_weighting": "gumbel"}, {"chunk_gate": 1}, {"chunk_topk": 0}])
def test_a_file_of_a_newer_version_is_refused(changes, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=next(iter(changes))):
        AutoConfig.from_pretrained(tmp_path)


def test_overrides_when_loading_are_validated_and_derived_fields_follow(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_lower_layers=4, chunk_topk=5)
    assert (config.num_lower_layers, config.num_hidden_layers, config.chunk_topk) == (4, 8, 5)
    with pytest.raises(ValueError, match="`chunk_topk` must be an integer of at least 1, got 0"):
        AutoConfig.from_pretrained(tmp_path, chunk_topk=0)


def test_configuration_of_another_model_type_is_refused(tmp_path):
    # 16 layers, as many as an HSAConfig has by default: nothing but the model type gives it away.
    LlamaConfig(num_hidden_layers=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'"):
        HSAConfig.from_pretrained(tmp_path)


def test_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises((OSError, ValueError), match="config.json"):
        HSAConfig.from_pretrained(tmp_path)

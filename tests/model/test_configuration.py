"""`HSAConfig`: the paper's sizes by default, refuses what is out of range or unknown by name, and survives JSON."""

import copy
import json
import math
from dataclasses import fields
from typing import get_args

import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM
from tests.models import tiny_config


NAN, INF = math.nan, math.inf
FIELDS = {one.name: one.type for one in fields(HSAConfig) if one.name not in PreTrainedConfig.__dataclass_fields__}
WRONG = {  # values that no field of the kind takes
    int: ("8", True, 2.0, NAN, -1),
    bool: (1, 0, "true", 1.0),
    float: ("0.02", True, -0.1, NAN, INF, -INF, 10**400, [0.1]),
    str: ("gumbel", "", "CLS", 1, True, ["cls"]),
    dict: ("default", 3, [1]),
    list[str]: ("hsa", [], ["mamba"], [1], [None], 3, ["attention"]),
    list[int]: ([-1], ["8"], [True], [1.0]),
}
# Integers that may be 0; a zero of one that counts things or gives their size would be an empty model.
MAY_BE_ZERO = {
    "num_lower_layers": {},
    "num_upper_layers": {},
    "num_encoder_layers": {"chunk_landmark": "mean"},
    "hsa_intermediate_size": {"hsa_residual": "standard"},
    "chunk_encoder_layer": {},
    "pad_token_id": {},
    "bos_token_id": {},
    "eos_token_id": {},
}


def kinds(field: str) -> set:
    return set(get_args(FIELDS[field]) or [FIELDS[field]])


def wrong_values():
    for field in FIELDS:
        optional = type(None) in kinds(field)
        for kind in sorted(kinds(field) - {type(None)}, key=str):
            yield from ((field, value) for value in WRONG[kind])
        if not optional:
            yield field, None
        if int in kinds(field) and field not in MAY_BE_ZERO:
            yield field, 0


def a_choice_of_everything() -> HSAConfig:
    """A configuration none of whose fields has its default value."""
    return HSAConfig(
        vocab_size=77,
        hidden_size=48,
        intermediate_size=80,
        layer_types=["full_attention", "linear_attention", "hsa", "hsa", "full_attention"],
        chunk_encoder_layer=1,
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
        hsa_intermediate_size=0,
        hsa_qk_norm=True,
        hsa_implementation="torch",
        num_retrieval_heads=4,
        retrieval_dim=9,
        retrieval_stride=3,
        retrieval_distance_penalty=0.5,
        landmark_norm=True,
        qk_norm=False,
        full_attention_rope=False,
        state_size=40,
        conv_kernel=3,
        expand=3,
        n_groups=2,
        mamba_head_dim=24,
        hidden_act="gelu",
        max_position_embeddings=123,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        initializer_range=0.1,
        rms_norm_eps=1e-5,
        attention_bias=True,
        attention_output_bias=False,
        attention_dropout=0.1,
        mlp_bias=True,
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_sizes_of_the_paper():
    config = HSAConfig()
    assert config.chunk_weighting == "softmax"  # where the paper's models have stick-breaking
    assert (config.sliding_window, config.chunk_size, config.chunk_topk) == (512, 64, 8)
    assert config.max_position_embeddings == 4096
    with torch.device("meta"):
        parameters = HSAForCausalLM(config).num_parameters()
    assert 230e6 <= parameters <= 250e6


def test_counts_are_short_for_the_pattern_of_the_paper():
    config = HSAConfig(num_lower_layers=3, num_upper_layers=4, num_upper_groups=2)
    group = ["hsa", "sliding_attention", "sliding_attention"]
    assert config.layer_types == ["sliding_attention"] * 3 + group * 2
    assert config.hsa_layers == [False] * 3 + [True, False, False] * 2
    assert (config.num_hidden_layers, config.chunk_encoder_layer) == (9, 3)
    for others in ({"num_hidden_layers": 9}, {"layer_types": config.layer_types}, {"chunk_encoder_layer": 3}):
        assert HSAConfig(num_lower_layers=3, num_upper_layers=4, num_upper_groups=2, **others) == config
    assert HSAConfig(layer_types=tuple(config.layer_types)) == config


def test_counts_left_out_are_those_of_the_paper():
    assert HSAConfig(num_lower_layers=3) == HSAConfig(num_lower_layers=3, num_upper_layers=6, num_upper_groups=2)


def test_upper_groups_may_be_of_hsa_layers_alone():
    assert tiny_config(num_upper_layers=0, num_upper_groups=3).hsa_layers == [False, True, True, True]


COUNTS = ("num_lower_layers", "num_upper_layers", "num_upper_groups")
WINDOW, FULL, HSA = "sliding_attention", "full_attention", "hsa"


@pytest.mark.parametrize(
    ("layer_types", "counts"),
    [
        ([HSA], (0, 0, 1)),
        ([WINDOW, HSA], (1, 0, 1)),
        ([HSA, WINDOW, HSA, WINDOW], (0, 2, 2)),
        ([WINDOW, WINDOW, HSA, HSA, HSA], (2, 0, 3)),
        ([HSA, WINDOW, HSA], None),
        ([HSA, WINDOW, WINDOW, HSA], None),
        ([WINDOW, FULL, HSA], None),
        ([HSA, FULL], None),
        ([WINDOW] * 3, None),
        ([FULL], None),
    ],
    ids=lambda value: "-".join(kind[0] for kind in value) if isinstance(value, list) else "",
)
def test_layer_types_are_saved_as_counts_where_these_say_as_much(layer_types, counts, tmp_path):
    config = HSAConfig(layer_types=layer_types)
    assert config.layer_types == layer_types and config.num_hidden_layers == len(layer_types)
    assert config.chunk_encoder_layer == (layer_types.index(HSA) if HSA in layer_types else None)
    assert tuple(getattr(config, name) for name in COUNTS) == (counts or (None, None, None))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert ("layer_types" in saved) == (counts is None) and "chunk_encoder_layer" not in saved
    assert HSAConfig.from_pretrained(tmp_path).layer_types == layer_types


def test_an_encoder_below_its_place_is_saved(tmp_path):
    config = HSAConfig(num_lower_layers=3, chunk_encoder_layer=1)
    assert config.layer_types[:4] == [WINDOW] * 3 + [HSA] and config.num_lower_layers is None
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.layer_types, loaded.chunk_encoder_layer) == (config.layer_types, 1)


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_lower_layers": 1, "intermediate_size": 77, "qk_norm": False, "attention_bias": True}],
    ids=["default", "changed"],
)
def test_what_is_new_is_written_only_where_it_is_used(fields):
    saved = HSAConfig(**fields).to_diff_dict()
    new = {"layer_types", "chunk_encoder_layer", "hsa_qk_norm", "hsa_intermediate_size", "attention_output_bias"}
    assert not new & saved.keys()
    other = {"hsa_qk_norm": fields != {}, "hsa_intermediate_size": 5, "attention_output_bias": not fields}
    saved = HSAConfig(**fields, **other).to_diff_dict()
    assert {name: saved[name] for name in other} == other


def test_sizes_left_out_are_derived():
    config = HSAConfig(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, intermediate_size=200)
    assert config.head_dim == 24 and config.encoder_intermediate_size == 200
    assert config.hsa_intermediate_size == 200
    config = HSAConfig(hidden_size=96, num_attention_heads=4, head_dim=32, encoder_intermediate_size=64)
    assert config.head_dim == 32 and config.encoder_intermediate_size == 64
    for value in (False, True):
        assert HSAConfig(qk_norm=value).hsa_qk_norm is HSAConfig(attention_bias=value).attention_output_bias is value
    config = HSAConfig(qk_norm=False, hsa_qk_norm=True, attention_bias=True, attention_output_bias=False)
    assert config.hsa_qk_norm and not config.qk_norm and config.attention_bias and not config.attention_output_bias


@pytest.mark.parametrize("field", MAY_BE_ZERO)
def test_zero_is_good_where_it_means_something(field):
    assert getattr(HSAConfig(**{field: 0}, **MAY_BE_ZERO[field]), field) in (0, None)  # None: counts of no pattern


def test_integers_are_numbers_too():
    config = HSAConfig(attention_dropout=0, rms_norm_eps=1, rope_theta=10000)
    assert config.attention_dropout == 0 and config.rope_parameters["rope_theta"] == 10000


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), wrong_values())
def test_values_of_another_kind_or_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        HSAConfig(**{field: value})
    named = value[0] if isinstance(value, list) and f"`{field}[0]`" in str(error.value) else value
    assert f"`{field}" in str(error.value) and repr(named) in str(error.value)


@pytest.mark.parametrize("field", ["chunk_landmark", "chunk_weighting", "hsa_residual", "hsa_implementation"])
def test_unknown_choices_may_be_those_of_a_newer_version(field):
    with pytest.raises(ValueError, match=f"`{field}` must be one of .*'{getattr(HSAConfig(), field)}'.*upgrade"):
        HSAConfig(**{field: "gumbel"})
    with pytest.raises(ValueError, match="layer_types.*upgrade"):
        HSAConfig(layer_types=["linear_gumbel"])


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
        ({"num_upper_groups": 4}, ("Write another pattern as `layer_types`",)),
        ({"num_hidden_layers": 12}, ("`num_hidden_layers` (12)", "derived", "16", "Leave it out")),
        ({"layer_types": [HSA], "num_hidden_layers": 2}, ("`num_hidden_layers` (2)", "derived", "1", "Leave it out")),
        ({"layer_types": [HSA], "num_lower_layers": 1}, ("`num_lower_layers` (1)", "`layer_types`", "0")),
        ({"layer_types": [FULL, HSA], "num_upper_groups": 1}, ("`num_upper_groups` (1)", "`layer_types`", "None")),
        ({"layer_types": [WINDOW], "num_upper_groups": 1}, ("`num_upper_groups` (1)", "`layer_types`", "None")),
        ({"layer_types": [WINDOW, HSA], "chunk_encoder_layer": 2}, ("`chunk_encoder_layer`", "from 0 to 1", "got 2")),
        ({"chunk_encoder_layer": 9}, ("`chunk_encoder_layer`", "from 0 to 8", "Leave it out")),
        ({"layer_types": [WINDOW], "chunk_encoder_layer": 0}, ("`chunk_encoder_layer` (0)", "None", "Leave it out")),
        ({"hsa_intermediate_size": 0}, ("`hsa_intermediate_size=0`", "'standard'", "'bypass'")),
        ({"attention_dropout": 1.0}, ("`attention_dropout`", "below 1.0", "got 1.0")),
        ({"vocab_size": 99, "pad_token_id": 99}, ("`pad_token_id`", "from 0 to 98", "got 99")),
        ({"vocab_size": 99, "bos_token_id": [1]}, ("`bos_token_id`", "a token id", "got [1]")),
        ({"vocab_size": 99, "eos_token_id": [1, 99]}, ("`eos_token_id`", "from 0 to 98", "got [1, 99]")),
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk_topk", 0),
        ("hsa_qk_norm", None),
        ("num_lower_layers", 2),
        ("num_hidden_layers", 4),
        ("layer_types", [HSA]),
        ("layer_types", [FULL, HSA, WINDOW, HSA, WINDOW]),
        ("chunk_encoder_layer", 0),
        ("pad_token_id", -1),
    ],
)
def test_what_was_changed_after_construction_is_checked(field, value, tmp_path):
    config = tiny_config()
    setattr(config, field, value)
    for use in (HSAForCausalLM, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="`num_|`" + field):
            use(config)
    with pytest.raises(ValueError, match="`num_|`" + field):
        if field != "hsa_qk_norm":  # None of it is to derive it again
            HSAConfig.from_dict(config.to_dict())
        config.validate_hsa()


def test_a_strict_subclass_checks_the_same():
    @strict
    class Strict(HSAConfig):
        model_type = "strict_hsa"

    assert Strict(layer_types=[FULL, HSA]).layer_types == [FULL, HSA]
    with pytest.raises(ValueError, match="`chunk_topk`"):
        Strict(chunk_topk=0)


# -- RoPE -------------------------------------------------------------------------------------------------------------


def test_rope_theta_defaults_to_10000():
    assert HSAConfig().rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert HSAConfig(rope_parameters={"rope_theta": 5e5}).rope_parameters["rope_type"] == "default"


def test_the_older_spelling_of_rope_is_understood():
    assert HSAConfig(rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    config = HSAConfig(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "whole yarn": {
        "rope_type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
        "beta_fast": 16,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "attention_factor": None,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("value", ["2", NAN, INF, -1.0, 0, 10**400, [2.0]], ids=lambda x: str(x)[:8])
def test_every_number_of_rope_is_checked(rope, value):
    for name, good in {"rope_theta": 1e4, **rope}.items():
        if name != "rope_type" and not (name == "truncate" and value == 0) and good is not None:
            with pytest.raises(ValueError) as error:
                HSAConfig(rope_parameters={**rope, name: value})
            assert f"rope_parameters['{name}']" in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("rope", "changes", "parts"),
    [
        ("default", {"factor": 2.0}, ("['factor']", "2.0", "not read by rope_type 'default'")),
        ("default", {"partial_rotary_factor": 0.5}, ("['partial_rotary_factor']", "must be 1", "0.5")),
        ("default", {"mrope_section": [1, 1]}, ("['mrope_section']", "not read")),
        ("default", {"full_attention": {"rope_theta": 1e4}}, ("'full_attention'", "all layers")),
        ("default", {"type": "linear"}, ("['type']", "'linear'", "'default'")),
        ("linear", {"rope_theta": 1.0}, ("['rope_theta']", "above 1")),
        ("llama3", {"high_freq_factor": 1.0}, ("['low_freq_factor']", "less than", "['high_freq_factor']")),
        ("llama3", {"original_max_position_embeddings": 64.0}, ("['original_max_position_embeddings']", "integer")),
        ("llama3", {"attention_factor": 1.0}, ("['attention_factor']", "not read")),
        ("yarn", {"beta_fast": 0.5}, ("['beta_slow'] (1)", "less than", "['beta_fast'] (0.5)")),
        ("yarn", {"mscale": 1.0}, ("['mscale']", "'mscale_all_dim'", "both")),
        ("yarn", {"truncate": "no"}, ("['truncate']", "True or False")),
        ("yarn of DeepSeek", {"attention_factor": 1.0}, ("['mscale']", "'attention_factor'")),
    ],
    ids=str,
)
def test_fields_of_rope_that_do_not_fit_are_refused(rope, changes, parts):
    with pytest.raises(ValueError) as error:
        HSAConfig(rope_parameters={**ROPES[rope], **changes})
    for part in parts:
        assert part in str(error.value).replace("]` (", "] (")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
        {"rope_scaling": "linear"},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_older_words_for_rope_do_not_contradict(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=name):
        HSAConfig(**fields)


def test_rope_of_the_caller_is_left_alone():
    rope = {"rope_theta": 5e5}
    assert HSAConfig(rope_parameters=rope).rope_parameters is not rope and rope == {"rope_theta": 5e5}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope_types_change_the_model(rope):
    x = torch.arange(40)[None]
    torch.manual_seed(0)
    plain = HSAForCausalLM(tiny_config()).eval()
    scaled = HSAForCausalLM(tiny_config(rope_parameters=rope)).eval()
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert not torch.allclose(plain(x).logits, scaled(x).logits, atol=1e-3)


# -- JSON and the Auto classes ----------------------------------------------------------------------------------------


def without_hsa_layers() -> HSAConfig:
    return HSAConfig(layer_types=[WINDOW, FULL])


@pytest.mark.parametrize("make", [HSAConfig, tiny_config, a_choice_of_everything, without_hsa_layers])
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
    for field in FIELDS:
        if field not in ("hsa_qk_norm", "attention_output_bias"):  # these are not as what they follow
            assert getattr(config, field) != getattr(default, field), field
    assert config.hsa_qk_norm != config.qk_norm and config.attention_output_bias != config.attention_bias


def test_auto_config_round_trip(tmp_path):
    a_choice_of_everything().save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HSAConfig
    assert loaded.chunk_topk == 7 and loaded.num_hidden_layers == 5
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
    config = AutoConfig.from_pretrained(tmp_path, intermediate_size=40, qk_norm=False)
    assert (config.hsa_intermediate_size, config.encoder_intermediate_size, config.hsa_qk_norm) == (40, 40, False)
    with pytest.raises(ValueError, match="`chunk_topk` must be an integer of at least 1, got 0"):
        AutoConfig.from_pretrained(tmp_path, chunk_topk=0)


def test_the_pattern_of_layers_can_be_overridden_when_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, layer_types=[FULL, WINDOW, HSA])
    assert (config.layer_types, config.num_hidden_layers, config.chunk_encoder_layer) == ([FULL, WINDOW, HSA], 3, 2)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, chunk_encoder_layer=1).chunk_encoder_layer == 1
    with pytest.raises(ValueError, match="`num_lower_layers` .4. does not agree with `layer_types`"):
        AutoConfig.from_pretrained(tmp_path, num_lower_layers=4)
    config = AutoConfig.from_pretrained(tmp_path, layer_types=None, num_lower_layers=4)
    assert config.layer_types == HSAConfig(num_lower_layers=4).layer_types
    with pytest.raises(ValueError, match="`num_hidden_layers` .7."):
        AutoConfig.from_pretrained(tmp_path, layer_types=[HSA], num_hidden_layers=7)


def test_configuration_of_another_model_type_is_refused(tmp_path):
    # 16 layers, as many as an HSAConfig has by default: nothing but the model type gives it away.
    LlamaConfig(num_hidden_layers=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'"):
        HSAConfig.from_pretrained(tmp_path)


def test_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises((OSError, ValueError), match="config.json"):
        HSAConfig.from_pretrained(tmp_path)

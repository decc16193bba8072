"""Contract 9, of fields that are changed after a model was made: each is obeyed everywhere, or refused by name."""

import copy

import pytest
import torch

from configuration_hsa import HSAConfig
from modeling_hsa import HSACache
from modeling_hsa.config_guard import _BUILT_FIELDS, _LIVE_FIELDS
from tests.helpers import OTHER_ORDER, relative_error
from tests.models import tiny_model
from tests.rows import random_ids, read


# Fields that change numbers, and to what.
OBEYED = {
    "sliding_window": 6,
    "chunk_size": 32,
    "chunk_topk": 1,
    "chunk_weighting": "stick_breaking",
    "hsa_residual": "standard",
    "retrieval_stride": 4,
    "retrieval_distance_penalty": 3.0,
}
REFUSED = {
    "hidden_size": 64,
    "layer_types": ["sliding_attention", "hsa"],
    "chunk_encoder_layer": 0,
    "num_lower_layers": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "chunk_landmark": "mean",
    "num_encoder_layers": 2,
    "hsa_local_attention": False,
    "hsa_num_key_value_heads": 2,
    "hsa_intermediate_size": 8,
    "num_retrieval_heads": 2,
    "retrieval_dim": 8,
    "landmark_norm": True,
    "qk_norm": False,
    "hsa_qk_norm": False,
    "hidden_act": "gelu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "rms_norm_eps": 1e-3,
    "attention_bias": True,
}


def test_every_field_is_one_or_the_other():
    names = {name for name in HSAConfig.__annotations__ if name in HSAConfig().to_dict() or name in _BUILT_FIELDS}
    assert names <= {*_LIVE_FIELDS, *_BUILT_FIELDS} and not set(_LIVE_FIELDS) & set(_BUILT_FIELDS)
    assert OBEYED.keys() <= set(_LIVE_FIELDS) and REFUSED.keys() <= set(_BUILT_FIELDS)


@torch.no_grad()
@pytest.mark.parametrize("there_and_back", [False, True])
@pytest.mark.parametrize("name", OBEYED)
def test_a_field_is_obeyed_with_and_without_a_cache(name, there_and_back):
    model, ids = tiny_model(), random_ids(1, 90)
    before = model(ids, use_cache=False).logits
    expected = tiny_model(**{name: OBEYED[name]})
    expected.load_state_dict(model.state_dict())
    expected = expected(ids, use_cache=False).logits
    assert relative_error(expected, before) > 1e-3
    built = getattr(model.config, name)
    setattr(model.config, name, OBEYED[name])
    if there_and_back:
        model(ids)
        setattr(model.config, name, built)
        expected = before
    assert relative_error(model(ids, use_cache=False).logits, expected) <= OTHER_ORDER
    assert relative_error(read(model, ids, [13, 1, 40])[0], expected) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("name", ["sliding_window", "chunk_size", "retrieval_stride"])
def test_a_cache_of_before_is_refused(name):
    model = tiny_model()
    cache = HSACache(model.config)
    model(random_ids(1, 40), past_key_values=cache)
    setattr(model.config, name, OBEYED[name])
    with pytest.raises(ValueError, match=f"past_key_values.*{name}"):
        model(random_ids(1, 5), past_key_values=cache)


@pytest.mark.parametrize("name", REFUSED)
def test_what_shaped_the_modules_is_refused(name):
    model, ids = tiny_model(), random_ids(1, 40)
    expected = model(ids).logits
    before = copy.deepcopy(getattr(model.config, name))
    setattr(model.config, name, REFUSED[name])
    with pytest.raises(ValueError, match=f"`config.{name}` was .*from_pretrained"):
        model(ids)
    setattr(model.config, name, before)
    assert torch.equal(model(ids).logits, expected)


def test_a_list_that_is_changed_in_place_is_seen():
    model = tiny_model()
    model.config.layer_types[0] = "full_attention"
    with pytest.raises(ValueError, match="`config.layer_types` was"):
        model(random_ids(1, 40))


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 0), ("chunk_topk", None), ("hsa_residual", "both")])
def test_what_a_field_cannot_be_is_refused(name, value):
    model = tiny_model()
    setattr(model.config, name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            model(random_ids(1, 40))


def test_embeddings_can_be_resized_and_tokens_set():
    model = tiny_model()
    model.resize_token_embeddings(120)
    model.config.pad_token_id = 110
    assert model(torch.full((1, 20), 115)).logits.shape == (1, 20, 120)

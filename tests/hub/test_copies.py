"""The classes of the package and those of a model that was loaded from the Hub, in one process."""

import importlib

import pytest
import torch
from transformers import DynamicCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_hsa import HSACache, HSAForCausalLM
from tests.models import tiny_model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The tiny model, loaded with the code in its folder."""
    folder = tmp_path_factory.mktemp("copies") / "tiny"
    tiny_model().save_pretrained(folder)
    model = get_class_from_dynamic_module("modeling_hsa.HSAForCausalLM", str(folder)).from_pretrained(folder)
    assert not isinstance(model, HSAForCausalLM)
    return model.eval()


@pytest.fixture(scope="module")
def their_cache_class(theirs):
    cls = importlib.import_module(type(theirs).__module__).HSACache
    assert cls is not HSACache
    return cls


@torch.no_grad()
def read(model, cache) -> torch.Tensor:
    prompt = torch.arange(70)[None] % 99
    first = model(prompt[:, :40], past_key_values=cache).logits
    return torch.cat([first, model(prompt[:, 40:], past_key_values=cache).logits], dim=1)


def test_a_cache_serves_a_model_of_the_other_copy(theirs, their_cache_class):
    ours = tiny_model()
    expected = read(ours, HSACache(ours.config))
    assert torch.equal(read(theirs, HSACache(theirs.config)), expected)
    assert torch.equal(read(ours, their_cache_class(ours.config)), expected)
    tokens = theirs.generate(torch.arange(20)[None], max_new_tokens=4, past_key_values=HSACache(theirs.config))
    assert torch.equal(tokens, ours.generate(torch.arange(20)[None], max_new_tokens=4))


def test_a_configuration_serves_a_model_of_the_other_copy(theirs):
    model = HSAForCausalLM(theirs.config)
    model.load_state_dict(theirs.state_dict())
    expected = read(theirs, HSACache(theirs.config))
    assert torch.equal(read(model.eval(), HSACache(theirs.config)), expected)


def test_a_cache_of_another_version_is_refused(theirs, monkeypatch):
    monkeypatch.setattr(HSACache, "format_version", 0)
    for model in (theirs, tiny_model()):
        with pytest.raises(TypeError, match="of another version.*import `modeling_hsa` before the model is loaded"):
            read(model, HSACache(model.config))


def test_a_cache_of_another_model_is_refused(theirs):
    with pytest.raises(TypeError, match="must be an HSACache, got DynamicCache"):
        read(theirs, DynamicCache())
    with pytest.raises(ValueError, match="made for a model with `chunk_size` 32, but this one has 16"):
        read(theirs, HSACache(tiny_model(chunk_size=32).config))

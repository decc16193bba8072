"""`device_map`: modules on different devices, or on disk until they run, change no bit."""

import pytest
import torch

from modeling_hsa import HSACache
from tests.distributed.device_maps import different, gradient_error, load_split, split_map, starts
from tests.helpers import OTHER_ORDER
from tests.models import tiny_model
from tests.rows import random_ids


STARTS = starts(tiny_model())
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("start", STARTS)
def test_modules_on_disk_change_no_bit(model, saved, tmp_path, start):
    places = split_map(model, start, "cpu", "disk")
    split = load_split(saved, places, offload_folder=tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in split.parameters())
    assert different(model, split, random_ids(2, 150)) == []


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_hooks_of_a_device_map_leave_the_cache_alone(model, saved, tmp_path, name):
    """They move the arguments of every module: a cache has to stay the object that layers write to."""
    split = load_split(saved, split_map(model, STARTS[1], "cpu", "disk"), offload_folder=tmp_path / "offloaded")
    ids, cache = random_ids(1, 100), HSACache(model.config)
    with torch.no_grad():
        for segment in ids.split(30, dim=1):
            logits = split(segment, **{name: cache}).logits
        expected = model(ids, use_cache=False).logits[:, -logits.shape[1] :]
    assert cache.get_seq_length() == 100
    assert (logits - expected).norm() <= OTHER_ORDER * expected.norm()


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("start", STARTS)
def test_modules_on_two_gpus_change_no_bit(model, saved, start):
    whole, split = load_split(saved, 0), load_split(saved, split_map(model, start, 0, 1))
    ids = random_ids(2, 150).cuda()
    assert different(whole, split, ids) == []
    assert gradient_error(whole, split, ids) <= OTHER_ORDER


@pytest.mark.gpu
@two_gpus
def test_device_map_auto_spreads_a_model_over_two_gpus(saved):
    whole, split = load_split(saved, 0), load_split(saved, "auto")
    assert set(split.hf_device_map.values()) == {0, 1}
    ids = random_ids(2, 150).cuda()
    assert different(whole, split, ids) == []
    assert gradient_error(whole, split, ids) <= OTHER_ORDER

"""Arguments of a cache that make no sense are refused by name, and change nothing."""

import pytest
import torch

from modeling_hsa import HSACache, HSAStaticCache
from tests.helpers import OTHER_ORDER, relative_error
from tests.models import tiny_model
from tests.rows import random_ids, read


ROWS = (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor([2]), torch.tensor([-1, 0]), [0, 1], None, 1)
ODD = {
    "crop": (
        lambda cache, x: cache.crop(x),
        "tokens_to_remove",
        (None, -1.0, True, "1", torch.tensor(-1.0), torch.tensor([-1, -2]), torch.tensor(True), 5, torch.tensor(3)),
    ),
    "reorder_cache": (
        lambda cache, x: cache.reorder_cache(x),
        "beam_idx",
        (*ROWS, torch.tensor([0]), torch.tensor([0, 1, 1]), torch.tensor([True, False]), torch.tensor([1, 0]).byte()),
    ),
    "batch_repeat_interleave": (
        lambda cache, x: cache.batch_repeat_interleave(x),
        "repeats",
        (None, 0, -1, 1.5, True, torch.tensor([1, 2]), torch.tensor(2.0)),
    ),
    "batch_select_indices": (
        lambda cache, x: cache.batch_select_indices(x),
        "indices",
        (
            *ROWS, torch.tensor([True]), torch.tensor([False, False]), torch.tensor([], dtype=torch.long),
            torch.tensor([1, 0]).byte(), torch.tensor([1, 0]).short(),
        ),
    ),
}  # fmt: skip
# A static cache refuses `crop` whatever its argument is.
CASES = [
    (name, x, static)
    for name, (_, _, values) in ODD.items()
    for x in values
    for static in (False, True)
    if not (static and name == "crop")
]


@torch.no_grad()
@pytest.mark.parametrize("name, value, static", CASES, ids=[f"{name}({x!r})-{static}" for name, x, static in CASES])
def test_what_makes_no_sense_is_refused_and_changes_nothing(model, name, value, static):
    ids = random_ids(2, 60)
    cache = HSAStaticCache(model.config, 60) if static else HSACache(model.config)
    read(model, ids[:, :40], [40], cache)
    call, argument, _ = ODD[name]
    with pytest.raises((ValueError, TypeError), match=argument):
        call(cache, value)
    assert (cache.batch_size, cache.get_seq_length()) == (2, 40)
    rest, _ = read(model, ids[:, 40:], [1, 19], cache)
    assert relative_error(rest, model(ids, use_cache=False).logits[:, 40:]) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_in_tensors_are_taken(model, dtype):
    ids = random_ids(2, 60)
    _, cache = read(model, ids[:, :45], [45])
    cache.crop(torch.tensor([-5], dtype=dtype))
    cache.reorder_cache(torch.tensor([1, 1], dtype=dtype))
    cache.batch_repeat_interleave(torch.tensor(2, dtype=dtype))
    cache.batch_select_indices(torch.tensor([3], dtype=dtype))
    rest, _ = read(model, ids[1:, 40:], [20], cache)
    assert relative_error(rest, model(ids[1:], use_cache=False).logits[:, 40:]) <= OTHER_ORDER


# -- calls that fail after the last layer -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("is_static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("sizes", [(20,), (1,), (1, 1, 18)], ids=str)
def test_a_head_that_fails_takes_the_call_back(is_static, sizes):
    model, ids = tiny_model(), random_ids(2, 60)
    cache = HSAStaticCache(model.config, 100) if is_static else HSACache(model.config)
    read(model, ids[:, :40], [40], cache)

    def fail(*_):
        raise MemoryError

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(ids[:, 40:50], past_key_values=cache)
    with pytest.raises(MemoryError):
        model(ids[:, 40:41], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 40
    logits, _ = read(model, ids[:, 40:], sizes, cache)
    assert relative_error(logits, model(ids, use_cache=False).logits[:, 40:]) <= OTHER_ORDER

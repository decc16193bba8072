"""What is not there does not count, also where it is NaN: padding, what a cache held, chunks of other documents."""

import pytest
import torch

from modeling_hsa import HSACache, HSAStaticCache
from tests.helpers import OTHER_ORDER, relative_error
from tests.models import make_variant
from tests.rows import Rows, random_ids


NAMES = (
    "default",
    "stride_3",
    "no_local_attention",
    "full_attention",
    "eager_attention",
    "joint",
    "no_encoder",
    "ramba",
)
CACHES = {
    "device": HSACache,
    "host": lambda config: HSACache(config, offloading=True),
    "static": lambda config: HSAStaticCache(config, 129),
}


def read_embeddings(model, embeds, sizes, cache, attention_mask=None, position_ids=None) -> torch.Tensor:
    logits, start = [], 0
    for size in sizes:
        end = start + size
        outputs = model(
            inputs_embeds=embeds[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            position_ids=None if position_ids is None else position_ids[:, start:end],
            past_key_values=cache,
        )
        logits.append(outputs.logits)
        start = end
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, *CACHES])
@pytest.mark.parametrize("name", NAMES)
def test_padding_may_hold_nan(name, cache):
    model = make_variant(name)
    rows = Rows("." * 29 + "x" * 100, "x" * 50 + "." * 37 + "x" * 42, "x" * 113 + "." * 16, "." * 129)
    mask = rows.attention_mask
    embeds = model.get_input_embeddings()(rows.ids).masked_fill(mask[..., None] == 0, torch.nan)
    if cache is None:
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    else:
        logits = read_embeddings(model, embeds, [60, 1, 1, 67], CACHES[cache](model.config), mask)
    assert rows.error(model, logits) <= OTHER_ORDER
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_reset_cache_may_have_held_nan(name, cache):
    model, ids = make_variant(name), random_ids(2, 129)
    cache = CACHES[cache](model.config)
    embeds = model.get_input_embeddings()(ids)
    read_embeddings(model, torch.full_like(embeds, torch.nan), [100, 1], cache)
    cache.reset()
    logits = read_embeddings(model, embeds, [1, 60, 1, 67], cache)
    assert relative_error(logits, model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("cache, forked", [("device", False), ("device", True), ("host", True), ("static", False)])
@pytest.mark.parametrize("weighting", ["softmax", "joint", "stick_breaking"])
@pytest.mark.parametrize("stride", [1, 3])
def test_chunks_of_an_earlier_document_may_hold_nan(weighting, stride, cache, forked):
    model = make_variant("default", chunk_weighting=weighting, retrieval_stride=stride)
    ids = random_ids(1, 79)
    position_ids = torch.cat([torch.arange(50), torch.arange(79)])[None]
    embeds = model.get_input_embeddings()(ids)
    cache = CACHES[cache](model.config)
    read_embeddings(model, torch.full_like(embeds[:, :50], torch.nan), [50], cache, None, position_ids)
    if forked:
        cache = cache.fork()
    logits = read_embeddings(model, embeds, [1, 40, 1, 37], cache, None, position_ids[:, 50:])
    assert relative_error(logits, model(ids, use_cache=False).logits) <= OTHER_ORDER

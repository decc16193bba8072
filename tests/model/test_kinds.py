"""The kinds of layers: one that is added in the two places that name kinds keeps the contracts of the model."""

import copy

import pytest
import torch
from torch import nn

from configuration_hsa import configuration_hsa
from modeling_hsa import HSACache, HSAStaticCache
from modeling_hsa.cache.layer_states import LayerState, Storage
from modeling_hsa.kinds import LAYER_KINDS, LayerKind
from modeling_hsa.layers import HSALayer
from modeling_hsa.layout import TokenLayout
from modeling_hsa.modules import HSARMSNorm
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error
from tests.models import tiny_model
from tests.rows import LENGTHS, Rows, random_ids, read


MEAN_OF = 3  # tokens


class MeanState(LayerState):
    """The last tokens of a layer that averages them."""

    def __init__(self, config, storage: Storage):
        self.tokens = storage.tokens(MEAN_OF, ordered=True)

    def parts(self):
        return {"tokens": self.tokens}

    def needs(self):
        return [(self.tokens, MEAN_OF - 1)]


class MeanLayer(HSALayer):
    """Adds the mean of what it makes of the last tokens of the document."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.norm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states, layout: TokenLayout, position_embeddings, state: MeanState | None = None, **kwargs
    ):
        stream = layout.align(self.proj(self.norm(hidden_states)))
        length = stream.shape[1]
        if state is not None:
            stream = state.tokens.append(stream, layout)
        stream = nn.functional.pad(stream, (0, 0, MEAN_OF - 1, 0))
        reach = layout.align(layout.reach(MEAN_OF).expand(len(stream), -1)[..., None])
        total = torch.zeros_like(stream[:, -length:])
        for back in range(MEAN_OF):
            end = stream.shape[1] - back
            total = total + stream[:, end - length : end] * (back <= reach)
        return hidden_states + layout.restore(total / (reach + 1))


@pytest.fixture
def model(monkeypatch):
    """It has the kind below, inside and above the retrieving layers."""
    kinds = (*configuration_hsa.LAYER_TYPES, "mean")
    monkeypatch.setattr(configuration_hsa, "LAYER_TYPES", kinds)
    monkeypatch.setitem(LAYER_KINDS, "mean", LayerKind(MeanLayer, MeanState))
    return tiny_model(layer_types=["mean", "sliding_attention", "hsa", "mean", "hsa", "full_attention", "mean"])


LAYOUTS = {
    "plain": ("x" * 129, "x" * 129),
    "padded": ("." * 29 + "x" * 100, "x" * 50 + "." * 16 + "x" * 63),
    "packed": ("|" + "x" * 69 + "||" + "x" * 57, "|" + "x" * 15 + "|" + "x" * 112),
    "padded and packed": ("...|" + "x" * 60 + ".." + "|" + "x" * 62, "|x|" + "x" * 110 + "." * 16),
}


def test_the_configuration_and_the_model_know_the_same_kinds():
    assert set(configuration_hsa.LAYER_TYPES) == LAYER_KINDS.keys()


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_causality(model, use_cache):
    ids = random_ids(1, 129)
    before = model(ids, use_cache=use_cache).logits
    for j in (0, 15, 64, 128):
        changed = ids.clone()
        changed[:, j] = (ids[:, j] + 1) % 99
        after = model(changed, use_cache=use_cache).logits
        assert relative_error(after[:, :j], before[:, :j]) <= SAME_ARITHMETIC
        assert relative_error(after[:, j], before[:, j]) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [[129], [1], [60, 1, 1, 7, 60]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_answer_for_any_split_padding_and_packing(model, layout, sizes, static):
    rows = Rows(*LAYOUTS[layout])
    cache = HSAStaticCache(model.config, 129) if static else HSACache(model.config)
    logits, _ = read(model, rows.ids, sizes, cache, **rows.inputs())
    assert rows.error(model, logits) <= OTHER_ORDER
    assert rows.error(model, model(rows.ids, **rows.inputs(), use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
def test_any_length_works(model):
    ids = random_ids(2, max(LENGTHS))
    longest = model(ids, use_cache=False).logits
    for length in LENGTHS:
        assert relative_error(model(ids[:, :length]).logits, longest[:, :length]) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("duplicated", [copy.deepcopy, HSACache.fork], ids=["deepcopy", "fork"])
def test_what_is_done_to_the_cache_is_done_to_its_state(model, duplicated):
    rows = Rows(*LAYOUTS["padded"])
    ids, mask = rows.ids, rows.attention_mask
    _, cache = read(model, ids[:, :100], [60, 1], attention_mask=mask[:, :100])
    cache = duplicated(cache)
    with pytest.raises(RuntimeError, match="fails"), model.model.norm.register_forward_hook(_fail):
        model(ids[:, 100:], attention_mask=mask, past_key_values=cache)
    cache.crop(-9)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    rows = rows.select([1, 0, 1])
    logits, _ = read(model, rows.ids[:, 91:], [1, 37], cache, attention_mask=rows.attention_mask)
    assert rows.error(model, logits, start=91) <= OTHER_ORDER
    cache.reset()
    logits, _ = read(model, ids, [100, 29], cache, attention_mask=mask)
    assert Rows.error(rows.select([1, 0]), model, logits) <= OTHER_ORDER


def test_its_parameters_are_trained(model):
    model.train()
    model(random_ids(2, 65)).logits.logsumexp(-1).mean().backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.model.layers[3].parameters())


def test_it_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    ids = random_ids(1, 65)
    assert again.config.layer_types == model.config.layer_types
    assert torch.equal(again(ids).logits, model(ids).logits)


def _fail(*_):
    raise RuntimeError("fails")

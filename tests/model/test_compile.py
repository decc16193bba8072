"""`torch.compile(model, fullgraph=True)`: one graph, with the loss, gradients and logits of the model as it is."""

import pytest
import torch

from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error
from tests.models import make_variant
from tests.rows import Rows, random_ids, read


pytestmark = pytest.mark.slow

# Rows of 100 columns, longer than a block of the window attention and than six chunks.
LAYOUTS = {
    "plain": ("x" * 100, "x" * 100),
    "packed": ("|" + "x" * 40 + "|" + "x" * 20 + "||" + "x" * 36, "|" + "x" * 69 + "|" + "x" * 29),
    "padded": ("." * 30 + "x" * 70, "x" * 50 + "." * 7 + "x" * 33 + "." * 10),
}


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def loss_and_gradients(model, forward, ids: torch.Tensor, **inputs):
    model.zero_grad()
    loss = forward(ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["default", "stride_3", "joint", "distance_penalty", "eager_attention", "ramba", "mass_landmark"]
)
def test_training_needs_one_graph(name, layout):
    model, rows = make_variant(name).train(), Rows(*LAYOUTS[layout])
    expected = loss_and_gradients(model, model, rows.ids, **rows.inputs())
    actual = loss_and_gradients(model, compiled(model), rows.ids, **rows.inputs())
    for x, y in zip(actual, expected):
        assert relative_error(x, y) <= SAME_ARITHMETIC


def test_training_on_rows_of_any_length_needs_two_graphs(model):
    """The second one takes rows of any number of tokens that make chunks and fill more than one block."""
    model = make_variant("default").train()
    forward = compiled(model)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for length in (200, 176, 190, 163):
            rows = Rows("|" + "x" * (length - 71) + "|" + "x" * 69)
            expected = loss_and_gradients(model, model, rows.ids, **rows.inputs())
            actual = loss_and_gradients(model, forward, rows.ids, **rows.inputs())
            for x, y in zip(actual, expected):
                assert relative_error(x, y) <= SAME_ARITHMETIC
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("layer_by_layer", [True, False])
def test_any_length_is_trained_with_the_graphs_of_two(layer_by_layer):
    """The second is for any length, also one that fills its last chunk or block, or of another power of two."""
    model, expected_of = make_variant("default").train(), make_variant("default").train()
    forward = model if layer_by_layer else compiled(model)
    if layer_by_layer:
        for module in (*model.model.layers, model.model.chunk_encoder):
            module.compile(fullgraph=True, backend="aot_eager")
    kinds = 3 if layer_by_layer else 1  # window layers, HSA layers, the encoder
    torch._dynamo.utils.counters.clear()
    for length in (200, 176, 190, 512, 333):
        ids = random_ids(2, length)
        expected = loss_and_gradients(expected_of, expected_of, ids)
        for x, y in zip(loss_and_gradients(model, forward, ids), expected):
            assert relative_error(x, y) <= SAME_ARITHMETIC
    assert graphs() == 2 * kinds


@torch.no_grad()
def test_prompts_are_read_layer_by_layer_in_few_graphs():
    model, plain = make_variant("default"), make_variant("default")
    for module in (*model.model.layers, model.model.chunk_encoder):
        module.compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    counts = []
    for _ in range(2):
        ids = random_ids(1, 1200)
        logits, _ = read(model, ids, [200])
        assert relative_error(logits, read(plain, ids, [200])[0]) <= SAME_ARITHMETIC
        counts.append(graphs())
    assert counts[0] <= 9 and counts[1] == counts[0]  # and none for another prompt


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_is_exported_for_any_length(model, strict):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    lengths = {"ids": {1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(Logits(), (random_ids(2, 200),), dynamic_shapes=lengths, strict=strict).module()
    for length in (200, 176, 190, 512):
        ids = random_ids(2, length)
        assert relative_error(exported(ids), model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_that_compiled_code_made_can_be_continued(model, layout):
    rows = Rows(*(row * 2 for row in LAYOUTS[layout]))
    inputs = {name: x[:, :100] for name, x in rows.inputs().items()}
    outputs = compiled(model)(rows.ids[:, :100], use_cache=True, **inputs)
    inputs = rows.inputs()
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, 100:]
    logits, _ = read(model, rows.ids[:, 100:], [40, 1, 1, 58], outputs.past_key_values, **inputs)
    assert rows.error(model, torch.cat([outputs.logits, logits], dim=1)) <= OTHER_ORDER


@torch.no_grad()
def test_the_default_backend_of_pytorch_gives_the_same(model):
    ids = random_ids(2, 100)
    expected = model(ids, use_cache=False).logits
    forward = torch.compile(model, fullgraph=True)
    forward(ids, use_cache=False)
    # Memory that was in use before: an element that the compiled code forgets to write would show.
    used = [torch.full((n,), 1 << 40) for n in (25, 50, 100, 200, 400, 800, 1600, 3200, 6400) for _ in range(20)]
    del used
    assert relative_error(forward(ids, use_cache=False).logits, expected) <= OTHER_ORDER

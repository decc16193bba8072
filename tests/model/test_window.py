"""
The window attention of `attn_implementation="sdpa"`: PyTorch's flash attention (`varlen_attn`), which runs on CUDA
only, against the blocks that run anywhere. On the CPU a plain function that does what the documentation of
`varlen_attn` says takes its place, so that what is checked is how it is called; the GPU tests run the real one.
"""

from dataclasses import replace

import pytest
import torch
from transformers import DataCollatorWithFlattening

from modeling_hsa import HSACache, window
from modeling_hsa.layout import build_layout
from modeling_hsa.window import window_attention
from tests.helpers import SAME_ARITHMETIC, attend_sequences, relative_error
from tests.models import tiny_model
from tests.rows import Rows, random_ids, read


WINDOWS = pytest.mark.parametrize("size", [1, 12, 64, 500])
PADDED = {
    "left": ("......xxxxxxxxxxxxxxxxxxxxxxxxxxx", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
    "right": ("xxxxxxxxxxxxxxxxxxxxxxxxxxx......", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
    "both": ("...xxxxxxxxxxxxxxxxxxxxxxxxx.....", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx."),
    "holes": ("xxxxxx....xxxxxxxxxx.xxxxxxxxxxxx", ".xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
    "one token": ("................................x", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
}


@pytest.fixture
def calls(monkeypatch):
    """Makes the tensors of the CPU eligible and counts the calls of the substitute of `varlen_attn`."""
    made = []

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        made.append((cu_seq_q.tolist(), cu_seq_k.tolist()))
        return attend_sequences(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, False, window_size)

    monkeypatch.setattr(window, "_varlen_attn", varlen_attn)
    take_varlen_where(monkeypatch, lambda call: call.length > 1 and window._sequences(call) is not None)
    return made


def take_varlen_where(monkeypatch, fits) -> None:
    strategies = [(fits if attend is window._attend_with_varlen else x, attend) for x, attend in window._STRATEGIES]
    monkeypatch.setattr(window, "_STRATEGIES", strategies)


def blocked(monkeypatch, function):
    """What `function` gives without flash attention."""
    with monkeypatch.context() as context:
        take_varlen_where(context, lambda call: False)
        return function()


def make_model(size: int = 12, **overrides):
    """It retrieves all chunks: rounding cannot change which."""
    return tiny_model(sliding_window=size, chunk_topk=50, **overrides)


@torch.no_grad()
@WINDOWS
@pytest.mark.parametrize("heads", [1, 2, 4], ids="{} kv heads".format)
def test_plain_rows(calls, monkeypatch, heads, size):
    model, ids = make_model(size, num_key_value_heads=heads), random_ids(2, 150)
    expected = blocked(monkeypatch, lambda: model(ids, use_cache=False).logits)
    assert relative_error(model(ids, use_cache=False).logits, expected) <= SAME_ARITHMETIC
    assert len(calls) == model.config.num_hidden_layers and calls[0][0] == [0, 150, 300]


@torch.no_grad()
@WINDOWS
@pytest.mark.parametrize("sizes", [[30], [1, 70, 2], [64, 1, 1, 40]], ids=str)
def test_segments(calls, monkeypatch, sizes, size):
    model, ids = make_model(size), random_ids(2, 110)
    expected = blocked(monkeypatch, lambda: model(ids, use_cache=False).logits)
    assert relative_error(read(model, ids, sizes)[0], expected) <= SAME_ARITHMETIC
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 12, 500])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", PADDED)
def test_padded_rows(calls, kind, use_cache, size):
    model, rows = make_model(size), Rows(*PADDED[kind])
    assert (
        rows.error(model, model(**{"input_ids": rows.ids, **rows.inputs()}, use_cache=use_cache).logits)
        <= SAME_ARITHMETIC
    )
    calls.clear()
    # As `generate` calls it: with the position ids of the row.
    inputs = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids}
    assert rows.error(model, model(rows.ids, **inputs, use_cache=use_cache).logits) <= SAME_ARITHMETIC
    assert len(calls) == model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 12, 500])
@pytest.mark.parametrize("sizes", [[10], [20, 1, 1, 7], [7, 13]], ids=str)
@pytest.mark.parametrize("kind", PADDED)
def test_segments_of_padded_rows(calls, kind, sizes, size):
    model, rows = make_model(size), Rows(*PADDED[kind])
    for positions in (None, rows.position_ids):
        logits, _ = read(model, rows.ids, sizes, None, rows.attention_mask, positions)
        assert rows.error(model, logits) <= SAME_ARITHMETIC
    assert calls


@torch.no_grad()
def test_row_of_padding_alone(calls):
    model, rows = make_model(), Rows("x" * 20, "." * 20, "..." + "x" * 17)
    assert rows.error(model, model(rows.ids, attention_mask=rows.attention_mask).logits) <= SAME_ARITHMETIC
    assert calls


@torch.no_grad()
@pytest.mark.parametrize(
    "rows",
    [("x" * 30 + "|" + "x" * 40,), ("xxx|xx", "x|xxxx"), ("..xxx|xx", "x|xxxxx."), ("x|" * 20,)],
    ids=["one row", "two rows", "padded", "short"],
)
def test_packed_rows_take_the_blocks(calls, rows):
    # Where documents start is known on the device only.
    model, rows = make_model(), Rows(*rows)
    calls.clear()
    logits = model(rows.ids, **rows.inputs(), use_cache=False).logits
    assert not calls
    assert rows.error(model, logits) <= SAME_ARITHMETIC


@torch.no_grad()
def test_packed_segments(calls):
    model, rows = make_model(), Rows("x" * 20 + "|" + "x" * 9 + "|" + "x" * 29)
    # The first document ends at a segment, the second one inside.
    logits, _ = read(model, rows.ids, [20, 25, 15], position_ids=rows.position_ids)
    assert calls
    assert rows.error(model, logits) <= SAME_ARITHMETIC


@torch.no_grad()
@WINDOWS
def test_packed_rows_with_the_bounds_of_the_collator(calls, size):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    documents = [random_ids(n) for n in (40, 1, 30, 64)]
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    batch.pop("labels")
    model = make_model(size)
    logits = model(**batch, use_cache=False).logits
    assert len(calls) == model.config.num_hidden_layers and calls[0][0] == [0, 40, 41, 71, 135]
    expected = torch.cat([model(document[None], use_cache=False).logits for document in documents], dim=1)
    assert relative_error(logits, expected) <= SAME_ARITHMETIC


@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_gradients(calls, monkeypatch, kind):
    model, ids = make_model().train(), random_ids(2, 90)
    inputs, labels = {}, ids.clone()
    if kind == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :20] = 0
        labels[0, :21] = -100

    def gradients():
        model.zero_grad()
        model(ids, labels=labels, **inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = blocked(monkeypatch, gradients)
    assert not calls
    for name, gradient in gradients().items():
        assert relative_error(gradient, expected[name]) <= 1e-4, name
    assert calls


def test_conditions(monkeypatch):
    # Those that need no CUDA device; the device and its kernels are taken for granted.
    class CudaQuery:
        device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (1, 4, 8, 64)

    def takes(query=CudaQuery, implementation="sdpa", **kwargs):
        model.config._attn_implementation = implementation
        layout = build_layout(1, query.shape[2], torch.device("cpu"), chunk_size=16)
        module = model.model.layers[0].self_attn
        return window._takes_varlen(window.Call(None, module, query, query, query, layout, 12, kwargs))

    monkeypatch.setattr(window, "_varlen_attn", lambda: None)
    monkeypatch.setattr(window, "_has_flash_kernels", lambda *args: True)
    model = make_model()
    assert takes()
    assert not takes(dropout=0.1)
    assert not takes(output_attentions=True)
    assert not takes(implementation="eager")
    assert not takes(torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16))
    shapes = [(1, 4, 8, 60), (1, 4, 8, 264), (1, 4, 1, 64)]
    for field, value in (("dtype", torch.float32), *(("shape", shape) for shape in shapes)):
        assert not takes(type("Query", (CudaQuery,), {field: value}))
    monkeypatch.setattr(window, "_varlen_attn", None)
    assert not takes()


def test_autocast_casts_what_flash_attention_gets(calls, monkeypatch):
    # The norms of queries and keys leave them in fp32.
    dtypes = []
    substitute = window._varlen_attn
    monkeypatch.setattr(
        window, "_varlen_attn", lambda *qkv, **kwargs: dtypes.append(qkv[0].dtype) or substitute(*qkv, **kwargs)
    )
    with torch.autocast("cpu", torch.bfloat16):
        make_model()(random_ids(1, 30))
    assert set(dtypes) == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_share_the_mask(monkeypatch, length, implementation):
    model, made, make_mask = make_model(), [], window._window_mask
    model.set_attn_implementation(implementation)
    monkeypatch.setattr(window, "_window_mask", lambda *args: made.append(1) or make_mask(*args))
    model(random_ids(1, length), use_cache=False)
    assert len(made) == 1


@torch.no_grad()
def test_decoding_of_even_rows_needs_no_mask(monkeypatch):
    model, cache = make_model(), HSACache(tiny_model().config)
    model(random_ids(2, 40), past_key_values=cache)
    monkeypatch.setattr(window, "_window_mask", lambda *args: pytest.fail("made a mask"))
    model(random_ids(2, 1), past_key_values=cache)


def attention_case(kind: str, dtype=torch.float32, heads=(4, 2), dim=64, size=100):
    """Queries, keys and values [B, H, tokens, D] on the GPU, and the layout of the queries."""
    batch, length, past = 3, 700, 0
    mask = torch.ones(batch, length, dtype=torch.int64, device="cuda")
    if kind == "segment":
        past = size - 1
    if kind == "left":
        mask[0, :300] = 0
    if kind == "right":
        mask[1, 200:] = 0
    layout = build_layout(batch, length, mask.device, chunk_size=16, attention_mask=mask)
    if kind == "segment":
        position = torch.arange(past, past + length, device="cuda")[None]
        layout = replace(layout, position_ids=position, position=position, past=past)
    make = lambda n, h: torch.randn(batch, h, n, dim, device="cuda").to(dtype)  # noqa: E731
    return make(length, heads[0]), make(past + length, heads[1]), make(past + length, heads[1]), layout, mask


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (16, 1)], ids=str)
@pytest.mark.parametrize("size", [1, 100, 512, 2000])
@pytest.mark.parametrize("kind", ["plain", "segment", "left", "right"])
def test_gpu_errors(monkeypatch, kind, size, heads, dim):
    """Output and gradients of flash attention, against fp32, lose about what those of the blocks lose."""
    query, key, value, layout, mask = attention_case(kind, torch.bfloat16, heads, dim, size)
    model = tiny_model(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=dim)
    module = model.model.layers[0].self_attn
    real = (mask != 0)[:, :, None, None]
    grad = torch.randn(*mask.shape, heads[0], dim, device="cuda") * real

    def run(implementation, dtype):
        module.config._attn_implementation = implementation
        inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        output, _ = window_attention(
            module.attention_interface, module, *inputs, layout, size, dropout=0.0, scaling=dim**-0.5
        )
        return [output * real, *torch.autograd.grad(output, inputs, grad.to(dtype))]

    exact = run("eager", torch.float32)
    expected = blocked(monkeypatch, lambda: run("sdpa", torch.bfloat16))
    called, varlen_attn = [], window._varlen_attn
    monkeypatch.setattr(window, "_varlen_attn", lambda *a, **k: called.append(1) or varlen_attn(*a, **k))
    for i, (x, y, z) in enumerate(zip(run("sdpa", torch.bfloat16), expected, exact)):
        assert x.isfinite().all()
        # Never below the rounding of the output itself: with a window of one token the blocks are exact but for that.
        assert relative_error(x, z) <= max((3 if i else 2) * relative_error(y, z), 2**-8), i
    assert called


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", PADDED)
def test_gpu_model_with_padded_rows(monkeypatch, kind, use_cache):
    exact, rows = make_model(num_attention_heads=4, head_dim=64), Rows(*PADDED[kind])
    model = make_model(num_attention_heads=4, head_dim=64).to("cuda", torch.bfloat16)
    ids, mask = rows.ids.cuda(), rows.attention_mask.cuda()

    def error():
        sizes = [20, 13] if use_cache else [33]
        return rows.error(exact, read(model, ids, sizes, None, mask)[0].cpu())

    assert error() <= 2 * blocked(monkeypatch, error)


@pytest.mark.gpu
def test_gpu_compiled_without_graph_breaks():
    module = make_model(num_attention_heads=4, head_dim=64).model.layers[0].self_attn
    query, key, value, layout, _ = attention_case("plain", torch.bfloat16)
    query.requires_grad_()

    def attend(query):
        interface, fresh = module.attention_interface, replace(layout, shared={})
        return window_attention(interface, module, query, key, value, fresh, 100, dropout=0.0, scaling=0.1)[0]

    expected = attend(query)
    (expected_grad,) = torch.autograd.grad(expected.float().sum(), query)
    actual = torch.compile(attend, fullgraph=True)(query)
    (actual_grad,) = torch.autograd.grad(actual.float().sum(), query)
    assert relative_error(actual, expected) <= 1e-2
    assert relative_error(actual_grad, expected_grad) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("with_bounds", [False, True])
def test_gpu_waits_for_nothing(with_bounds):
    # Training on whole and on packed rows launches its kernels without waiting for the device.
    query, key, value, layout, _ = attention_case("plain", torch.bfloat16)
    module = make_model(num_attention_heads=4, head_dim=64).model.layers[0].self_attn
    kwargs = {"dropout": 0.0, "scaling": 0.1}
    query, key, value = (x[:1] for x in (query, key, value))
    if with_bounds:
        position_ids = torch.arange(700, device="cuda")[None] % 350
        layout = build_layout(1, 700, query.device, chunk_size=16, position_ids=position_ids)
        kwargs["cu_seq_lens_q"] = torch.tensor([0, 350, 700], dtype=torch.int32, device="cuda")
    interface = module.attention_interface
    window_attention(interface, module, query, key, value, replace(layout, shared={}), 100, **kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        window_attention(interface, module, query, key, value, replace(layout, shared={}), 100, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""
`attn_implementation="flash_attention_3"` (2 and 4 are called alike) without its kernels: Transformers' own integration
runs over plain PyTorch functions that do what flash-attn's documentation says, so that what is checked is how the
window attention calls it: masks of padding, packed documents, the window, queries that continue a cache.
"""

import sys
import types

import pytest
import torch
from transformers import modeling_flash_attention_utils
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from modeling_hsa import HSACache, HSAForCausalLM
from tests.helpers import attend, attend_sequences, relative_error
from tests.models import tiny_model


LENGTH = 90
TOLERANCE = 1e-5


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    """q [B, n, Hq, D], k, v [B, m, Hkv, D]."""
    return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend_sequences(q, k, v, *lengths, softmax_scale, causal, window_size)


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch):
    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = lambda *args, **kwargs: pytest.fail("the paged cache is not used")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    lazy_import_flash_attention("flash_attention_3")


def with_flash(model: HSAForCausalLM) -> HSAForCausalLM:
    # Not `set_attn_implementation`, which looks for the package.
    model.config._attn_implementation = "flash_attention_3"
    return model


def make_models(**overrides) -> tuple[HSAForCausalLM, HSAForCausalLM]:
    """The same model with flash attention and with sdpa. It retrieves all chunks: rounding cannot change which."""
    overrides = {"chunk_topk": 50, **overrides}
    return with_flash(tiny_model(**overrides)), tiny_model(**overrides)


def tokens(batch: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(0))


def padding(kind: str, batch: int, length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    if kind == "left":
        mask[0, :31] = 0
        mask[-1, :5] = 0
    elif kind == "right":
        mask[0, -29:] = 0
    elif kind == "both":
        mask[0, :7], mask[0, -20:] = 0, 0
        mask[-1, -1] = 0
    elif kind == "holes":
        mask[0, 10:25], mask[-1, 40:41] = 0, 0
    elif kind == "nearly all":
        mask[0, :-1], mask[-1, 1:] = 0, 0
    return mask


PADDINGS = ("left", "right", "both", "holes", "nearly all")
WINDOWS = pytest.mark.parametrize("window", [1, 12, 64, 500])


def assert_same(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is not None:
        actual, expected = actual[mask != 0], expected[mask != 0]
    assert actual.isfinite().all()
    assert relative_error(actual, expected) <= TOLERANCE


@torch.no_grad()
@WINDOWS
@pytest.mark.parametrize("length", [1, 16, 90, 200])
def test_plain_rows(length, window):
    flash, sdpa = make_models(sliding_window=window)
    x = tokens(2, length)
    assert_same(flash(x, use_cache=False).logits, sdpa(x, use_cache=False).logits)


@torch.no_grad()
@WINDOWS
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", PADDINGS)
def test_padded_rows(kind, use_cache, window):
    flash, sdpa = make_models(sliding_window=window)
    x, mask = tokens(3), padding(kind, 3)
    arguments = {"attention_mask": mask, "use_cache": use_cache}
    assert_same(flash(x, **arguments).logits, sdpa(x, **arguments).logits, mask)


@torch.no_grad()
def test_row_of_padding_alone():
    flash, sdpa = make_models()
    mask = padding("left", 3)
    mask[1] = 0
    assert_same(flash(tokens(3), attention_mask=mask).logits, sdpa(tokens(3), attention_mask=mask).logits, mask)


def packed(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@torch.no_grad()
@WINDOWS
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "position_ids",
    [
        packed(40, 1, 33, 16),
        packed(1, 1, 1, 87),
        torch.cat([packed(40, 50), packed(17, 73)]),
        torch.cat([packed(90), packed(1, 30, 59)]),
        packed(90) + 1000,
        torch.cat([packed(30) + 7, packed(60) + 3], dim=1),
    ],
    ids=["one row", "documents of one token", "two rows", "one of two rows", "shifted", "packed and shifted"],
)
def test_packed_rows(position_ids, use_cache, window):
    flash, sdpa = make_models(sliding_window=window)
    x = tokens(position_ids.shape[0])
    arguments = {"position_ids": position_ids, "use_cache": use_cache}
    assert_same(flash(x, **arguments).logits, sdpa(x, **arguments).logits)


def read(model, x, sizes, mask=None, position_ids=None) -> torch.Tensor:
    cache, logits, start = HSACache(model.config), [], 0
    for size in sizes:
        span = slice(start, start + size)
        logits.append(
            model(
                x[:, span],
                attention_mask=None if mask is None else mask[:, : start + size],
                position_ids=None if position_ids is None else position_ids[:, span],
                past_key_values=cache,
            ).logits
        )
        start += size
    assert start == x.shape[1]
    return torch.cat(logits, dim=1)


SPLITS = pytest.mark.parametrize(
    "sizes", [[76] + [1] * 14, [7, 1, 30, 52], [30, 30, 30]], ids=["prefill and decode", "uneven", "even"]
)


@torch.no_grad()
@WINDOWS
@SPLITS
def test_segments_and_decoding(sizes, window):
    flash, sdpa = make_models(sliding_window=window)
    x = tokens(2)
    assert_same(read(flash, x, sizes), sdpa(x).logits)


@torch.no_grad()
def test_decoding_from_the_first_token():
    flash, sdpa = make_models()
    x, mask = tokens(2), padding("left", 2)
    assert_same(read(flash, x, [1] * LENGTH, mask), sdpa(x, attention_mask=mask).logits, mask)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 12, 500])
@pytest.mark.parametrize("kind", PADDINGS)
@SPLITS
def test_segments_and_decoding_of_padded_rows(sizes, kind, window):
    flash, sdpa = make_models(sliding_window=window)
    x, mask = tokens(3), padding(kind, 3)
    assert_same(read(flash, x, sizes, mask), sdpa(x, attention_mask=mask).logits, mask)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[40, 50], [40, 25, 25], [40, 30, *[1] * 20], [20, 20, 50]], ids=len)
def test_documents_that_start_with_a_segment(sizes):
    flash, sdpa = make_models()
    x, position_ids = tokens(1), packed(40, 50)
    expected = sdpa(x, position_ids=position_ids).logits
    assert_same(read(flash, x, sizes, position_ids=position_ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(40, 50), (30, 1, 59)], ids=["documents", "a document of one token"])
def test_documents_inside_a_segment_are_refused(lengths):
    # Flash attention cannot be told of documents in a row that continues a cache: refused, never silently wrong.
    flash, _ = make_models()
    with pytest.raises(ValueError, match="Packed documents with padding or a cache.*'sdpa'"):
        read(flash, tokens(1), [30, 60], position_ids=packed(*lengths))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(50, 40), (31, 1, 58)], ids=["documents", "a document of one token"])
def test_documents_in_a_padded_row_are_refused(lengths):
    flash, _ = make_models()
    mask = torch.ones(1, LENGTH)
    mask[0, :30] = 0
    with pytest.raises(ValueError, match="Packed documents with padding or a cache.*'sdpa'"):
        flash(tokens(1), attention_mask=mask, position_ids=packed(*lengths))


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{"num_encoder_layers": 2}, {"hsa_local_attention": False}, {"head_dim": 10}], ids=str
)
def test_architectures(fields):
    flash, sdpa = make_models(**fields)
    x, mask = tokens(2), padding("left", 2)
    assert_same(flash(x, attention_mask=mask).logits, sdpa(x, attention_mask=mask).logits, mask)


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
def test_gradients(kind, length):
    # Also for inputs too short to have a chunk.
    x = tokens(2, length)
    labels, arguments = x.clone(), {}
    if kind == "left":
        arguments["attention_mask"] = torch.ones_like(x)
        arguments["attention_mask"][0, :3] = 0
        labels[0, :4] = -100  # of what padding would have to predict too
    elif kind == "packed":
        arguments["position_ids"] = packed(length - 3, 3).expand(2, -1)
    gradients = []
    for model in make_models():
        model.train()
        model(x, labels=labels, **arguments).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    flash, sdpa = gradients
    for name, expected in sdpa.items():
        assert (flash[name] is None) == (expected is None), name
        if expected is not None and expected.any():
            assert relative_error(flash[name], expected) <= 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("prefill_chunk_size", [16, 4096])
def test_generation_of_a_left_padded_batch(prefill_chunk_size):
    flash, sdpa = make_models(pad_token_id=0)
    x, mask = tokens(2, 50), padding("left", 2, 50)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = sdpa.generate(x, **arguments)
    assert torch.equal(flash.generate(x, **arguments, prefill_chunk_size=prefill_chunk_size), expected)

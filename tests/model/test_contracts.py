"""
The contracts of the whole model: 1 causality, 2 one answer however it is read, 3 padding, 4 packing, 5 any length and
7 memory.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from modeling_hsa import HSACache
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, Allocations, relative_error
from tests.models import VARIANTS, make_variant, tiny_model
from tests.rows import LENGTHS, Rows, random_ids, read


@pytest.fixture(scope="module")
def variants():
    return {name: make_variant(name) for name in VARIANTS}


def pack(*lengths: int) -> str:
    return "".join("|" + "x" * (length - 1) for length in lengths)


# Layouts of 129 columns, as `Rows` takes them.
PADDINGS = {
    "left": ("." * 29 + "x" * 100, "." + "x" * 128),
    "right": ("x" * 100 + "." * 29, "x" * 128 + "."),
    "both": ("." * 16 + "x" * 97 + "." * 16, "x" * 128 + "."),
    "holes": ("x" * 10 + "." * 5 + "x" * 50 + "." * 16 + "x" * 48, ".x" * 64 + "x"),
    "short rows": ("." * 128 + "x", "x" * 15 + "." * 114),
    "an empty row": ("." * 129, "x" * 129),
}
PACKINGS = {
    "long and short": pack(70, 1, 1, 57),
    "whole chunks": pack(16, 32, 16, 65),
    "one token each": pack(*[1] * 20, 109),
    "shorter than a chunk": pack(15, 15, 15, 15, 15, 15, 39),
    "one document": pack(129),
}
ALL_LAYOUTS = {"plain": ("x" * 129,)} | PADDINGS | {name: (row,) for name, row in PACKINGS.items()}

# Sizes of the segments, None for no cache.
WAYS_TO_READ = {"no cache": None, "cache": [129], "segments": [60, *[1] * 8, 17, 64]}


# -- 1: causality -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_changing_a_token_changes_no_logit_before_it(variant_model, use_cache):
    ids = random_ids(1, 129)
    before = variant_model(ids, use_cache=use_cache).logits
    for j in (0, 1, 15, 16, 47, 64, 127, 128):
        changed = ids.clone()
        changed[:, j] = (ids[:, j] + 1) % 99
        after = variant_model(changed, use_cache=use_cache).logits
        assert relative_error(after[:, :j], before[:, :j]) <= SAME_ARITHMETIC
        assert relative_error(after[:, j], before[:, j]) > 0.01


def test_no_gradient_reaches_a_later_token(variant_model):
    embeds = variant_model.get_input_embeddings()(random_ids(1, 100)).detach().requires_grad_()
    logits = variant_model(inputs_embeds=embeds).logits
    for t in (0, 15, 16, 63, 64, 98):
        (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), embeds, retain_graph=True)
        reached = gradient.norm(dim=-1)[0]
        assert reached[t] > 0
        assert (reached[t + 1 :] == 0).all()


@torch.no_grad()
def test_a_token_retrieves_as_many_chunks_as_lie_strictly_in_its_past(variant_model):
    config = variant_model.config
    retrieval = variant_model(random_ids(2, 129), output_retrieval=True).retrieval
    position = torch.arange(129)
    visible = (position - position % config.retrieval_stride) // config.chunk_size
    for indices, weights, _ in retrieval:
        found = (indices >= 0).sum(-1)
        if weights is not None:  # `joint` has none
            assert ((weights > 0) == (indices >= 0)).all()
        assert (found == visible.clamp(max=config.chunk_topk)[None, :, None]).all()
        assert (indices < visible.clamp(min=1)[None, :, None, None]).all()


# -- 2: one answer ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 7, 16, 64, 100])
def test_reading_in_segments_equals_one_pass(variant_model, size):
    ids = random_ids(2, 129)
    whole = variant_model(ids, use_cache=False).logits
    segments, cache = read(variant_model, ids, [size])
    assert relative_error(segments, whole) <= OTHER_ORDER
    assert cache.get_seq_length() == 129


@torch.no_grad()
@settings(max_examples=60)
@given(
    name=st.sampled_from(list(VARIANTS)),
    sizes=st.lists(st.sampled_from([1, 2, 15, 16, 17, 33, 64, 65, 100]) | st.integers(1, 90), min_size=1, max_size=8),
    ask_for_positions=st.booleans(),
)
def test_any_split_equals_one_pass(variants, name, sizes, ask_for_positions):
    model, ids = variants[name], random_ids(1, sum(sizes))
    position_ids = torch.arange(sum(sizes))[None] if ask_for_positions else None
    segments, _ = read(model, ids, sizes, position_ids=position_ids)
    assert relative_error(segments, model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("sliding_window", [5, 33, 64, 512])
@pytest.mark.parametrize("sizes", [[1, 100], [5, 1, 90, 3], [100, 1, 1, 1, 200], [2, 300]])
def test_segments_of_very_different_sizes_equal_one_pass(sliding_window, sizes):
    model, ids = tiny_model(sliding_window=sliding_window), random_ids(1, sum(sizes))
    segments, _ = read(model, ids, sizes)
    assert relative_error(segments, model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("period", [1, 4, 16])
def test_repeated_text_reads_the_same_in_segments(variant_model, period):
    """The scores of equal chunks differ by rounding only: which of them are retrieved must make no difference."""
    ids = random_ids(1, period).repeat(1, 129 // period)
    segments, _ = read(variant_model, ids, [50, 1, 1, 1, 23])
    assert relative_error(segments, variant_model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
def test_a_cache_changes_nothing_in_half_precision():
    """With all chunks retrieved, so that rounding cannot select others: not further from fp32 than one pass is."""
    model, ids = tiny_model(chunk_topk=20), random_ids(2, 129)
    exact = model(ids, use_cache=False).logits
    half = tiny_model(chunk_topk=20).to(torch.bfloat16)
    one_pass = relative_error(half(ids, use_cache=False).logits, exact)
    for size in (1, 30):
        assert relative_error(read(half, ids, [size])[0], exact) <= 2 * one_pass


@torch.no_grad()
@pytest.mark.parametrize("layout", ["plain", "left", "holes", "long and short"])
def test_what_is_retrieved_does_not_depend_on_the_segments(variant_model, layout):
    rows = Rows(*ALL_LAYOUTS[layout])
    real, whole, segments = rows.attention_mask.bool(), [], []
    for sizes, retrieved in (([129], whole), ([60, 1, 1, 67], segments)):
        cache, start = HSACache(variant_model.config), 0
        for end in torch.tensor(sizes).cumsum(0).tolist():
            inputs = rows.inputs()
            if "attention_mask" in inputs:
                inputs["attention_mask"] = rows.attention_mask[:, :end]
            if "position_ids" in inputs:
                inputs["position_ids"] = rows.position_ids[:, start:end]
            ids = rows.ids[:, start:end]
            retrieved.append(variant_model(ids, past_key_values=cache, output_retrieval=True, **inputs).retrieval)
            start = end
    for layer in range(len(whole[0])):
        indices = torch.cat([call[layer].indices for call in segments], dim=1)
        assert torch.equal(indices[real], whole[0][layer].indices[real])


# -- 3: padding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sizes", WAYS_TO_READ.values(), ids=WAYS_TO_READ)
@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_rows_equal_the_rows_alone(variant_model, padding, sizes):
    rows = Rows(*PADDINGS[padding])
    if sizes is None:
        logits = variant_model(rows.ids, attention_mask=rows.attention_mask, use_cache=False).logits
    else:
        logits, _ = read(variant_model, rows.ids, sizes, attention_mask=rows.attention_mask)
    assert rows.error(variant_model, logits) <= OTHER_ORDER
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_of_any_length_equals_the_row_alone(model, side, length):
    row = "x" * length
    rows = Rows(row.rjust(140, ".") if side == "left" else row.ljust(140, "."), "x" * 140)
    logits = model(rows.ids, attention_mask=rows.attention_mask).logits
    assert rows.error(model, logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_decoding_any_layout_token_by_token_equals_the_documents_alone(model, layout):
    rows = Rows(*ALL_LAYOUTS[layout])
    logits, _ = read(model, rows.ids, [1], **rows.inputs())
    assert rows.error(model, logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype_mean_the_same(model, dtype):
    rows = Rows(*PADDINGS["both"])
    expected = model(rows.ids, attention_mask=rows.attention_mask).logits
    assert torch.equal(model(rows.ids, attention_mask=rows.attention_mask.to(dtype)).logits, expected)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padding", ["left", "right", "both", "holes"])
def test_no_gradient_flows_between_padding_and_tokens(variant_model, padding, use_cache):
    rows = Rows(*PADDINGS[padding])
    real = rows.attention_mask.bool()
    embeds = variant_model.get_input_embeddings()(rows.ids).detach().requires_grad_()
    logits = variant_model(inputs_embeds=embeds, attention_mask=rows.attention_mask, use_cache=use_cache).logits
    (gradient,) = torch.autograd.grad(logits[real].square().sum(), embeds)
    reached = gradient.norm(dim=-1)
    assert (reached[real] > 0).all()
    assert (reached[~real] == 0).all()


# -- 4: packing -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sizes", WAYS_TO_READ.values(), ids=WAYS_TO_READ)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_documents_equal_the_documents_alone(variant_model, packing, sizes):
    rows = Rows(PACKINGS[packing])
    if sizes is None:
        logits = variant_model(rows.ids, position_ids=rows.position_ids, use_cache=False).logits
    else:
        logits, _ = read(variant_model, rows.ids, sizes, position_ids=rows.position_ids)
    assert rows.error(variant_model, logits) <= OTHER_ORDER


@torch.no_grad()
def test_rows_packed_differently_equal_the_documents_alone(variant_model):
    rows = Rows(*PACKINGS.values())
    logits = variant_model(rows.ids, position_ids=rows.position_ids, use_cache=False).logits
    assert rows.error(variant_model, logits) <= OTHER_ORDER


@torch.no_grad()
def test_position_ids_of_one_row_hold_for_all(model):
    rows = Rows(PACKINGS["long and short"], PACKINGS["long and short"])
    assert rows.error(model, model(rows.ids, position_ids=rows.position_ids[:1]).logits) <= OTHER_ORDER


@pytest.mark.parametrize("use_cache", [False, True])
def test_no_gradient_flows_between_documents(variant_model, use_cache):
    rows = Rows(pack(40, 3, 50, 36))
    embeds = variant_model.get_input_embeddings()(rows.ids).detach().requires_grad_()
    logits = variant_model(inputs_embeds=embeds, position_ids=rows.position_ids, use_cache=use_cache).logits
    for _, columns in rows.documents:
        (gradient,) = torch.autograd.grad(logits[:, columns].square().sum(), embeds, retain_graph=True)
        inside = torch.zeros(129, dtype=torch.bool)
        inside[columns] = True
        reached = gradient.norm(dim=-1)[0]
        assert (reached[inside] > 0).all()
        assert (reached[~inside] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("return_flash_attn_kwargs", [False, True])
def test_what_the_flattening_collator_packs_equals_the_documents_alone(variant_model, return_flash_attn_kwargs):
    documents = [random_ids(length).tolist() for length in (30, 1, 64, 17)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=return_flash_attn_kwargs)
    batch = collator([{"input_ids": document} for document in documents])
    assert batch["input_ids"].shape == (1, 112)
    packed = variant_model(**batch, use_cache=False)
    alone = [variant_model(torch.tensor([x]), labels=torch.tensor([x]), use_cache=False) for x in documents]
    assert relative_error(packed.logits, torch.cat([x.logits for x in alone], dim=1)) <= OTHER_ORDER
    # A document of n tokens has n - 1 labels.
    loss = sum(x.loss * (len(document) - 1) for x, document in zip(alone, documents) if len(document) > 1)
    torch.testing.assert_close(packed.loss, loss / (112 - len(documents)), rtol=1e-4, atol=0)


# -- 3 and 4 at once --------------------------------------------------------------------------------------------------


@st.composite
def batches(draw) -> list[str]:
    """Up to three rows of documents and of padding anywhere, as `Rows` takes them."""
    runs = st.lists(st.tuples(st.sampled_from("xx.|"), st.integers(1, 40)), min_size=1, max_size=6)
    is_padded, is_packed = draw(st.booleans()), draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = "".join("|" + "x" * (n - 1) if kind == "|" else kind * n for kind, n in draw(runs))
        row = row if is_padded else row.replace(".", "x")
        rows.append(row if is_packed else row.replace("|", "x"))
    length = max(map(len, rows))
    filler = "." if is_padded else "x"
    return [row.ljust(length, filler) if draw(st.booleans()) else row.rjust(length, filler) for row in rows]


@torch.no_grad()
@settings(max_examples=80)
@given(name=st.sampled_from(list(VARIANTS)), strings=batches())
def test_any_layout_equals_the_documents_alone(variants, name, strings):
    rows = Rows(*strings)
    assert rows.error(variants[name], variants[name](rows.ids, **rows.inputs(), use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@settings(max_examples=80)
@given(
    name=st.sampled_from(list(VARIANTS)),
    strings=batches(),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    offloading=st.booleans(),
)
def test_any_layout_in_segments_equals_the_documents_alone(variants, name, strings, sizes, offloading):
    model, rows = variants[name], Rows(*strings)
    logits, cache = read(model, rows.ids, sizes, HSACache(model.config, offloading=offloading), **rows.inputs())
    assert rows.error(model, logits) <= OTHER_ORDER
    assert cache.get_seq_length() == rows.ids.shape[1]


@torch.no_grad()
def test_positions_need_not_start_at_zero(variant_model):
    """RoPE only sees differences of positions, and the first token of a row starts a document wherever it stands."""
    ids = random_ids(1, 100)
    expected = variant_model(ids, use_cache=False).logits
    position_ids = torch.arange(1001, 1101)[None]
    one_pass = variant_model(ids, position_ids=position_ids, use_cache=False).logits
    assert relative_error(one_pass, expected) <= OTHER_ORDER
    segments, _ = read(variant_model, ids, [30], position_ids=position_ids)
    assert relative_error(segments, expected) <= OTHER_ORDER


@torch.no_grad()
def test_positions_left_out_count_on_from_those_of_the_cache(model):
    ids = random_ids(1, 100)
    _, cache = read(model, ids[:, :60], [30], position_ids=torch.arange(1000, 1060)[None])
    rest = model(ids[:, 60:], past_key_values=cache).logits
    assert relative_error(rest, model(ids, use_cache=False).logits[:, 60:]) <= OTHER_ORDER


# -- 5: any length ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_any_length_works(variant_model, use_cache):
    ids = random_ids(2, max(LENGTHS))
    longest = variant_model(ids, use_cache=False).logits
    for length in LENGTHS:
        logits = variant_model(ids[:, :length], use_cache=use_cache).logits
        assert logits.shape == (2, length, 99)
        assert relative_error(logits, longest[:, :length]) <= OTHER_ORDER


@torch.no_grad()
def test_a_token_without_a_chunk_in_its_past_gets_nothing_from_retrieval():
    model, ids = tiny_model(), random_ids(1, 129)
    before = model(ids).logits
    for layer, is_hsa in zip(model.model.layers, model.config.hsa_layers):
        if is_hsa:
            layer.o_proj.weight.mul_(2)
    after = model(ids).logits
    assert torch.equal(after[:, :16], before[:, :16])
    assert relative_error(after[:, 16], before[:, 16]) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", ["softmax", "stick_breaking", "joint"])
def test_no_length_gives_nan(weighting, dtype):
    model = tiny_model(chunk_weighting=weighting).to(dtype)
    ids = random_ids(1, 130)
    for length in range(1, 131):
        assert model(ids[:, :length]).logits.isfinite().all(), length


@pytest.mark.parametrize("length", [1, 16, 17, 65])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient_at_any_length(name, length):
    """Also where there is no chunk yet: data-parallel training waits for the gradient of every parameter."""
    assert_finite_gradients(make_variant(name), length)


@pytest.mark.parametrize("length", [1, 17, 65])
@pytest.mark.parametrize("weighting", ["softmax", "stick_breaking", "joint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_length_gives_nan_gradients_in_half_precision(dtype, weighting, length):
    assert_finite_gradients(tiny_model(chunk_weighting=weighting).to(dtype), length)


def assert_finite_gradients(model, length: int) -> None:
    model.train()
    model(random_ids(2, length)).logits.float().logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# -- 7: memory --------------------------------------------------------------------------------------------------------


# One layer of each kind, and so much of keys and values per token that a copy of the chunk memory would show.
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_lower_layers": 1,
    "num_upper_layers": 0,
    "num_upper_groups": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hsa_num_key_value_heads": 2,
    "head_dim": 32,
    "retrieval_dim": 8,
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("weighting", ["softmax", "joint"])
def test_one_pass_makes_no_tensor_of_tokens_by_chunks(weighting):
    model = tiny_model(chunk_weighting=weighting, **SMALL)
    largest = {}
    for length in (16384, 32768):
        with Allocations() as made:
            model(random_ids(1, length), use_cache=False, logits_to_keep=1)
        largest[length] = max(made.elements())
    assert largest[32768] <= 2.1 * largest[16384]
    assert largest[32768] < 32768 * (32768 // 16) / 8


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5])
def test_memory_of_segmented_prefill_does_not_grow(padding):
    model = tiny_model(**SMALL)
    ids = random_ids(1, 32768)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    largest = []
    for length in (16384, 32768):
        cache = HSACache(model.config)
        cache.reserve(length + 4096)  # as `generate` does
        with Allocations() as made:
            for end in range(4096, length + 1, 4096):
                inputs = {"input_ids": ids[:, end - 4096 : end], "attention_mask": mask[:, :end]}
                model(**inputs, past_key_values=cache, logits_to_keep=1)
        largest.append(max(made.elements(but=cache.memory.buffers)))
    assert largest[1] <= 1.05 * largest[0]

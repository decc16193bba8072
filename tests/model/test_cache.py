"""`HSACache`: whatever is done to it, the next tokens get the logits they get without a cache."""

import copy
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from modeling_hsa import HSACache, HSAStaticCache
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, Allocations, relative_error
from tests.models import VARIANTS, make_variant, tiny_config, tiny_model
from tests.rows import Rows, random_ids, read


WINDOW = tiny_config().sliding_window  # 12 tokens; chunks have 16

# Rows of 160 columns: plain, padded in every way, and packed.
LAYOUTS = {
    "plain": ("x" * 160, "x" * 160),
    "left": ("." * 37 + "x" * 123, "." + "x" * 159),
    "holes": ("x" * 60 + "." * 30 + "x" * 70, "." * 16 + "x.." * 48),
    "late padding": ("x" * 110 + "." * 10 + "x" * 40, "x" * 112 + "." * 20 + "x" * 28),
    "packed": ("|" + "x" * 69 + "|" + "x" * 20 + "||" + "x" * 67, "|" + "x" * 95 + "|" + "x" * 63),
    "packed and padded": ("..|" + "x" * 60 + "..." + "|" + "x" * 20 + "." * 13 + "x" * 60, "|" + "x" * 150 + "." * 9),
}
# Switches that change what the cache has to keep.
CACHED = ("default", "no_local_attention", "stride_3", "stride_20", "window_of_one", "window_beyond_the_input")


CACHES = {
    "device": HSACache,
    "host": lambda config: HSACache(config, memory="host"),
    "disk": lambda config: HSACache(config, memory="disk", folder=tempfile.gettempdir()),
    "static": lambda config: HSAStaticCache(config, 120),
}


@pytest.fixture(scope="module")
def variants():
    return {name: make_variant(name) for name in VARIANTS}


@pytest.fixture(params=LAYOUTS)
def rows(request) -> Rows:
    return Rows(*LAYOUTS[request.param])


def read_columns(model, rows: Rows, cache, start: int, end: int, sizes=(1000,)) -> torch.Tensor:
    """Reads the columns from `start` to `end` into a cache that holds those before; returns their logits."""
    inputs = rows.inputs()
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, start:end]
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"][:, :end]
    return read(model, rows.ids[:, start:end], sizes, cache, **inputs)[0]


# -- crop -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("sizes", [[120], [30, 1, 1, 1, 60, 9]], ids=["one piece", "segments"])
def test_crop_is_exact_as_far_back_as_the_window_reaches(variants, name, rows, sizes):
    model = variants[name]
    cache = HSACache(model.config)
    read_columns(model, rows, cache, 0, 120, sizes)
    for tokens in (0, 1, min(5, model.config.sliding_window), min(WINDOW, model.config.sliding_window)):
        cropped = copy.deepcopy(cache)
        cropped.crop(-tokens)
        assert cropped.get_seq_length() == 120 - tokens
        logits = read_columns(model, rows, cropped, 120 - tokens, 160)
        assert rows.error(model, logits, start=120 - tokens) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("length", [12, 16, 17, 33, 48])
def test_after_a_crop_other_tokens_can_follow(variants, name, length):
    """The forgotten tokens leave nothing behind: neither in the window, nor in chunks they completed, nor queries."""
    model = variants[name]
    ids, others = random_ids(2, length), random_ids(2, 60)
    for tokens in range(0, min(WINDOW, model.config.sliding_window) + 1, 3):
        _, cache = read(model, ids, [7])
        cache.crop(-tokens)
        logits, _ = read(model, others, [5, 55], cache)
        whole = model(torch.cat([ids[:, : length - tokens], others], dim=1), use_cache=False).logits
        assert relative_error(logits, whole[:, length - tokens :]) <= OTHER_ORDER


@torch.no_grad()
def test_a_short_input_can_be_cropped_to_nothing(model, rows):
    cache = HSACache(model.config)
    read_columns(model, rows, cache, 0, 10, [3])
    cache.crop(-10)
    assert cache.get_seq_length() == 0
    assert rows.error(model, read_columns(model, rows, cache, 0, 160)) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
def test_repeated_crops_are_exact_or_refused(variants, name, rows):
    model = variants[name]
    cache = HSACache(model.config)
    read_columns(model, rows, cache, 0, 140, [100, 1, 1, 38])
    end, refused = 140, False
    while end > 0 and not refused:
        try:
            cache.crop(-min(5, end))
            end -= min(5, end)
        except ValueError:
            refused = True
        again = copy.deepcopy(cache)
        assert again.get_seq_length() == end
        assert rows.error(model, read_columns(model, rows, again, end, 160), start=end) <= OTHER_ORDER
    assert refused or model.config.sliding_window > 160


@torch.no_grad()
def test_a_crop_beyond_what_is_kept_is_refused_and_changes_nothing(model, rows):
    cache = HSACache(model.config)
    read_columns(model, rows, cache, 0, 120)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-100)
    assert cache.get_seq_length() == 120
    assert rows.error(model, read_columns(model, rows, cache, 120, 160), start=120) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("sizes", [[150], [60, 1, 1, 50]], ids=["one piece", "segments"])
def test_any_crop_is_exact_while_the_past_is_recorded(variants, name, rows, sizes):
    model = variants[name]
    cache = HSACache(model.config)
    cache.activate_past_recording()
    read_columns(model, rows, cache, 0, 150, sizes)
    for tokens in (1, 13, 70, 149, 150):
        cropped = copy.deepcopy(cache)
        cropped.crop(-tokens)
        logits = read_columns(model, rows, cropped, 150 - tokens, 160)
        assert rows.error(model, logits, start=150 - tokens) <= OTHER_ORDER


@torch.no_grad()
def test_drafting_and_rejecting_for_long_stays_exact_and_small(model, rows):
    """As assisted generation does: a few tokens on, some of them back again."""
    cache = HSACache(model.config)
    cache.activate_past_recording()
    read_columns(model, rows, cache, 0, 20)
    end = 20
    while end < 150:
        logits = read_columns(model, rows, cache, end, end + 10)
        assert rows.error(model, logits, start=end) <= OTHER_ORDER
        cache.crop(-7)
        end += 3
    once = HSACache(model.config)
    read_columns(model, rows, once, 0, end)
    assert stored_elements(cache) <= 2 * stored_elements(once)


@torch.no_grad()
def test_crops_before_and_after_padding_are_exact_or_refused(model):
    """A row that pads while the others go on has less to go back to."""
    rows = Rows("x" * 18 + "...x.." + "x" * 76, "x" * 18 + "." + "x" * 81)
    _, cache = read(model, torch.cat([rows.ids[:, :18], random_ids(2, 7)], dim=1), [25])
    cache.crop(-7)
    read_columns(model, rows, cache, 18, 58, [6, 17, 17])
    for tokens in range(1, 58):
        cropped = copy.deepcopy(cache)
        try:
            cropped.crop(-tokens)
        except ValueError:
            assert tokens > WINDOW
            continue
        logits = read_columns(model, rows, cropped, 58 - tokens, 100)
        assert rows.error(model, logits, start=58 - tokens) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1])
def test_going_back_and_forth_over_the_end_of_a_chunk_stores_nothing_more(model, padding):
    rows = Rows("." * padding + "x" * 50)
    cache = HSACache(model.config)
    read_columns(model, rows, cache, 0, 50)
    stored = []
    for _ in range(40):
        cache.crop(-5)
        read_columns(model, rows, cache, 45, 50)
        stored.append(stored_elements(cache))
    assert max(stored) <= 1.1 * stored[0]


@pytest.mark.parametrize(
    "tokens, message", [(1, "must be 0 or negative"), (-31, "Cannot forget 31 tokens: the cache holds 30")]
)
def test_a_crop_that_makes_no_sense_is_refused(model, tokens, message):
    _, cache = read(model, random_ids(1, 30), [30])
    with pytest.raises(ValueError, match=message):
        cache.crop(tokens)


@torch.no_grad()
@settings(max_examples=60)
@given(
    name=st.sampled_from(CACHED),
    layout=st.sampled_from(list(LAYOUTS)),
    recording=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(["read", "crop"]), st.integers(0, 40)), max_size=10),
)
def test_any_series_of_reads_and_crops_is_exact_or_refused(variants, name, layout, recording, steps):
    model, rows = variants[name], Rows(*LAYOUTS[layout])
    cache, end = HSACache(model.config), 0
    if recording:
        cache.activate_past_recording()
    for step, tokens in steps:
        if step == "read" and 0 < tokens <= 150 - end:
            logits = read_columns(model, rows, cache, end, end + tokens)
            assert rows.error(model, logits, start=end) <= OTHER_ORDER
            end += tokens
        elif step == "crop":
            try:
                cache.crop(-min(tokens, end))
                end -= min(tokens, end)
            except ValueError as error:
                assert "Cannot forget" in str(error)  # noqa: PT017
    assert cache.get_seq_length() == end
    assert rows.error(model, read_columns(model, rows, cache, end, 160), start=end) <= OTHER_ORDER


# -- rows -------------------------------------------------------------------------------------------------------------

ROW_CHANGES = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "reorder_cache twice the same": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "reorder_cache to the same order": (lambda cache: cache.reorder_cache(torch.tensor([0, 1])), [0, 1]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "batch_select_indices by mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
}


@torch.no_grad()
@pytest.mark.parametrize("change", ROW_CHANGES)
@pytest.mark.parametrize("name, offloading", [("default", False), ("default", True), ("stride_3", False)])
def test_rows_of_the_cache_follow(variants, name, rows, change, offloading):
    model = variants[name]
    cache = HSACache(model.config, offloading=offloading)
    read_columns(model, rows, cache, 0, 120, [70, 3])
    apply, order = ROW_CHANGES[change]
    apply(cache)
    assert cache.batch_size == len(order)
    rows = rows.select(order)
    logits = read_columns(model, rows, cache, 120, 160, [1, 39])
    assert rows.error(model, logits, start=120) <= OTHER_ORDER


@torch.no_grad()
def test_an_empty_cache_can_be_reordered(model):
    cache = HSACache(model.config)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.crop(0)
    assert cache.get_seq_length() == 0


# -- reset and copies -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "stride_3"])
def test_a_reset_cache_is_as_good_as_new(variants, name, rows):
    model = variants[name]
    cache = HSACache(model.config)
    read_columns(model, rows, cache, 0, 100, [60, 1])
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = random_ids(3, 90)  # also of another batch size
    logits, _ = read(model, ids, [40, 1], cache)
    assert relative_error(logits, model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("duplicated", [copy.deepcopy, HSACache.fork], ids=["deepcopy", "fork"])
@pytest.mark.parametrize("name, offloading", [("default", False), ("default", True), ("stride_3", False)])
def test_a_copy_and_its_original_go_separate_ways(variants, name, rows, offloading, duplicated):
    model = variants[name]
    cache = HSACache(model.config, offloading=offloading)
    read_columns(model, rows, cache, 0, 100, [60, 1])
    duplicate = duplicated(cache)
    read(model, random_ids(2, 50), [1, 49], duplicate, attention_mask=torch.ones(2, 150))
    assert (cache.get_seq_length(), duplicate.get_seq_length()) == (100, 150)
    assert rows.error(model, read_columns(model, rows, cache, 100, 160, [1, 59]), start=100) <= OTHER_ORDER


# -- gradients and inference mode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("end", [121, 160], ids=["decoding", "segment"])
@pytest.mark.parametrize("name", ["default", "stride_3"])
def test_a_cache_made_in_inference_mode_can_be_continued_anywhere(variants, name, rows, end, after):
    model = variants[name]
    cache = HSACache(model.config)
    with torch.inference_mode():
        read_columns(model, rows, cache, 0, 120, [100, 1])
    with after():
        logits = read_columns(model, rows, cache, 120, end)
        if torch.is_grad_enabled():
            (gradient,) = torch.autograd.grad(logits.square().sum(), model.lm_head.weight)
            assert gradient.norm() > 0
    assert rows.error(model, logits, start=120) <= OTHER_ORDER


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_rows_of_a_cache_made_in_inference_mode_can_be_changed_outside(model, change):
    ids = random_ids(2, 100)
    cache = HSACache(model.config)
    with torch.inference_mode():
        read(model, ids[:, :60], [60], cache)
    apply, order = ROW_CHANGES[change]
    cache.crop(-4)
    apply(cache)
    cache = copy.deepcopy(cache)
    logits = model(ids[order, 56:], past_key_values=cache).logits
    assert relative_error(logits, model(ids[order], use_cache=False).logits[:, 56:]) <= OTHER_ORDER


@pytest.mark.parametrize("layout", ["plain", "packed and padded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_with_a_new_cache_are_those_without(name, layout):
    rows, gradients = Rows(*LAYOUTS[layout]), []
    for use_cache in (False, True):
        model = make_variant(name).train()
        logits = model(rows.ids, **rows.inputs(), use_cache=use_cache).logits
        logits[rows.attention_mask.bool()].logsumexp(-1).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) <= OTHER_ORDER, name


@pytest.mark.parametrize("first", [torch.inference_mode, torch.enable_grad])
def test_segments_train_layers_above_a_frozen_memory(first):
    """What was retrieved needs no gradient here, but the queries of the HSA layers do."""
    model, ids = tiny_model(), random_ids(1, 120)
    trained = [layer for layer, is_hsa in zip(model.model.layers, model.config.hsa_layers) if is_hsa]
    model.requires_grad_(False)
    for layer in trained:
        layer.requires_grad_(True)
    cache, loss = HSACache(model.config), 0.0
    with first():
        model(ids[:, :40], past_key_values=cache)
    for segment in ids[:, 40:].split([1, 40, 39], dim=1):
        loss = loss + model(segment, past_key_values=cache).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(layer.q_proj.weight.grad.norm() > 0 for layer in trained)


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("backward", ["after every segment", "once"])
def test_training_on_segments_stops_gradients_between_them(backward, make_cache):
    """Truncated back-propagation: the cache is an input without gradient, so the segments' gradients add up."""
    ids = random_ids(1, 120)
    sizes = [40, 1, 1, 33, 1, 44]

    def gradient(segments) -> torch.Tensor:
        """Of all parameters, for the loss of these segments."""
        model, losses = tiny_model().train(), []
        cache = make_cache(model.config)
        for i, segment in enumerate(ids.split(sizes, dim=1)):
            with torch.set_grad_enabled(i in segments):
                outputs = model(segment, past_key_values=cache)
            if i in segments:
                losses.append(outputs.logits.logsumexp(-1).sum())
                if backward == "after every segment":
                    losses.pop().backward()
        if losses:
            sum(losses).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return torch.cat([x.flatten() for x in gradients])

    one_by_one = sum(gradient([i]) for i in range(len(sizes)))
    assert relative_error(gradient(range(len(sizes))), one_by_one) <= OTHER_ORDER


# -- offloading -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", ["plain", "packed and padded"])
def test_offloading_changes_nothing(variant_model, layout):
    rows, sizes = Rows(*LAYOUTS[layout]), [1, 99, 1, 1, 58]
    expected, _ = read(variant_model, rows.ids, sizes, **rows.inputs())
    cache = HSACache(variant_model.config, offloading=True)
    offloaded, _ = read(variant_model, rows.ids, sizes, cache, **rows.inputs())
    real = rows.attention_mask.bool()
    assert relative_error(offloaded[real], expected[real]) <= SAME_ARITHMETIC


# -- memory -----------------------------------------------------------------------------------------------------------


def stored_elements(cache: HSACache) -> int:
    """Elements of all tensors the cache holds, in storage that may be larger than what is used of it."""
    storages = {}

    def visit(x):
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        elif isinstance(x, (list, tuple)):
            for item in x:
                visit(item)
        elif isinstance(x, dict):
            visit(list(x.values()))
        elif hasattr(x, "__dict__") and type(x).__module__.startswith("modeling_hsa"):
            visit(vars(x))

    visit(cache)
    return sum(storages.values())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_chunk_memory_grows_geometrically(model, padding, forked, offloading):
    """While decoding adds 10 chunks to 64: a memory that grew by each of them would be copied 10 times."""
    ids = random_ids(1, 64 * 16 + 10 * 16)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    cache = HSACache(model.config, offloading=offloading)
    read(model, ids[:, : 64 * 16], [100], cache, attention_mask=mask[:, : 64 * 16])
    cache = cache.fork() if forked else cache
    keys_of_all_chunks = 63 * 16 * model.config.hsa_num_key_value_heads * model.config.head_dim
    with Allocations() as made:
        read(model, ids[:, 64 * 16 :], [1], cache, attention_mask=mask)
    copies = sum(elements >= keys_of_all_chunks for elements in made.elements())
    assert copies <= 2  # one of keys and one of values


@torch.no_grad()
def test_all_but_the_chunk_memory_has_a_size_of_its_own():
    """A landmark, keys and values per chunk: that is all that grows with the length, by at most half too much."""
    model = tiny_model(retrieval_stride=3)
    ids = random_ids(1, 8192)
    sizes = {}
    for length in (4096, 8192):
        _, cache = read(model, ids[:, :length], [512])
        sizes[length] = stored_elements(cache)
    config = model.config
    per_chunk = config.retrieval_dim + 2 * config.chunk_size * config.hsa_num_key_value_heads * config.head_dim
    assert sizes[8192] - sizes[4096] <= 1.5 * per_chunk * 8192 / config.chunk_size
    assert sizes[8192] <= 1.5 * per_chunk * 8192 / config.chunk_size + 20_000


# -- caches that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"chunk_size": 32},
        {"sliding_window": 11},
        {"retrieval_stride": 3},
        {"num_lower_layers": 0},
        {"num_lower_layers": 2},
        {"num_upper_groups": 1},
        {"num_key_value_heads": 4},
        {"hsa_num_key_value_heads": 2},
        {"num_retrieval_heads": 2},
        {"retrieval_dim": 8},
    ],
    ids=str,
)
def test_a_cache_made_for_another_model_is_refused(model, other):
    cache = HSACache(tiny_config(**other))
    name = next(iter(other))
    if name in ("num_lower_layers", "num_upper_groups"):
        name = "layer_types"  # which the counts are short for
    with pytest.raises(ValueError, match=f"past_key_values.*{name}"):
        model(random_ids(1, 50), past_key_values=cache)


def test_a_cache_made_by_a_model_of_equal_configuration_is_accepted(model):
    cache = HSACache(copy.deepcopy(model.config))
    assert model(random_ids(1, 50), past_key_values=cache).past_key_values is cache


def test_a_cache_of_another_kind_is_refused(model):
    with pytest.raises(TypeError, match="past_key_values.*HSACache.*DynamicCache"):
        model(random_ids(1, 5), past_key_values=DynamicCache())


def test_a_cache_of_another_batch_size_is_refused(model):
    _, cache = read(model, random_ids(2, 20), [20])
    with pytest.raises(ValueError, match="past_key_values.*2 rows.*3"):
        model(random_ids(3, 5), past_key_values=cache)


def test_a_mask_without_the_cached_columns_is_refused(model):
    _, cache = read(model, random_ids(2, 20), [20])
    with pytest.raises(ValueError, match=r"attention_mask.*\[2, 25\]"):
        model(random_ids(2, 5), past_key_values=cache, attention_mask=torch.ones(2, 5))


def test_no_cache_is_returned_where_none_is_wanted(model):
    assert model(random_ids(1, 5), use_cache=False).past_key_values is None
    assert isinstance(model(random_ids(1, 5)).past_key_values, HSACache)

"""`HSAStaticCache`: steps that are compiled once, in storage that never moves, give what any other cache gives."""

import copy

import pytest
import torch
from transformers import CompileConfig

from modeling_hsa import HSACache, HSAStaticCache
from tests.helpers import OTHER_ORDER, Allocations, relative_error
from tests.models import make_variant, tiny_model
from tests.rows import Rows, random_ids, read


NEW_TOKENS = 40  # completes two chunks (of 16) and goes three times around the window (of 12)
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
STATIC = {"cache_implementation": "static"} | GREEDY
PROMPTS = (1, 15, 16, 17, 100)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def compile_config() -> CompileConfig:
    """Makes `generate` compile on the CPU too, with an error for every graph break."""
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return config


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def storage(cache: HSAStaticCache) -> list[torch.Tensor]:
    tensors = [x for state in cache.state_dict().values() for x in state.values() if isinstance(x, torch.Tensor)]
    return [*tensors, *cache.memory.buffers]


def addresses(cache: HSAStaticCache) -> list[int]:
    return [buffer.data_ptr() for buffer in storage(cache)]


# -- one answer -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", PROMPTS)
def test_steps_equal_a_full_forward_and_those_of_a_dynamic_cache(variant_model, length):
    ids = random_ids(2, length + NEW_TOKENS)
    static, _ = read(variant_model, ids, [length, 1], HSAStaticCache(variant_model.config, ids.shape[1]))
    dynamic, _ = read(variant_model, ids, [length, 1])
    assert relative_error(static, dynamic) <= OTHER_ORDER
    assert relative_error(static, variant_model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1], [7], [30, 1, 1, 1, 17, 1, 1, 2, 1, 16, 1], [1, 60, 1]])
@pytest.mark.parametrize("name", ["default", "stride_20", "window_of_one", "window_of_100"])
def test_steps_and_segments_may_alternate(name, sizes):
    model, ids = make_variant(name), random_ids(2, 100)
    logits, cache = read(model, ids, sizes, HSAStaticCache(model.config, 100))
    assert relative_error(logits, model(ids, use_cache=False).logits) <= OTHER_ORDER
    assert cache.get_seq_length() == 100


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[60, 1], [7, 53, 1], [60, 1, 1, 1, 30, 1]])
@pytest.mark.parametrize("name", ["default", "stride_3"])
def test_padded_rows_equal_the_same_rows_alone(name, sizes):
    """Also where a segment of one token has a mask, and so is no step."""
    model = make_variant(name)
    rows = Rows("x" * 100, "." * 37 + "x" * 63, "." * 59 + "x" * 41, "x" * 20 + "." * 30 + "x" * 50)
    cache, logits, start = HSAStaticCache(model.config, 100), [], 0
    while start < 100:
        end = min(100, start + sizes[0])
        sizes = sizes[1:] or sizes
        mask = rows.attention_mask[:, :end] if end - start > 1 else None
        logits.append(model(rows.ids[:, start:end], attention_mask=mask, past_key_values=cache).logits)
        start = end
    assert rows.error(model, torch.cat(logits, dim=1)) <= OTHER_ORDER
    logits, _ = read(model, rows.ids, [60, 1, 1, 38], HSAStaticCache(model.config, 100), rows.attention_mask)
    assert rows.error(model, logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "stride_3"])
def test_documents_may_end_and_begin_in_any_call(name):
    model = make_variant(name)
    rows = Rows("|" + "x" * 40 + "|" + "x" * 47 + "||" + "x" * 9, "|" + "x" * 69 + "|" + "x" * 29)
    cache = HSAStaticCache(model.config, 100)
    logits, _ = read(model, rows.ids, [50, *[1] * 43, 7], cache, position_ids=rows.position_ids)
    assert rows.error(model, logits) <= OTHER_ORDER


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "joint", "stride_3", "no_local_attention", "eager_attention", "ramba"])
def test_steps_need_one_graph_for_all_tokens_and_all_caches(name):
    model, ids = make_variant(name), random_ids(2, 16 + NEW_TOKENS)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    expected = model(ids, use_cache=False).logits
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (16, 9):
            cache = HSAStaticCache(model.config, ids.shape[1])
            logits = [model(ids[:, :length], past_key_values=cache).logits]
            logits += [step(token, past_key_values=cache).logits for token in ids[:, length:].split(1, dim=1)]
            assert relative_error(torch.cat(logits, dim=1), expected) <= OTHER_ORDER
            assert cache.get_seq_length() == ids.shape[1]
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 27], ids=["whole rows", "padded rows"])
def test_generate_compiles_its_steps_once(compile_config, padding):
    model, mask = tiny_model(), torch.ones(2, 50, dtype=torch.long)
    mask[0, :padding] = 0
    ids = random_ids(2, 50) * mask
    settings = {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **settings, **GREEDY)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prefill_chunk_size in (16, 49):  # the second leaves one token, which is still part of the prompt
            settings |= {"compile_config": compile_config, "prefill_chunk_size": prefill_chunk_size}
            outputs = model.generate(ids, **settings, **STATIC)
            assert torch.equal(outputs.sequences, expected.sequences)
            assert relative_error(torch.stack(outputs.logits), torch.stack(expected.logits)) <= OTHER_ORDER
    assert graphs() == 1
    assert isinstance(outputs.past_key_values, HSAStaticCache)


@pytest.mark.slow
def test_a_shorter_generation_uses_what_a_longer_one_compiled(compile_config):
    model, ids = tiny_model(), random_ids(1, 50)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (50, 20):
            sequences = model.generate(ids[:, :length], compile_config=compile_config, **STATIC)
            assert torch.equal(sequences, model.generate(ids[:, :length], **GREEDY))
    assert graphs() == 1


@torch.no_grad()
@pytest.mark.slow
def test_the_default_backend_of_pytorch_gives_the_same(model):
    ids = random_ids(2, 60)
    step, cache = torch.compile(model.forward, fullgraph=True), HSAStaticCache(model.config, 60)
    logits = [model(ids[:, :20], past_key_values=cache).logits]
    logits += [step(token, past_key_values=cache).logits for token in ids[:, 20:].split(1, dim=1)]
    assert relative_error(torch.cat(logits, dim=1), model(ids, use_cache=False).logits) <= OTHER_ORDER
    with pytest.raises(RuntimeError, match="max_length.*60"):
        step(ids[:, :1], past_key_values=cache)


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", PROMPTS)
def test_generate_gives_the_same_as_without(model, length):
    ids = random_ids(2, length)
    sequences = model.generate(ids, prefill_chunk_size=32, **STATIC)
    assert torch.equal(sequences, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("kind", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_samples_are_the_same(model, kind):
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    sequences = []
    for settings in (STATIC, GREEDY):
        torch.manual_seed(1)
        sequences.append(model.generate(ids, attention_mask=mask, **settings | kind))
    assert torch.equal(*sequences)


def test_a_conversation_goes_on_from_a_static_cache(model):
    ids, cache = random_ids(2, 20), HSAStaticCache(model.config, 200)
    for _ in range(2):
        sequences = model.generate(ids, past_key_values=cache, **GREEDY)
        assert torch.equal(sequences, model.generate(ids, **GREEDY))
        ids = torch.cat([sequences, random_ids(2, 9)], dim=1)


def test_embeddings_are_a_prompt_too(model):
    ids = random_ids(2, 20)
    sequences = model.generate(inputs_embeds=model.get_input_embeddings()(ids).detach(), **STATIC)
    assert torch.equal(sequences, model.generate(ids, **GREEDY)[:, 20:])


# -- the storage ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
def test_storage_is_made_once_and_no_step_copies_the_memory(model, is_padded):
    cache, ids = HSAStaticCache(model.config, 4000), random_ids(2, 60)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, : 23 * is_padded] = 0
    model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
    made = addresses(cache)
    model(ids[:, 10:50], attention_mask=mask, past_key_values=cache)
    landmarks = cache.memory.buffers[0].numel()  # the smallest of the memory
    for i in range(50, 60):
        with Allocations() as allocations:
            model(ids[:, i : i + 1], past_key_values=cache)
        assert max(allocations.elements()) < landmarks
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    read(model, ids, [7, 1, 1, 30, 1], cache)
    assert addresses(cache) == made


@torch.no_grad()
def test_after_a_reset_everything_is_forgotten(model):
    cache = HSAStaticCache(model.config, 60)
    read(model, random_ids(2, 60), [20, 1], cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    for sizes in ([1], [30, 1]):
        ids = random_ids(2, 60)
        cache.reset()
        logits, _ = read(model, ids, sizes, cache)
        assert relative_error(logits, model(ids, use_cache=False).logits) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 15])
def test_rows_can_be_moved_repeated_and_selected(model, steps):
    rows = Rows("x" * 100, "." * 37 + "x" * 63, "." * 12 + "x" * 88)
    prompt, whole = 60 - steps, HSAStaticCache(model.config, 100)
    read(model, rows.ids[:, :prompt], [prompt], whole, rows.attention_mask)
    read(model, rows.ids[:, prompt:60], [1], whole)
    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ):
        cache, selected = copy.deepcopy(whole), rows.select(order)
        change(cache)
        assert cache.batch_size == len(order)
        logits, _ = read(model, selected.ids[:, 60:], [1] * 20 + [20], cache)
        assert selected.error(model, logits, start=60) <= OTHER_ORDER
    logits, _ = read(model, rows.ids[:, 60:], [1], whole)  # which the copies left alone
    assert rows.error(model, logits, start=60) <= OTHER_ORDER


def test_steps_may_follow_a_prompt_read_in_inference_mode(model):
    ids, cache = random_ids(2, 40), HSAStaticCache(model.config, 40)
    with torch.inference_mode():
        read(model, ids[:, :20], [20], cache)
    with torch.no_grad():
        logits, _ = read(model, ids[:, 20:], [1], cache)
        assert relative_error(logits, model(ids, use_cache=False).logits[:, 20:]) <= OTHER_ORDER


# -- what does not go -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_more_tokens_than_fit_are_refused(model):
    ids, cache = random_ids(2, 50), HSAStaticCache(model.config, 50)
    with pytest.raises(ValueError, match="max_length.*50.*51"):
        model(random_ids(2, 51), past_key_values=cache)
    read(model, ids, [48, 1], cache)
    for length in (1, 2):
        with pytest.raises((RuntimeError, ValueError), match="max_length.*50"):
            model(random_ids(2, length), past_key_values=cache)
    assert cache.get_seq_length() == 50


def test_generate_says_beforehand_that_the_cache_is_too_short(model):
    fits = HSAStaticCache(model.config, 20 + NEW_TOKENS - 1)
    model.generate(random_ids(1, 20), past_key_values=fits, **GREEDY)
    short = HSAStaticCache(model.config, 20 + NEW_TOKENS - 2)
    with pytest.raises(ValueError, match="max_length.*58.*59"):
        model.generate(random_ids(1, 20), past_key_values=short, **GREEDY)
    assert short.get_seq_length() == 0


@pytest.mark.parametrize("max_length", [0, -1, 2.5, None])
def test_lengths_that_make_no_sense_are_refused(model, max_length):
    with pytest.raises(ValueError, match="max_length"):
        HSAStaticCache(model.config, max_length)


def test_a_static_cache_cannot_go_back(model):
    cache = HSAStaticCache(model.config, 50)
    for call in (lambda: cache.crop(-1), cache.activate_past_recording):
        with pytest.raises(NotImplementedError, match="HSACache"):
            call()
    # From Transformers up to 5.23, which ask beforehand, or from the cache.
    with pytest.raises((ValueError, NotImplementedError), match="[Ss]tatic"):
        model.generate(random_ids(1, 20), prompt_lookup_num_tokens=3, **STATIC)


def test_flash_attention_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*sdpa"):
        model(random_ids(1, 5), past_key_values=HSAStaticCache(model.config, 50))


def test_rows_cannot_become_more_or_fewer(model):
    cache = HSAStaticCache(model.config, 50)
    read(model, random_ids(2, 5), [5], cache)
    with pytest.raises(ValueError, match="past_key_values.*2 rows.*3"):
        model(random_ids(3, 1), past_key_values=cache)


def test_only_the_static_cache_is_compileable(model):
    assert HSAStaticCache(model.config, 50).is_compileable
    assert not HSACache(model.config).is_compileable


# -- calls that fail --------------------------------------------------------------------------------------------------


def _fail(*_):
    raise RuntimeError("out of memory")


@torch.no_grad()
@pytest.mark.parametrize("starts_document", [False, True])
@pytest.mark.parametrize("name", ["default", "stride_3", "full_attention"])
def test_a_step_that_failed_is_repeated_or_the_cache_refuses(name, starts_document):
    """A step writes over tokens that it no longer sees; the first one of a document sees none, but others still do."""
    model, ids = make_variant(name), random_ids(1, 60)
    cache = HSAStaticCache(model.config, 60)
    read(model, ids[:, :40], [40], cache)
    step = {"input_ids": ids[:, 40:41], "past_key_values": cache}
    if starts_document:
        step["position_ids"] = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="out of memory"), model.model.norm.register_forward_hook(_fail):
        model(**step)
    if starts_document:
        with pytest.raises(ValueError, match="reset"):
            model(**step)
        cache.reset()
        ids = ids[:, 40:]
    start = cache.get_seq_length()
    logits, _ = read(model, ids[:, start:], [1, 7, 1], cache)
    assert relative_error(logits, model(ids, use_cache=False).logits[:, start:]) <= OTHER_ORDER

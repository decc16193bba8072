"""`generate` and pipelines: every way of decoding gives the tokens it would give without a cache, row by row."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from modeling_hsa import HSACache
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error
from tests.models import CROPPABLE, make_variant, tiny_model
from tests.rows import LENGTHS, random_ids


NEW_TOKENS = 18  # after the prompts of 50 tokens used here, enough for a new chunk (of 16) to be completed and seen
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}


@torch.no_grad()
def decode_without_cache(model, ids, steps: int = NEW_TOKENS, attention_mask=None) -> torch.Tensor:
    """Greedy decoding with a full forward for every token; [B, L + steps]."""
    for _ in range(steps):
        logits = model(ids, attention_mask=attention_mask, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
    return ids


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of these lengths, padded on the left."""
    total = max(lengths)
    ids = random_ids(len(lengths), total)
    mask = torch.stack([(torch.arange(total) >= total - length).long() for length in lengths])
    return ids * mask, mask


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Knows one word per token of the tiny model: `[PAD]`, `[EOS]`, `w2` to `w97`, `abcdef`."""
    words = ["[PAD]", "[EOS]", *(f"w{i}" for i in range(2, 98)), "abcdef"]  # stop strings need that last word
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        eos_token="[EOS]",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def segment_lengths(model):
    """The lengths of the calls of the shared model from here on."""
    lengths = []

    def record(module, args, kwargs):
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        lengths.append(next(x for x in given if x is not None).shape[1])

    hook = model.model.register_forward_pre_hook(record, with_kwargs=True)
    yield lengths
    hook.remove()


# -- ways to decode ---------------------------------------------------------------------------------------------------


def test_greedy_takes_the_argmax_of_full_forwards(variant_model):
    ids = random_ids(2, 50)
    assert torch.equal(variant_model.generate(ids, **GREEDY), decode_without_cache(variant_model, ids))


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_works_from_a_prompt_of_any_length(model, length):
    ids = random_ids(1, length)
    assert torch.equal(model.generate(ids, **GREEDY), decode_without_cache(model, ids))


@pytest.mark.parametrize("prefill_chunk_size", [None, 16])
def test_the_logits_of_generate_are_those_of_one_pass(variant_model, prefill_chunk_size):
    ids = random_ids(2, 50)
    outputs = variant_model.generate(
        ids, output_logits=True, return_dict_in_generate=True, prefill_chunk_size=prefill_chunk_size, **GREEDY
    )
    expected = variant_model(outputs.sequences, use_cache=False).logits[:, 49:-1]
    assert relative_error(torch.stack(outputs.logits, dim=1), expected) <= OTHER_ORDER


def test_generate_needs_no_prompt():
    model = tiny_model(bos_token_id=7)
    assert torch.equal(model.generate(**GREEDY), decode_without_cache(model, torch.tensor([[7]])))


def test_sampling_depends_on_the_seed_alone(model):
    ids = random_ids(2, 50)
    sampled = []
    for seed, use_cache in ((1, True), (1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        sampled.append(model.generate(ids, use_cache=use_cache, **GREEDY | {"do_sample": True}))
    assert torch.equal(sampled[0], sampled[1])
    assert torch.equal(sampled[0], sampled[2])
    assert not torch.equal(sampled[0], sampled[3])


def test_several_sequences_per_prompt_are_those_of_a_repeated_prompt(model):
    ids, mask = left_padded(50, 33)
    settings = GREEDY | {"do_sample": True}
    torch.manual_seed(0)
    several = model.generate(ids, attention_mask=mask, num_return_sequences=3, **settings)
    torch.manual_seed(0)
    ids, mask = (x.repeat_interleave(3, dim=0) for x in (ids, mask))
    assert torch.equal(several, model.generate(ids, attention_mask=mask, **settings))
    assert several.shape == (6, 50 + NEW_TOKENS)
    assert len({tuple(row.tolist()) for row in several}) == 6


class _CountingCache(HSACache):
    """Counts the times its rows changed places."""

    reorders = 0

    def reorder_cache(self, beam_idx):
        self.reorders += not torch.equal(beam_idx, torch.arange(len(beam_idx)))
        super().reorder_cache(beam_idx)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", ["default", "stride_3", "window_of_one"])
def test_beam_search_reorders_the_cache(name, do_sample):
    model = make_variant(name)
    ids, mask = left_padded(50, 29)
    cache = _CountingCache(model.config)
    settings = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2} | GREEDY | {"do_sample": do_sample}
    torch.manual_seed(0)
    with_cache = model.generate(ids, past_key_values=cache, **settings)
    torch.manual_seed(0)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))
    assert cache.reorders > 0
    assert cache.batch_size == 8


def test_left_padded_rows_generate_what_they_generate_alone(variant_model):
    ids, mask = left_padded(50, 33, 17, 1)
    together = variant_model.generate(ids, attention_mask=mask, **GREEDY)
    for row, length in enumerate((50, 33, 17, 1)):
        alone = variant_model.generate(ids[row : row + 1, 50 - length :], **GREEDY)
        assert torch.equal(together[row, 50 - length :], alone[0])


@pytest.mark.parametrize("prefill_chunk_size", [None, 7])
def test_holes_in_a_prompt_are_not_there(model, prefill_chunk_size):
    ids, mask = random_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, 5:20:2] = 0
    mask[1, :30] = 0
    sequences = model.generate(ids, attention_mask=mask, prefill_chunk_size=prefill_chunk_size, **GREEDY)
    for row in range(2):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **GREEDY)
        assert torch.equal(sequences[row, 50:], alone[0, -NEW_TOKENS:])


def test_a_row_that_ends_early_leaves_the_others_alone(model):
    ids, mask = left_padded(50, 33)
    free = model.generate(ids, attention_mask=mask, **GREEDY)
    end = free[0, 50 + 5].item()  # a token the first row comes to
    together = model.generate(ids, attention_mask=mask, eos_token_id=end, **GREEDY)
    for row, length in enumerate((50, 33)):
        alone = model.generate(ids[row : row + 1, 50 - length :], eos_token_id=end, **GREEDY)[0]
        assert torch.equal(together[row, 50 - length :][: len(alone)], alone)
        assert (together[row, 50 - length :][len(alone) :] == 0).all()
    assert (together[0, 50:] == end).sum() == 1


def test_guidance_works_with_a_cache(model):
    """Classifier-free guidance keeps a second cache of its own."""
    ids = random_ids(1, 50)
    with_cache = model.generate(ids, guidance_scale=1.5, **GREEDY)
    assert torch.equal(with_cache, model.generate(ids, guidance_scale=1.5, use_cache=False, **GREEDY))


def test_a_packed_prompt_continues_its_last_document(model):
    ids = random_ids(1, 50)
    position_ids = torch.cat([torch.arange(20), torch.arange(30)])[None]
    packed = model.generate(ids, position_ids=position_ids, prefill_chunk_size=16, **GREEDY)
    assert torch.equal(packed[:, 20:], model.generate(ids[:, 20:], **GREEDY))


# -- streaming and stopping -------------------------------------------------------------------------------------------


def test_a_streamer_gets_the_text_as_it_comes(model, tokenizer, capsys):
    ids = random_ids(1, 50)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    sequences = model.generate(ids, streamer=streamer, prefill_chunk_size=16, **GREEDY)
    assert capsys.readouterr().out.split() == tokenizer.decode(sequences[0, 50:]).split()


def test_a_streamer_gets_the_prompt_too(model, tokenizer):
    ids = random_ids(1, 50)
    streamer = TextIteratorStreamer(tokenizer)
    sequences = model.generate(ids, streamer=streamer, **GREEDY)
    assert "".join(streamer).split() == tokenizer.decode(sequences[0]).split()


class _AfterTokens(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_stop(model):
    ids = random_ids(2, 50)
    stopped = model.generate(ids, stopping_criteria=[_AfterTokens(60)], **GREEDY)
    assert torch.equal(stopped, model.generate(ids, **GREEDY)[:, :60])


def test_stop_strings_stop(model, tokenizer):
    ids = random_ids(1, 50)
    free = model.generate(ids, **GREEDY)[0]
    word = tokenizer.convert_ids_to_tokens(free[50 + 5].item())
    stopped = model.generate(ids, stop_strings=[word], tokenizer=tokenizer, **GREEDY)[0]
    assert torch.equal(stopped, free[: len(stopped)])
    assert word in tokenizer.decode(stopped[-1])
    assert len(stopped) <= 50 + 6


# -- long prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_chunk_size", [1, 7, 16, 49, 50, 51])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("is_embedded", [False, True], ids=["input_ids", "inputs_embeds"])
def test_a_prompt_read_in_segments_gives_what_one_piece_gives(
    model, segment_lengths, prefill_chunk_size, is_padded, is_embedded
):
    ids, mask = left_padded(50, 23 if is_padded else 50)
    expected = model.generate(ids, attention_mask=mask, prefill_chunk_size=None, **GREEDY)
    prompt = {"input_ids": ids}
    if is_embedded:
        prompt, expected = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}, expected[:, 50:]

    segment_lengths.clear()
    sequences = model.generate(**prompt, attention_mask=mask, prefill_chunk_size=prefill_chunk_size, **GREEDY)
    assert torch.equal(sequences, expected)
    segments, rest = divmod(50, prefill_chunk_size)
    assert segment_lengths == [prefill_chunk_size] * segments + [rest] * (rest > 0) + [1] * (NEW_TOKENS - 1)


def test_embeddings_can_come_with_the_ids_they_stand_for(model):
    ids = random_ids(2, 50)
    embeds = model.get_input_embeddings()(ids).detach()
    sequences = model.generate(ids, inputs_embeds=embeds, prefill_chunk_size=16, **GREEDY)
    assert torch.equal(sequences, model.generate(ids, **GREEDY))


def test_prompts_of_thousands_of_tokens_are_read_in_segments_by_default(model, segment_lengths):
    ids = random_ids(1, 5000)
    sequences = model.generate(ids, do_sample=False, max_new_tokens=2, pad_token_id=0)
    assert segment_lengths == [2048, 2048, 904, 1]
    whole = model.generate(ids, do_sample=False, max_new_tokens=2, pad_token_id=0, prefill_chunk_size=None)
    assert torch.equal(sequences, whole)


@pytest.mark.parametrize("cached", [0, 20, 49])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole row", "padded row"])
@pytest.mark.parametrize("way", ["greedy", "sampling", "beams", "prompt lookup", "assistant", "custom"])
def test_every_way_of_decoding_reads_segments_and_nothing_twice(model, segment_lengths, way, is_padded, cached):
    """Also where the cache holds the start of the prompt, and the cache goes on to the next turn."""
    ids, mask = random_ids(1, 50), torch.ones(1, 50, dtype=torch.long)
    mask[:, : 3 * is_padded] = 0
    settings = {
        "greedy": {},
        "sampling": {"do_sample": True, "top_k": 1},
        "beams": {"num_beams": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": assistant_of(model, 3)},
        "custom": {"custom_generate": type(model)._sample},
    }[way]
    beams = {"num_beams": settings.get("num_beams", 1)}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY | beams)

    cache = HSACache(model.config)
    if cached:
        with torch.no_grad():
            model(ids[:, :cached], attention_mask=mask[:, :cached], past_key_values=cache)
        cache.batch_repeat_interleave(beams["num_beams"])
    segment_lengths.clear()
    sequences = model.generate(
        ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=16, **GREEDY | settings
    )
    assert torch.equal(sequences, expected)
    assert max(segment_lengths) <= 16
    assert cache.get_seq_length() == 50 + NEW_TOKENS - 1

    if way != "beams":
        ids = torch.cat([sequences, random_ids(1, 20)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - 50), value=1)
        sequences = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY | settings)
        assert torch.equal(sequences, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))


@pytest.mark.parametrize("prefill_chunk_size", [None, 7, 49])
def test_a_negative_prompt_is_read_in_segments(model, segment_lengths, prefill_chunk_size):
    ids, (negative, mask) = random_ids(2, 20), left_padded(50, 33)
    settings = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "negative_prompt_attention_mask": mask}
    expected = model.generate(ids, use_cache=False, **settings, **GREEDY)
    segment_lengths.clear()
    sequences = model.generate(ids, prefill_chunk_size=prefill_chunk_size, **settings, **GREEDY)
    assert torch.equal(sequences, expected)
    assert max(segment_lengths) == (prefill_chunk_size or 50)
    assert sum(segment_lengths) == 20 + 50 + 2 * (NEW_TOKENS - 1)


@pytest.mark.parametrize("prefill_chunk_size", [0, -1, 2.5, True])
def test_segments_that_make_no_sense_are_refused(model, prefill_chunk_size):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(random_ids(1, 50), prefill_chunk_size=prefill_chunk_size, **GREEDY)


@pytest.mark.parametrize("prefill_chunk_size", [7, 50])
def test_position_ids_are_cut_with_the_prompt(model, prefill_chunk_size):
    ids, position_ids = random_ids(1, 50), torch.arange(7, 57)[None]
    sequences = model.generate(ids, position_ids=position_ids, prefill_chunk_size=prefill_chunk_size, **GREEDY)
    assert torch.equal(sequences, model.generate(ids, position_ids=position_ids, use_cache=False, **GREEDY))


# -- continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_chunk_size", [None, 16, 4096])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("given", ["all ids", "new ids"])
def test_a_conversation_goes_on_from_the_returned_cache(model, segment_lengths, given, is_padded, prefill_chunk_size):
    ids, mask = left_padded(50, 23 if is_padded else 50)
    cache, cached = None, 0
    for _ in range(3):
        segment_lengths.clear()
        outputs = model.generate(
            ids if given == "all ids" else ids[:, cached:],
            attention_mask=mask,
            past_key_values=cache,
            return_dict_in_generate=True,
            prefill_chunk_size=prefill_chunk_size,
            **GREEDY,
        )
        assert sum(segment_lengths) == ids.shape[1] - cached + NEW_TOKENS - 1  # nothing is read twice
        alone = model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(outputs.sequences[:, -NEW_TOKENS:], alone[:, -NEW_TOKENS:])
        cache = outputs.past_key_values
        cached = cache.get_seq_length()
        assert cached == alone.shape[1] - 1
        ids = torch.cat([alone, random_ids(2, 40)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, NEW_TOKENS + 40), value=1)


def test_one_cached_prefix_serves_many_prompts(model):
    prefix = random_ids(1, 60)
    with torch.no_grad():
        cache = model(prefix).past_key_values
    for length in (1, 17, 40):
        ids = torch.cat([prefix, random_ids(1, length)], dim=1)
        sequences = model.generate(ids, past_key_values=copy.deepcopy(cache), prefill_chunk_size=16, **GREEDY)
        assert torch.equal(sequences, model.generate(ids, **GREEDY))


def test_embeddings_continue_a_cache(model):
    ids = random_ids(2, 50)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        cache = model(ids[:, :13]).past_key_values
    sequences = model.generate(inputs_embeds=embeds, past_key_values=cache, prefill_chunk_size=8, **GREEDY)
    assert torch.equal(sequences, model.generate(ids, **GREEDY)[:, 50:])


def test_beam_search_goes_on_from_a_repeated_cache(model):
    ids = random_ids(2, 50)
    with torch.no_grad():
        cache = model(ids[:, :30]).past_key_values
    cache.batch_repeat_interleave(3)
    sequences = model.generate(ids, past_key_values=cache, num_beams=3, **GREEDY)
    assert torch.equal(sequences, model.generate(ids, num_beams=3, **GREEDY))


@pytest.mark.parametrize("length", [5, 30])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_prompt_that_the_cache_holds_already_is_refused(model, length, with_mask):
    """Also one that is shorter: it would be read once more, after itself."""
    ids = random_ids(1, 30)
    with torch.no_grad():
        cache = model(ids).past_key_values
    settings = {"attention_mask": torch.ones(1, length, dtype=torch.long)} if with_mask else {}
    for way in ({}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="past_key_values. holds 30 tokens, but the prompt has"):
            model.generate(ids[:, :length], past_key_values=cache, **settings, **way, **GREEDY)
    cache.crop(-1)  # what the message advises
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))


def test_a_prompt_without_tokens_is_refused_by_name(model):
    with pytest.raises(ValueError, match="The prompt has no tokens"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), **GREEDY)


@pytest.mark.parametrize("masked", [0, 3])
def test_a_mask_that_fits_neither_all_tokens_nor_the_new_ones_is_refused(model, masked):
    ids = random_ids(1, 30)
    with torch.no_grad():
        cache = model(ids).past_key_values
    mask = torch.ones(1, 35, dtype=torch.long)
    mask[:, :masked] = 0
    with pytest.raises(ValueError, match="attention_mask. has 35 columns.*holds 30 tokens.*input_ids. has 9"):
        model.generate(random_ids(1, 9), attention_mask=mask, past_key_values=cache, **GREEDY)


def test_more_sequences_than_the_cache_has_rows_are_refused(model):
    ids = random_ids(1, 50)
    with torch.no_grad():
        cache = model(ids[:, :30]).past_key_values
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 3}
    with pytest.raises(ValueError, match=r"holds 1 rows but 3.*batch_repeat_interleave\(3\)"):
        model.generate(ids, past_key_values=cache, **settings)
    cache.batch_repeat_interleave(3)  # what the message advises
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), model.generate(ids, **settings))
    with pytest.raises(ValueError, match="holds 3 rows but 2.*prompt of as many rows"):
        model.generate(random_ids(2, 120), past_key_values=cache, **GREEDY)


# -- assisted generation ----------------------------------------------------------------------------------------------


def assistant_of(model, tokens: int, noise: float = 0.1):
    """A model that drafts `tokens` tokens at a time, most but not all of which are right."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + noise * torch.randn_like(parameter))
    draft = assistant.generation_config
    draft.num_assistant_tokens, draft.num_assistant_tokens_schedule = tokens, "constant"
    draft.assistant_confidence_threshold = 0.0
    return assistant


def _tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    ).eval()  # fmt: skip


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole row", "padded row"])
@pytest.mark.parametrize("tokens", [3, 20])  # less and more than the window
@pytest.mark.parametrize("name", ["default", "stride_3", "window_of_one"])
def test_assisted_generation_equals_greedy(name, tokens, is_padded):
    model = make_variant(name)
    ids, mask = random_ids(1, 50), torch.ones(1, 50, dtype=torch.long)
    mask[:, : 9 * is_padded] = 0
    settings = {"attention_mask": mask} | GREEDY | {"max_new_tokens": 30}
    assisted = model.generate(ids, assistant_model=assistant_of(model, tokens), **settings)
    assert torch.equal(assisted, model.generate(ids, **settings))


def test_a_cache_can_be_continued_after_assisted_generation(model):
    ids = random_ids(1, 50)
    outputs = model.generate(ids, assistant_model=assistant_of(model, 5), return_dict_in_generate=True, **GREEDY)
    ids = torch.cat([outputs.sequences, random_ids(1, 40)], dim=1)
    sequences = model.generate(ids, past_key_values=outputs.past_key_values, **GREEDY)
    assert torch.equal(sequences, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", CROPPABLE)
def test_prompt_lookup_equals_greedy(name):
    model, ids = make_variant(name), random_ids(1, 10).repeat(1, 5)
    sequences = model.generate(ids, prompt_lookup_num_tokens=20, **GREEDY)
    assert torch.equal(sequences, model.generate(ids, **GREEDY))


def test_models_of_other_kinds_assist_and_are_assisted(model):
    llama, ids = _tiny_llama(), random_ids(1, 50)
    for target, assistant in ((model, llama), (llama, copy.deepcopy(model))):
        assert torch.equal(target.generate(ids, assistant_model=assistant, **GREEDY), target.generate(ids, **GREEDY))


@pytest.mark.parametrize("main", ["hsa", "llama"])
def test_an_assistant_reads_in_segments_and_records_only_the_last(main, monkeypatch):
    """The cache of an assistant records what it may have to forget, which is not the whole prompt."""
    assistant, ids = tiny_model(1), random_ids(1, 200)
    assistant.generation_config.prefill_chunk_size = 16
    lengths, recorded_from = [], []
    activate = HSACache.activate_past_recording

    def record(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    def activate_and_note(cache):
        recorded_from.append(cache.get_seq_length())
        activate(cache)

    assistant.model.register_forward_pre_hook(record, with_kwargs=True)
    monkeypatch.setattr(HSACache, "activate_past_recording", activate_and_note)
    target = tiny_model() if main == "hsa" else _tiny_llama()
    settings = GREEDY | ({"prefill_chunk_size": 16} if main == "hsa" else {})
    sequences = target.generate(ids, assistant_model=assistant, **settings)
    assert torch.equal(sequences, target.generate(ids, **GREEDY))
    assert lengths[:13] == [16] * 12 + [8]
    assert max(lengths[13:]) <= 3
    assert min(recorded_from) == 11 * 16


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_may_have_another_tokenizer(model, do_sample):
    words = ["[PAD]", "[EOS]", *(f"w{i}" for i in range(2, 101))]
    main, other = (
        Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[PAD]"))
        for vocabulary in (words[:99], [*words[:2], *words[:1:-1]])
    )
    tokenizers = []
    for fast in (main, other):
        fast.pre_tokenizer = WhitespaceSplit()
        tokenizers.append(PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", eos_token="[EOS]"))
    assistant, ids = tiny_model(1, vocab_size=101), random_ids(1, 50).clamp(min=2)
    assistant.generation_config.prefill_chunk_size = 16
    sequences = model.generate(
        ids,
        assistant_model=assistant,
        tokenizer=tokenizers[0],
        assistant_tokenizer=tokenizers[1],
        **GREEDY | {"do_sample": do_sample},
    )
    assert sequences.shape == (1, 50 + NEW_TOKENS)
    if not do_sample:
        assert torch.equal(sequences, model.generate(ids, **GREEDY))


def test_assisted_generation_needs_all_tokens(model):
    ids = random_ids(1, 30)
    with torch.no_grad():
        cache = model(ids).past_key_values
    mask = torch.ones(1, 39, dtype=torch.long)
    with pytest.raises(ValueError, match="all tokens of the prompt as `input_ids`.*got 9 tokens.*39"):
        model.generate(
            random_ids(1, 9), attention_mask=mask, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY
        )


@pytest.mark.parametrize(
    "settings",
    [{"use_mtp": True}, {"assistant_early_exit": 1}, {"speculation_type": "dflash", "prompt_lookup_num_tokens": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_drafts_that_hsa_models_cannot_make_are_refused(model, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` does not work with HSA models"):
        model.generate(random_ids(1, 20), **settings, **GREEDY)


def test_drafts_from_embeddings_are_refused(model):
    """They would be compared with the wrong logits."""
    embeds = model.get_input_embeddings()(random_ids(1, 20)).detach()
    with pytest.raises(ValueError, match="inputs_embeds.*token ids"):
        model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=3, **GREEDY)


def test_hidden_states_of_assisted_generation_need_an_empty_cache(model):
    ids = random_ids(1, 30)
    settings = {"prompt_lookup_num_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True} | GREEDY
    outputs = model.generate(ids, prefill_chunk_size=8, **settings)
    expected = model(outputs.sequences, output_hidden_states=True, use_cache=False).hidden_states
    for layer, whole in enumerate(expected):
        steps = torch.cat([step[layer] for step in outputs.hidden_states], dim=1)
        assert relative_error(steps, whole[:, : steps.shape[1]]) <= OTHER_ORDER
    with torch.no_grad():
        cache = model(ids[:, :20]).past_key_values
    with pytest.raises(ValueError, match="output_hidden_states.*past_key_values"):
        model.generate(ids, past_key_values=cache, **settings)


# -- kinds of cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["offloaded", "dynamic"])
@pytest.mark.parametrize("name", ["default", "joint", "stride_3"])
def test_other_kinds_of_cache_give_the_same(name, kind, num_beams):
    model, (ids, mask) = make_variant(name), left_padded(50, 23)
    settings = {"attention_mask": mask, "num_beams": num_beams} | GREEDY
    sequences = model.generate(ids, cache_implementation=kind, **settings)
    assert torch.equal(sequences, model.generate(ids, **settings))


@pytest.mark.parametrize("kind", ["offloaded_static", "quantized", "sliding_window", "hybrid_chunked"])
def test_kinds_of_cache_that_do_not_exist_here_are_refused(model, kind):
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}'.*HSACache.*offloaded"):
        model.generate(random_ids(1, 5), cache_implementation=kind, **GREEDY)


@pytest.mark.parametrize("way", [{}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}], ids=str)
def test_a_cache_of_another_kind_is_refused(model, way):
    with pytest.raises(TypeError, match="past_key_values.*HSACache.*DynamicCache"):
        model.generate(random_ids(1, 5), past_key_values=DynamicCache(), **way, **GREEDY)


@pytest.mark.parametrize("way", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}], ids=str)
def test_a_configuration_of_the_cache_is_obeyed(model, way):
    ids = random_ids(1, 50)
    outputs = model.generate(ids, cache_config={"offloading": True}, return_dict_in_generate=True, **way, **GREEDY)
    assert outputs.past_key_values.memory.place.name == "host"
    assert torch.equal(outputs.sequences, model.generate(ids, **way, **GREEDY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_config": {"nbits": 4}}, r"cache_config.*\['nbits'\].*offloading"),
        ({"cache_config": {"offloading": True}, "cache_implementation": "static"}, "cache_config.*'static'"),
        ({"cache_config": {"offloading": True}, "cache_implementation": "offloaded"}, "cache_config.*'offloaded'"),
        ({"cache_config": {"offloading": True}, "past_key_values": True}, "cache_config.*past_key_values"),
        ({"use_cache": False, "past_key_values": True}, "past_key_values.*use_cache=False"),
        ({"cache_implementation": "offloaded", "past_key_values": True}, "cache_implementation"),
        ({"use_cache": False, "prefill_chunk_size": 7}, "prefill_chunk_size.*use_cache=False"),
        ({"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}, "tuple"),
    ],
)
def test_settings_of_the_cache_that_nobody_could_obey_are_refused(model, settings, message):
    settings = dict(settings)
    if settings.get("past_key_values") is True:
        settings["past_key_values"] = HSACache(model.config)
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(1, 20), **settings, **GREEDY)


@pytest.mark.parametrize("way", ["cache_implementation", "generate_batch", "context manager", "manager"])
def test_continuous_batching_is_refused(model, way):
    """Its errors come from a thread that only logs them, so it must not come so far."""
    ids = random_ids(1, 20)
    with pytest.raises(NotImplementedError, match="continuous batching.*HSACache.*padded on the left"):
        if way == "cache_implementation":
            model.generate(ids, cache_implementation="paged", **GREEDY)
        elif way == "generate_batch":
            model.generate_batch(ids.tolist())
        elif way == "context manager":
            with model.continuous_batching_context_manager():
                pass
        else:
            model.init_continuous_batching()


def test_paged_generation_by_a_generation_config_is_refused(model):
    settings = GenerationConfig(cache_implementation="paged", max_new_tokens=3, pad_token_id=0)
    with pytest.raises(ValueError, match="cache_implementation='paged'"):
        model.generate(random_ids(1, 20), generation_config=settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"dola_layers": "high"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[5]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_ways_that_transformers_keeps_elsewhere_are_refused(model, settings):
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(random_ids(1, 20), **settings, **GREEDY)


# -- models in training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 16},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_does_not_change_what_is_generated(model, segment_lengths, way, use_reentrant):
    ids = random_ids(1, 50)
    segment_lengths.clear()
    expected, calls = model.generate(ids, **way, **GREEDY), list(segment_lengths)
    training = copy.deepcopy(model).train()
    training.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    segment_lengths.clear()
    training.model._forward_pre_hooks.update(model.model._forward_pre_hooks)
    assert torch.equal(training.generate(ids, **way, **GREEDY), expected)
    assert segment_lengths == calls  # and the cache is used


def test_checkpointing_leaves_out_the_cache_only_where_gradients_are_wanted(model):
    training, ids = copy.deepcopy(model).train(), random_ids(2, 50)
    training.gradient_checkpointing_enable()
    with torch.no_grad():
        cache = training(ids[:, :30], use_cache=True).past_key_values
        logits = training(ids[:, 30:], past_key_values=cache).logits
    assert cache.get_seq_length() == 50
    assert relative_error(logits, model(ids, use_cache=False).logits[:, 30:]) <= OTHER_ORDER
    assert training(ids, use_cache=True).past_key_values is None


# -- what the layers computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_chunk_size", [None, 16])
def test_generate_returns_hidden_states_of_the_whole_prompt(model, prefill_chunk_size):
    ids = random_ids(2, 50)
    outputs = model.generate(
        ids, output_hidden_states=True, return_dict_in_generate=True, prefill_chunk_size=prefill_chunk_size, **GREEDY
    )
    expected = model(outputs.sequences, output_hidden_states=True, use_cache=False).hidden_states
    assert len(expected) == model.config.num_hidden_layers + 1
    assert len(outputs.hidden_states) == NEW_TOKENS
    for layer, whole in enumerate(expected):
        steps = torch.cat([step[layer] for step in outputs.hidden_states], dim=1)
        assert relative_error(steps, whole[:, :-1]) <= OTHER_ORDER


@pytest.mark.parametrize("prefill_chunk_size", [None, 16])
def test_generate_returns_attentions_of_the_whole_prompt(prefill_chunk_size):
    model, ids = make_variant("eager_attention"), random_ids(2, 50)
    outputs = model.generate(
        ids, output_attentions=True, return_dict_in_generate=True, prefill_chunk_size=prefill_chunk_size, **GREEDY
    )
    expected = model(ids, output_attentions=True, use_cache=False).attentions
    assert len(outputs.attentions) == NEW_TOKENS
    assert len(expected) == model.config.num_hidden_layers
    for weights, whole in zip(outputs.attentions[0], expected):
        assert weights.shape == (2, model.config.num_attention_heads, 50, 50)
        assert relative_error(weights, whole) <= SAME_ARITHMETIC
    for step in outputs.attentions[1:]:
        for weights in step:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, model.config.num_attention_heads, 1))


def test_attentions_that_the_implementation_does_not_give_are_refused(model):
    with pytest.raises(ValueError, match="output_attentions.*attn_implementation='eager'"):
        model.generate(random_ids(1, 5), output_attentions=True, return_dict_in_generate=True, **GREEDY)


def test_retrieval_is_not_silently_left_out(model):
    """`generate` has no place for it in its output; `model(sequences, output_retrieval=True)` gives it afterwards."""
    with pytest.raises(ValueError, match="output_retrieval"):
        model.generate(random_ids(1, 5), output_retrieval=True, return_dict_in_generate=True, **GREEDY)


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_pipeline_generates_what_generate_does(model, tokenizer, batch_size):
    texts = [tokenizer.decode(random_ids(length)) for length in (50, 7, 23)]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_full_text": False}
    results = generator(texts, batch_size=batch_size, **settings)
    for text, (result,) in zip(texts, results):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=True)
        assert result["generated_text"].split() == expected.split()


# -- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"max_new_tokens": 5}, {"max_length": 90}])
def test_the_training_length_is_no_limit(arguments):
    model = tiny_model(max_position_embeddings=64)
    prompt = random_ids(1, 80)
    new_tokens = model.generate(prompt, do_sample=False, **arguments).shape[1] - 80
    assert new_tokens == {"max_new_tokens": 5, "max_length": 10}.get(next(iter(arguments), ""), 20)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_takes_a_cache_under_both_of_its_names(model, name):
    ids, cache = random_ids(1, 50), HSACache(model.config)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **{name: cache}, **GREEDY), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    with pytest.raises(ValueError, match="two names of the same argument"):
        model.generate(ids, cache=HSACache(model.config), past_key_values=HSACache(model.config), **GREEDY)

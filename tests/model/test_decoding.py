"""
Steps of `generate` as a graph give what steps one by one give, and leave the same cache behind.

On a CPU, a graph of what `make_fx` records stands for a CUDA graph: it too repeats the operations of one step on the
tensors of that step, whatever Python would have done in another. The tests marked `gpu` capture.
"""

import copy
from unittest.mock import patch

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CompileConfig, TextStreamer
from transformers.utils import logging

from modeling_hsa import HSACache, HSAForCausalLM, HSAStaticCache, decoding, inputs
from modeling_hsa.naming import CACHE
from tests.helpers import OTHER_ORDER, relative_error
from tests.models import VARIANTS, make_variant, tiny_model
from tests.rows import random_ids


NEW_TOKENS = 40  # completes two chunks (of 16) and goes around the window (of 12) and the rings (of 32)
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "return_dict_in_generate": True}
SIZES = {"head_dim": 16}  # as the kernels take it
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture
def messages(caplog):
    logger = logging.get_logger("modeling_hsa.decoding")
    before = logger.level
    logger.setLevel("INFO")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(before)


class Captures:
    """Counts graphs, and on a CPU makes them."""

    def __init__(self, device: str):
        self.device, self.count, self.replays = device, 0, 0
        self.capture = decoding.capture

    def __call__(self, step, stream):
        self.count += 1
        replay, output = self.capture(step, stream) if self.device == "cuda" else self._record(step)

        def counted():
            self.replays += 1
            replay()

        return counted, output

    def _record(self, step):
        view = decoding.current_steps.get().view
        tensors = [view.rows.state, view.rows.count, *(ring.buffer for ring, _ in view._rings())]
        before = [x.clone() for x in tensors]
        # On a GPU, nobody looks at the values of inputs.
        with torch.inference_mode(), patch.object(inputs, "_can_look", lambda *_: False):
            graph = make_fx(lambda: step())()  # the signature of `step` itself is that of a decorator
        for x, y in zip(tensors, before):  # recording ran the step, as capturing does not
            x.copy_(y)
        output = torch.empty_like(graph())
        for x, y in zip(tensors, before):
            x.copy_(y)

        def replay():
            with torch.inference_mode():
                output.copy_(graph())

        return replay, output


@pytest.fixture(params=["cpu", GPU])
def captures(request, monkeypatch) -> Captures:
    captures = Captures(request.param)
    monkeypatch.setattr(decoding, "_DEVICES", (request.param,))
    monkeypatch.setattr(HSAForCausalLM, "captures_steps", True)
    monkeypatch.setattr(decoding, "capture", captures)
    return captures


def test_steps_are_captured_where_that_was_chosen(captures, monkeypatch):
    model = make_variant("default", **SIZES).to(captures.device)
    prompt = to(captures.device, input_ids=random_ids(1, 40))
    monkeypatch.setattr(HSAForCausalLM, "captures_steps", False)
    model.generate(**prompt, **GREEDY)
    assert captures.count == 0
    model.captures_steps = True
    model.generate(**prompt, **GREEDY)
    assert captures.count == 1


def generate_both_ways(model: HSAForCausalLM, captures: Captures, prompt: dict, cache=None, **settings):
    """The outputs of `generate` with and without graphs, from two copies of the cache."""
    outputs = []
    for disable_compile in (False, True):
        given = {} if cache is None else {CACHE: copy.deepcopy(cache)}
        torch.manual_seed(0)
        outputs.append(
            model.generate(**prompt, **given, **GREEDY | settings, output_logits=True, disable_compile=disable_compile)
        )
    return outputs


def to(device: str, **inputs) -> dict:
    return {name: x.to(device) for name, x in inputs.items()}


def same_logits(outputs, expected) -> bool:
    return relative_error(torch.stack(outputs.logits), torch.stack(expected.logits)) <= OTHER_ORDER


@torch.no_grad()
def same_caches(model, cache: HSACache, expected: HSACache) -> bool:
    """Whether both know the same columns, and go on and back alike."""
    if cache.get_seq_length() != expected.get_seq_length():
        return False
    batch = max(expected.batch_size, 1)
    for columns in (0, 5) if model.config.sliding_window > 5 else (0,):
        if columns:
            cache.crop(-columns)
            expected.crop(-columns)
        ids = random_ids(batch, 30).to(model.device)
        logits, wanted = (model(ids, past_key_values=copy.deepcopy(x)).logits for x in (cache, expected))
        if relative_error(logits, wanted) > OTHER_ORDER:
            return False
    return True


# -- one answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 50])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "full_attention"])
def test_tokens_and_cache_are_those_of_steps_without_a_graph(captures, name, length):
    sizes = SIZES | ({"retrieval_dim": 17} if name.startswith("mass_landmark") else {})
    model = make_variant(name, **sizes).to(captures.device)
    if {"full_attention", "linear_attention"} & set(model.config.layer_types):
        pytest.skip("has no graph")
    outputs, expected = generate_both_ways(model, captures, to(captures.device, input_ids=random_ids(2, length)))
    assert captures.count == 1 and captures.replays == NEW_TOKENS - 1 - decoding._WARM_UP
    assert torch.equal(outputs.sequences, expected.sequences) and same_logits(outputs, expected)
    assert same_caches(model, outputs[CACHE], expected[CACHE])


@pytest.mark.parametrize("name", ["default", "stride_3"])
def test_rows_may_be_padded_and_packed(captures, name):
    model = make_variant(name, **SIZES).to(captures.device)
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[0, :23], mask[1, :1], mask[2, 10:15] = 0, 0, 0
    prompt = to(captures.device, input_ids=random_ids(3, 50), attention_mask=mask)
    outputs, expected = generate_both_ways(model, captures, prompt)
    assert captures.count == 1
    assert torch.equal(outputs.sequences, expected.sequences) and same_logits(outputs, expected)
    assert same_caches(model, outputs[CACHE], expected[CACHE])
    position_ids = torch.cat([torch.arange(30), torch.arange(20)])[None].expand(3, -1)
    prompt = to(captures.device, input_ids=random_ids(3, 50), position_ids=position_ids)
    outputs, expected = generate_both_ways(model, captures, prompt)
    assert torch.equal(outputs.sequences, expected.sequences) and same_logits(outputs, expected)
    assert same_caches(model, outputs[CACHE], expected[CACHE])


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_samples_are_the_same(captures, settings):
    model = tiny_model(**SIZES).to(captures.device)
    outputs, expected = generate_both_ways(
        model, captures, to(captures.device, input_ids=random_ids(2, 50)), **settings
    )
    assert captures.count == 1 and torch.equal(outputs.sequences, expected.sequences)


def test_rows_padded_on_the_right_have_no_graph(captures, messages):
    """Transformers counts their positions on from the padding."""
    model, mask = tiny_model(**SIZES).to(captures.device), torch.ones(2, 50, dtype=torch.long)
    mask[0, 40:] = 0
    prompt = to(captures.device, input_ids=random_ids(2, 50), attention_mask=mask)
    outputs, expected = generate_both_ways(model, captures, prompt)
    assert captures.count == 0 and "position_ids" in messages.text
    assert torch.equal(outputs.sequences, expected.sequences) and same_caches(model, outputs[CACHE], expected[CACHE])


def test_embeddings_are_a_prompt_too(captures):
    model = tiny_model(**SIZES).to(captures.device)
    embeds = model.get_input_embeddings()(random_ids(2, 30).to(captures.device)).detach()
    outputs, expected = generate_both_ways(model, captures, {"inputs_embeds": embeds})
    assert captures.count == 1 and torch.equal(outputs.sequences, expected.sequences)


def test_more_steps_than_there_is_room_for_take_another_graph(captures, monkeypatch):
    monkeypatch.setattr(decoding, "_MOST_STEPS", 17)
    model = tiny_model(**SIZES).to(captures.device)
    outputs, expected = generate_both_ways(model, captures, to(captures.device, input_ids=random_ids(2, 50)))
    assert captures.count == 3 and torch.equal(outputs.sequences, expected.sequences)
    assert same_caches(model, outputs[CACHE], expected[CACHE])


@pytest.mark.parametrize("inference", [False, True])
def test_forks_and_their_parent_go_on_from_a_conversation(captures, inference):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(2, 100).to(captures.device)
    parent = HSACache(model.config)
    with torch.inference_mode(inference), torch.no_grad():
        model(ids[:, :70], past_key_values=parent)
    forks = [parent.fork(), parent.fork()]
    forks.append(forks[0].fork())
    for cache in (forks[0], parent, *forks[1:], forks[0]):
        whole = torch.cat([ids[:, :70], random_ids(2, cache.get_seq_length() - 70 + 9).to(ids.device)], dim=1)
        mask = torch.ones_like(whole)
        expected = copy.deepcopy(cache)
        settings = {"attention_mask": mask} | GREEDY
        sequences = model.generate(whole, **{CACHE: cache}, **settings).sequences
        assert torch.equal(sequences, model.generate(whole, **{CACHE: expected}, disable_compile=True, **settings)[0])
        assert same_caches(model, copy.deepcopy(cache), expected)
    assert captures.count == 5


def test_a_memory_that_a_fork_has_moved_is_followed(captures):
    """A fork that is used between two steps: here by a streamer."""
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(1, 50).to(captures.device)
    cache = HSACache(model.config)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    fork, cache = cache, cache.fork()

    class Streamer(TextStreamer):
        def __init__(self):
            self.tokens = 0

        def put(self, value):
            self.tokens += 1
            if self.tokens == 12:
                with torch.no_grad():
                    model(random_ids(1, 600).to(ids.device), past_key_values=fork)

        def end(self):
            pass

    expected = model.generate(ids, disable_compile=True, **GREEDY).sequences
    assert torch.equal(model.generate(ids, **{CACHE: cache}, streamer=Streamer(), **GREEDY).sequences, expected)
    assert captures.count == 2


# -- the cache in between, and after failures -------------------------------------------------------------------------


class Stop(Exception):
    pass


class StoppingStreamer(TextStreamer):
    """Looks at the cache between steps, and stops `generate` after some tokens."""

    def __init__(self, tokens: int, look=lambda: None):
        self.left, self.look = tokens, look

    def put(self, value):
        self.look()
        self.left -= 1
        if self.left < 0:
            raise Stop

    def end(self):
        pass


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 25])
@pytest.mark.parametrize("is_padded", [False, True])
def test_an_interrupted_generation_leaves_what_it_generated(captures, tokens, is_padded):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(2, 50).to(captures.device)
    mask = torch.ones_like(ids)
    mask[0, : 20 * is_padded] = 0
    caches = []
    for disable_compile in (False, True):
        cache = HSACache(model.config)
        with pytest.raises(Stop):
            model.generate(
                ids, attention_mask=mask, **{CACHE: cache}, streamer=StoppingStreamer(tokens),
                disable_compile=disable_compile, **GREEDY,
            )  # fmt: skip
        caches.append(cache)
    assert caches[0].get_seq_length() == 50 + tokens - 1
    assert same_caches(model, *caches)


def test_who_looks_at_the_cache_gets_it_back(captures):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(2, 50).to(captures.device)
    cache, lengths, forks = HSACache(model.config), [], []

    def look():
        lengths.append(cache.get_seq_length())
        if len(lengths) == 20:
            forks.append(cache.fork())

    streamer = StoppingStreamer(100, look)
    outputs = model.generate(ids, **{CACHE: cache}, streamer=streamer, **GREEDY)
    expected = model.generate(ids, disable_compile=True, **GREEDY)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert lengths == [0, *range(50, 50 + NEW_TOKENS)]
    assert captures.count == 2
    continued = model.generate(outputs.sequences[:, :69], **{CACHE: forks[0]}, **GREEDY | {"max_new_tokens": 21})
    assert torch.equal(continued.sequences, expected.sequences)


def _fail(*_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("place", ["layers.1", "norm"])
def test_a_step_that_failed_is_not_there(captures, place):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(2, 50).to(captures.device)
    cache, expected = HSACache(model.config), HSACache(model.config)
    module = model.model.get_submodule(place)

    def fail_at_the_next_step():
        if cache.get_seq_length() == 51:  # one warm-up went through
            hooks.append(module.register_forward_hook(_fail))

    hooks = []
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(ids, **{CACHE: cache}, streamer=StoppingStreamer(100, fail_at_the_next_step), **GREEDY)
    hooks[0].remove()
    with pytest.raises(Stop):
        model.generate(ids, **{CACHE: expected}, streamer=StoppingStreamer(2), disable_compile=True, **GREEDY)
    assert same_caches(model, cache, expected)


def test_a_step_that_cannot_be_captured_runs_without(captures, monkeypatch, caplog):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(2, 50).to(captures.device)
    expected = model.generate(ids, disable_compile=True, **GREEDY)
    monkeypatch.setattr(decoding, "capture", _fail)
    outputs = model.generate(ids, **GREEDY)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert same_caches(model, outputs[CACHE], expected[CACHE])


# -- where there is none ----------------------------------------------------------------------------------------------


def _with_hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def _with_adapters(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    model.eval()


OBSTACLES = {
    "hooks": _with_hook,
    "training": lambda model: model.train(),
    "adapters": _with_adapters,
    "wrapped": lambda model: setattr(model.lm_head, "forward", model.lm_head.forward),
}
SETTINGS = {
    "beams": {"num_beams": 2},
    "offloaded": {"cache_implementation": "offloaded"},
    "no cache": {"use_cache": False},
    "few tokens": {"max_new_tokens": 5},
    "hidden states": {"output_hidden_states": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "disabled": {"disable_compile": True},
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_model_that_cannot_be_a_graph_is_called_as_it_is(captures, messages, name):
    model = tiny_model(**SIZES).to(captures.device)
    OBSTACLES[name](model)
    ids = random_ids(2, 50).to(captures.device)
    sequences = model.generate(ids, **GREEDY).sequences
    assert captures.count == 0 and "without a CUDA graph" in messages.text
    assert torch.equal(sequences, model.generate(ids, disable_compile=True, **GREEDY).sequences)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_without_a_graph_work_as_before(captures, name):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(1, 50).to(captures.device)
    settings = GREEDY | SETTINGS[name]
    sequences = model.generate(ids, **settings).sequences
    assert captures.count == 0
    assert torch.equal(sequences, model.generate(ids, **settings | {"disable_compile": True}).sequences)


def test_neither_flex_nor_full_nor_linear_attention_have_a_graph():
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in decoding.find_obstacle(model, HSACache(model.config))
    model = make_variant("full_attention")
    assert "full attention" in decoding.find_obstacle(model, HSACache(model.config))
    model = make_variant("ramba")
    assert "linear attention" in decoding.find_obstacle(model, HSACache(model.config))


@pytest.mark.gpu
def test_what_the_kernels_do_not_take_has_no_graph():
    for sizes, kind in (({}, "default"), (SIZES, "torch")):
        model = tiny_model(**sizes).to("cuda")
        if kind == "torch":
            model.config.hsa_implementation = "torch"
        assert "plain PyTorch" in decoding.find_obstacle(model, HSACache(model.config))


def test_autocast_has_no_graph(captures, messages):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(1, 50).to(captures.device)
    with torch.autocast(captures.device, dtype=torch.bfloat16):
        model.generate(ids, **GREEDY)
    assert captures.count == 0 and "autocast" in messages.text


def test_a_compile_config_and_a_static_cache_are_those_of_transformers(captures, monkeypatch):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(1, 50).to(captures.device)
    asked = []
    monkeypatch.setattr(
        HSAForCausalLM.__mro__[1], "get_compiled_call", lambda self, config: asked.append(config) or self.__call__
    )
    config = CompileConfig()
    config._compile_all_devices = True
    cache = HSAStaticCache(model.config, 200)
    sequences = model.generate(ids, **{CACHE: cache}, compile_config=config, **GREEDY).sequences
    assert asked == [config] and captures.count == 0
    assert torch.equal(sequences, model.generate(ids, disable_compile=True, **GREEDY).sequences)


def test_recorded_outputs_of_an_earlier_call_are_no_obstacle(captures):
    model, ids = tiny_model(**SIZES).to(captures.device), random_ids(1, 50).to(captures.device)
    with torch.no_grad():
        model(ids, output_retrieval=True)
    model.generate(ids, **GREEDY)
    assert captures.count == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu_there_is_none(monkeypatch):
    monkeypatch.setattr(decoding, "capture", _fail)
    model = tiny_model()
    monkeypatch.setattr(decoding.DecodeSteps, "__call__", _fail)
    model.generate(random_ids(1, 50), **GREEDY)

"""How prompts are read: how much at a time, from the CPU, with a bar, and what an interruption leaves behind."""

import signal

import pytest
import torch
from transformers.utils import logging

from configuration_hsa import HSAConfig
from modeling_hsa import HSACache, prompts, segments
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error
from tests.models import tiny_model
from tests.rows import random_ids


GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
GPU, CPU = torch.device("cuda"), torch.device("cpu")
GIB = 2**30


# -- how much at a time -----------------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory of a GPU is free."""
    memory = {"bytes": 70 * GIB}
    monkeypatch.setattr(segments, "free_bytes", lambda device: memory["bytes"])
    return lambda gib: memory.update(bytes=gib * GIB)


def segment(config: HSAConfig, rows: int = 1, tokens: int = 0, device: torch.device = GPU) -> int:
    return segments.automatic_segment(config, device, torch.bfloat16, rows, tokens)


def test_a_segment_keeps_a_gpu_busy(free):
    config = HSAConfig()
    assert segment(config) == 16384
    assert segment(config, rows=4) == 4096
    assert segment(config, rows=1000) == 1024
    small = HSAConfig(hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2)
    large = HSAConfig(hidden_size=4096, intermediate_size=12288, num_attention_heads=64, num_key_value_heads=16)
    assert segment(small) == 65536
    assert segment(large) == 4096


def test_a_segment_fits_into_what_the_cache_leaves_free(free):
    config = HSAConfig()
    free(2)
    assert segment(config) == 8192
    assert segment(config, tokens=1 << 22) == 4096  # whose chunk memory takes half of it
    free(0)
    assert segment(config) == 1024


def test_elsewhere_the_segment_is_fixed():
    config = HSAConfig()
    assert segment(config, device=CPU) == 2048
    assert segment(config, device=torch.device("mps")) == 4096


def test_an_automatic_segment_is_the_default_and_one_that_is_asked_for_wins(monkeypatch):
    model, ids, lengths = tiny_model(), random_ids(1, 50), []
    expected = model.generate(ids, prefill_chunk_size=None, **GREEDY)
    monkeypatch.setattr(prompts, "automatic_segment", lambda *_: 16)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert model.generation_config.prefill_chunk_size == "auto"
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert lengths[:4] == [16, 16, 16, 2]
    lengths.clear()
    assert torch.equal(model.generate(ids, prefill_chunk_size=30, **GREEDY), expected)
    assert lengths[:2] == [30, 20]


@pytest.mark.gpu
def test_the_free_memory_of_a_gpu_counts_what_pytorch_holds_unused():
    before = segments.free_bytes(GPU)
    x = torch.empty(GIB, dtype=torch.uint8, device=GPU)
    used = segments.free_bytes(GPU)
    del x
    assert before - used >= GIB // 2 and segments.free_bytes(GPU) - used >= GIB // 2


# -- interrupted ------------------------------------------------------------------------------------------------------


def _interrupt(module, args, output):
    signal.raise_signal(signal.SIGINT)


def _fail(module, args, output):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("stop", [_interrupt, _fail])
@pytest.mark.parametrize("place", ["first layer", "encoder", "norm"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_an_interrupted_prompt_goes_on_from_the_last_segment(stop, place, is_padded):
    model, ids, mask = tiny_model(), random_ids(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[0, : 20 * is_padded] = 0
    arguments = {"attention_mask": mask, "prefill_chunk_size": 30, **GREEDY}
    expected = model.generate(ids, **arguments)
    base, cache, calls = model.model, HSACache(model.config), []
    module = {"first layer": base.layers[0], "encoder": base.chunk_encoder, "norm": base.norm}[place]

    def stop_in_the_third_segment(*arguments):
        calls.append(1)
        if len(calls) == 3:
            stop(*arguments)

    with module.register_forward_hook(stop_in_the_third_segment):
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            model.generate(ids, past_key_values=cache, **arguments)
    assert cache.get_seq_length() == 60
    assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)


# -- from the CPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ids", "embeddings"])
def test_a_prompt_may_stay_on_the_cpu(kind):
    model, ids, mask = tiny_model().to(GPU), random_ids(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[0, :20] = 0
    arguments = {"prefill_chunk_size": 30, **GREEDY}
    if kind == "ids":
        prompt = {"input_ids": ids, "attention_mask": mask}
    else:
        prompt = {"inputs_embeds": model.get_input_embeddings()(ids.to(GPU)).detach().cpu(), "attention_mask": mask}
    expected = model.generate(**{name: x.to(GPU) for name, x in prompt.items()}, **arguments)
    assert torch.equal(model.generate(**prompt, **arguments).to(GPU), expected)


def test_only_the_segment_that_is_read_is_moved(model, monkeypatch):
    """Also tested without a GPU: which tensors are asked to move."""
    moved = []
    monkeypatch.setattr(type(model), "_on_device", lambda self, x: moved.append(tuple(x.shape)) or x)
    ids = random_ids(1, 100)
    model.generate(ids, position_ids=torch.arange(100)[None], prefill_chunk_size=30, **GREEDY)
    assert moved[:6] == [(1, 30)] * 6  # ids and positions
    assert moved[6:8] == [(1, 10)] * 2
    assert set(moved[8:]) == {(1, 1)}


# -- the bar ----------------------------------------------------------------------------------------------------------


def test_a_bar_shows_how_much_is_read(model, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "_SECONDS_WITHOUT_BAR", 0)
    arguments = {"prefill_chunk_size": 30, **GREEDY}
    model.generate(random_ids(1, 100), **arguments)
    assert "Reading the prompt" in capsys.readouterr().err
    model.generate(random_ids(1, 20), **arguments)  # in one segment
    logging.disable_progress_bar()
    try:
        model.generate(random_ids(1, 100), **arguments)
    finally:
        logging.enable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model.generate(random_ids(1, 100), **arguments)
    finally:
        logging.set_verbosity(verbosity)
    monkeypatch.setattr(prompts, "_SECONDS_WITHOUT_BAR", 60)
    model.generate(random_ids(1, 100), **arguments)
    assert "Reading" not in capsys.readouterr().err


# -- far positions ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("start", [2**24 - 30, 100_000_000])
@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}])
def test_positions_beyond_2_to_the_24_are_exact(start, rope):
    """RoPE is relative, so a text far in gives what it gives at the start, in any split."""
    model = tiny_model(rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **rope})
    ids = random_ids(2, 100)
    expected = model(ids, use_cache=False).logits
    position_ids = torch.arange(start, start + 100)[None]
    assert relative_error(model(ids, position_ids=position_ids, use_cache=False).logits, expected) <= OTHER_ORDER
    cache, logits = HSACache(model.config), []
    for first, last in ((0, 40), (40, 41), (41, 42), (42, 100)):
        segment = {"input_ids": ids[:, first:last], "position_ids": position_ids[:, first:last]}
        logits.append(model(**segment, past_key_values=cache).logits)
    assert relative_error(torch.cat(logits, dim=1), expected) <= OTHER_ORDER


@torch.no_grad()
def test_angles_of_neighbours_far_in_differ_by_one_frequency(model):
    far = torch.arange(100_000_000, 100_000_064)
    (cos, sin), x = model.model.rotary_emb(torch.zeros(1), far[None]), torch.zeros(1)
    near_cos, near_sin = model.model.rotary_emb(x, torch.ones(1, 1, dtype=torch.long))
    half = sin.shape[-1] // 2
    # The angle between a position and the next one is that of position 1.
    turned = cos[:, :-1] * cos[:, 1:] + sin[:, :-1] * sin[:, 1:]
    assert relative_error(turned, near_cos.expand_as(turned)) <= SAME_ARITHMETIC
    cross = (cos[:, :-1] * sin[:, 1:] - sin[:, :-1] * cos[:, 1:])[..., half:]
    assert relative_error(cross, near_sin[..., half:].expand_as(cross)) <= SAME_ARITHMETIC

"""
Training, prefill and decoding of the default HSA model and of a Llama of the same size, on a GPU.

    python examples/benchmark.py models --output benchmarks/results/gpu --parts models prefill decode generate static

`models`: forward and backward of the loss (no optimizer), `--compile` for `torch.compile`. `prefill`: reading a prompt
of one row into a cache (HSA: in segments, as `generate` does it), and `segments` in others. `decode`: one token at a
time after it, by calls of the model. `generate`: by `generate`, which makes a graph of the steps of an HSA model, and
without it. `static`: as `decode`, with a static cache and a compiled step, HSA only. Prints every row and writes
models.json, with hardware and versions, and a plot. `--device cpu --toy` runs the same on tiny models.

Model FLOPs of a training step are three times those of the forward, which are: 2 per token and element of every weight
matrix (of tied embeddings, once, as the head; recomputation and the CLS token of a chunk do not count); 4 D per query
head and pair of query and key in attention; and 2 d_r per pair of query and visible landmark. MFU is what of them is
done per second, over the measured speed of a matmul (`mfu`) and over the 989e12 FLOP/s of the data sheet of an H100
SXM (`mfu_of_h100_peak`).
"""

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM, HSAStaticCache

from ..models import count_parameters, llama_like
from ..plots import draw_scaling
from ..reading import CACHE, Reader, make_reader
from .timing import MIB, Benchmark, Timer


H100_PEAK_FLOP_PER_S = 989e12
# Files of plots: part, field and title of each panel.
PLOTS = {
    "training": [
        ("models", "tokens_per_s", "training, tokens per second"),
        ("models", "peak_mib", "training, peak memory, MiB"),
    ],
    "reading": [
        ("prefill", "ms", "reading a prompt, ms"),
        ("prefill", "beyond_cache_mib", "memory for it beyond the cache, MiB"),
        ("decode", "ms_per_token", "decoding, ms per token"),
        ("generate", "ms_per_token", "generate, ms per token"),
        ("static", "ms_per_token", "decoding, static cache, ms per token"),
    ],
}
# Batch and length.
TRAINING = [(8, 4096), (2, 16384), (1, 65536)]
CONTEXTS = [4096, 16384, 65536, 131072, 262144, 524288]
TOY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_lower_layers": 2, "num_upper_layers": 2, "num_upper_groups": 1, "sliding_window": 32, "chunk_size": 16,
    "chunk_topk": 2, "retrieval_dim": 16,
}  # fmt: skip


# -- what all benchmarks of models share --


def build(name: str, config: HSAConfig, seed: int = 0) -> PreTrainedModel:
    """`hsa`, or a `llama` of the same size; randomly initialised, fp32."""
    torch.manual_seed(seed)
    if name == "hsa":
        return HSAForCausalLM(config)
    return LlamaForCausalLM(llama_like(config, count_parameters(HSAForCausalLM, config)))


def make_prompt_reader(model: PreTrainedModel) -> Reader:
    """Reads as `generate` does: an HSA model in segments, a Llama all at once."""
    return make_reader(model, None if model.config.model_type == "hsa" else 0)


def cache_bytes(cache) -> int:
    """Bytes of all tensors of a cache, by their storage."""
    seen, total, stack = set(), 0, [cache]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif hasattr(item, "__dict__") and type(item).__module__.startswith(("modeling_hsa", "transformers.cache")):
            stack.extend(vars(item).values())
    return total


def train_step(model, input_ids, with_backward: bool) -> None:
    with torch.set_grad_enabled(with_backward):
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
    if with_backward:
        loss.backward()
        model.zero_grad(set_to_none=True)


def forward_flop(model, batch: int, length: int) -> float:
    """As the head of this file says."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # `parameters` yields tied ones once
    causal = length * (length + 1) / 2
    scores = 0.0
    if isinstance(config, HSAConfig):
        size, window = config.chunk_size, min(config.sliding_window, length)
        in_window = window * (window + 1) / 2 + (length - window) * window
        visible = torch.arange(length) // size
        windows = config.num_hidden_layers - config.num_upper_groups * (not config.hsa_local_attention)
        pairs = windows * in_window + config.num_encoder_layers * (length // size) * (size + 1) ** 2
        pairs += config.num_upper_groups * visible.clamp(max=config.chunk_topk).sum().item() * size
        scores = 2 * config.num_retrieval_heads * config.retrieval_dim * visible.sum().item()
        scores *= config.num_upper_groups
    else:
        pairs = config.num_hidden_layers * causal
    attention = 4 * config.head_dim * config.num_attention_heads * pairs
    return batch * (2.0 * weights * length + attention + scores)


# -- measurements --


def measure_step(timer: Timer, limits: dict, model, step_model, input_ids) -> dict:
    step = partial(train_step, step_model, input_ids, with_backward=True)
    first = timer.clock_ms(step)
    if timer.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timer.clock_ms(step)
    peak = torch.cuda.max_memory_allocated() / MIB if timer.on_gpu else None  # weights, activations and gradients
    ms = timer.median_ms(step)
    row = {
        "first_call_s": first / 1e3,
        "ms": ms,
        "tokens_per_s": input_ids.numel() / ms * 1e3,
        "peak_mib": peak,
    }
    if timer.on_gpu:  # elsewhere, and of toys, a share of what the device reaches says nothing
        flop = 3 * forward_flop(model, *input_ids.shape) / ms * 1e3
        row |= {"mfu": flop / limits["matmul_flop_per_s"], "mfu_of_h100_peak": flop / H100_PEAK_FLOP_PER_S}
    return row


@torch.inference_mode()
def measure_prefill(timer: Timer, model, input_ids, segment: int | None = None) -> dict:
    """`segment`: tokens read at a time; None: as `generate` does."""
    reader = make_prompt_reader(model) if segment is None else make_reader(model, segment)
    reader.read(input_ids[:, :4096])
    ms = timer.median_ms(lambda: reader.read(input_ids), repeats=3)
    # The cache is no tensor, so its memory is not that of a result: it is in `extra`.
    extra = timer.extra_memory(lambda: reader.read(input_ids))
    cache = cache_bytes(reader.read(input_ids)) / MIB
    beyond = None if extra is None else extra - cache
    return {"ms": ms, "tokens_per_s": input_ids.numel() / ms * 1e3, "cache_mib": cache, "beyond_cache_mib": beyond}


@torch.inference_mode()
def measure_decode(timer: Timer, model, input_ids, steps: int) -> dict:
    """By the clock over `steps` tokens, of which every 64th completes a chunk."""
    cache, token = make_prompt_reader(model).read(input_ids), input_ids[:, :1]

    def decode(steps):
        for _ in range(steps):
            model(token, **{CACHE: cache}, use_cache=True)

    decode(8)
    return {"ms_per_token": timer.clock_ms(lambda: decode(steps)) / steps}


class TokenClock(BaseStreamer):
    """Notes when `generate` hands over the prompt and each token, for which it waits for the device."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure_generate(timer: Timer, model, input_ids, steps: int, **options) -> dict:
    """
    Greedy tokens by `generate`, after a prompt that was read before: the median of the later ones, and what the first
    ones take, among which a graph is captured.
    """
    cache = make_prompt_reader(model).read(input_ids[:, :-1])
    clock = TokenClock()
    model.generate(
        input_ids, **{CACHE: cache}, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0,
        streamer=clock, **options,
    )  # fmt: skip
    ms = [1e3 * (after - before) for before, after in zip(clock.times[1:], clock.times[2:])]
    first = len(ms) // 8
    return {"ms_per_token": statistics.median(ms[first:]), "mean_ms": statistics.mean(ms), "first_ms": sum(ms[:first])}


# -- the benchmark --


class Models(Benchmark):
    name, parts = "models", ("models", "prefill", "segments", "decode", "generate", "static")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--models", nargs="+", default=["hsa", "llama"], choices=["hsa", "llama"], help="of all")
        parser.add_argument(
            "--compile", nargs="+", default=["off"], choices=["off", "on"], help="torch.compile, of `models`"
        )
        parser.add_argument(
            "--gradient_checkpointing", type=int, nargs="*", default=[], help="lengths to train with it, of `models`"
        )
        parser.add_argument(
            "--hsa_implementation", default="auto", choices=["auto", "triton", "torch"], help="of the HSA model"
        )

    def build(self, name: str) -> PreTrainedModel:
        toy = TOY if self.arguments.toy else {}
        model = build(name, HSAConfig(**toy, hsa_implementation=self.arguments.hsa_implementation))
        return model.to(self.timer.device, self.timer.dtype)

    def input_ids(self, model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
        return torch.randint(model.config.vocab_size, (batch, length), device=self.timer.device)

    def measure_models(self) -> Iterator[dict]:
        arguments = self.arguments
        for compiled in arguments.compile:
            for batch, length in [(2, 64), (1, 256)] if arguments.toy else TRAINING:
                if arguments.lengths and length not in arguments.lengths:
                    continue
                for name in arguments.models:
                    model = self.build(name).train()
                    checkpointing = length in arguments.gradient_checkpointing
                    if checkpointing:
                        model.gradient_checkpointing_enable({"use_reentrant": False})
                    torch.compiler.reset()
                    step_model = torch.compile(model, dynamic=False) if compiled == "on" else model
                    input_ids = self.input_ids(model, batch, length)
                    yield {
                        "model": name, "batch": batch, "length": length, "compile": compiled,
                        "gradient_checkpointing": checkpointing, "parameters": model.num_parameters(),
                    } | self.timer.attempt(
                        measure_step, self.timer, self.limits, model, step_model, input_ids
                    )  # fmt: skip
                    del model, step_model

    @property
    def contexts(self) -> list[int]:
        return self.arguments.lengths or ([64, 256] if self.arguments.toy else CONTEXTS)

    @property
    def steps(self) -> int:
        return 8 if self.arguments.toy else 128

    def measure_generation(self, measure: Callable) -> Iterator[dict]:
        for length in self.contexts:
            for name in self.arguments.models:
                torch.compiler.reset()
                model = self.build(name).eval()
                input_ids = self.input_ids(model, 1, length)
                row = {"model": name, "length": length}
                yield row | self.timer.attempt(measure, self.timer, model, input_ids)
                del model

    def measure_prefill(self) -> Iterator[dict]:
        return self.measure_generation(measure_prefill)

    def measure_decode(self) -> Iterator[dict]:
        return self.measure_generation(partial(measure_decode, steps=self.steps))

    def measure_generate(self) -> Iterator[dict]:
        """By `generate` with a graph of its steps, which HSA models make where it is chosen, and without."""
        HSAForCausalLM.captures_steps = True
        for options in ({}, {"disable_compile": True}):
            for row in self.measure_generation(partial(measure_generate, steps=4 * self.steps, **options)):
                yield row | options

    def measure_segments(self) -> Iterator[dict]:
        """Reading a prompt in segments of other lengths than `generate` takes by itself, which is the last one."""
        for length in self.contexts:
            model = self.build("hsa").eval()
            input_ids = self.input_ids(model, 1, length)
            automatic = model.prefill_segment(1, length)
            for segment in (32,) if self.arguments.toy else (4096, 8192, 32768, 65536, automatic):
                row = {"model": "hsa", "length": length, "segment": segment, "automatic": segment == automatic}
                yield row | self.timer.attempt(measure_prefill, self.timer, model, input_ids, segment)

    def measure_static(self) -> Iterator[dict]:
        """
        Decoding as in `decode`, by one compiled step: CUDA graphs of it, and a static cache with room for the longest
        context, which all contexts share.
        """
        timer, steps = self.timer, self.steps
        model = self.build("hsa").eval()
        cache = HSAStaticCache(model.config, max(self.contexts) + 2 * steps)
        mode = {"mode": "reduce-overhead"} if timer.on_gpu else {"backend": "aot_eager"}
        step = torch.compile(model.forward, fullgraph=True, **mode)

        @torch.no_grad()
        def decode(steps):
            token = torch.zeros(1, 1, dtype=torch.int64, device=timer.device)
            for _ in range(steps):
                token = step(token, **{CACHE: cache}).logits.argmax(-1)

        for length in self.contexts:
            cache.reset()
            with torch.no_grad():
                for segment in self.input_ids(model, 1, length).split(model.prefill_segment(1, length), dim=1):
                    model(segment, **{CACHE: cache}, logits_to_keep=1)
            first = timer.clock_ms(lambda: decode(8))
            row = {"model": "hsa", "length": length, "max_length": cache.max_length}
            yield row | {"ms_per_token": timer.clock_ms(lambda: decode(steps)) / steps, "first_steps_s": first / 1e3}

    @classmethod
    def plot(cls, rows: dict[str, list[dict]], folder: Path) -> None:
        for name, shown in PLOTS.items():
            panels = {}
            for part, field, title in shown:
                for row in rows.get(part, []):
                    if row.get(field) is not None:
                        label = row["model"] + (", compiled" if row.get("compile") == "on" else "")
                        label += ", without a graph" if row.get("disable_compile") else ""
                        x, y = panels.setdefault(title, {}).setdefault(label, ([], []))
                        x.append(row["length"])
                        y.append(row[field])
            draw_scaling(panels, folder / f"{name}.png")

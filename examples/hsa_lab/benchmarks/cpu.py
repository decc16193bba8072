"""
Time and peak memory of an HSA model and of a Llama of the same size, by length, on the CPU.

    python examples/benchmark.py cpu --output benchmarks/results/cpu

Measures a training step (forward, forward + backward), prefill of a prompt into a cache (HSA: in segments, as
`generate` does it) and decoding with the cache of that prompt. Every measurement runs in a process of its own, so that
its peak memory is its own. Writes results.json, with hardware and versions, and a plot; prints a table.
"""

import multiprocessing
import os
import re
import statistics
import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from configuration_hsa import HSAConfig

from ..plots import draw_scaling
from ..reading import CACHE
from ..results import provenance, write_json
from .models import build, cache_bytes, make_prompt_reader, train_step
from .timing import MIB


# The proportions of the default configuration, small enough for a CPU to train.
CONFIG = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_lower_layers": 4, "num_upper_layers": 2, "num_upper_groups": 2, "retrieval_dim": 64,
}  # fmt: skip
# Settings of glibc's allocator, read when a process starts.
RETURNS_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def _memory(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def _measure(function, repeats: int) -> dict[str, float]:
    """Median seconds of `function` and its peak memory beyond what was there before, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, times = _memory("VmRSS"), []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "peak_mib": (_memory("VmHWM") - before) / 2**20}


def measure_training(model, input_ids) -> list[dict]:
    repeats = 3 if input_ids.shape[1] <= 4096 else 1
    results = []
    for what in ("forward", "backward"):
        train_step(model, input_ids[:, :256], what == "backward")
        step = partial(train_step, model, input_ids, what == "backward")
        results.append({"what": what} | _measure(step, repeats))
    return results


@torch.inference_mode()
def measure_generation(model, input_ids) -> list[dict]:
    """Prefill, once (keeping an earlier cache, or freeing it, would blur the memory of the next), and decoding."""
    reader = make_prompt_reader(model)
    reader.read(input_ids[:, :256])
    kept = []
    result = {"what": "prefill"} | _measure(lambda: kept.append(reader.read(input_ids)), 1)
    cache = kept[0]
    result["cache_mib"] = cache_bytes(cache) / MIB
    token, steps = input_ids[:, :1], 128  # two chunks, so that the cost of encoding a chunk is in
    for _ in range(4):
        model(token, **{CACHE: cache}, use_cache=True)
    start = time.perf_counter()
    for _ in range(steps):
        model(token, **{CACHE: cache}, use_cache=True)
    decode = {"what": "decode", "seconds": (time.perf_counter() - start) / steps, "cache_mib": result["cache_mib"]}
    return [result, decode]


@torch.inference_mode()
def measure_memory(model, input_ids) -> list[dict]:
    """
    Peak memory of prefill beyond the cache. In its own process with an allocator that returns what is freed (`run`
    sets it), which costs time but keeps fragmentation out of the figure.
    """
    reader = make_prompt_reader(model)
    reader.read(input_ids[:, :256])
    kept = []
    peak = _measure(lambda: kept.append(reader.read(input_ids)), 1)["peak_mib"]
    cache = cache_bytes(kept[0]) / MIB
    return [{"what": "memory", "peak_mib": peak, "cache_mib": cache, "beyond_cache_mib": peak - cache}]


MEASURES = {"training": measure_training, "generation": measure_generation, "memory": measure_memory}


def run_one(name: str, what: str, length: int) -> list[dict]:
    """The measurements of one kind, in this process."""
    model = build(name, HSAConfig(**CONFIG))
    input_ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    results = MEASURES[what](model.train(what == "training"), input_ids)
    return [{"model": name, "length": length} | result for result in results]


def print_row(row: dict) -> None:
    ms = f"{row['seconds'] * 1e3:.1f}" if "seconds" in row else ""
    per_1k = f"{row['seconds'] * 1e6 / row['length']:.1f}" if ms and row["what"] != "decode" else ""
    memory = [f"{row[field]:.0f}" if field in row else "" for field in ("peak_mib", "cache_mib", "beyond_cache_mib")]
    print(
        f"{row['model']:6} {row['what']:9} {row['length']:7} {ms:>10} {per_1k:>10} "
        f"{memory[0]:>9} {memory[1]:>10} {memory[2]:>11}",
        flush=True,
    )


def plot(measurements: list[dict], file: Path) -> None:
    panels = {}
    for what, field, title in (
        ("backward", "seconds", "training step, s"),
        ("prefill", "seconds", "reading a prompt, s"),
        ("memory", "beyond_cache_mib", "memory for it beyond the cache, MiB"),
        ("decode", "seconds", "decoding, s per token"),
    ):
        for row in measurements:
            if row["what"] == what:
                x, y = panels.setdefault(title, {}).setdefault(row["model"], ([], []))
                x.append(row["length"])
                y.append(row[field])
    draw_scaling(panels, file)


def measure(name: str, what: str, length: int) -> list[dict]:
    """`run_one`, in a process of its own."""
    environment = RETURNS_FREED_MEMORY if what == "memory" else {}
    os.environ.update(environment)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        rows = process.submit(run_one, name, what, length).result()
    for variable in environment:
        del os.environ[variable]
    return rows


class Cpu:
    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--output", type=Path, required=True, help="folder for results.json and benchmark.png")
        parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens")
        parser.add_argument("--max_train_length", type=int, default=16384, help="longest training step")
        parser.add_argument("--what", nargs="+", default=list(MEASURES), choices=list(MEASURES), help="to measure")
        parser.add_argument("--models", nargs="+", default=["hsa", "llama"], choices=["hsa", "llama"], help="of all")

    def __init__(self, arguments: Namespace):
        self.arguments = arguments

    def run(self) -> None:
        arguments, measurements = self.arguments, []
        parameters = {name: build(name, HSAConfig(**CONFIG)).num_parameters() for name in arguments.models}
        segment = build("hsa", HSAConfig(**CONFIG)).prefill_segment()
        results = {"parameters": parameters, "prefill_chunk_size": segment, "measurements": measurements}
        header = ("model", "what", "tokens", "ms", "ms/1K tok", "peak MiB", "cache MiB", "beyond it")
        print("{:6} {:9} {:>7} {:>10} {:>10} {:>9} {:>10} {:>11}".format(*header))
        for what in arguments.what:
            for length in arguments.lengths:
                if what == "training" and length > arguments.max_train_length:
                    continue
                for name in arguments.models:
                    rows = measure(name, what, length)
                    measurements += rows
                    for row in rows:
                        print_row(row)
                    write_json(arguments.output / "results.json", provenance() | results)
        if set(arguments.what) == set(MEASURES):
            plot(measurements, arguments.output / "benchmark.png")

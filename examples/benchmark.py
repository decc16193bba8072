"""
Time and peak memory of an HSA model and of a Llama of the same size, by length, on the CPU.

    python examples/benchmark.py --output benchmarks/results/cpu

Measures a training step (forward, forward + backward), prefill of a prompt into a cache (HSA: in segments, as
`generate` does it) and decoding with the cache of that prompt. Every measurement runs in a process of its own, so that
its peak memory is its own. Writes results.json, with hardware and versions, and a plot; prints a table.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measuring import hardware
from transformers import LlamaConfig, LlamaForCausalLM

from configuration_hsa import HSAConfig
from modeling_hsa import HSACache, HSAForCausalLM
from modeling_hsa.modeling_hsa import PREFILL_CHUNK_SIZE


VOCAB_SIZE = 4096
# The proportions of the default configuration, small enough for a CPU to train.
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
HSA = {
    "intermediate_size": 768,
    "num_lower_layers": 4,
    "num_upper_layers": 2,
    "num_upper_groups": 2,
    "retrieval_dim": 64,
}
LLAMA = {
    "intermediate_size": 896,
    "num_hidden_layers": 9,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1 << 20,
}


# Settings of glibc's allocator, read when a process starts.
RETURNS_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def build(name: str):
    """`hsa` or `llama`, randomly initialised, fp32."""
    torch.manual_seed(0)
    if name == "hsa":
        return HSAForCausalLM(HSAConfig(**SHAPE, **HSA))
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **LLAMA, attn_implementation="sdpa"))


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


def prefill(model, input_ids):
    """The cache of a prompt."""
    if isinstance(model, LlamaForCausalLM):
        return model(input_ids, logits_to_keep=1, use_cache=True).past_key_values
    cache = HSACache(model.config)
    cache.reserve(input_ids.shape[1])
    for segment in input_ids.split(PREFILL_CHUNK_SIZE, dim=1):
        model(segment, past_key_values=cache, logits_to_keep=1, use_cache=True)
    return cache


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


def measure_training(model, input_ids) -> list[dict]:
    repeats = 3 if input_ids.shape[1] <= 4096 else 1
    results = []
    for what in ("forward", "backward"):
        train_step(model, input_ids[:, :256], what == "backward")
        results.append({"what": what} | _measure(lambda: train_step(model, input_ids, what == "backward"), repeats))  # noqa: B023
    return results


@torch.inference_mode()
def measure_generation(model, input_ids) -> list[dict]:
    """Prefill, once (keeping an earlier cache, or freeing it, would blur the memory of the next), and decoding."""
    prefill(model, input_ids[:, :256])
    kept = []
    result = {"what": "prefill"} | _measure(lambda: kept.append(prefill(model, input_ids)), 1)
    cache = kept[0]
    result["cache_mib"] = cache_bytes(cache) / 2**20
    token, steps = input_ids[:, :1], 128  # two chunks, so that the cost of encoding a chunk is in
    for _ in range(4):
        model(token, past_key_values=cache, use_cache=True)
    start = time.perf_counter()
    for _ in range(steps):
        model(token, past_key_values=cache, use_cache=True)
    decode = {"what": "decode", "seconds": (time.perf_counter() - start) / steps, "cache_mib": result["cache_mib"]}
    return [result, decode]


@torch.inference_mode()
def measure_memory(model, input_ids) -> list[dict]:
    """
    Peak memory of prefill beyond the cache. In its own process with an allocator that returns what is freed (`main`
    sets it), which costs time but keeps fragmentation out of the figure.
    """
    prefill(model, input_ids[:, :256])
    kept = []
    peak = _measure(lambda: kept.append(prefill(model, input_ids)), 1)["peak_mib"]
    cache = cache_bytes(kept[0]) / 2**20
    return [{"what": "memory", "peak_mib": peak, "cache_mib": cache, "beyond_cache_mib": peak - cache}]


MEASURES = {"training": measure_training, "generation": measure_generation, "memory": measure_memory}


def run_one(name: str, what: str, length: int) -> list[dict]:
    """The measurements of one kind, in this process."""
    model = build(name)
    input_ids = torch.randint(VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))
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


def plot(results: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("backward", "seconds", "training step, s"),
        ("prefill", "seconds", "prefill, s"),
        ("memory", "beyond_cache_mib", "prefill memory beyond the cache, MiB"),
        ("decode", "seconds", "decode, s per token"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.6))
    for axis, (what, field, title) in zip(axes, panels):
        for name, style in (("hsa", "o-"), ("llama", "s--")):
            rows = [r for r in results["measurements"] if r["model"] == name and r["what"] == what]
            axis.plot([r["length"] for r in rows], [r[field] for r in rows], style, label=name)
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for results.json and benchmark.png")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--max_train_length", type=int, default=16384, help="longest training step")
    parser.add_argument("--what", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--models", nargs="+", default=["hsa", "llama"])
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    measurements = []
    header = ("model", "what", "tokens", "ms", "ms/1K tok", "peak MiB", "cache MiB", "beyond it")
    print("{:6} {:9} {:>7} {:>10} {:>10} {:>9} {:>10} {:>11}".format(*header))
    for what in arguments.what:
        for length in arguments.lengths:
            if what == "training" and length > arguments.max_train_length:
                continue
            for name in arguments.models:
                environment = RETURNS_FREED_MEMORY if what == "memory" else {}
                os.environ.update(environment)
                with ProcessPoolExecutor(1, mp_context=context) as process:
                    rows = process.submit(run_one, name, what, length).result()
                for variable in environment:
                    del os.environ[variable]
                measurements += rows
                for row in rows:
                    print_row(row)

    results = {
        "hardware": hardware(),
        "parameters": {name: build(name).num_parameters() for name in arguments.models},
        "prefill_chunk_size": PREFILL_CHUNK_SIZE,
        "measurements": measurements,
    }
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if set(arguments.what) == set(MEASURES):
        plot(results, output / "benchmark.png")


if __name__ == "__main__":
    main()

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
import platform
import re
import statistics
import time
from pathlib import Path

import torch
import transformers
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


def run_one(name: str, what: str, length: int, queue) -> None:
    """Runs one measurement and puts its result into the queue."""
    model = build(name)
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(VOCAB_SIZE, (1, length), generator=generator)
    warm_up = input_ids[:, :256]
    repeats = 3 if length <= 8192 else 1
    if what in ("forward", "backward"):

        def step(ids):
            with torch.set_grad_enabled(what == "backward"):
                loss = model(ids, labels=ids, use_cache=False).loss
                if what == "backward":
                    loss.backward()
                    model.zero_grad(set_to_none=True)

        step(warm_up)
        queue.put(_measure(lambda: step(input_ids), repeats))
        return
    model.eval()
    with torch.inference_mode():
        prefill(model, warm_up)
        kept = []
        # One run: keeping an earlier cache, or freeing it, would blur the memory of the next.
        result = _measure(lambda: kept.append(prefill(model, input_ids)), 1)
        cache = kept[0]
        result["cache_mib"] = cache_bytes(cache) / 2**20
        result["beyond_cache_mib"] = result["peak_mib"] - result["cache_mib"]
        if what == "decode":
            token, steps = input_ids[:, :1], 128  # two chunks: the cost of encoding a chunk is in
            for _ in range(4):
                model(token, past_key_values=cache, use_cache=True)
            start = time.perf_counter()
            for _ in range(steps):
                model(token, past_key_values=cache, use_cache=True)
            result = {"seconds": (time.perf_counter() - start) / steps, "cache_mib": result["cache_mib"]}
    queue.put(result)


def hardware() -> dict[str, str | int]:
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def plot(results: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("backward", "seconds", "training step, s"),
        ("prefill", "seconds", "prefill, s"),
        ("prefill", "beyond_cache_mib", "prefill memory beyond the cache, MiB"),
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
    parser.add_argument("--what", nargs="+", default=["forward", "backward", "prefill", "decode"])
    parser.add_argument("--models", nargs="+", default=["hsa", "llama"])
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    measurements = []
    print(f"{'model':6} {'what':9} {'tokens':>7} {'ms':>10} {'ms/1K tok':>10} {'peak MiB':>9} {'cache MiB':>9}")
    for what in arguments.what:
        for length in arguments.lengths:
            if what in ("forward", "backward") and length > arguments.max_train_length:
                continue
            for name in arguments.models:
                queue = context.Queue()
                process = context.Process(target=run_one, args=(name, what, length, queue))
                process.start()
                process.join()
                if process.exitcode:
                    raise RuntimeError(f"{name} {what} at {length} tokens failed with exit code {process.exitcode}.")
                result = {"model": name, "what": what, "length": length} | queue.get()
                measurements.append(result)
                ms = result["seconds"] * 1e3
                per_1k = "" if what == "decode" else f"{ms / length * 1000:.1f}"
                memory = [f"{result[f]:.0f}" if f in result else "" for f in ("peak_mib", "cache_mib")]
                print(
                    f"{name:6} {what:9} {length:7} {ms:10.1f} {per_1k:>10} {memory[0]:>9} {memory[1]:>9}", flush=True
                )

    results = {
        "hardware": hardware(),
        "parameters": {name: build(name).num_parameters() for name in arguments.models},
        "prefill_chunk_size": PREFILL_CHUNK_SIZE,
        "measurements": measurements,
    }
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if set(arguments.what) >= {"backward", "prefill", "decode"}:
        plot(results, output / "benchmark.png")


if __name__ == "__main__":
    main()

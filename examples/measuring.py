"""What the benchmarks share: hardware and versions, times and peak memory on a GPU or a CPU, ceilings, results."""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


MIB = 2**20
# Calls that take longer are timed a few times, by the clock; shorter ones many times, by `triton.testing.do_bench`.
LONG_CALL_MS = 300.0

_device = "cpu"  # `parse` sets it. (Not the default device of PyTorch, which slows every operation down.)


def hardware() -> dict[str, str | int]:
    """The machine and the versions of what runs on it."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    found = {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError):
            found["driver"] = "unknown"
    for peer in ("fla-core", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    return found


def device() -> str:
    """What `--device` says."""
    return _device


def on_gpu() -> bool:
    return _device == "cuda"


def dtype() -> torch.dtype:
    return torch.bfloat16 if on_gpu() else torch.float32


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device(), dtype=dtype())


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def clock_ms(function: Callable) -> float:
    """Milliseconds of one call, by the clock."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def median_ms(function: Callable, repeats: int = 5) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    clock_ms(function)
    once = clock_ms(function)
    if on_gpu() and once < LONG_CALL_MS:
        from triton.testing import do_bench

        return do_bench(function, return_mode="median")
    return statistics.median([once, *(clock_ms(function) for _ in range(repeats - 1 if once < 3000 else 1))])


def replay_ms(function: Callable) -> float | None:
    """Median milliseconds of replaying the call as a CUDA graph."""
    if not on_gpu():
        return None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay)


def tensor_bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def extra_memory(function: Callable) -> float | None:
    """Peak MiB on the GPU during a call, beyond what was there before and the tensors it returns."""
    if not on_gpu():
        return None
    gc.collect()
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = function()
    synchronize()
    returned = returned if isinstance(returned, (tuple, list)) else (returned,)
    return (torch.cuda.max_memory_allocated() - before - tensor_bytes(returned)) / MIB


def forward_backward(
    function: Callable, inputs: list[torch.Tensor], memory: bool = True, graph: bool = False
) -> dict[str, float | None]:
    """
    Times of `function(*inputs)`, of its backward and of both, in ms, and extra peak memory of the first and the last;
    with `graph`, of the first and of both also as a CUDA graph, where launching from Python takes no time.
    """
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        output = function(*inputs)
        return output, *torch.autograd.grad(output, wanted, grad, allow_unused=True)

    grad = torch.randn_like(forward())
    times = {"forward_ms": median_ms(forward), "both_ms": median_ms(both)}
    if graph:
        times |= {"graph_forward_ms": replay_ms(forward), "graph_both_ms": replay_ms(both)}
    times["backward_ms"] = _backward_ms(function(*inputs), wanted, grad)
    if memory:
        times |= {"forward_extra_mib": extra_memory(forward), "both_extra_mib": extra_memory(both)}
    return times


def _backward_ms(output: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor) -> float:
    return median_ms(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True, allow_unused=True))


def attempt(function: Callable, *arguments, **keywords) -> dict:
    """The measurements that `function` returns, or why there are none: a missing backend, or not enough memory."""
    try:
        return function(*arguments, **keywords)
    except (NotImplementedError, ImportError, torch.OutOfMemoryError, RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        gc.collect()
        if on_gpu():
            torch.cuda.empty_cache()


def ceilings(toy: bool) -> dict[str, float]:
    """What the device reaches: bytes/s of a copy (read and written) and FLOP/s of a bf16 matmul, 8192^3."""
    size = 256 if toy else 8192
    source = randn(size, size * (1 if toy else 8))
    target = torch.empty_like(source)
    copy = 2 * tensor_bytes([source]) / median_ms(lambda: target.copy_(source)) * 1e3
    a, b = randn(size, size), randn(size, size)
    return {"copy_bytes_per_s": copy, "matmul_flop_per_s": 2 * size**3 / median_ms(lambda: a @ b) * 1e3}


def parse(doc: str, parts, add_arguments: Callable | None = None):
    """The arguments that the GPU benchmarks share, and those that `add_arguments` adds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results and plots")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--lengths", type=int, nargs="+", help="only these lengths")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that everything runs")
    if add_arguments is not None:
        add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: `--device cpu --toy` runs the same code on tiny shapes")
    global _device
    _device = arguments.device
    torch.manual_seed(0)
    return arguments


def run(name: str, parts: dict[str, Callable], arguments, plot: Callable) -> None:
    """
    Runs the chosen parts, each a generator of rows, printing every row and writing `<output>/<name>.json` after it;
    rows of parts that were not run stay as an earlier run left them.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    limits = ceilings(arguments.toy)
    print(json.dumps(limits), flush=True)
    for part in arguments.parts:
        rows = []
        for row in parts[part](arguments, limits):
            rows.append(row)
            print(part, " ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
            results[part] = {"hardware": hardware(), "ceilings": limits, "rows": rows}
            file.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`; of wide ranges only the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 100 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def draw(panels, file: Path) -> None:
    """`panels`: a title, a label of the x axis and lines (label, x, y) each, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in panels if any(x for _, x, _ in panel[2])]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
    for axis, (title, label, lines) in zip(axes[0], panels):
        for name, x, y in lines:
            if x:
                axis.plot(x, y, "o-", label=name)
        axis.set(title=title, xlabel=label, xscale="log", yscale="log")
        ticks = sorted({value for _, x, _ in lines for value in x})
        axis.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in ticks])
        axis.minorticks_off()
        low, high = (bound(value for _, _, y in lines for value in y) for bound in (min, max))
        axis.set_ylim(min(low, high / 4) / 1.5, high * 1.5)  # what hardly changes looks flat
        axis.set_yticks(_decades(min(low, high / 4) / 1.5, high * 1.5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)

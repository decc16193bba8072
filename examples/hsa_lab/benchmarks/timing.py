"""Times and peak memory of calls on a GPU or a CPU, what the device reaches, and runs of several parts."""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..results import provenance, write_json


MIB = 2**20
# Calls that take longer are timed a few times, by the clock; shorter ones many times, by `triton.testing.do_bench`.
LONG_CALL_MS = 300.0


def tensor_bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


class Timer:
    """Measures calls on one device: "cuda", in bf16, or "cpu", in fp32 and without figures of memory."""

    def __init__(self, device: str):
        self.device, self.on_gpu = device, device == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def clock_ms(self, function: Callable) -> float:
        """Milliseconds of one call, by the clock."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3

    def median_ms(self, function: Callable, repeats: int = 5) -> float:
        """Median milliseconds of a call, after one that is not counted."""
        self.clock_ms(function)
        once = self.clock_ms(function)
        if self.on_gpu and once < LONG_CALL_MS:
            from triton.testing import do_bench

            return do_bench(function, return_mode="median")
        return statistics.median([once, *(self.clock_ms(function) for _ in range(repeats - 1 if once < 3000 else 1))])

    def replay_ms(self, function: Callable) -> float | None:
        """Median milliseconds of replaying the call as a CUDA graph."""
        if not self.on_gpu:
            return None
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return self.median_ms(graph.replay)

    def extra_memory(self, function: Callable) -> float | None:
        """Peak MiB on the GPU during a call, beyond what was there before and the tensors it returns."""
        if not self.on_gpu:
            return None
        gc.collect()
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        returned = function()
        self.synchronize()
        returned = returned if isinstance(returned, (tuple, list)) else (returned,)
        return (torch.cuda.max_memory_allocated() - before - tensor_bytes(returned)) / MIB

    def forward_backward(
        self, function: Callable, inputs: list[torch.Tensor], memory: bool = True, graph: bool = False
    ) -> dict[str, float | None]:
        """
        Times of `function(*inputs)`, of its backward and of both, in ms, and extra peak memory of the first and the
        last; with `graph`, of the first and of both also as a CUDA graph, where launching from Python takes no time.
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
        times = {"forward_ms": self.median_ms(forward), "both_ms": self.median_ms(both)}
        if graph:
            times |= {"graph_forward_ms": self.replay_ms(forward), "graph_both_ms": self.replay_ms(both)}
        times["backward_ms"] = self._backward_ms(function(*inputs), wanted, grad)
        if memory:
            times |= {"forward_extra_mib": self.extra_memory(forward), "both_extra_mib": self.extra_memory(both)}
        return times

    def _backward_ms(self, output: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor) -> float:
        return self.median_ms(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True, allow_unused=True))

    def attempt(self, function: Callable, *arguments, **keywords) -> dict:
        """The measurements that `function` returns, or why there are none: a missing backend, or not enough memory."""
        try:
            return function(*arguments, **keywords)
        except (NotImplementedError, ImportError, torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        finally:
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def ceilings(self, toy: bool) -> dict[str, float]:
        """What the device reaches: bytes/s of a copy (read and written) and FLOP/s of a bf16 matmul, 8192^3."""
        size = 256 if toy else 8192
        source = self.randn(size, size * (1 if toy else 8))
        target = torch.empty_like(source)
        copy = 2 * tensor_bytes([source]) / self.median_ms(lambda: target.copy_(source)) * 1e3
        a, b = self.randn(size, size), self.randn(size, size)
        return {"copy_bytes_per_s": copy, "matmul_flop_per_s": 2 * size**3 / self.median_ms(lambda: a @ b) * 1e3}


class Benchmark:
    """
    Measurements on one device in parts, each a generator of rows: methods `measure_<part>`. All rows of the chosen
    parts are printed and written to `<output>/<name>.json` as they come; other parts stay as an earlier run left them.
    """

    name: str
    parts: tuple[str, ...]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--output", type=Path, required=True, help="folder for the results and plots")
        parser.add_argument("--parts", nargs="+", default=list(cls.parts), choices=cls.parts, help="what to measure")
        parser.add_argument("--lengths", type=int, nargs="+", help="only these lengths")
        parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to see that it runs")
        parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that everything runs")

    def __init__(self, arguments: argparse.Namespace):
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device: `--device cpu --toy` runs the same code on tiny shapes")
        torch.manual_seed(0)
        self.arguments, self.timer = arguments, Timer(arguments.device)
        self.limits = self.timer.ceilings(arguments.toy)

    def run(self) -> None:
        file = self.arguments.output / f"{self.name}.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        print(json.dumps(self.limits), flush=True)
        for part in self.arguments.parts:
            rows = []
            for row in getattr(self, f"measure_{part}")():
                rows.append(row)
                print(part, " ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
                results[part] = provenance() | {"ceilings": self.limits, "rows": rows}
                write_json(file, results)
        self.plot({part: result["rows"] for part, result in results.items()}, self.arguments.output)

    @classmethod
    def plot(cls, rows: dict[str, list[dict]], folder: Path) -> None:
        """Draws the rows of every part."""
        raise NotImplementedError


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

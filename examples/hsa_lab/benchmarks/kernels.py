"""
Time and memory of the operations of HSA and of the sliding window, each against its peers, on a GPU.

    python examples/benchmark.py kernels --output benchmarks/results/gpu --parts kernels selection window

`kernels`: chunk attention, forward and backward, on retrieved chunks that differ from query to query ("random") or
mostly agree ("shared", as those of trained models do). `selection`: the top chunks of many queries, and of one over a
long memory. `window`: the ways to compute the sliding window. Prints every row and writes kernels.json, with hardware
and versions, and plots. `--device cpu --toy` runs the same on tiny shapes.

A row also holds its floors: the time to read every input and write every output once at the bandwidth of a copy
(`bytes_floor_ms`), and the time of its arithmetic at the speed of a matmul of 8192^3 (`flop_floor_ms`), both measured
on the same device; and the ratio of the time to the larger one.
"""

import os
import random
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from modeling_hsa.layout import build_layout
from modeling_hsa.ops import chunk_attention, select_chunks
from modeling_hsa.window import window_attention

from ..plots import draw_scaling, named
from .timing import Benchmark, Timer, tensor_bytes


CHUNK_SIZE = 64
# Legends.
PATTERN_NAMES = {"random": "chunks at random", "shared": "shared chunks"}
WAYS = {"sdpa": "flash attention with a window", "sdpa, blocks": "masked blocks", "flex": "FlexAttention"}
SHAPE = ("batch", "length", "heads", "kv_heads", "dim", "topk")
# Batch, length, query heads, key/value heads, head dim, chunks per query.
SHAPES = [
    (8, 4096, 16, 1, 64, 8),
    (2, 16384, 16, 1, 64, 8),
    (1, 65536, 16, 1, 64, 8),
    (4, 4096, 32, 2, 128, 16),
    (1, 65536, 32, 2, 128, 16),
]
TOY_SHAPES = [(2, 512, 4, 1, 16, 4), (1, 1024, 4, 2, 16, 4)]
# Name, queries, landmarks, dim, whether causal.
SELECTIONS = [
    ("8192 queries", 8192, 1024, 64, False),
    ("8192 queries", 8192, 1024, 256, False),
    ("causal", 65536, 1024, 64, True),
    ("causal", 65536, 1024, 256, True),
    ("decode", 1, 524288, 64, False),
]
TOY_SELECTIONS = [("queries", 64, 32, 16, False), ("causal", 640, 10, 16, True), ("decode", 1, 512, 16, False)]


# -- indices --


def random_chunks(length: int, topk: int, generator: np.random.Generator) -> np.ndarray:
    """[L, K]: for every query distinct visible chunks, uniformly, nearest first; -1: none. (Floyd's sampling.)"""
    visible = np.arange(length)[:, None] // CHUNK_SIZE
    chosen = np.full((length, topk), -1)
    for i in range(topk):
        last = visible - topk + i  # the last of the chunks to sample from in this step
        drawn = (generator.random((length, 1)) * (last + 1)).astype(np.int64)
        taken = (chosen == drawn).any(1, keepdims=True)
        chosen[:, i : i + 1] = np.where(last < 0, -1, np.where(taken, last, drawn))
    everything = visible - 1 - np.arange(topk)  # of queries that see no more than K
    return np.where(visible <= topk, np.maximum(everything, -1), -np.sort(-chosen, axis=1))


def shared_chunks(length: int, topk: int, generator: np.random.Generator, change: float = 0.1) -> np.ndarray:
    """As `random_chunks`, but each chunk of a query is one of the query before, but for a probability of `change`."""
    draw, rows, chosen = random.Random(int(generator.integers(1 << 30))), [], []
    for t in range(length):
        visible = t // CHUNK_SIZE
        if visible <= topk:
            chosen = list(range(visible))
        else:
            for slot in range(topk):
                if draw.random() < change:
                    new = draw.randrange(visible)
                    while new in chosen:
                        new = draw.randrange(visible)
                    chosen[slot] = new
        rows.append(sorted(chosen, reverse=True) + [-1] * (topk - len(chosen)))
    return np.array(rows)


PATTERNS = {"random": random_chunks, "shared": shared_chunks}


def make_indices(pattern: str, batch: int, length: int, heads: int, topk: int, device: str = "cpu") -> torch.Tensor:
    """int32 [B, L, H, K]."""
    generator = np.random.default_rng(0)
    rows = [PATTERNS[pattern](length, topk, generator) for _ in range(batch * heads)]
    stacked = np.stack(rows).reshape(batch, heads, length, topk).swapaxes(1, 2)
    return torch.tensor(np.ascontiguousarray(stacked), dtype=torch.int32, device=device)


# -- chunk attention --


def causal_sdpa(q, k, v, weights, indices):
    """Causal attention to all tokens, by the kernel that PyTorch takes of its own accord (on Hopper: cuDNN's)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2)


def causal_flash(q, k, v, weights, indices):
    """As `causal_sdpa`, by the FlashAttention-2 of PyTorch."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return causal_sdpa(q, k, v, weights, indices)


def fla_nsa(q, k, v, weights, indices):
    """The branch of Native Sparse Attention that attends to selected blocks: one softmax over all, no weights."""
    from fla.ops.nsa import parallel_nsa

    return parallel_nsa(q, k, v, block_indices=indices, block_counts=indices.shape[-1], block_size=CHUNK_SIZE)


def _hsa(implementation: str):
    return lambda q, k, v, weights, indices: chunk_attention(
        q, k, v, weights, indices, chunk_size=CHUNK_SIZE, implementation=implementation
    )


IMPLEMENTATIONS = {
    "triton": _hsa("triton"),
    "torch": _hsa("torch"),
    "sdpa": causal_sdpa,
    "flash": causal_flash,
    "fla nsa": fla_nsa,
}


def first_call_ms(timer: Timer, function, inputs: list[torch.Tensor]) -> float:
    """What the first forward and backward take longer than the second: the time of compiling."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]

    def step():
        output = function(*inputs)
        output.backward(torch.ones_like(output))

    return timer.clock_ms(step) - timer.clock_ms(step)


def measure_attention(timer: Timer, name: str, inputs: list[torch.Tensor]) -> dict:
    function = IMPLEMENTATIONS[name]
    row = {"compile_ms": first_call_ms(timer, function, inputs)} if timer.on_gpu else {}  # a CPU compiles nothing
    row |= timer.forward_backward(function, inputs, graph=name != "torch")
    if row["both_extra_mib"] is not None:
        for what in ("forward", "both"):
            row[f"{what}_extra_of_inputs"] = row[f"{what}_extra_mib"] * 2**20 / tensor_bytes(inputs)
    return row


def with_floors(row: dict, inputs: list[torch.Tensor], limits: dict) -> dict:
    """
    Adds the floors. FLOPs of the forward: 4 S D per query head and present chunk. The backward takes five matmuls of
    this size where the forward takes two, and reads the inputs, the output and its gradient, and writes those of q, k,
    v and the weights.
    """
    q, k, v, weights, indices = inputs
    flop = 4 * q.shape[3] * (indices >= 0).sum().item() * CHUNK_SIZE * q.shape[2] // indices.shape[2]
    moved = tensor_bytes([*inputs, q])
    gradients = tensor_bytes([q, k, v, weights])
    work = {"forward": (flop, moved), "backward": (2.5 * flop, moved + tensor_bytes([q]) + gradients)}
    for what, (flop, moved) in work.items():
        floors = {"bytes": moved / limits["copy_bytes_per_s"] * 1e3, "flop": flop / limits["matmul_flop_per_s"] * 1e3}
        row |= {f"{what}_{kind}_floor_ms": floor for kind, floor in floors.items()}
        if f"{what}_ms" in row:
            row[f"{what}_times_floor"] = row[f"{what}_ms"] / max(floors.values())
    return row


# -- selection --


def naive_selection(q, landmarks, visible, topk: int):
    """All scores at once in fp32, then `torch.topk`."""
    scores = torch.einsum("blhd,bchd->blhc", q, landmarks).float() * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.topk(topk, dim=-1)


# -- the sliding window --


def _window(implementation: str, flash: bool, layout, window: int, heads: int, kv_heads: int, dim: int):
    """`window_attention` as a layer calls it, with or without the flash attention of PyTorch."""
    config = SimpleNamespace(_attn_implementation=implementation)
    groups = heads // kv_heads
    module = SimpleNamespace(config=config, is_causal=True, num_key_value_groups=groups, training=False, layer_idx=0)
    attention = ALL_ATTENTION_FUNCTIONS[implementation]

    def function(q, k, v):
        backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] + [SDPBackend.FLASH_ATTENTION] * flash
        with sdpa_kernel(backends):
            output, _ = window_attention(attention, module, q, k, v, layout, window, dropout=0.0, scaling=dim**-0.5)
        return output

    return function


def _flex(window: int, queries: int, keys: int, device: str):
    """Compiled FlexAttention; the block mask, which layers would share, is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # of a function that is compiled for many shapes, PyTorch leaves the last ones uncompiled
    torch._functorch.config.donated_buffer = False  # backward is timed by running it again and again
    past = keys - queries
    mask = create_block_mask(
        lambda b, h, q, k: (q + past >= k) & (q + past - k < window), None, None, queries, keys,
        device=device,
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def window_implementations(timer: Timer, queries: int, past: int, shape: tuple) -> dict:
    """By name what makes the function of q, k and v [1, H, tokens, D], `past` keys being of earlier calls."""
    layout = build_layout(1, queries, torch.device(timer.device), chunk_size=CHUNK_SIZE)
    position = torch.arange(past, past + queries, device=timer.device)[None]
    layout = replace(layout, position=position, past=past, shared={})
    # As rows of different lengths have it: one token of rows of the same length needs no mask.
    masked = replace(layout, past=None, shared={}) if queries == 1 else layout
    functions = {
        "sdpa, blocks": lambda: _window("sdpa", False, masked, *shape),
        "sdpa": lambda: _window("sdpa", True, layout, *shape),
    }
    if timer.on_gpu:
        functions["flex"] = lambda: _flex(shape[0], queries, past + queries, timer.device)
        if is_flash_attn_2_available():
            functions["flash_attention_2"] = lambda: _window("flash_attention_2", True, layout, *shape)
    return functions


def measure_window_call(timer: Timer, make, inputs: list[torch.Tensor], with_backward: bool) -> dict:
    function = make()
    if with_backward:
        return timer.forward_backward(function, inputs)
    with torch.no_grad():
        return {"forward_ms": timer.median_ms(lambda: function(*inputs))}


# -- the benchmark --


class Kernels(Benchmark):
    name, parts = "kernels", ("kernels", "selection", "window")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        group = parser.add_argument_group("of `kernels`")
        group.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS), help="only these")
        group.add_argument("--dims", type=int, nargs="+", help="only these")
        group.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS), help="of chunks")

    def measure_kernels(self) -> Iterator[dict]:
        arguments, timer = self.arguments, self.timer
        names = arguments.implementations or (["torch", "sdpa"] if arguments.toy else list(IMPLEMENTATIONS))
        # An empty cache, so that the first call of a shape compiles what no earlier one has.
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
        for shape in TOY_SHAPES if arguments.toy else SHAPES:
            batch, length, heads, kv_heads, dim, topk = shape
            if arguments.lengths and length not in arguments.lengths or arguments.dims and dim not in arguments.dims:
                continue
            q, k, v = (timer.randn(batch, length, h, dim) for h in (heads, kv_heads, kv_heads))
            for pattern in arguments.patterns:
                indices = make_indices(pattern, batch, length, kv_heads, topk, timer.device)
                weights = torch.rand(indices.shape, device=timer.device) / topk * (indices >= 0)
                inputs = [q, k, v, weights, indices]
                for name in names:
                    takes_no_indices = name in ("sdpa", "flash") and pattern != arguments.patterns[0]
                    if takes_no_indices or name == "torch" and length > 16384:  # the latter takes too long
                        continue
                    row = dict(zip(SHAPE, shape)) | {"pattern": pattern, "implementation": name}
                    row |= timer.attempt(measure_attention, timer, name, inputs)
                    if name in ("triton", "torch"):
                        row = with_floors(row, inputs, self.limits)
                    yield row

    def measure_selection(self) -> Iterator[dict]:
        timer, topk = self.timer, 8
        for case, queries, chunks, dim, causal in TOY_SELECTIONS if self.arguments.toy else SELECTIONS:
            q = timer.randn(1, queries, 1, dim)
            landmarks = timer.randn(1, chunks, 1, dim)
            options = {"topk": topk, "chunk_size": CHUNK_SIZE, "q_start": 0 if causal else chunks * CHUNK_SIZE}
            visible = None
            if causal:
                position = torch.arange(queries, device=timer.device)
                visible = torch.arange(chunks, device=timer.device) < (position // CHUNK_SIZE)[:, None]
                visible = visible[None, :, None]
            functions = {
                name: partial(select_chunks, q, landmarks, **options, implementation=name)
                for name in ("triton", "torch")
                if timer.on_gpu or name == "torch"
            }
            functions["naive"] = partial(naive_selection, q, landmarks, visible, topk)
            floor = tensor_bytes([q, landmarks]) + queries * topk * 8
            flop = 2 * queries * chunks * dim / (2 if causal else 1)
            for name, function in functions.items():
                row = {"case": case, "queries": queries, "chunks": chunks, "dim": dim, "implementation": name}
                with torch.no_grad():
                    row |= timer.attempt(
                        lambda f: {"ms": timer.median_ms(f), "extra_mib": timer.extra_memory(f)}, function
                    )
                    if name != "torch" and timer.on_gpu:
                        row |= timer.attempt(lambda f: {"graph_ms": timer.replay_ms(f)}, function)
                row["bytes_floor_ms"] = floor / self.limits["copy_bytes_per_s"] * 1e3
                row["flop_floor_ms"] = flop / self.limits["matmul_flop_per_s"] * 1e3
                yield row

    def measure_window(self) -> Iterator[dict]:
        arguments, timer = self.arguments, self.timer
        window, heads, kv_heads, dim = (32, 4, 2, 16) if arguments.toy else (512, 16, 4, 64)
        lengths = arguments.lengths or ([256] if arguments.toy else [4096, 16384, 65536])
        # Name, queries, cached keys.
        cases = [("whole", length, 0) for length in lengths]
        cases += [("segment", 128 if arguments.toy else 4096, window - 1), ("decode", 1, window - 1)]
        for case, queries, past in cases:
            sizes = ((queries, heads), (past + queries, kv_heads), (past + queries, kv_heads))
            inputs = [timer.randn(1, n, h, dim).transpose(1, 2) for n, h in sizes]
            functions = window_implementations(timer, queries, past, (window, heads, kv_heads, dim))
            for name, make in functions.items():
                row = {"case": case, "queries": queries, "keys": past + queries, "implementation": name}
                yield row | timer.attempt(measure_window_call, timer, make, inputs, case == "whole")

    @classmethod
    def plot(cls, rows: dict[str, list[dict]], folder: Path) -> None:
        for part, x in (("kernels", "length"), ("window", "queries")):
            kept = [row for row in rows.get(part, []) if "both_ms" in row]
            kept = [row for row in kept if all(row.get(name) == kept[0].get(name) for name in ("heads", "dim"))]
            panels = {}
            for field in ("forward_ms", "backward_ms"):
                lines = panels.setdefault(field.replace("_", ", "), {})
                for row in kept:
                    uses_chunks = "pattern" in row and row["implementation"] not in ("sdpa", "flash")
                    label = (
                        WAYS.get(row["implementation"], row["implementation"])
                        if part == "window"
                        else named(row["implementation"])
                    )
                    label += f", {PATTERN_NAMES[row['pattern']]}" if uses_chunks else ""
                    line = lines.setdefault(label, ([], []))
                    line[0].append(row[x])
                    line[1].append(row[field])
            draw_scaling(panels, folder / f"{part}.png")

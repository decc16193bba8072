"""Comparisons, what operations allocate, a plain flash attention, and processes without the package."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_hsa.ops import library


# Relative errors in fp32: where the arithmetic is the same, and where sums are taken in another order.
SAME_ARITHMETIC = 1e-5
OTHER_ORDER = 1e-4


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


class InsideOperators(TorchDispatchMode):
    """A dispatch mode that also sees what the operators of `modeling_hsa.ops` do inside, in plain PyTorch."""

    _FUNCTIONS = ("torch_selection", "torch_selection_backward", "torch_attention", "torch_attention_backward")

    def __enter__(self):
        self._functions = {name: getattr(library, name) for name in self._FUNCTIONS}
        for name, function in self._functions.items():
            setattr(library, name, self._watched(function))
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for name, function in self._functions.items():
            setattr(library, name, function)

    def _watched(self, function):
        def run(*args):
            super(InsideOperators, self).__enter__()
            try:
                return function(*args)
            finally:
                super(InsideOperators, self).__exit__(None, None, None)

        return run


class Allocations(InsideOperators):
    """Records the tensors that operations make in storage of their own, so neither views nor what is written into."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[int, int]] = []  # elements of a tensor, and the address of its storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made.append((x.numel(), x.untyped_storage().data_ptr()))
        return result

    def elements(self, but=()) -> list[int]:
        """The number of elements of each tensor made, except for the tensors `but`."""
        excluded = {(x.numel(), x.untyped_storage().data_ptr()) for x in but}
        return [elements for elements, address in self.made if (elements, address) not in excluded]


def attend(q, k, v, scale, causal, window):
    """
    q [n, Hq, D], k, v [m, Hkv, D] -> [n, Hq, D]. Causality is aligned at the bottom right: the last query is at the
    last key. `window` is (left, right), how many tokens are seen on each side; -1: all. A query that sees nothing
    gives 0.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    ahead = torch.arange(k.shape[0]) - torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    left, right = window
    if causal:
        right = 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    probs = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hnm,mhd->nhd", probs, v)


def attend_sequences(q, k, v, bounds_q, bounds_k, max_q, max_k, scale, causal, window) -> torch.Tensor:
    """q [total, Hq, D], k, v [total, Hkv, D]: sequences one after the other, cut at the cumulative lengths."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and len(bounds_q) == len(bounds_k)
    assert int(bounds_q[-1]) == len(q) and int(bounds_k[-1]) == len(k) == len(v)
    lengths_q, lengths_k = bounds_q.diff().tolist(), bounds_k.diff().tolist()
    assert max(lengths_q) <= int(max_q) and max(lengths_k) <= int(max_k)
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    return torch.cat([attend(*sequence, scale, causal, window) for sequence in sequences])


BLOCK_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_hsa", "configuration_hsa"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run_without_the_package(code: str, folder: Path, *arguments: str) -> str:
    """What `code` prints in a fresh, offline process that cannot import the package, in `folder`, with `arguments`."""
    (folder / "script.py").write_text(BLOCK_THE_PACKAGE + code, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # as here, for bitwise equal sums
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "script.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout

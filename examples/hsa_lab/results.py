"""Results of evaluations and benchmarks: where they were made and of what, scores with intervals, files and tables."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from .commands import REPOSITORY


# -- where and of what --


def hardware() -> dict[str, str | int]:
    """The machine and the versions of what runs on it, of this package where it is installed."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    found = {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
    for peer in ("fla-core", "flash-attn", "mamba-ssm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    if importlib.util.find_spec("configuration_hsa"):
        from configuration_hsa.versions import __version__

        found["hsa"] = __version__
    return found


def commit() -> str | None:
    """The commit that the code is of, with "-dirty" where files differ from it; None outside of git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict:
    """What every file of results has: the hardware with versions, and the commit."""
    return {"hardware": hardware(), "commit": commit()}


def write_json(file: Path, content: dict | list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# -- scores --


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson 95 % interval of a proportion. Fractional successes (parts of an answer) give a wider one: safe."""
    if trials == 0:
        return 0.0, 1.0
    p, w = successes / trials, z * z / trials
    middle, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / trials + w / trials / 4) / (1 + w)
    return max(0.0, middle - half), min(1.0, middle + half)


def student(trials: int) -> float:
    """
    The 97.5 % quantile of Student's t of `trials` samples: tabulated, then the expansion of Abramowitz and Stegun,
    26.7.5, which is right to 0.01 from there on.
    """
    v = trials - 1
    if v < 4:
        return (math.inf, 12.706, 4.303, 3.182)[v]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean of the samples with its 95 % interval, which one sample has not."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = student(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ratio(above: list[float], below: list[float]) -> dict[str, float | None]:
    """Ratio of two sums over samples, with its 95 % interval by the delta method."""
    mean = sum(above) / max(sum(below), 1)
    spread = interval([(a - mean * b) * len(below) / max(sum(below), 1) for a, b in zip(above, below)])
    return {"mean": mean} | {k: None if spread[k] is None else mean + spread[k] for k in ("low", "high")}


def summarise(records: Sequence[dict]) -> dict:
    """
    Accuracy of records with a `score` in [0, 1] each, and its interval. With `recall` (of `retrieval_recall`) also its
    mean, by layer and in total, and the accuracy of the samples all whose needles were retrieved.
    """
    total = sum(record["score"] for record in records)
    low, high = wilson(total, len(records))
    row = {"samples": len(records), "accuracy": total / max(len(records), 1), "low": low, "high": high}
    with_recall = [record for record in records if record.get("recall") is not None]
    if with_recall:
        mean = np.mean([record["recall"] for record in with_recall], axis=0)
        found = [record["score"] for record in with_recall if record["recall"][-1] == 1]
        row |= {"recall": float(mean[-1]), "recall_by_layer": mean[:-1].tolist(), "retrieved": len(found)}
        row["accuracy_if_retrieved"] = sum(found) / len(found) if found else None
    return row


def columns(records: Sequence[dict]) -> dict[str, list]:
    """Records as one list a field, None where one lacks it: compact in JSON."""
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()} for record in records]
    names = dict.fromkeys(name for record in rounded for name in record)
    return {name: [record.get(name) for record in rounded] for name in names}


# -- files --


class Results:
    """
    `<output>/<name>.json`: provenance, the model, the arguments, and one row a task and length, each with its summary
    and records. Written after every row, so that a run that was cut short leaves what it had.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, model):
        self.file = arguments.output / f"{name}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.content = provenance()
        self.content["hardware"] |= {"device": str(model.device), "dtype": str(model.dtype)}
        self.content["model"] = {
            "name": Path(arguments.model).name if Path(arguments.model).is_dir() else arguments.model,
            "type": model.config.model_type,
            "parameters": model.num_parameters(),
        }
        if getattr(arguments, "base", None):
            self.content["base"] = Path(arguments.base).name
        self.content["arguments"] = {
            k: _plain(v) for k, v in vars(arguments).items() if k not in ("model", "base", "output")
        }
        self.content["arguments"]["config"] = dict(arguments.config)
        self.content["rows"] = []

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    def add(self, task: str, length: int, row: dict, records: Sequence[dict] = ()) -> None:
        self.rows.append({"task": task, "length": length} | row | ({"records": columns(records)} if records else {}))
        self.write()

    def write(self) -> None:
        # One line a row: readable, and small with thousands of records.
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        head = json.dumps(
            {k: v for k, v in self.content.items() if k != "rows"} | {"rows": None}, indent=1
        ).removesuffix("null\n}")
        self.file.write_text(f"{head}[\n{rows}\n]\n}}\n", encoding="utf-8")

    def table(self) -> str:
        """Tasks by lengths: accuracy in percent, with its interval."""
        lengths = sorted({row["length"] for row in self.rows})
        cells = {(row["task"], row["length"]): row for row in self.rows}
        tasks = dict.fromkeys(row["task"] for row in self.rows)
        wide = max(18, *(len(task) + 2 for task in tasks))
        lines = [" " * wide + "".join(f"{short(length) if length else 'alone':>18}" for length in lengths)]
        for task in tasks:
            texts = [_cell(cells.get((task, length))) for length in lengths]
            lines.append(f"{task:{wide}}" + "".join(f"{text:>18}" for text in texts))
        return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    interval = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.0f}-{100 * row['high']:.0f}]" if "low" in row else ""
    return row.get("error", interval)


def read_rows(files: Sequence[Path]) -> list[dict]:
    """The rows of all files that have results, by length. Raises: ValueError if two are of one task and length."""
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    rows = sorted((row for row in rows if "error" not in row), key=lambda row: row["length"])
    cells = [(row["task"], row["length"]) for row in rows]
    if double := {cell for cell in cells if cells.count(cell) > 1}:
        task, length = sorted(double)[0]
        raise ValueError(f"Two of the files have results of {task} at {length:,} tokens: leave one out.")
    return rows


def _plain(value):
    """For JSON; of files only the names, since folders say nothing elsewhere."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.name if isinstance(value, Path) else value


def short(tokens: int) -> str:
    """4096 -> 4K, 1048576 -> 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"

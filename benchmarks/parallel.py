"""
Checks models that are spread over two GPUs against the same models on one, and writes what errors were seen. From the
root of the repository:

    python -m benchmarks.parallel --output benchmarks/results/gpu/parallel.json

`device_map` (in every way to cut the model, and "auto") must change no bit. Tensor parallelism, DDP and FSDP2 run the
cases of tests/distributed/cases.py that are named there for GPUs, each compared in logits, every gradient, a step of
training, and generation; errors are relative to the norm. The models are tiny: this is no measure of speed.

The file is written whenever a case ends. One that takes longer than `--limit` seconds has failed, and its traceback is
in the file. `--device cpu` runs the same on the CPU (gloo, and the disk in place of the second GPU). Exits with 1 if
anything is wrong.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

from tests.distributed.cases import ON_CPU, ON_GPUS
from tests.distributed.device_maps import starts
from tests.distributed.launch import problems, run_cases, run_device_maps, untrained_entries
from tests.models import tiny_model


REPOSITORY = Path(__file__).resolve().parents[1]
DEVICE_MAP = "device_map-"


def commit() -> str | None:
    """That of the checkout, if it is one."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return run.stdout.strip() or None


def environment(device: str) -> dict[str, object]:
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device == "cuda":
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def all_cases(device: str) -> list[str]:
    cuts = [DEVICE_MAP + start for start in starts(tiny_model())]
    if device == "cpu":
        return [*(name for name in ON_GPUS if name in ON_CPU), *cuts]
    return [*ON_GPUS, f"{DEVICE_MAP}auto", *cuts]


class Results:
    """Those of the cases that ended, in a file."""

    def __init__(self, names: list[str], output: Path, head: dict[str, object]):
        self.names, self.output, self.head = names, output, head
        self.cases: dict[str, dict] = {}
        self.start, self.lock = time.perf_counter(), threading.Lock()
        self.write()

    def add(self, result: dict) -> None:
        with self.lock:
            self.cases[result["case"]] = result
            wrong = problems([result["case"]], {result["case"]: result})
            print(f"{len(self.cases)}/{len(self.names)} {result['case']}: {wrong or 'right'}", flush=True)
            self.write()

    def wrong(self) -> dict[str, object]:
        found = problems(self.names, self.cases)
        if set(ON_GPUS) <= set(self.names) and (untrained := untrained_entries(self.cases)):
            found["entries of the plan that no case trained"] = sorted(untrained)
        return found

    def write(self) -> None:
        seconds = round(time.perf_counter() - self.start, 1)
        cases = {
            name: {key: value for key, value in result.items() if key not in ("case", "trained") and value}
            for name, result in self.cases.items()
        }
        content = {**self.head, "seconds": seconds, "wrong": self.wrong(), "cases": cases}
        temporary = self.output.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.output)


def run_all(names: list[str], device: str, limit: float, results: Results) -> None:
    """Three kinds at a time, as starting and compiling take longer than what the GPUs do."""
    cuts = [name.removeprefix(DEVICE_MAP) for name in names if name.startswith(DEVICE_MAP)]
    tensor_parallel = [name for name in names if name.startswith("tp-")]
    others = [name for name in names if name not in tensor_parallel and not name.startswith(DEVICE_MAP)]

    def add_cut(result: dict) -> None:
        results.add({**result, "case": DEVICE_MAP + result["case"]})

    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(run_cases, tensor_parallel, device, limit, results.add),
            pool.submit(run_cases, others, device, limit, results.add),
            pool.submit(run_device_maps, cuts, device, limit, add_cut),
        ]
    for job in jobs:
        job.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these; what the file has tells their names")
    parser.add_argument("--limit", type=float, default=90, help="seconds that a case may take, or the start")
    parser.add_argument("--commit", default=commit(), help="where the code is no checkout of git")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, but PyTorch sees {torch.cuda.device_count()}. Use --device cpu.")
    known = all_cases(args.device)
    if unknown := set(args.cases or ()) - set(known):
        parser.error(f"no such cases: {', '.join(sorted(unknown))}. There are {', '.join(known)}.")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    head = {"commit": args.commit, "environment": environment(args.device)}
    results = Results(args.cases or known, args.output, head)
    run_all(results.names, args.device, args.limit, results)
    wrong = results.wrong()
    print(f"{len(results.names) - len(wrong)} of {len(results.names)} cases are right: {args.output}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

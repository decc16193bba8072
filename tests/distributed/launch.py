"""Starting the processes of `worker.py` and `device_maps.py`, and what is wrong with their results."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers import OTHER_ORDER
from tests.models import tiny_model


REPOSITORY = Path(__file__).parents[2]
PROCESSES = 2
# Times the error that one process makes in bf16.
BF16_EXCESS = 2.0

Report = Callable[[dict], None]


def run_cases(
    cases: Sequence[str], device: str = "cpu", limit: float = 120, report: Report = lambda result: None
) -> dict[str, dict]:
    """
    Runs cases of `cases.CASES` in two processes, on two GPUs with `device="cuda"`.

    Args:
        limit: seconds that a case may take.
        report: is called with the result of each case when it ends.

    Returns: what `worker.py` writes, by case, and `{"case": ..., "failure": ...}` for one that the processes did not
        survive; others then run the rest.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES))
    return _run_all((*launcher, "-m", "tests.distributed.worker"), cases, device, limit, report)


def run_device_maps(
    places: Sequence[str], device: str = "cpu", limit: float = 120, report: Report = lambda result: None
) -> dict[str, dict]:
    """As `run_cases`, for a model that one process cuts at each of `places`: see `device_maps.py`."""
    return _run_all(("-m", "tests.distributed.device_maps"), places, device, limit, report)


def _run_all(program: tuple[str, ...], cases, device: str, limit: float, report: Report) -> dict[str, dict]:
    results: dict[str, dict] = {}
    while rest := [name for name in cases if name not in results]:
        for result in _run(program, rest, device, limit):
            results[result["case"]] = result
            report(result)
    return results


def _run(program: tuple[str, ...], cases: list[str], device: str, limit: float):
    """The results of cases as they end, the last that of one that failed if one does."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONWARNINGS": "ignore",
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Transformers takes a GPU where there is one
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "results.jsonl", Path(folder) / "log"
        output.touch()
        words = ("--output", str(output), "--device", device, "--limit", str(limit), *cases)
        with log.open("w") as file, output.open(encoding="utf-8") as lines:
            run = subprocess.Popen(
                [sys.executable, *program, *words], env=environment, cwd=REPOSITORY, stdout=file, stderr=file
            )
            ended = 0
            try:
                is_over = False
                while not is_over:
                    is_over = run.poll() is not None
                    for line in lines:
                        ended += 1
                        yield json.loads(line)
                    time.sleep(0.1)
            finally:
                run.terminate()  # the launcher ends its processes
                run.wait()
        if run.returncode or ended < len(cases):
            died = cases[ended] if ended < len(cases) else "the end"
            yield {"case": died, "failure": log.read_text(errors="replace")[-20000:]}


def problems(cases, results: dict[str, dict], tolerance: float = OTHER_ORDER) -> dict[str, object]:
    """What is wrong with the results of cases, by case; nothing if they are as they should be."""
    found: dict[str, object] = {}
    for name in dict.fromkeys([*cases, *results]):
        result = results.get(name, {"failure": "did not run"})
        large = {what: error for what, error in result.get("errors", {}).items() if not error <= tolerance}
        large |= {what: excess for what, excess in result.get("excess", {}).items() if not excess <= BF16_EXCESS}
        if wrong := result.get("failure") or large:
            found[name] = wrong
    return found


def untrained_entries(results: dict[str, dict]) -> set[str]:
    """Entries of the tensor parallel plan whose parameters got a gradient in none of the cases."""
    trained = set().union(*(result.get("trained", ()) for result in results.values()))
    return set(tiny_model().tp_plan) - trained

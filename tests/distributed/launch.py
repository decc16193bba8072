"""Starting the processes of `worker.py`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import OTHER_ORDER
from tests.models import tiny_model


REPOSITORY = Path(__file__).parents[2]
PROCESSES = 2
# Times the error that one process makes in bf16.
BF16_EXCESS = 2.0


def run_cases(cases, device: str = "cpu", timeout: float = 450) -> dict[str, dict]:
    """
    Runs cases of `cases.CASES` in two processes, on two GPUs with `device="cuda"`.

    Returns: what `worker.py` writes, and `{"failure": ...}` for the case that the processes did not survive.
    """
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
        output, log = Path(folder) / "results.json", Path(folder) / "log"
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES))
        command = [sys.executable, *launcher, "-m", "tests.distributed.worker", "--output", str(output)]
        with log.open("w") as file:
            run = subprocess.Popen(
                [*command, "--device", device, *cases], env=environment, cwd=REPOSITORY, stdout=file, stderr=file
            )
            try:
                run.wait(timeout)
            except subprocess.TimeoutExpired:
                run.terminate()  # the launcher ends its processes
                run.wait()
        results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        if run.returncode:
            died = next((name for name in cases if name not in results), "the end")
            results[died] = {"failure": log.read_text(errors="replace")[-4000:]}
    return results


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

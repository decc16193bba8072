"""
A model on several processes is the model on one: its logits, every gradient, a step of training and generation.

Two processes run all cases of a group (see `cases.py`), as to start them takes longer than a case.
"""

import json
import subprocess
import sys

import pytest
import torch

from tests.distributed.cases import FEW, ON_CPU, ON_GPUS
from tests.distributed.launch import REPOSITORY, problems, run_cases, run_device_maps, untrained_entries
from tests.distributed.worker import largest


def test_one_case_of_each_kind():
    results = run_cases(FEW)
    assert problems(FEW, results) == {}


@pytest.mark.slow
@pytest.mark.parametrize("group", dict.fromkeys(name.partition("-")[0] for name in ON_CPU))
def test_several_processes_train_and_generate_as_one(group):
    cases = [name for name in ON_CPU if name.startswith(f"{group}-")]
    results = run_cases(cases)
    assert problems(cases, results) == {}
    if group == "tp":
        assert untrained_entries(results) == set()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_gpus_train_and_generate_as_one():
    results = run_cases(ON_GPUS, device="cuda")
    assert problems(ON_GPUS, results) == {}
    assert untrained_entries(results) == set()


@pytest.mark.slow
def test_a_case_that_hangs_or_fails_is_recorded_and_the_rest_runs():
    """In what `benchmarks/parallel.py` runs."""
    hung = run_device_maps(["model.norm"], limit=0.1)["model.norm"]
    assert "Timeout" in hung["failure"] and "device_maps.py" in hung["failure"]
    results = run_device_maps(["auto", "model.norm"])  # with one device
    assert "AssertionError: All modules were put in one place." in results["auto"]["failure"]
    assert problems(["auto", "model.norm"], results).keys() == {"auto"}


def test_errors_that_are_no_number_are_found():
    assert problems(["a"], {"a": {"errors": {"logits": largest([0.0, float("nan"), 1e-9])}}}).keys() == {"a"}


@pytest.mark.slow
def test_the_benchmark_writes_what_it_saw(tmp_path):
    cases = ["tp-default", "ddp-uneven", "fsdp-uneven", "device_map-model.norm"]
    words = ["--output", tmp_path / "parallel.json", "--device", "cpu", "--cases", *cases]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.parallel", *words], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    made = json.loads((tmp_path / "parallel.json").read_text(encoding="utf-8"))
    assert made["wrong"] == {} and made["cases"].keys() == set(cases)
    assert all("tokens of generate" in made["cases"][name]["errors"] for name in cases[:3])
    assert "4 of 4 cases are right" in run.stdout

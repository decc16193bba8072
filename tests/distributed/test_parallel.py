"""
A model on several processes is the model on one: its logits, every gradient, a step of training and generation.

Two processes run all cases of a group (see `cases.py`), as to start them takes longer than a case.
"""

import pytest
import torch

from tests.distributed.cases import FEW, ON_CPU, ON_GPUS
from tests.distributed.launch import problems, run_cases, untrained_entries


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

"""
A model on several processes is the model on one: its logits, every gradient, a step of training and generation.

Two processes run all cases of a group (see `cases.py`), as to start them takes longer than a case.
"""

import pytest
import torch

from tests.distributed.cases import FEW, ON_CPU, ON_GPUS
from tests.distributed.launch import problems, run_cases, untrained_entries


# On one process its gradients are right (tests/model/test_training.py). On several, the processes disagree about the
# order of the collectives of the chunk encoder, unless it is frozen: the cause is not found yet.
FSDP_IS_BROKEN = pytest.mark.xfail(reason="FSDP2 on several processes: collectives out of order", strict=False)


def test_one_case_of_each_kind():
    results = run_cases(FEW)
    assert problems(FEW, results) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "group",
    [
        pytest.param(group, marks=FSDP_IS_BROKEN) if "fsdp" in group else group
        for group in dict.fromkeys(name.partition("-")[0] for name in ON_CPU)
    ],
)
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

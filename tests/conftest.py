"""Fixtures and settings of all tests: seeds, the skipping of GPU tests, Hypothesis settings, model variants."""
# ruff: noqa: E402

import os
from zlib import crc32

import pytest
import torch


# Without a GPU the kernels run in Triton's interpreter, which it asks for when it is imported: Transformers does that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, register_random, settings
from transformers import set_seed

from modeling_hsa import HSAForCausalLM

from .models import FAST_VARIANTS, VARIANTS, make_variant, tiny_model


# The models are so small that threads only get in each other's way.
torch.set_num_threads(1)

settings.register_profile(
    "hsa", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("hsa")


class _TorchRandom:
    """Lets Hypothesis seed PyTorch, so that it can repeat an example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()
register_random(_torch_random)


def covering(cases: list[set]) -> list[int]:
    """The numbers of a few cases that together have every value of any."""
    missing, chosen = set().union(*cases), []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(cases[i] & missing))
        chosen.append(best)
        missing -= cases[best]
    return chosen


def variant_of(item) -> str | None:
    """The key of `VARIANTS` that a case is about."""
    parameters = item.callspec.params
    name = parameters.get("variant_model", parameters.get("name"))
    return name if isinstance(name, str) and name in VARIANTS else None


def fast_cases(cases: list) -> list:
    """
    Those of a test that the fast tier has. One variant of the model, of `FAST_VARIANTS`, which one follows from the
    name of the test, and two cases, with as many values of other arguments as two can have. Of tests of kernels, which
    are slow to interpret, one case, and of what is refused, which costs little, every value.
    """
    name = cases[0].originalname
    if all(map(variant_of, cases)):
        variants = [variant for variant in FAST_VARIANTS if variant in map(variant_of, cases)]
        variant = variants[crc32(name.encode()) % len(variants)] if variants else variant_of(cases[0])
        cases = [case for case in cases if variant_of(case) == variant]
    limit = 1 if cases[0].path.name.startswith("test_triton") else 2
    if any(words in name for words in ("refused", "does_not_fit")):
        limit = len(cases)
    # Values by identity, as not all can be hashed.
    values = [{(argument, id(value)) for argument, value in case.callspec.params.items()} for case in cases]
    return [cases[i] for i in covering(values)[:limit]]


def mark_slow(items) -> None:
    """What repeats a case of the fast tier, and searches for counterexamples, are slow too."""
    tests: dict[str, list] = {}
    for item in items:
        if getattr(item.obj, "is_hypothesis_test", False):
            item.add_marker(pytest.mark.slow)
        elif hasattr(item, "callspec") and "slow" not in item.keywords:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        fast = fast_cases(cases)
        for case in cases:
            if case not in fast:
                case.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items):
    mark_slow(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)


@pytest.fixture(autouse=True)
def _free_gpu_memory(request):
    """Tests that run beside each other share one GPU: none keeps what it no longer uses."""
    yield
    if "gpu" in request.keywords and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def model() -> HSAForCausalLM:
    """The tiny model with default switches. Shared: do not change it."""
    return tiny_model()


@pytest.fixture(scope="session", params=VARIANTS)
def variant_model(request) -> HSAForCausalLM:
    """The tiny model with every switch in turn. Shared: do not change it."""
    return make_variant(request.param)

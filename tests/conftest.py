"""Fixtures and settings of all tests: seeds, the skipping of GPU tests, Hypothesis settings, model variants."""
# ruff: noqa: E402

import os

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


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        variant = parameters.get("variant_model", parameters.get("name"))
        if variant in VARIANTS and variant not in FAST_VARIANTS:
            item.add_marker(pytest.mark.slow)
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

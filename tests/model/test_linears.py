"""On a CPU, linear layers of prompts are computed by oneDNN, with the same results."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_hsa.linears import fast_linears
from tests.helpers import SAME_ARITHMETIC, relative_error
from tests.models import make_variant, tiny_model
from tests.rows import random_ids


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


class OneDNNCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


def calls(model, ids, **inputs) -> int:
    with OneDNNCalls() as watched:
        model(ids, use_cache=False, **inputs)
    return watched.count


@pytest.mark.parametrize("name", ["default", "qwen2_biases", "mean_landmark"])
def test_the_logits_are_the_same(name):
    model, ids = make_variant(name), random_ids(2, 100)
    expected = model(ids, use_cache=False).logits.detach()  # with gradients, so by PyTorch's default
    with torch.no_grad():
        assert calls(model, ids) > 0
        assert relative_error(model(ids, use_cache=False).logits, expected) <= SAME_ARITHMETIC
    with torch.inference_mode():
        assert relative_error(model(ids, use_cache=False).logits, expected) <= SAME_ARITHMETIC


def test_what_has_no_backward_or_other_numbers_is_left_alone(model):
    ids = random_ids(2, 100)
    assert calls(model, ids) == 0
    with torch.no_grad():
        assert calls(model, ids[:, :5]) == 0
        assert calls(tiny_model().double(), ids) == 0
        with torch.backends.mkldnn.flags(enabled=False):
            assert calls(model, ids) == 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert calls(model, ids) == 0


@torch.no_grad()
def test_a_weight_that_is_no_plain_tensor_is_left_alone():
    """Sharded and quantised weights are tensors of other classes with a way of their own to multiply."""

    class Special(torch.Tensor):
        pass

    x, weight = torch.randn(2, 100, 32), torch.randn(16, 32)
    for given, count in ((weight, 1), (weight.as_subclass(Special), 0)):
        with fast_linears(x), OneDNNCalls() as watched:
            product = torch.nn.functional.linear(x, given)
        assert watched.count == count
        assert relative_error(product, x @ weight.T) <= SAME_ARITHMETIC

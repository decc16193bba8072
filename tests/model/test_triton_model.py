"""
Contracts 2 to 6 of the design for whole models on the Triton kernels, without a GPU through Triton's interpreter: they
give what the PyTorch path gives, which the other tests hold to the contracts.
"""

import pytest
import torch

from tests.helpers import OTHER_ORDER, relative_error
from tests.models import tiny_model
from tests.rows import Rows, random_ids, read


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "plain": ("x" * 41,),
    "padded": ("." * 13 + "x" * 28, "x" * 35 + "." * 6),
    "packed": ("|" + "x" * 20 + "|" + "x" * 19,),
}


def models(**overrides) -> list:
    """The same small model on the PyTorch path and on the kernels, whose heads have at least 16 dimensions."""
    config = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, **overrides}
    return [tiny_model(hsa_implementation=name, **config).to(DEVICE) for name in ("torch", "triton")]


@pytest.mark.parametrize(
    "fields",
    [{}, {"chunk_weighting": "joint"}, {"chunk_landmark": "mass", "retrieval_dim": 17}],
    ids=["softmax", "joint", "mass"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_those_of_the_pytorch_path(layout, fields):
    rows = Rows(*LAYOUTS[layout])
    inputs = {name: x.to(DEVICE) for name, x in rows.inputs().items()}
    results = []
    for model in models(**fields):
        logits = model(rows.ids.to(DEVICE), use_cache=False, **inputs).logits
        real = inputs.get("attention_mask", torch.ones(logits.shape[:2], device=DEVICE)) > 0
        logits.logsumexp(-1)[real].sum().backward()
        results.append({"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        assert relative_error(results[1][name], expected) <= OTHER_ORDER, name


@pytest.mark.slow
@torch.no_grad()
def test_segments_and_decoding_are_those_of_the_pytorch_path():
    ids = random_ids(1, 41).to(DEVICE)
    expected, actual = (read(model, ids, [20, 1, 13, 1, 6])[0] for model in models())
    assert relative_error(actual, expected) <= OTHER_ORDER


@pytest.mark.slow
def test_gradient_of_a_whole_model_by_finite_differences():
    """In fp32, along a random direction of all parameters; all chunks are retrieved, so that none comes or goes."""
    _, model = models(chunk_topk=4)
    ids = random_ids(1, 41).to(DEVICE)
    signs = torch.randn(1, 41, 99, generator=torch.Generator().manual_seed(1)).double().to(DEVICE)

    def loss():
        return (model(ids, use_cache=False).logits.double() * signs).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    steps = {p: 1e-3 * torch.randn(p.shape, generator=generator).to(DEVICE) for p in model.parameters()}
    expected = sum((p.grad.double() * step).sum() for p, step in steps.items())
    losses = []
    with torch.no_grad():
        for factor in (1, -2):  # to the one side, and from there to the other
            for p, step in steps.items():
                p += factor * step
            losses.append(loss())
    assert abs((losses[0] - losses[1]) / 2 - expected) <= 2e-2 * abs(expected)

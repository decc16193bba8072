"""Scores are made and kept in fp32, whatever the inputs: half precision loses no more than PyTorch's own attention."""

import math

import pytest
import torch

from modeling_hsa.ops import chunk_attention, chunk_weights, select_chunks
from tests.helpers import relative_error


IMPLEMENTATIONS = ("naive", "torch", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
all_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
half_precision = pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)


def skip_bf16_in_the_interpreter(implementation: str, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and implementation == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bf16")


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


@half_precision
@all_implementations
@pytest.mark.parametrize("kind", ["one chunk", "joint"])
@pytest.mark.parametrize("size", [1, 5, 10])  # scores of about 5, 100 and 400
def test_loses_no_more_than_twice_what_sdpa_loses(size, kind, implementation, dtype):
    skip_bf16_in_the_interpreter(implementation, dtype)
    generator = torch.Generator().manual_seed(0)
    chunks = 2 if kind == "joint" else 1
    shapes = ((1, 33, 4, 64), (1, 32 * chunks, 2, 64), (1, 32 * chunks, 2, 64))
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    inputs = [x.to(dtype) for x in (q * size, k * size, v)]
    d_out = torch.randn(q.shape, generator=generator).to(DEVICE, dtype)
    indices = torch.arange(chunks - 1, -1, -1, device=DEVICE).expand(1, 33, 1, chunks)
    weights = None if kind == "joint" else torch.ones(1, 33, 1, 1, device=DEVICE)

    def ours(q, k, v):
        return chunk_attention(q, k, v, weights, indices, chunk_size=32, implementation=implementation)

    def run(attention, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        output = attention(*leaves)
        return [output, *torch.autograd.grad(output, leaves, d_out.to(output.dtype))]

    exact = run(sdpa, torch.float64)
    for name, actual, plain, expected in zip("oqkv", run(ours, dtype), run(sdpa, dtype), exact):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= 2 * relative_error(plain, expected), name


@all_implementations
@pytest.mark.parametrize("kind", ["weights", "joint"])
@pytest.mark.parametrize(("size", "dim"), [(100, 16), (40, 64), (250, 32)])
def test_finite_fp16_gives_no_nan(size, dim, kind, implementation):
    """`q . k` is beyond the largest number of fp16, before it is scaled and after."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    q, k = ((draw(1, n, 2, dim).sign() * size).to(DEVICE, torch.float16) for n in (4, 32))
    k[:, 0] = q[:, 0]
    assert (q[0, 0, 0].float() @ k[0, 0, 0].float()) > torch.finfo(torch.float16).max
    v, d_out = (draw(1, n, 2, dim).to(DEVICE, torch.float16) for n in (32, 4))
    indices = torch.tensor([1, 0], device=DEVICE).expand(1, 4, 1, 2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if kind == "weights":
        leaves.append(torch.full((1, 4, 1, 2), 0.5, device=DEVICE, requires_grad=True))
    weights = leaves[3] if kind == "weights" else None
    output = chunk_attention(q, k, v, weights, indices, chunk_size=16, implementation=implementation)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    expected = chunk_attention(*wide[:3], wide[3] if kind == "weights" else None, indices, chunk_size=16,
                               implementation="naive")  # fmt: skip
    assert relative_error(output, expected) <= 4 * torch.finfo(torch.float16).eps
    actual, exact = (torch.autograd.grad(x, y, d_out.to(x.dtype)) for x, y in ((output, leaves), (expected, wide)))
    # What fp32 leaves uncertain of a score is uncertain of its exponential.
    rounding = 4 * torch.finfo(torch.float16).eps + torch.finfo(torch.float32).eps * size**2 * dim**0.5
    for gradient, reference in zip(actual, exact):
        assert gradient.isfinite().all()
        assert (gradient - reference).abs().max() <= rounding * max(1.0, reference.abs().max().item())


@half_precision
@all_implementations
def test_selection_of_large_fp16_scores(implementation, dtype):
    q, landmarks = (torch.full((1, n, 1, 64), 200.0, dtype=dtype, device=DEVICE) for n in (3, 4))
    landmarks[:, 2] = -200.0
    leaves = q.requires_grad_(), landmarks.requires_grad_()
    scores, indices = select_chunks(*leaves, topk=2, chunk_size=16, q_start=64, implementation=implementation)
    assert (indices == torch.tensor([3, 1], device=DEVICE)).all()
    assert (scores == 200.0 * 200.0 * 8).all() and scores.dtype == torch.float32
    d_q, d_landmarks = torch.autograd.grad(scores.sum(), leaves)
    assert (d_q == 2 * 200 / 8).all() and (d_landmarks[0, [1, 3]] == 3 * 200 / 8).all()


@all_implementations
@pytest.mark.parametrize("length", [1, 20])
def test_the_penalty_leaves_no_trace_in_the_scores(length, implementation):
    """It decides alone here, and is so large that a score would lose all its digits if it were added and taken off."""
    generator = torch.Generator().manual_seed(0)
    q, landmarks = (torch.randn(2, n, 2, 24, generator=generator).to(DEVICE) for n in (length, 40))
    arguments = {"topk": 5, "chunk_size": 16, "q_start": 40 * 16, "implementation": implementation}
    scores, indices = select_chunks(q, landmarks, distance_penalty=1e8, **arguments)
    # Distances 1; 2 and 3; the best two of 4 to 7.
    assert (indices[..., :3] == torch.tensor([39, 38, 37], device=DEVICE)).all()
    assert ((indices[..., 3:] <= 36) & (indices[..., 3:] >= 33)).all()
    row, head = torch.arange(2, device=DEVICE)[:, None, None, None], torch.arange(2, device=DEVICE)[:, None]
    selected = landmarks.double()[row, indices.long(), head]
    exact = (selected @ q.double()[..., None]).squeeze(-1) / math.sqrt(24)
    assert relative_error(scores, exact) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_stick_breaking_keeps_what_the_nearer_chunks_left_beside_a_large_score(implementation):
    scores = torch.tensor([[[[0.0, 1e9, 0.0], [-1e9, 0.0, 1e9]]]])
    indices = torch.tensor([2, 1, 0]).expand(1, 1, 2, 3)
    weights = chunk_weights(scores, indices, "stick_breaking", implementation)
    assert torch.allclose(weights, torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]]]))

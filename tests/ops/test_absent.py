"""What is not there does not count: memory that nobody sees or retrieves may hold NaN or infinity."""

import pytest
import torch

from modeling_hsa.ops import chunk_attention, chunk_weights, select_chunks


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
all_implementations = pytest.mark.parametrize("implementation", ["naive", "torch", "triton"])
all_garbage = pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
S, D = 16, 16


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def filled(x: torch.Tensor, absent: torch.Tensor, value: float) -> torch.Tensor:
    """A leaf: x [B, n, ...] with `value` where absent [B, n]."""
    return torch.where(absent[:, :, None, None], value, x).requires_grad_()


@all_implementations
@all_garbage
@pytest.mark.parametrize("length", [1, 21])
@pytest.mark.parametrize("penalty", [0.0, 0.2])
def test_landmarks_that_no_query_sees(penalty, length, garbage, implementation):
    # The first chunk, which stands in for none in the code; those of another document; those beyond the end.
    seen = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], device=DEVICE).bool()
    first = torch.tensor([2, 1, 6], device=DEVICE)[:, None].expand(3, length)
    end = torch.tensor([5, 3, 6], device=DEVICE)[:, None].expand(3, length)
    q, landmarks = draw(3, length, 2, D), draw(3, 6, 2, D, seed=1)
    results = []
    for value in (0.0, garbage):
        leaves = q.clone().requires_grad_(), filled(landmarks, ~seen, value)
        scores, indices = select_chunks(
            *leaves, topk=4, chunk_size=S, visible=(first, end), distance_penalty=penalty,
            implementation=implementation,
        )  # fmt: skip
        # What comes back for absent chunks is garbage, too.
        d_scores = torch.where(indices < 0, value, draw(*scores.shape, seed=2))
        results.append([scores, indices, *torch.autograd.grad(scores, leaves, d_scores)])
    for expected, actual in zip(*results):
        assert torch.equal(actual, expected)
    assert (results[1][1][2] == -1).all() and not results[1][3][~seen].any()


@all_implementations
@all_garbage
def test_landmarks_of_another_document_of_the_row(garbage, implementation):
    other = torch.tensor([[1, 1, 0, 0, 0]], device=DEVICE).bool()
    mine = torch.arange(20, device=DEVICE) >= 9  # the others see the garbage
    first, end = torch.where(mine, 2, 0)[None], torch.where(mine, 5, 2)[None]
    q, landmarks = draw(1, 20, 1, D), draw(1, 5, 1, D, seed=1)
    results = []
    for value in (0.0, garbage):
        leaves = q.clone().requires_grad_(), filled(landmarks, other, value)
        scores, indices = select_chunks(
            *leaves, topk=2, chunk_size=S, visible=(first, end), implementation=implementation
        )
        d_q, d_landmarks = torch.autograd.grad(scores[:, mine].sum(), leaves)
        results.append([scores[:, mine], indices[:, mine], d_q[:, mine], d_landmarks[:, 2:]])
    for expected, actual in zip(*results):
        assert torch.equal(actual, expected)


@all_implementations
@all_garbage
@pytest.mark.parametrize("kind", ["softmax", "stick_breaking"])
def test_scores_of_absent_chunks(kind, garbage, implementation):
    indices = torch.tensor([[3, 1, -1], [2, -1, -1], [-1, -1, -1], [2, 1, 0]], device=DEVICE).view(1, 4, 1, 3)
    results = []
    for value in (0.0, garbage):
        scores = torch.where(indices < 0, value, draw(1, 4, 1, 3)).requires_grad_()
        weights = chunk_weights(scores, indices, kind, implementation)
        results.append([weights, *torch.autograd.grad(weights, scores, draw(1, 4, 1, 3, seed=1))])
    for expected, actual in zip(*results):
        assert torch.equal(actual, expected)
    assert not results[1][0][indices < 0].any() and not results[1][1][indices < 0].any()


@all_implementations
@all_garbage
@pytest.mark.parametrize("kind", ["weights", "joint"])
@pytest.mark.parametrize("length", [1, 21])
def test_keys_values_and_weights_that_no_query_retrieved(length, kind, garbage, implementation):
    # Chunk 0 is that which an absent one might read. Some queries have three chunks, some one, those of row 2 none.
    retrieved = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], device=DEVICE).bool()
    indices = torch.tensor([[5, 3, 2], [1, -1, -1], [-1, -1, -1]], device=DEVICE)[:, None, None]
    indices = indices.expand(3, length, 1, 3).clone()
    indices[0, ::3, 0, 1:] = -1
    absent = ~retrieved.repeat_interleave(S, dim=1)
    q, k, v = draw(3, length, 4, D), draw(3, 6 * S, 2, D, seed=1), draw(3, 6 * S, 2, D, seed=2)
    results = []
    for value in (0.0, garbage):
        leaves = [q.clone().requires_grad_(), filled(k, absent, value), filled(v, absent, value)]
        weights = None
        if kind == "weights":
            weights = torch.where(indices < 0, value, draw(3, length, 1, 3, seed=3)).requires_grad_()
            leaves.append(weights)
        output = chunk_attention(*leaves[:3], weights, indices, chunk_size=S, implementation=implementation)
        results.append([output, *torch.autograd.grad(output, leaves, draw(*q.shape, seed=4))])
    for expected, actual in zip(*results):
        assert torch.equal(actual, expected)
    output, _, d_k, d_v, *d_weights = results[1]
    assert not output[2].any() and not d_k[absent].any() and not d_v[absent].any()
    assert not d_weights or not d_weights[0][indices < 0].any()


@all_garbage
@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("kind", ["weights", "joint"])
def test_keys_and_values_that_other_queries_retrieved(kind, garbage, implementation):
    """Of the PyTorch backends; in a block of queries of the kernels such a chunk reaches all."""
    mine = torch.arange(20) >= 9
    indices = torch.where(mine[:, None], torch.tensor([3, 2]), torch.tensor([1, 0]))[None, :, None].to(DEVICE)
    other = torch.tensor([[1, 1, 0, 0]], device=DEVICE).bool().repeat_interleave(S, dim=1)
    q, k, v = draw(1, 20, 2, D), draw(1, 4 * S, 1, D, seed=1), draw(1, 4 * S, 1, D, seed=2)
    results = []
    for value in (0.0, garbage):
        leaves = [q.clone().requires_grad_(), filled(k, other, value), filled(v, other, value)]
        weights = None if kind == "joint" else draw(1, 20, 1, 2, seed=3)
        output = chunk_attention(*leaves, weights, indices, chunk_size=S, implementation=implementation)
        d_q, d_k, d_v = torch.autograd.grad(output[:, mine].sum(), leaves)
        results.append([output[:, mine], d_q[:, mine], d_k[:, 2 * S :], d_v[:, 2 * S :]])
    for expected, actual in zip(*results):
        assert torch.equal(actual, expected)


@all_implementations
def test_without_chunks_the_output_is_zero_whatever_the_query_holds(implementation):
    q = torch.full((1, 3, 2, D), float("nan"), device=DEVICE, requires_grad=True)
    k = torch.zeros(1, 0, 1, D, device=DEVICE, requires_grad=True)
    indices = torch.full((1, 3, 1, 2), -1, device=DEVICE)
    output = chunk_attention(q, k, k, None, indices, chunk_size=S, implementation=implementation)
    assert not output.any() and not torch.autograd.grad(output.sum(), q)[0].any()

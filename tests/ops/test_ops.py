"""
Contract 6 of the design for the PyTorch path: it agrees with the fp32 oracle, outputs and every gradient; its memory
is bounded; and its selection is deterministic.
"""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from modeling_hsa.ops import chunk_attention, chunk_weights, select_chunks, visible_chunks
from tests.helpers import InsideOperators, relative_error


KINDS = ("softmax", "stick_breaking", "joint")
IMPLEMENTATIONS = ("torch", "naive")


class Case(NamedTuple):
    batch: int = 2
    length: int = 37
    num_chunks: int = 5
    heads: int = 4
    kv_heads: int = 2
    retrieval_heads: int = 1
    topk: int = 3
    chunk_size: int = 16
    head_dim: int = 8
    retrieval_dim: int = 12

    def __str__(self):
        return "-".join(f"{name}{value}" for name, value in self._asdict().items() if value != getattr(Case(), name))


CASES = [
    Case(),
    # odd lengths, one token and none
    *(Case(length=n) for n in (0, 1, 2, 63, 65, 100)),
    # query heads per key/value head: 1:1, 2:1, 4:1, 16:1
    *(Case(heads=q, kv_heads=kv) for q, kv in ((1, 1), (4, 4), (2, 1), (8, 4), (8, 2), (16, 1))),
    # several retrieval heads per key/value head, and the other way round
    *(Case(heads=8, kv_heads=kv, retrieval_heads=r) for kv, r in ((1, 2), (2, 4), (2, 2), (4, 2), (8, 1), (1, 8))),
    Case(heads=6, kv_heads=3, retrieval_heads=3),
    # fewer chunks than are asked for, one and none
    *(Case(num_chunks=c, topk=k) for c, k in ((2, 4), (1, 3), (0, 3), (4, 4))),
    Case(topk=1),
    Case(length=0, num_chunks=0),
    Case(length=70, chunk_size=48, num_chunks=3, head_dim=5, retrieval_dim=1),
]
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_kinds = pytest.mark.parametrize("kind", KINDS)
all_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def make_inputs(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Retrieval queries `rq`, landmarks `lm`, queries `q`, keys `k` and values `v`, leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens = case.num_chunks * case.chunk_size
    shapes = {
        "rq": (case.length, case.retrieval_heads, case.retrieval_dim),
        "lm": (case.num_chunks, case.retrieval_heads, case.retrieval_dim),
        "q": (case.length, case.heads, case.head_dim),
        "k": (tokens, case.kv_heads, case.head_dim),
        "v": (tokens, case.kv_heads, case.head_dim),
    }
    return {
        name: torch.randn(case.batch, *shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def run_ops(
    case: Case,
    kind: str,
    implementation: str,
    seed: int = 0,
    forward=nullcontext(),  # noqa: B008
    backward=nullcontext(),  # noqa: B008
    **selection,
) -> dict[str, torch.Tensor]:
    """
    All three operations one after the other, and the gradients of a random function of their results.

    Args:
        forward, backward: contexts to run them in.
    """
    inputs = make_inputs(case, seed)
    if not selection:
        selection = {"q_start": 2 * case.chunk_size + 3}  # so that some chunks are visible from the first query on
    arguments = {"chunk_size": case.chunk_size, "implementation": implementation}
    with forward:
        scores, indices = select_chunks(inputs["rq"], inputs["lm"], topk=case.topk, **arguments, **selection)
        weights = chunk_weights(scores, indices, kind, implementation=implementation)
        output = chunk_attention(inputs["q"], inputs["k"], inputs["v"], weights, indices, **arguments)
    results = {"scores": scores, "indices": indices, "output": output}
    if weights is not None:
        results["weights"] = weights
    generator = torch.Generator().manual_seed(seed + 1)
    loss = (output * torch.randn(output.shape, generator=generator)).sum()
    loss = loss + (scores * torch.randn(scores.shape, generator=generator))[indices >= 0].sum()
    with backward:
        gradients = torch.autograd.grad(loss, list(inputs.values()))
    results |= {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients)}
    return {name: x.detach() for name, x in results.items()}


def assert_agree(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    assert torch.equal(actual["indices"], expected["indices"])
    for name, x in expected.items():
        assert actual[name].shape == x.shape and actual[name].dtype == x.dtype, name
        finite = x.isfinite()
        assert torch.equal(actual[name].isfinite(), finite), name  # the scores of absent chunks are -inf
        assert relative_error(actual[name][finite], x[finite]) <= tolerance, name


# -- the PyTorch path against the oracle ------------------------------------------------------------------------------


@all_kinds
@all_cases
def test_torch_path_agrees_with_the_oracle(case, kind):
    assert_agree(run_ops(case, kind, "torch"), run_ops(case, kind, "naive"))


@all_kinds
def test_torch_path_agrees_with_the_oracle_with_a_distance_penalty(kind):
    selection = {"q_start": 200, "distance_penalty": 0.3}
    case = Case(batch=2, length=90, num_chunks=18, heads=4, kv_heads=1, retrieval_heads=2)
    assert_agree(run_ops(case, kind, "torch", **selection), run_ops(case, kind, "naive", **selection))


@all_kinds
@pytest.mark.parametrize("seed", range(3))
def test_torch_path_agrees_with_the_oracle_for_any_visible_range(kind, seed):
    # Every query of every row has a range of its own: empty ones, whole ones, and ones that end beyond the last chunk.
    case = Case(batch=3, length=41, num_chunks=7, heads=4, kv_heads=1, retrieval_heads=2)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 7, (3, 41), generator=generator)
    end = first + torch.randint(0, 6, (3, 41), generator=generator)
    actual, expected = (run_ops(case, kind, i, seed, visible=(first, end)) for i in IMPLEMENTATIONS)
    assert_agree(actual, expected)
    present = actual["indices"] >= 0
    assert torch.equal(present.sum(-1)[..., 0], (end.clamp(max=7) - first).clamp(0, case.topk))
    inside = (actual["indices"] >= first[..., None, None]) & (actual["indices"] < end[..., None, None])
    assert inside[present].all()


@all_kinds
def test_torch_path_agrees_with_the_oracle_for_strided_inputs(kind):
    case = Case(heads=4, kv_heads=2)
    results = []
    for strided in (False, True):
        inputs = {name: x.detach() for name, x in make_inputs(case).items()}
        if strided:
            inputs = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
            assert not any(x.is_contiguous() for name, x in inputs.items() if x.shape[2] > 1)
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        scores, indices = select_chunks(inputs["rq"], inputs["lm"], topk=3, chunk_size=16, q_start=32)
        weights = chunk_weights(scores, indices, kind)
        output = chunk_attention(inputs["q"], inputs["k"], inputs["v"], weights, indices, chunk_size=16)
        used = [x for name, x in inputs.items() if kind != "joint" or name not in ("rq", "lm")]
        results.append([output, *torch.autograd.grad(output.square().sum(), used)])
    for actual, expected in zip(*results):
        assert relative_error(actual, expected) <= 1e-6


@all_kinds
def test_long_input_equals_its_pieces(kind):
    # Longer than the blocks in which the PyTorch path takes queries and chunks.
    case = Case(batch=1, length=4500, num_chunks=1500, heads=8, kv_heads=1, topk=8, head_dim=64, retrieval_dim=4)
    inputs = {name: x.detach() for name, x in make_inputs(case).items()}

    def run(piece: slice, implementation: str):
        scores, indices = select_chunks(
            inputs["rq"][:, piece],
            inputs["lm"],
            topk=8,
            chunk_size=16,
            q_start=20000 + piece.start,
            implementation=implementation,
        )
        weights = chunk_weights(scores, indices, kind, implementation)
        q = inputs["q"][:, piece]
        out = chunk_attention(
            q, inputs["k"], inputs["v"], weights, indices, chunk_size=16, implementation=implementation
        )
        return indices, out

    indices, output = run(slice(0, 4500), "torch")
    for start in (0, 2040, 4090, 4470):  # across the borders of blocks
        piece = slice(start, start + 30)
        expected_indices, expected = run(piece, "naive")
        assert torch.equal(indices[:, piece], expected_indices)
        assert relative_error(output[:, piece], expected) <= 1e-5


# -- what selection means ---------------------------------------------------------------------------------------------


@all_implementations
def test_a_chunk_is_visible_once_all_its_tokens_are_past(implementation):
    q, landmarks = torch.ones(2, 70, 1, 4), torch.ones(2, 9, 1, 4)
    start = torch.tensor([0, 37])
    _, indices = select_chunks(q, landmarks, topk=9, chunk_size=16, q_start=start, implementation=implementation)
    for row, offset in enumerate(start.tolist()):
        for t in range(70):
            expected = [i for i in range(9) if (i + 1) * 16 <= offset + t]
            assert sorted(indices[row, t, 0][indices[row, t, 0] >= 0].tolist()) == expected


@all_implementations
def test_selects_the_best_nearest_first_and_the_nearest_of_equals(implementation):
    # Small integers: many scores are exactly equal. -0.0 and 0.0 are equal too.
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-1, 2, (2, 60, 2, 3), generator=generator).float()
    landmarks = torch.randint(-1, 2, (2, 11, 2, 3), generator=generator).float() * torch.tensor([1.0, -1.0, 0.0])
    start = 11 * 16 - 50
    scores, indices = select_chunks(
        q, landmarks, topk=4, chunk_size=16, q_start=start, scale=1.0, implementation=implementation
    )
    for b, t, r in torch.cartesian_prod(torch.arange(2), torch.arange(60), torch.arange(2)).tolist():
        products = (landmarks[b, :, r] @ q[b, t, r]).tolist()
        visible = [i for i in range(11) if (i + 1) * 16 <= start + t]
        best = sorted(visible, key=lambda i: (-products[i], -i))[:4]
        expected = sorted(best, reverse=True)
        assert indices[b, t, r].tolist() == expected
        assert scores[b, t, r].tolist() == [products[i] for i in expected]


@all_implementations
def test_every_doubling_of_the_distance_takes_the_penalty_from_what_selects(implementation):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-2, 3, (2, 60, 1, 3), generator=generator).float()
    landmarks = torch.randint(-2, 3, (2, 40, 1, 3), generator=generator).float()
    first = torch.randint(0, 40, (2, 60), generator=generator)
    end = first + torch.randint(0, 45, (2, 60), generator=generator)
    arguments = {"topk": 4, "chunk_size": 16, "visible": (first, end), "scale": 1.0, "implementation": implementation}
    scores, indices = select_chunks(q, landmarks, distance_penalty=0.75, **arguments)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(60)).tolist():
        products = (landmarks[b, :, 0] @ q[b, t, 0]).tolist()
        visible = range(int(first[b, t]), newest := min(int(end[b, t]), 40))
        # Distances 1, 2 to 3, 4 to 7, ...
        preference = {i: products[i] - 0.75 * ((newest - i).bit_length() - 1) for i in visible}
        expected = sorted(sorted(visible, key=lambda i: (-preference[i], -i))[:4], reverse=True)
        expected += [-1] * (4 - len(expected))
        assert indices[b, t, 0].tolist() == expected
        assert scores[b, t, 0].tolist() == [products[i] if i >= 0 else float("-inf") for i in expected]
    assert not torch.equal(indices, select_chunks(q, landmarks, **arguments)[1])


@all_implementations
def test_absent_chunks_come_last(implementation):
    q, landmarks = torch.ones(1, 40, 1, 4), torch.ones(1, 2, 1, 4)
    scores, indices = select_chunks(q, landmarks, topk=3, chunk_size=16, implementation=implementation)
    assert indices[0, 10, 0].tolist() == [-1, -1, -1]
    assert indices[0, 20, 0].tolist() == [0, -1, -1]
    assert indices[0, 39, 0].tolist() == [1, 0, -1]
    assert scores[0, 20, 0].tolist() == [2.0, float("-inf"), float("-inf")]
    assert scores.dtype == torch.float32 and indices.dtype == torch.int32


@all_implementations
def test_scores_are_scaled_by_the_retrieval_dim_by_default(implementation):
    generator = torch.Generator().manual_seed(0)
    q, landmarks = torch.randn(1, 5, 1, 9, generator=generator), torch.randn(1, 3, 1, 9, generator=generator)
    arguments = {"topk": 3, "chunk_size": 16, "q_start": 48, "implementation": implementation}
    scores, _ = select_chunks(q, landmarks, **arguments)
    expected, _ = select_chunks(q, landmarks, scale=9**-0.5, **arguments)
    assert torch.equal(scores, expected)
    products = torch.einsum("bld,bcd->blc", q[:, :, 0], landmarks[:, :, 0]).flip(-1)  # nearest first
    assert relative_error(scores[:, :, 0], products / 3) <= 1e-6


@all_implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_leave_scores_in_fp32(implementation, dtype):
    case = Case(length=50, num_chunks=9, retrieval_dim=64)
    inputs = {name: x.detach() for name, x in make_inputs(case, dtype=dtype).items()}
    arguments = {"topk": 3, "chunk_size": 16, "q_start": 144, "implementation": implementation}
    expected = select_chunks(inputs["rq"].float(), inputs["lm"].float(), **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = select_chunks(inputs["rq"], inputs["lm"], **arguments)
    assert torch.equal(actual[1], expected[1])
    assert actual[0].dtype == torch.float32
    assert relative_error(actual[0], expected[0]) <= 1e-6


@all_kinds
@all_implementations
def test_autocast_leaves_weights_and_attention_as_they_are(implementation, kind):
    expected = run_ops(Case(), kind, implementation)
    actual = run_ops(Case(), kind, implementation, forward=torch.autocast("cpu", dtype=torch.bfloat16))
    assert_agree(actual, expected, tolerance=1e-6)


@all_kinds
def test_autocast_leaves_gradients_as_they_are(kind):
    # `loss.backward()` inside of `torch.autocast` is advised against, but common.
    expected = run_ops(Case(), kind, "torch")
    actual = run_ops(Case(), kind, "torch", backward=torch.autocast("cpu", dtype=torch.bfloat16))
    assert_agree(actual, expected, tolerance=1e-6)


@all_kinds
def test_results_are_the_same_every_time(kind):
    case = Case(batch=2, length=300, num_chunks=12, heads=8, kv_heads=2, retrieval_heads=2, topk=4)
    first, second = (run_ops(case, kind, "torch") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_visible_chunks_counts_from_the_start_of_each_row():
    first, end = visible_chunks(34, 16)
    assert first.tolist() == [[0] * 34]
    assert end.tolist() == [[0] * 16 + [1] * 16 + [2] * 2]
    first, end = visible_chunks(2, 16, torch.tensor([15, 63]))
    assert end.tolist() == [[0, 1], [3, 4]] and first.tolist() == [[0, 0], [0, 0]]


# -- what the weights mean --------------------------------------------------------------------------------------------


@all_implementations
def test_softmax_weights(implementation):
    scores = torch.tensor([[[[1.0, -2.0, 0.5]], [[3.0, 100.0, float("-inf")]], [[1.0, 2.0, 3.0]]]])
    indices = torch.tensor([[[[7, 3, 0]], [[4, 2, -1]], [[-1, -1, -1]]]])
    weights = chunk_weights(scores, indices, "softmax", implementation)
    assert torch.allclose(weights[0, 0, 0], scores[0, 0, 0].softmax(-1))
    assert torch.allclose(weights[0, 1, 0], torch.tensor([0.0, 1.0, 0.0]))
    assert weights[0, 2, 0].tolist() == [0, 0, 0]
    assert weights.dtype == torch.float32


@all_implementations
def test_stick_breaking_weights_leave_the_farther_chunk_what_the_nearer_ones_left(implementation):
    a, b, c = torch.tensor([1.0, -2.0, 0.5]).sigmoid().tolist()
    scores = torch.tensor([[[[1.0, -2.0, 0.5]], [[1.0, float("-inf"), float("-inf")]]]])
    indices = torch.tensor([[[[7, 3, 0]], [[4, -1, -1]]]])
    weights = chunk_weights(scores, indices, "stick_breaking", implementation)
    expected = torch.tensor([[[[a, (1 - a) * b, (1 - a) * (1 - b) * c]], [[a, 0.0, 0.0]]]])
    assert torch.allclose(weights, expected)


@all_implementations
def test_stick_breaking_weights_of_extreme_scores_are_finite(implementation):
    scores = torch.tensor([[[[60.0, 60.0, -60.0]], [[-200.0, 200.0, 5.0]]]], requires_grad=True)
    indices = torch.tensor([[[[2, 1, 0]], [[2, 1, 0]]]])
    weights = chunk_weights(scores, indices, "stick_breaking", implementation)
    weights.sum().backward()
    assert weights.isfinite().all() and scores.grad.isfinite().all()
    assert torch.allclose(weights[0, :, 0].sum(-1), torch.ones(2))


@all_implementations
def test_softmax_weights_do_not_depend_on_the_order_of_the_chunks(implementation):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 1, 6, generator=generator)
    indices = torch.arange(5, -1, -1).expand(2, 5, 1, 6)
    order = torch.randperm(6, generator=generator)
    weights = chunk_weights(scores, indices, "softmax", implementation)
    assert torch.allclose(chunk_weights(scores[..., order], indices[..., order], "softmax", implementation),
                          weights[..., order])  # fmt: skip


@all_implementations
def test_joint_leaves_the_weights_to_the_attention(implementation):
    scores, indices = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3, dtype=torch.int32)
    assert chunk_weights(scores, indices, "joint", implementation) is None


# -- what the attention means -----------------------------------------------------------------------------------------


@all_kinds
@all_implementations
def test_attention_by_its_definition(implementation, kind):
    case = Case(batch=2, length=5, num_chunks=4, heads=4, kv_heads=2, retrieval_heads=2)
    inputs = {name: x.detach() for name, x in make_inputs(case).items()}
    indices = torch.tensor([[3, 1, 0], [2, 0, -1], [1, -1, -1], [-1, -1, -1], [3, 2, 1]]).view(1, 5, 1, 3)
    indices = torch.cat([indices, indices.roll(1, dims=1)], dim=2).expand(2, -1, -1, -1)
    weights = None if kind == "joint" else chunk_weights(torch.randn(indices.shape), indices, kind)
    output = chunk_attention(
        inputs["q"], inputs["k"], inputs["v"], weights, indices, chunk_size=16, implementation=implementation
    )
    for b, t, h in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(4)).tolist():
        kv, r, q = h // 2, h // 2, inputs["q"][b, t, h]
        chunks = [slice(16 * i, 16 * i + 16) for i in indices[b, t, r].tolist() if i >= 0]
        scores = [inputs["k"][b, chunk, kv] @ q * 8**-0.5 for chunk in chunks]
        values = [inputs["v"][b, chunk, kv] for chunk in chunks]
        expected = torch.zeros(8)
        if kind == "joint" and chunks:
            expected = torch.cat(scores).softmax(0) @ torch.cat(values)
        elif chunks:
            expected = sum(w * (s.softmax(0) @ v) for w, s, v in zip(weights[b, t, r], scores, values))
        assert torch.allclose(output[b, t, h], expected, atol=1e-6)
        assert chunks or output[b, t, h].count_nonzero() == 0  # a token without chunks gets exactly 0


@all_kinds
@all_implementations
@pytest.mark.parametrize("case", [Case(num_chunks=0), Case(length=9)], ids=["no chunks", "none visible"])
def test_without_chunks_the_output_is_zero_and_so_is_every_gradient(case, implementation, kind):
    # Every parameter still gets a gradient: data-parallel training waits for it.
    results = run_ops(case, kind, implementation, q_start=0)
    for name, x in results.items():
        if name == "output" or name.startswith("gradient"):
            assert x.count_nonzero() == 0, name
    assert (results["indices"] == -1).all() and (results["scores"] == float("-inf")).all()


# -- gradients --------------------------------------------------------------------------------------------------------


@all_kinds
@all_implementations
@pytest.mark.parametrize(("kv_heads", "retrieval_heads"), [(1, 2), (2, 1), (2, 2)])
def test_gradients_of_chunk_attention_by_finite_differences(implementation, kind, kv_heads, retrieval_heads):
    generator = torch.Generator().manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    indices = torch.tensor([[2, 0], [1, -1], [-1, -1], [2, 1]]).view(1, 4, 1, 2).expand(1, 4, retrieval_heads, 2)
    weights = () if kind == "joint" else (leaf(1, 4, retrieval_heads, 2),)

    def attention(q, k, v, weights=None):
        return chunk_attention(q, k, v, weights, indices, chunk_size=3, implementation=implementation)

    inputs = (leaf(1, 4, 4, 3), leaf(1, 9, kv_heads, 3), leaf(1, 9, kv_heads, 3), *weights)
    assert torch.autograd.gradcheck(attention, inputs)


@all_implementations
@pytest.mark.parametrize("kind", ["softmax", "stick_breaking"])
def test_gradients_of_chunk_weights_by_finite_differences(implementation, kind):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 4, 2, 3, generator=generator, dtype=torch.float64)
    indices = torch.tensor([[5, 3, 0], [4, 2, -1], [1, -1, -1], [-1, -1, -1]]).view(1, 4, 1, 3).expand(1, 4, 2, 3)
    scores = scores.masked_fill(indices < 0, float("-inf")).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: chunk_weights(s, indices, kind, implementation), (scores,))


@all_implementations
def test_gradients_of_select_chunks_by_finite_differences(implementation):
    # Scores are bilinear: the central difference is exact, to fp32 rounding, as long as the selection stays.
    inputs = make_inputs(Case(length=20, num_chunks=4, topk=2))
    generator = torch.Generator().manual_seed(7)

    def loss(q, landmarks):
        scores, indices = select_chunks(q, landmarks, topk=2, chunk_size=16, q_start=40, implementation=implementation)
        return (scores * projection)[indices >= 0].sum(), indices

    projection = torch.randn(2, 20, 1, 2, generator=generator)
    q, landmarks = inputs["rq"], inputs["lm"]
    value, indices = loss(q, landmarks)
    for x, gradient in zip((q, landmarks), torch.autograd.grad(value, (q, landmarks))):
        step = 1e-3 * torch.randn(x.shape, generator=generator)
        (high, above), (low, below) = (loss(*(y + s if y is x else y for y in (q, landmarks))) for s in (step, -step))
        assert torch.equal(above, indices) and torch.equal(below, indices)
        assert ((high - low) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=2e-2, abs=1e-5)


@all_implementations
def test_no_gradient_flows_through_joint_scores(implementation):
    inputs = make_inputs(Case())
    scores, indices = select_chunks(inputs["rq"], inputs["lm"], topk=3, chunk_size=16, q_start=48)
    weights = chunk_weights(scores, indices, "joint", implementation)
    output = chunk_attention(
        inputs["q"], inputs["k"], inputs["v"], weights, indices, chunk_size=16, implementation=implementation
    )
    gradients = torch.autograd.grad(output.sum(), (inputs["rq"], inputs["lm"]), allow_unused=True)
    assert gradients == (None, None)


# -- half precision ---------------------------------------------------------------------------------------------------


def plain_chunk_attention(q, k, v, weights, indices, chunk_size):
    """A straightforward PyTorch program, all of it in the dtype of q. One key/value head, one retrieval head."""
    batch, length, _, dim = q.shape
    row = torch.arange(batch)[:, None, None]
    chunk, present = indices[:, :, 0].long().clamp(min=0), indices[:, :, 0] >= 0
    keys, values = (x[:, :, 0].view(batch, -1, chunk_size, dim)[row, chunk] for x in (k, v))  # [B, L, K, S, D]
    scores = torch.einsum("blhd,blksd->blhks", q, keys) * dim**-0.5
    if weights is None:
        scores = scores.masked_fill(~present[:, :, None, :, None], torch.finfo(q.dtype).min)
        probs = scores.flatten(-2).softmax(-1).view(scores.shape) * present[:, :, None, :, None]
    else:
        probs = scores.softmax(-1) * (weights[:, :, 0].to(q.dtype) * present)[:, :, None, :, None]
    return torch.einsum("blhks,blksd->blhd", probs, values)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_loses_no_more_than_plain_pytorch(dtype, kind):
    """Against fp32: at most twice the error of plain PyTorch in the same dtype, three times for the gradients."""
    case = Case(batch=2, length=150, num_chunks=9, heads=8, kv_heads=1, topk=4, head_dim=32)
    half = {name: x.detach() for name, x in make_inputs(case, dtype=dtype).items()}
    scores, indices = select_chunks(half["rq"], half["lm"], topk=4, chunk_size=16, q_start=16)
    weights = chunk_weights(scores, indices, kind)
    d_out = torch.randn(2, 150, 8, 32, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(attention, wide: bool):
        inputs = [half[name] for name in "qkv"] + ([] if weights is None else [weights])
        inputs = [(x.float() if wide else x).detach().requires_grad_() for x in inputs]
        output = attention(*inputs[:3], inputs[3] if weights is not None else None, indices, chunk_size=16)
        return [output, *torch.autograd.grad(output, inputs, d_out.to(output.dtype))]

    exact = run(plain_chunk_attention, wide=True)
    ours, plain = (run(attention, wide=False) for attention in (chunk_attention, plain_chunk_attention))
    for i, (actual, reference, expected) in enumerate(zip(ours, plain, exact)):
        assert actual.dtype == reference.dtype
        assert relative_error(actual, expected) <= (3 if i else 2) * relative_error(reference, expected) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_gradients_of_the_selection(dtype):
    case = Case(batch=2, length=150, num_chunks=9, topk=4)
    half = make_inputs(case, dtype=dtype)
    d_scores = torch.randn(2, 150, 1, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for q, landmarks in ((half["rq"], half["lm"]), (half["rq"].float(), half["lm"].float())):
        scores, indices = select_chunks(q, landmarks, topk=4, chunk_size=16, q_start=16)
        gradients = torch.autograd.grad((scores * d_scores)[indices >= 0].sum(), (half["rq"], half["lm"]))
        results.append((indices, *gradients))
    (indices, *actual), (expected_indices, *expected) = results
    assert torch.equal(indices, expected_indices)
    for x, y in zip(actual, expected):
        assert relative_error(x, y) <= torch.finfo(dtype).eps


# -- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(InsideOperators):
    """Remembers the size, in bytes, of the largest tensor an operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def largest_tensor(length: int, kind: str) -> tuple[int, int]:
    """Bytes of the largest tensor that exists in forward and backward, and of the largest input."""
    case = Case(
        batch=1, length=length, num_chunks=length // 16, heads=4, kv_heads=1, topk=32, head_dim=32, retrieval_dim=8
    )
    inputs = make_inputs(case)
    with LargestTensor() as largest:
        scores, indices = select_chunks(inputs["rq"], inputs["lm"], topk=32, chunk_size=16)
        weights = chunk_weights(scores, indices, kind)
        output = chunk_attention(inputs["q"], inputs["k"], inputs["v"], weights, indices, chunk_size=16)
        (output.sum() + scores[indices >= 0].sum()).backward()
    return largest.bytes, max(x.untyped_storage().nbytes() for x in [*inputs.values(), scores])


@all_kinds
def test_memory_beyond_inputs_and_outputs_does_not_grow_with_the_length(kind):
    short, _ = largest_tensor(2048, kind)
    long, inputs = largest_tensor(8192, kind)
    # Sorting takes int64 keys where the result is int32, hence the factor 2.
    assert long <= max(1.25 * short, 2 * inputs)
    assert long <= 8192 * 32 * 16 * 32 * 4 / 8  # the retrieved keys of all tokens are 8 times as much


def test_selection_memory_grows_with_neither_queries_nor_chunks():
    largest = []
    for length, num_chunks in ((256, 16384), (256, 131072), (4096, 16384)):
        q, landmarks = torch.randn(1, length, 1, 4), torch.randn(1, num_chunks, 1, 4)
        with LargestTensor() as mode:
            select_chunks(q, landmarks, topk=4, chunk_size=16, q_start=16 * num_chunks)
        largest.append(mode.bytes)
    assert max(largest[1:]) <= 1.25 * largest[0]
    assert largest[2] <= 4096 * 16384 * 4 / 4  # all scores are four times as much

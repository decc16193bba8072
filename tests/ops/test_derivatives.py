"""
Derivatives in every mode of PyTorch are right or refused: for part of the inputs, in forward mode, by the transforms
of `torch.func`, and twice.
"""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from modeling_hsa.ops import chunk_attention, chunk_weights, select_chunks
from tests.helpers import relative_error


KINDS = ("softmax", "stick_breaking", "joint")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("rq", "lm", "q", "k", "v")
all_kinds = pytest.mark.parametrize("kind", KINDS)
plain_implementations = pytest.mark.parametrize("implementation", ["naive", "torch"])


def make_inputs(*batch: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 24, 2, 8), (1, 4, 2, 8), (1, 24, 4, 8), (1, 64, 2, 8), (1, 64, 2, 8))
    return [torch.randn(*batch, *shape, generator=generator).to(DEVICE) for shape in shapes]


def program(kind: str, implementation: str, penalty: float = 0.1):
    """All three operations: the inputs -> [B, L, Hq, D]. Queries see 1 to 2 chunks, so that some are absent."""

    def run(rq, lm, q, k, v):
        scores, indices = select_chunks(
            rq, lm, topk=2, chunk_size=16, q_start=20, distance_penalty=penalty, implementation=implementation
        )
        weights = chunk_weights(scores, indices, kind, implementation)
        return chunk_attention(q, k, v, weights, indices, chunk_size=16, implementation=implementation)

    return run


def loss(kind: str, implementation: str):
    function = program(kind, implementation)
    return lambda *inputs: function(*inputs).square().sum()


def used(kind: str) -> range:
    """The inputs on which the output depends: of `joint`, selection has no gradient."""
    return range(2 if kind == "joint" else 0, 5)


def gradients(kind: str, implementation: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(kind, implementation)(*leaves), [leaves[i] for i in used(kind)])


@all_kinds
@pytest.mark.parametrize("implementation", ["naive", "torch", "triton"])
def test_part_of_the_inputs_may_require_gradients(implementation, kind):
    if implementation == "triton":
        inputs = [torch.nn.functional.pad(x, (0, 8)) for x in make_inputs()]  # the kernels take dims from 16 on
    else:
        inputs = make_inputs()
    expected = dict(zip(used(kind), gradients(kind, implementation, inputs)))
    pairs = itertools.combinations(used(kind), 2) if implementation != "triton" else ()
    for part in (*((i,) for i in used(kind)), *pairs):
        leaves = [x.clone().requires_grad_(i in part) for i, x in enumerate(inputs)]
        actual = torch.autograd.grad(loss(kind, implementation)(*leaves), [leaves[i] for i in part])
        for i, x in zip(part, actual):
            assert torch.equal(x, expected[i]), NAMES[i]


# -- forward mode -----------------------------------------------------------------------------------------------------


def expected_tangent(kind: str, inputs: list[torch.Tensor], directions: list[torch.Tensor]) -> torch.Tensor:
    """By central differences in fp64; the selection, which is of fp32, stays as it is."""
    wide, step = [x.double() for x in inputs], 1e-4
    (_, indices) = select_chunks(*inputs[:2], topk=2, chunk_size=16, q_start=20, distance_penalty=0.1)

    def run(sign):
        rq, lm, q, k, v = (x + sign * step * d.double() for x, d in zip(wide, directions))
        head = torch.arange(2, device=DEVICE)[:, None]
        selected = lm[0][indices.long().clamp(min=0), head]  # [B, L, Hr, K, d]
        scores = ((selected @ rq[..., None]).squeeze(-1) * 8**-0.5).masked_fill(indices < 0, float("-inf"))
        weights = chunk_weights(scores, indices, kind, "naive")
        return chunk_attention(q, k, v, weights, indices, chunk_size=16, implementation="naive")

    return (run(1) - run(-1)) / (2 * step)


@all_kinds
@plain_implementations
def test_forward_mode(implementation, kind):
    inputs, directions = make_inputs(), make_inputs(seed=1)
    function, expected = program(kind, implementation), expected_tangent(kind, inputs, directions)
    output, tangent = torch.func.jvp(function, tuple(inputs), tuple(directions))
    assert relative_error(output, function(*inputs)) <= 1e-6
    assert relative_error(tangent, expected) <= 1e-5
    with forward_ad.dual_level():
        output = function(*(forward_ad.make_dual(x, d) for x, d in zip(inputs, directions)))
        assert relative_error(forward_ad.unpack_dual(output).tangent, expected) <= 1e-5
    # A single input with a tangent is enough, whichever it is.
    for i in used(kind):
        alone = [d if j == i else torch.zeros_like(d) for j, d in enumerate(directions)]
        with forward_ad.dual_level():
            output = function(*(forward_ad.make_dual(x, d) if j == i else x
                                for j, (x, d) in enumerate(zip(inputs, directions))))  # fmt: skip
            actual = forward_ad.unpack_dual(output).tangent
        assert relative_error(actual, expected_tangent(kind, inputs, alone)) <= 1e-5, NAMES[i]


@pytest.mark.parametrize("op", ["select", "attention"])
def test_the_kernels_refuse_forward_mode(op):
    rq, lm, q, k, v = (torch.nn.functional.pad(x, (0, 8)) for x in make_inputs())
    _, indices = select_chunks(rq, lm, topk=2, chunk_size=16)
    arguments = {"chunk_size": 16, "implementation": "triton"}

    def run(x):
        if op == "select":
            return select_chunks(x, lm, topk=2, **arguments)[0]
        return chunk_attention(x, k, v, None, indices, **arguments)

    x = rq if op == "select" else q
    message = "they have no derivatives in forward mode .* Use 'auto' or 'torch' instead"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(run, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        run(forward_ad.make_dual(x, x))


# -- transforms of torch.func -----------------------------------------------------------------------------------------


@all_kinds
@plain_implementations
def test_gradients_by_torch_func(implementation, kind):
    inputs = make_inputs()
    actual = torch.func.grad(loss(kind, implementation), argnums=tuple(used(kind)))(*inputs)
    for i, x, expected in zip(used(kind), actual, gradients(kind, implementation, inputs)):
        assert relative_error(x, expected) <= 1e-5, NAMES[i]


@all_kinds
@plain_implementations
def test_jacobians_by_rows_and_by_columns(implementation, kind):
    inputs = make_inputs()
    function = program(kind, implementation)
    for i in used(kind):

        def part(x):
            return function(*inputs[:i], x, *inputs[i + 1 :])[0, -2:]  # noqa: B023

        rows, columns = torch.func.jacrev(part)(inputs[i]), torch.func.jacfwd(part)(inputs[i])
        assert rows.count_nonzero() and relative_error(rows, columns) <= 1e-5, NAMES[i]


@pytest.mark.parametrize("implementation", ["naive", "torch", "triton"])
@all_kinds
def test_vmap_is_a_loop(kind, implementation):
    inputs = make_inputs(3)
    if implementation == "triton":
        inputs = [torch.nn.functional.pad(x, (0, 8)) for x in inputs]
    function = program(kind, implementation)
    actual = torch.func.vmap(function)(*inputs)
    for i in range(3):
        assert relative_error(actual[i], function(*(x[i] for x in inputs))) <= 1e-6


@all_kinds
def test_gradients_of_examples_by_vmap(kind):
    inputs, parts = make_inputs(3), tuple(used(kind))
    actual = torch.func.vmap(torch.func.grad(loss(kind, "naive"), argnums=parts))(*inputs)
    for n in range(3):
        for x, expected in zip(actual, gradients(kind, "naive", [x[n] for x in inputs])):
            assert relative_error(x[n], expected) <= 1e-5
    with pytest.raises(NotImplementedError, match="`indices` of its own, needs `implementation='naive'`"):
        torch.func.vmap(torch.func.grad(loss(kind, "torch")))(*inputs)


# -- second derivatives -----------------------------------------------------------------------------------------------


@all_kinds
@plain_implementations
def test_second_derivatives_by_torch_func(implementation, kind):
    """Along a direction: the derivative of the gradient, forward over reverse and reverse over reverse."""
    inputs, directions = make_inputs(), make_inputs(seed=1)
    parts = tuple(used(kind))
    gradient = torch.func.grad(loss(kind, implementation), argnums=parts)
    step = 1e-2
    high, low = (
        gradients(kind, "naive", [*inputs[:3], inputs[3] + sign * step * directions[3], inputs[4]]) for sign in (1, -1)
    )
    _, forward = torch.func.jvp(lambda k: gradient(*inputs[:3], k, inputs[4]), (inputs[3],), (directions[3],))

    def along(*inputs):
        return (gradient(*inputs)[parts.index(3)] * directions[3]).sum()

    reverse = torch.func.grad(along, argnums=parts)(*inputs)
    for i, above, below, x, y in zip(parts, high, low, forward, reverse):
        expected = (above - below) / (2 * step)
        assert relative_error(x, expected) <= 5e-3 and relative_error(y, expected) <= 5e-3, NAMES[i]


@all_kinds
@pytest.mark.parametrize("implementation", ["naive", "torch", "triton"])
def test_second_derivatives_by_autograd_are_right_or_refused(implementation, kind):
    inputs = make_inputs()
    if implementation == "triton":
        inputs = [torch.nn.functional.pad(x, (0, 8)) for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    parts = [leaves[i] for i in used(kind)]
    first = torch.autograd.grad(loss(kind, implementation)(*leaves), parts, create_graph=True)
    penalty = sum(x.square().sum() for x in first)
    if implementation != "naive":
        with pytest.raises(NotImplementedError, match="first derivatives only .* use `implementation='naive'`"):
            penalty.backward()
        return
    second = torch.autograd.grad(penalty, parts)
    gradient = torch.func.grad(loss(kind, "torch"), argnums=tuple(used(kind)))
    expected = torch.func.grad(lambda *x: sum(g.square().sum() for g in gradient(*x)), argnums=tuple(used(kind)))
    for x, y in zip(second, expected(*(x.detach() for x in leaves))):
        assert relative_error(x, y) <= 1e-4


@pytest.mark.parametrize("op", ["select", "attention"])
def test_each_operator_refuses_second_derivatives(op):
    rq, lm, q, k, v = (x.requires_grad_() for x in make_inputs())
    scores, indices = select_chunks(rq, lm, topk=2, chunk_size=16, q_start=64)
    if op == "select":
        first = torch.autograd.grad(scores.square().sum(), (rq, lm), create_graph=True)
    else:
        output = chunk_attention(q, k, v, None, indices, chunk_size=16)
        first = torch.autograd.grad(output.square().sum(), (q, k, v), create_graph=True)
    with pytest.raises(NotImplementedError, match="hsa_implementation='naive'"):
        sum(x.square().sum() for x in first).backward()

"""
Contract 6 of the design for the Triton kernels of chunk selection: they agree with the fp32 oracle, scores, indices
and gradients. On a GPU if there is one, else, for the small cases, in Triton's interpreter.
"""

from typing import NamedTuple

import pytest
import torch

from modeling_hsa.ops import select_chunks
from tests.helpers import relative_error


pytest.importorskip("triton")
from modeling_hsa.ops import triton_selection  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
gpu = pytest.mark.gpu
all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


class Case(NamedTuple):
    length: int = 20
    num_chunks: int = 17
    topk: int = 3
    dim: int = 16
    heads: int = 1
    batch: int = 2

    def __str__(self):
        return "-".join(f"{name}{value}" for name, value in self._asdict().items() if value != getattr(Case(), name))


SMALL = [
    Case(),
    # one query, odd lengths, more than one block of queries
    *(Case(length=n) for n in (1, 2)),
    *(Case(length=n, batch=1) for n in (63, 65)),
    # fewer chunks than are asked for, one, and several tiles of them
    *(Case(length=n, num_chunks=c) for n in (1, 5) for c in (1, 2, 200)),
    # any K
    *(Case(length=n, topk=k, batch=1) for n in (1, 4) for k in (1, 8, 20)),
    Case(length=1, topk=128, num_chunks=140, batch=1),
    # any width, also wider than what a program holds of the queries
    *(Case(length=n, dim=d) for n in (1, 5) for d in (24, 128)),
    Case(length=5, dim=300, num_chunks=70),
    *(Case(length=n, heads=h) for n in (1, 18) for h in (2, 4)),
]
LARGE = [
    *(
        Case(length=n, num_chunks=c, topk=k, dim=d, heads=h)
        for n in (1, 2, 63, 65, 100)
        for c, k, d, h in ((3, 20, 16, 4), (200, 1, 64, 2), (200, 3, 1024, 1), (200, 128, 24, 2), (5000, 8, 256, 1))
    ),
    Case(length=1000, num_chunks=200, topk=8, dim=128, heads=2),
    Case(length=2000, num_chunks=1000, topk=32, dim=64),
    Case(length=300, num_chunks=1000, topk=128, dim=64),
    Case(length=3, num_chunks=30000, topk=128, dim=64),
    Case(length=1, num_chunks=100000, topk=128, dim=64),
    Case(length=1, num_chunks=1000, topk=8, dim=64, batch=50, heads=4),
]
CASES = [*SMALL, *(pytest.param(case, marks=gpu) for case in LARGE)]
GRADIENT_CASES = [
    Case(),
    Case(length=1, heads=2),
    Case(length=9, num_chunks=3, dim=24, heads=2),
    Case(length=70, num_chunks=2, topk=5, batch=1),
    Case(length=5, num_chunks=3, dim=130),
    *(pytest.param(case, marks=gpu) for case in LARGE),
]
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
gradient_cases = pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What nobody wrote is NaN, or an impossible integer."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -12345)

    def new_poisoned(x, *size, dtype=None, device=None):
        return poisoned(*size, dtype=dtype or x.dtype, device=device or x.device)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_poisoned)


@pytest.fixture
def many_splits(monkeypatch):
    """As many programs per query as possible, and merges in several steps, also for small inputs."""
    monkeypatch.setattr(triton_selection, "device_limits", lambda device: (10000, 1 << 17, False))
    monkeypatch.setattr(triton_selection, "_MERGED", 512)


def strided_landmarks(case: Case, values: torch.Tensor) -> torch.Tensor:
    """`values` [B, C, Hr, d] as a view of a larger buffer, as the cache has it; what else is there is NaN."""
    batch, num_chunks, heads, dim = values.shape
    storage = torch.full((batch, num_chunks + 7, heads, dim), float("nan"), dtype=values.dtype, device=values.device)
    storage[:, :num_chunks] = values
    return storage[:, :num_chunks]


def make_inputs(case: Case, dtype: torch.dtype, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """q and landmarks, leaves that require gradients; `exact`: small integers, for exact scores and many ties."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for n in (case.length, case.num_chunks):
        shape = (case.batch, n, case.heads, case.dim)
        if exact:
            x = torch.randint(-1, 2, shape, generator=generator).float() * (
                torch.rand(shape, generator=generator) < 0.3
            )
        else:
            x = torch.randn(shape, generator=generator)
        inputs.append(x.to(DEVICE, dtype))
    q, landmarks = inputs[0], strided_landmarks(case, inputs[1])
    return q.requires_grad_(), landmarks.requires_grad_()


def visible_ranges(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Causal ranges that end with all chunks in one row, and in the others arbitrary ones: documents that start at any
    chunk, empty ranges, and ranges that begin before the first chunk or end beyond the last.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, num_chunks = (case.batch, case.length), case.num_chunks
    first = torch.randint(-2, num_chunks + 1, shape, generator=generator)
    end = first + torch.randint(-1, num_chunks + 3, shape, generator=generator)
    first[0], end[0] = 0, num_chunks - (torch.arange(case.length).flip(0) // 4)
    return first.to(DEVICE), end.to(DEVICE)


def select(case: Case, inputs, implementation: str = "triton", visible=None, **arguments):
    visible = visible_ranges(case) if visible is None else visible
    return select_chunks(
        *inputs, topk=case.topk, chunk_size=16, visible=visible, implementation=implementation, **arguments
    )


def assert_equal_selection(case: Case, inputs, **arguments) -> None:
    """Exactly the oracle's scores and indices."""
    with torch.no_grad():
        (scores, indices), (expected_scores, expected_indices) = (
            select(case, inputs, implementation, **arguments) for implementation in ("triton", "naive")
        )
    assert indices.dtype == torch.int32 and scores.dtype == torch.float32
    assert indices.is_contiguous() and scores.is_contiguous()
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected_scores)


# -- selection --------------------------------------------------------------------------------------------------------


@all_dtypes
@all_cases
def test_exact_scores_are_selected_exactly(case, dtype):
    if DEVICE == "cpu" and dtype == torch.float16 and case != Case():
        pytest.skip("the interpreter computes all dtypes in fp32")
    assert_equal_selection(case, make_inputs(case, dtype, exact=True), scale=0.5)


@pytest.mark.usefixtures("many_splits")
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize(
    ("num_chunks", "topk"),
    [(700, 3), (600, 128), *(pytest.param(c, k, marks=gpu) for c in (1000, 60000) for k in (1, 8, 20, 128))],
)
def test_splits_of_the_landmarks_select_the_same(num_chunks, topk, length):
    case = Case(length=length, num_chunks=num_chunks, topk=topk, batch=1 if DEVICE == "cpu" and topk > 100 else 2)
    assert_equal_selection(case, make_inputs(case, torch.bfloat16, exact=True))


@pytest.mark.usefixtures("many_splits")
@pytest.mark.parametrize("length", [1, 4])
def test_visible_chunks_may_be_a_small_part_of_the_landmarks(length):
    # As in a cache of fixed capacity: what no token was written to yet may hold anything.
    case = Case(length=length, num_chunks=600)
    q, landmarks = (x.detach().clone() for x in make_inputs(case, torch.bfloat16, exact=True))
    landmarks[:, 23:] = float("nan")
    end = torch.full((1, length), 23, device=DEVICE)
    _, indices = select(case, (q, landmarks), visible=(end * 0, end))
    expected = select(case, (q, landmarks[:, :23]), "naive", visible=(end * 0, end))
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("length", [1, 18])
def test_of_equal_scores_the_nearest_chunks(length):
    case = Case(length=length, num_chunks=300, topk=5)
    q, landmarks = torch.ones(2, length, 1, 16, device=DEVICE), torch.zeros(2, 300, 1, 16, device=DEVICE)
    landmarks[:, ::2] = -0.0  # equals 0.0
    assert_equal_selection(case, (q, landmarks))
    # Better ones far away take the place of the farthest of the equal ones.
    landmarks[:, 250], landmarks[:, 40], landmarks[:, 3] = -1.0, 1.0, 2.0
    end = torch.full((1, length), 300, device=DEVICE)
    _, indices = select(case, (q, landmarks), visible=(end * 0, end))
    assert (indices == torch.tensor([299, 298, 297, 40, 3], device=DEVICE)).all()


PENALIZED = [
    *(Case(length=n, num_chunks=c) for n in (1, 5) for c in (2, 200)),
    Case(length=18, num_chunks=70, heads=2),
    *(pytest.param(case, marks=gpu) for case in LARGE),
]


@all_dtypes
@pytest.mark.parametrize("case", PENALIZED, ids=str)
def test_distance_penalty(case, dtype):
    if DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("the interpreter computes all dtypes in fp32")
    assert_equal_selection(case, make_inputs(case, dtype, exact=True), scale=0.5, distance_penalty=0.25)


@pytest.mark.usefixtures("many_splits")
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("num_chunks", [700, pytest.param(60000, marks=gpu)])
def test_distance_penalty_with_splits_of_the_landmarks(num_chunks, length):
    case = Case(length=length, num_chunks=num_chunks)
    inputs = make_inputs(case, torch.bfloat16, exact=True)
    assert_equal_selection(case, inputs, distance_penalty=0.5)
    plain, penalized = (select(case, inputs, distance_penalty=penalty)[1] for penalty in (0.0, 0.5))
    assert not torch.equal(plain, penalized)


@all_dtypes
@pytest.mark.parametrize("length", [1, 20])
def test_random_scores_lose_no_more_than_plain_pytorch(length, dtype):
    case = Case(length=length, num_chunks=40, topk=8, dim=64) if DEVICE == "cpu" else Case(length, 3000, 8, 64, 2)
    inputs = [x.detach() for x in make_inputs(case, dtype, exact=False)]
    scores, indices = select(case, inputs)
    plain, plain_indices = select(case, inputs, "torch")
    present = indices >= 0
    assert torch.equal(present, plain_indices >= 0)
    # Scores of what was selected, in fp64.
    q, landmarks = (x.double() for x in inputs)
    exact = torch.einsum("blrd,bcrd->blrc", q, landmarks) / case.dim**0.5
    rounding = 2 * relative_error(plain[present], exact.gather(-1, plain_indices.clamp(min=0).long())[present])
    rounding += torch.finfo(torch.float32).eps * case.dim**0.5  # of a sum of products in any order
    assert relative_error(scores[present], exact.gather(-1, indices.clamp(min=0).long())[present]) <= rounding
    # Nothing visible that was left is better than what was taken, but by rounding.
    first, end = (x[..., None, None] for x in visible_ranges(case))
    chunk = torch.arange(case.num_chunks, device=DEVICE)
    left = exact.masked_fill((chunk < first) | (chunk >= end), float("-inf"))
    left = torch.cat([left, left[..., :1]], -1).scatter(-1, indices.long() % (case.num_chunks + 1), float("-inf"))
    full = present.all(-1)
    gap = left[..., :-1].amax(-1) - scores.amin(-1)
    assert gap[full].max() <= rounding * exact.abs().max()
    assert not left[..., :-1][~full].isfinite().any()


@pytest.mark.parametrize("length", [1, 20])
def test_inputs_may_have_any_strides(length):
    case = Case(length=length, heads=2)
    inputs = [x.detach() for x in make_inputs(case, torch.float32, exact=True)]
    for axes in ((0, 2, 1, 3), (3, 0, 1, 2)):
        back = torch.tensor(axes).argsort().tolist()
        assert_equal_selection(case, [x.permute(axes).contiguous().permute(back) for x in inputs])
    bounds = [x[:1].expand(2, -1) for x in visible_ranges(case)]
    assert_equal_selection(case, inputs, visible=bounds)
    assert_equal_selection(case, inputs, visible=[x[:1].repeat_interleave(2, 1)[:, ::2] for x in bounds])


@pytest.mark.parametrize("length", [1, 20])
def test_no_query_sees_a_chunk(length):
    case = Case(length=length)
    nothing = torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
    for visible in ((nothing, nothing), (nothing + 5, nothing + 2), (nothing + 17, nothing + 20)):
        scores, indices = select(case, make_inputs(case, torch.float32, exact=False), visible=visible)
        assert (indices == -1).all() and (scores == float("-inf")).all()


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(case: Case, inputs, implementation: str, d_scores: torch.Tensor) -> list[torch.Tensor]:
    scores, _ = select(case, inputs, implementation)
    return torch.autograd.grad(scores, inputs, d_scores)


def make_d_scores(case: Case) -> torch.Tensor:
    shape = (case.batch, case.length, case.heads, case.topk)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def assert_gradients_agree(case: Case, dtype: torch.dtype) -> None:
    """Against the oracle in fp32: at most three times the error of the PyTorch path in the same dtype."""
    inputs, d_scores = make_inputs(case, dtype, exact=True), make_d_scores(case)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    ours, plain = (gradients(case, inputs, implementation, d_scores) for implementation in ("triton", "torch"))
    for actual, reference, expected, x in zip(ours, plain, gradients(case, wide, "naive", d_scores), inputs):
        assert actual.dtype == dtype and actual.shape == x.shape and actual.is_contiguous()
        rounding = 3 * relative_error(reference, expected) + torch.finfo(torch.float32).eps
        assert relative_error(actual, expected) <= rounding


@all_dtypes
@gradient_cases
def test_gradients_agree_with_the_oracle(case, dtype):
    if DEVICE == "cpu" and dtype == torch.float16 and case != Case():
        pytest.skip("the interpreter computes all dtypes in fp32")
    assert_gradients_agree(case, dtype)


@pytest.mark.parametrize("segment", [1, 3, 40])
def test_chunks_of_many_pairs_are_cut_into_segments(segment, monkeypatch):
    # Up to 70 queries for each of 2 chunks: up to 70 segments, more than one tile of partial sums.
    monkeypatch.setattr(triton_selection, "_SEGMENT", segment)
    assert_gradients_agree(Case(length=70, num_chunks=2, batch=1, heads=2), torch.float32)


def test_scores_of_absent_chunks_have_no_gradient():
    case = Case(length=30, num_chunks=4)
    inputs, d_scores = make_inputs(case, torch.float32, exact=False), make_d_scores(case)
    _, indices = select(case, inputs)
    expected = gradients(case, inputs, "triton", d_scores)
    garbage = torch.tensor([float("nan"), float("inf"), -1e30], device=DEVICE).expand_as(d_scores)
    assert (indices < 0).any()
    for actual, x in zip(gradients(case, inputs, "triton", torch.where(indices < 0, garbage, d_scores)), expected):
        assert torch.equal(actual, x)


def test_gradients_of_nothing():
    q, landmarks = torch.ones(2, 0, 1, 16, device=DEVICE), torch.ones(2, 3, 1, 16, device=DEVICE)
    scores, indices = triton_selection.select_chunks_forward(q, landmarks, *[torch.zeros(1, 0).long()] * 2, 4, 1.0)
    assert scores.shape == indices.shape == (2, 0, 1, 4)
    d_q, d_landmarks = triton_selection.select_chunks_backward(scores, q, landmarks, indices, 1.0)
    assert d_q.shape == q.shape and torch.equal(d_landmarks, torch.zeros_like(landmarks))


@pytest.mark.parametrize("case", [Case(length=40, num_chunks=9, topk=5), pytest.param(LARGE[-5], marks=gpu)], ids=str)
def test_same_bits_every_time(case, monkeypatch):
    monkeypatch.setattr(triton_selection, "_SEGMENT", 8)
    inputs, d_scores = make_inputs(case, torch.bfloat16, exact=False), make_d_scores(case)
    runs = [(*select(case, inputs), *gradients(case, inputs, "triton", d_scores)) for _ in range(2)]
    for x, y in zip(*runs):
        assert torch.equal(x, y)


# -- size -------------------------------------------------------------------------------------------------------------


def peak_memory(function) -> int:
    """Bytes of device memory that `function` takes at most beyond what is there."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


@gpu
@pytest.mark.parametrize(("length", "num_chunks"), [(65536, 16384), (1, 524288), (16, 524288)])
def test_memory_is_that_of_the_result(length, num_chunks, monkeypatch):
    monkeypatch.undo()  # poisoning takes no memory, but time
    q, landmarks = (torch.randn(1, n, 1, 64, device=DEVICE, dtype=torch.bfloat16) for n in (length, num_chunks))
    end = torch.full((1, length), num_chunks, device=DEVICE)

    def run():
        return select_chunks(
            q, landmarks, topk=8, chunk_size=64, visible=(torch.zeros_like(end), end), implementation="triton"
        )

    # The scores and indices, `first`, and for few queries what programs found of it: far less than the landmarks.
    assert peak_memory(run) <= length * (8 * 8 + 8) + landmarks.numel() // 8 + (1 << 20)


@gpu
def test_one_query_over_half_a_million_chunks():
    case = Case(length=1, num_chunks=524288, topk=8, dim=64, batch=1)
    assert_equal_selection(case, make_inputs(case, torch.bfloat16, exact=True))


@gpu
@pytest.mark.parametrize("length", [1, 40])
def test_landmarks_beyond_the_reach_of_32_bits(length):
    # Row 1 begins beyond 2^31 elements, and its last landmark is as many after its first.
    storage = torch.zeros(2, (1 << 21) + 4096, 1, 1024, device=DEVICE, dtype=torch.bfloat16)
    q = torch.ones(2, length, 1, 1024, device=DEVICE, dtype=torch.bfloat16)
    landmarks = storage[:, : (1 << 21) + 10]
    landmarks[0, 5], landmarks[1, -1], landmarks[1, 1 << 20] = 1.0, 1.0, 0.5
    end = torch.full((1, length), landmarks.shape[1], device=DEVICE)
    scores, indices = select_chunks(
        q, landmarks, topk=2, chunk_size=64, visible=(end * 0, end), scale=1.0, implementation="triton"
    )
    assert (indices[0] == torch.tensor([landmarks.shape[1] - 1, 5], device=DEVICE)).all()
    assert (indices[1] == torch.tensor([landmarks.shape[1] - 1, 1 << 20], device=DEVICE)).all()
    assert (scores[0] == torch.tensor([0.0, 1024.0], device=DEVICE)).all()
    assert (scores[1] == torch.tensor([1024.0, 512.0], device=DEVICE)).all()


@gpu
def test_more_results_than_32_bits_can_count():
    # 2^31 scores and indices: 16 GB. The last query sees other chunks than the first.
    length, topk = (1 << 24) + 64, 128
    q = torch.ones(1, length, 1, 16, device=DEVICE, dtype=torch.bfloat16)
    landmarks = torch.arange(130, device=DEVICE).view(1, 130, 1, 1).expand(1, 130, 1, 16).to(torch.bfloat16)
    end = 2 + torch.arange(length, device=DEVICE)[None] // (1 << 17)
    scores, indices = triton_selection.select_chunks_forward(q, landmarks, torch.zeros_like(end), end, topk, 1 / 16)
    for t in (0, 1 << 23, length - 1):
        seen = min(end[0, t].item(), 130)
        expected = torch.arange(seen - 1, -1, -1, device=DEVICE)[:topk]
        assert torch.equal(indices[0, t, 0, : len(expected)], expected.to(torch.int32))
        assert (indices[0, t, 0, len(expected) :] == -1).all()
        assert torch.equal(scores[0, t, 0, : len(expected)], expected.float())

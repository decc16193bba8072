"""
Contract 6 of the design for chunk attention in Triton: it agrees with the fp32 oracle, outputs and every gradient.

Without a GPU the kernels run through Triton's interpreter, on small shapes.
"""

import logging
from typing import NamedTuple

import pytest
import torch

from modeling_hsa.ops import chunk_attention, chunk_weights, triton_attention
from tests.helpers import relative_error


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("softmax", "stick_breaking", "joint")
all_kinds = pytest.mark.parametrize("kind", KINDS)


class Case(NamedTuple):
    batch: int = 2
    length: int = 11
    num_chunks: int = 5
    heads: int = 4
    kv_heads: int = 2
    retrieval_heads: int = 1
    topk: int = 3
    chunk_size: int = 16
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    shared: float = 0.0  # probability of a query to have the chunks of the query before

    def __str__(self):
        return "-".join(f"{name}{value}" for name, value in self._asdict().items() if value != getattr(Case(), name))


def make_indices(case: Case, generator: torch.Generator) -> torch.Tensor:
    """int32 [B, L, Hr, K]: distinct chunks nearest first; the number of them differs, so there are absent ones."""
    shape = (case.batch, case.length, case.retrieval_heads)
    topk = min(case.topk, case.num_chunks)
    chunks = torch.rand(*shape, case.num_chunks, generator=generator).topk(topk).indices
    absent = torch.arange(topk) >= torch.randint(0, 2 * topk + 1, (*shape, 1), generator=generator)
    repeats = torch.rand(shape, generator=generator) < case.shared
    own = torch.where(repeats, 0, torch.arange(case.length)[None, :, None]).cummax(1).values
    chunks = chunks.masked_fill(absent, -1).sort(-1, descending=True).values
    chunks = chunks.gather(1, own[..., None].expand_as(chunks))
    return torch.nn.functional.pad(chunks, (0, case.topk - topk), value=-1).int()


def make_inputs(case: Case, kind: str) -> dict[str, torch.Tensor]:
    """Inputs of chunk attention by name, in the dtype of the case (the weights in fp32), and the gradient `d_out`."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tokens = case.num_chunks * case.chunk_size
    x = {
        "q": draw(case.batch, case.length, case.heads, case.head_dim),
        "k": draw(case.batch, tokens, case.kv_heads, case.head_dim),
        "v": draw(case.batch, tokens, case.kv_heads, case.head_dim),
        "d_out": draw(case.batch, case.length, case.heads, case.head_dim),
    }
    x = {name: tensor.to(case.dtype) for name, tensor in x.items()}
    x["indices"] = make_indices(case, generator)
    weights = chunk_weights(draw(x["indices"].shape), x["indices"], kind)
    if weights is not None:
        x["weights"] = weights
    return {name: tensor.to(DEVICE) for name, tensor in x.items()}


def run(case: Case, inputs: dict[str, torch.Tensor], implementation: str, dtype: torch.dtype | None = None):
    """The output and the gradients of q, k, v and the weights, by name; computed in `dtype` if given."""
    names = [name for name in ("q", "k", "v", "weights") if name in inputs]
    leaves = {name: inputs[name].to(dtype or inputs[name].dtype).detach().requires_grad_() for name in names}
    output = chunk_attention(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("weights"), inputs["indices"],
        chunk_size=case.chunk_size, implementation=implementation,
    )  # fmt: skip
    gradients = torch.autograd.grad(output, list(leaves.values()), inputs["d_out"].to(output.dtype))
    return {"output": output.detach()} | {f"gradient of {name}": g for name, g in zip(names, gradients)}


def assert_as_good_as_pytorch(case: Case, kind: str) -> None:
    """The error against the oracle in fp32 is at most twice that of the PyTorch path, three times for gradients."""
    inputs = make_inputs(case, kind)
    exact = run(case, inputs, "naive", torch.float32)
    plain, ours = run(case, inputs, "torch"), run(case, inputs, "triton")
    for name, expected in exact.items():
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == plain[name].shape, name
        assert ours[name].isfinite().all(), name
        allowed = (2 if name == "output" else 3) * relative_error(plain[name], expected)
        # In half precision the PyTorch path rounds the gradient of the weights, the kernels do not; in fp32 both
        # differ from the oracle by the order of sums only.
        assert relative_error(ours[name], expected) <= max(allowed, 2e-6), name
    absent = inputs["indices"].amax(-1) < 0  # [B, L, Hr]
    absent = absent.repeat_interleave(case.heads // case.retrieval_heads, dim=2)
    assert (ours["output"][absent] == 0).all() and (ours["gradient of q"][absent] == 0).all()


@pytest.fixture(params=["union", "split"])
def path(request, monkeypatch):
    """Blocks of queries that share their chunks, or one query a program, its chunks split over several."""
    multiprocessors = {"union": 1, "split": 1 << 20}[request.param]
    _, *others = triton_attention.device_limits(torch.device(DEVICE))
    monkeypatch.setattr(triton_attention, "device_limits", lambda device: (multiprocessors, *others))
    return request.param


only_split = pytest.mark.parametrize("path", ["split"], indirect=True)
only_union = pytest.mark.parametrize("path", ["union"], indirect=True)


@all_kinds
def test_agrees_with_the_oracle_in_every_weighting(kind, path):
    assert_as_good_as_pytorch(Case(), kind)


SMALL = [
    *(Case(batch=1, length=n, kv_heads=1) for n in (1, 2, 63, 65)),
    # query heads per key/value head
    *(Case(batch=1, heads=q, kv_heads=kv) for q, kv in ((1, 1), (3, 3), (6, 2), (16, 1), (17, 1))),
    # several retrieval heads per key/value head, and the other way round
    *(
        Case(batch=1, heads=8, kv_heads=kv, retrieval_heads=r, shared=0.7)
        for kv, r in ((1, 2), (2, 4), (4, 2), (8, 1))
    ),
    *(Case(batch=1, num_chunks=c, topk=k) for c, k in ((1, 3), (2, 4), (7, 5), (20, 20), (5, 1))),
    Case(batch=1, length=20, chunk_size=48, num_chunks=3, head_dim=24, shared=0.9),
    Case(batch=1, dtype=torch.float16, heads=8, kv_heads=1),
]
weights_and_joint = pytest.mark.parametrize("kind", ["softmax", "joint"])


@weights_and_joint
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_agrees_with_the_oracle(case, kind):
    assert_as_good_as_pytorch(case, kind)


@only_split
@weights_and_joint
@pytest.mark.parametrize("case", [Case(batch=1, length=2, heads=6), Case(length=1, topk=5, num_chunks=4)], ids=str)
def test_agrees_with_the_oracle_where_the_chunks_of_a_query_are_split(case, kind, path):
    assert_as_good_as_pytorch(case, kind)


@weights_and_joint
@pytest.mark.parametrize(("num_chunks", "shared", "most"), [(2, 0.5, 16), (150, 0.95, 4)])
def test_a_chunk_that_many_queries_retrieve_is_summed_in_segments(num_chunks, shared, most, kind, monkeypatch):
    segments = []
    invert = triton_attention.invert
    monkeypatch.setattr(triton_attention, "invert", lambda *a: segments.append(invert(*a[:3], most)) or segments[-1])
    case = Case(batch=1, length=70, num_chunks=num_chunks, topk=2, heads=2, shared=shared)
    assert_as_good_as_pytorch(case, kind)
    assert segments[0].num_segments.max() > 2
    # There are two ways to place the partial sums, for few chunks and for many.
    assert (segments[0].num_slots == len(segments[0].chunk)) == (num_chunks == 2)


@weights_and_joint
def test_on_hopper_registers_are_limited_for_more_programs_to_run(kind, monkeypatch):
    monkeypatch.setattr(triton_attention, "device_limits", lambda device: (1, 1 << 17, True))
    limits, streaming = [], triton_attention._Plan.streaming

    def record(*args, **kwargs):
        sizes = streaming(*args, **kwargs)
        limits.append((sizes.get("maxnreg"), 32 * sizes["num_warps"]))
        return sizes

    monkeypatch.setattr(triton_attention._Plan, "streaming", record)
    assert_as_good_as_pytorch(Case(dtype=torch.float16, heads=16, kv_heads=1), kind)
    resident = [65536 // (registers * threads) for registers, threads in limits if registers]
    assert resident == ([5, 4, 3] if kind == "softmax" else [4, 3])  # forward, gradients of q, of k and v
    limits.clear()
    assert_as_good_as_pytorch(Case(heads=16, kv_heads=1), kind)
    assert limits and not any(registers for registers, _ in limits)  # fp32


@pytest.fixture
def poison(monkeypatch):
    """New tensors are full of NaN, so an element that a kernel forgot would show."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(torch.iinfo(x.dtype).min // 2)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


@weights_and_joint
@pytest.mark.usefixtures("poison")
def test_every_element_is_written(kind, path):
    assert_as_good_as_pytorch(Case(batch=2, length=5, num_chunks=6, heads=6, kv_heads=2), kind)


# Blocks of queries that share few chunks, and others.
SCATTERED = Case(batch=2, length=13, num_chunks=40, heads=16, kv_heads=1, shared=0.5)


@only_union
@weights_and_joint
@pytest.mark.parametrize(
    "case",
    [
        *(SCATTERED._replace(dtype=dtype) for dtype in (torch.float32, torch.float16)),
        Case(batch=1, length=37, num_chunks=120, heads=8, topk=4),
    ],
    ids=str,
)
def test_agrees_with_the_oracle_where_neighbours_share_few_chunks(case, kind, path):
    assert_as_good_as_pytorch(case, kind)


@pytest.mark.slow
@only_union
@pytest.mark.usefixtures("poison")
def test_a_query_is_computed_in_its_block_or_if_that_shares_few_chunks_alone(path, monkeypatch):
    inputs = make_inputs(SCATTERED, "softmax")
    launches = triton_attention._Plan.launches
    together = run(SCATTERED, inputs, "triton")
    written = []
    for kept in (0, 1):
        monkeypatch.setattr(
            triton_attention._Plan,
            "launches",
            lambda self, *a, **k: [list(launches(self, *a, **k))[kept]],  # noqa: B023
        )
        part = run(SCATTERED, inputs, "triton")
        for name in ("output", "gradient of q"):
            there = part[name].isfinite()
            assert torch.equal(part[name][there], together[name][there])
            written.append(there.all(-1).all(-1))
    in_blocks, in_blocks_too, alone, alone_too = written
    assert in_blocks.any() and not in_blocks.all()
    assert torch.equal(alone, ~in_blocks) and torch.equal(alone_too, alone) and torch.equal(in_blocks_too, in_blocks)


@only_union
def test_where_queries_must_share_chunks_there_is_one_launch(path):
    for num_chunks, launches in ((4, 1), (5, 2)):  # of 2 queries with 3 chunks each more than 0.7 must differ
        inputs = make_inputs(SCATTERED._replace(num_chunks=num_chunks), "softmax")
        plan = triton_attention._Plan(inputs["q"], inputs["k"], inputs["indices"], SCATTERED.chunk_size)
        tile = {"BLOCK": 2, "LINES": 16}
        assert len(list(plan.launches(tile, tensors=1))) == launches
        assert_as_good_as_pytorch(SCATTERED._replace(num_chunks=num_chunks), "softmax")


@weights_and_joint
def test_keys_and_values_may_be_a_part_of_a_larger_cache(kind, path):
    case = Case(batch=2, length=5)
    inputs = make_inputs(case, kind)
    results = []
    for strided in (False, True):
        x = dict(inputs)
        if strided:
            for name in "kv":
                larger = torch.full((2, x[name].shape[1] + 32, 2, 16), float("nan"), device=DEVICE)
                larger[:, : x[name].shape[1]] = x[name]
                x[name] = larger[:, : x[name].shape[1]]
                assert not x[name].is_contiguous()
        results.append(run(case, x, "triton"))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@weights_and_joint
def test_a_query_gives_the_same_whatever_its_neighbours_retrieve(kind):
    """Rows of a block that did not retrieve a chunk are not moved by it, not even by rounding."""
    case = Case(batch=1, length=22, heads=4, kv_heads=1, num_chunks=9, topk=4)
    inputs = make_inputs(case, kind)
    together = run(case, inputs, "triton")
    changed = dict(inputs, indices=inputs["indices"].clone())
    changed["indices"][:, 1::2] = inputs["indices"][:, 1::2].roll(1, dims=1)
    apart = run(case, changed, "triton")
    assert torch.equal(together["output"][:, ::2], apart["output"][:, ::2])
    assert torch.equal(together["gradient of q"][:, ::2], apart["gradient of q"][:, ::2])


def test_gradients_by_finite_differences():
    """In fp32, along a random direction of all inputs at once."""
    case = Case(batch=1)
    for kind in ("softmax", "joint"):
        inputs = make_inputs(case, kind)
        names = [name for name in ("q", "k", "v", "weights") if name in inputs]
        generator = torch.Generator().manual_seed(1)
        step = {name: torch.randn(inputs[name].shape, generator=generator).to(DEVICE) * 1e-2 for name in names}

        def loss(sign):
            x = dict(inputs, **{name: inputs[name] + sign * step[name] for name in names})  # noqa: B023
            output = chunk_attention(
                x["q"], x["k"], x["v"], x.get("weights"), x["indices"], chunk_size=16, implementation="triton"
            )
            return (output.double() * inputs["d_out"].double()).sum()  # noqa: B023

        gradients = run(case, inputs, "triton")
        expected = sum((gradients[f"gradient of {name}"].double() * step[name].double()).sum() for name in names)
        assert abs((loss(1) - loss(-1)) / 2 - expected) <= 2e-3 * abs(expected)


@weights_and_joint
def test_results_are_the_same_every_time(kind, path):
    case = Case(length=7, num_chunks=3, topk=2)
    inputs = make_inputs(case, kind)
    first, second = run(case, inputs, "triton"), run(case, inputs, "triton")
    assert all(torch.equal(second[name], x) for name, x in first.items())


# -- on a GPU ---------------------------------------------------------------------------------------------------------

LARGE = [
    *(Case(length=n, num_chunks=16, heads=16, kv_heads=1, topk=8, chunk_size=64, head_dim=64) for n in (1000, 2000)),
    *(Case(length=500, num_chunks=16, heads=8, kv_heads=kv, topk=4, chunk_size=64, head_dim=64) for kv in (1, 2, 8)),
    *(Case(length=300, num_chunks=9, topk=4, chunk_size=64, head_dim=d) for d in (16, 32, 80, 96, 128, 192, 256)),
    *(Case(length=300, num_chunks=9, topk=4, chunk_size=s, head_dim=64) for s in (16, 32, 80, 128)),
    *(Case(length=300, num_chunks=9, topk=4, chunk_size=128, head_dim=d) for d in (128, 256)),
    *(Case(length=300, num_chunks=150, topk=k, chunk_size=16, head_dim=64, shared=0.5) for k in (1, 17, 128)),
    Case(length=300, heads=32, kv_heads=1, chunk_size=64, head_dim=64, shared=0.9),
    Case(length=300, heads=128, kv_heads=1, chunk_size=64, head_dim=64),
    Case(length=300, heads=8, kv_heads=2, retrieval_heads=8, chunk_size=64, head_dim=64),
    Case(length=300, chunk_size=64, head_dim=64, dtype=torch.float16),
    # Neighbours share few chunks.
    *(
        Case(1, 160, c, heads=h, kv_heads=kv, topk=k, chunk_size=s, head_dim=d, shared=0.3)
        for c, h, kv, k, s, d in (
            (200, 16, 1, 8, 64, 64),
            (200, 32, 2, 8, 32, 128),
            (60, 16, 1, 4, 64, 256),
            (200, 32, 1, 4, 64, 64),
            (60, 16, 1, 4, 128, 128),
            (900, 8, 2, 8, 16, 32),
        )
    ),
]


@pytest.mark.gpu
@weights_and_joint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_agrees_with_the_oracle_at_real_sizes(case, dtype, kind):
    if dtype == torch.float32 and case.chunk_size * case.head_dim > 64 * 256:
        pytest.skip("the kernels do not take chunks of this size in fp32")
    assert_as_good_as_pytorch(case if case.dtype == torch.float16 else case._replace(dtype=dtype), kind)


@pytest.mark.gpu
@weights_and_joint
def test_decoding_agrees_with_the_oracle_at_real_sizes(kind):
    for batch, length in ((1, 1), (3, 1), (1, 5), (7, 3)):
        case = Case(batch, length, 600, heads=16, kv_heads=1, topk=8, chunk_size=64, head_dim=64, dtype=torch.bfloat16)
        assert_as_good_as_pytorch(case, kind)


@pytest.mark.gpu
def test_memory_is_addressed_beyond_32_bits():
    """Chunks whose keys start beyond element 2**31 of the storage."""
    tokens, heads, dim = (1 << 31) // 256 + 128, 2, 128
    k, v = (torch.zeros(1, tokens, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    k[:, -64:].normal_(), v[:, -64:].normal_()
    q = torch.randn(1, 300, 2, dim, dtype=torch.bfloat16, device="cuda")
    indices = torch.full((1, 300, 2, 1), tokens // 64 - 1, dtype=torch.int32, device="cuda")
    weights = torch.ones(indices.shape, device="cuda")
    for queries in (1, 300):
        inputs = q[:, :queries], k, v, weights[:, :queries], indices[:, :queries]
        actual = chunk_attention(*inputs, chunk_size=64, implementation="triton")
        last = [x[:, -64:] for x in inputs[1:3]]
        expected = chunk_attention(
            inputs[0], *last, inputs[3], torch.zeros_like(inputs[4]), chunk_size=64, implementation="naive"
        )
        assert relative_error(actual, expected) <= 1e-2


@pytest.mark.gpu
def test_memory_of_backward_is_bounded_by_the_inputs():
    case = Case(2, 8192, 128, heads=16, kv_heads=1, topk=8, chunk_size=64, head_dim=64, dtype=torch.bfloat16)
    for kind in ("softmax", "joint"):
        inputs = make_inputs(case, kind)
        size = sum(x.numel() * x.element_size() for x in inputs.values())
        run(case, inputs, "triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run(case, inputs, "triton")
        outputs = sum(x.numel() * x.element_size() for x in results.values())
        assert torch.cuda.max_memory_allocated() - before - outputs <= 2 * size


@pytest.mark.gpu
def test_auto_says_once_why_it_does_not_use_the_kernels(caplog):
    case = Case(length=40, chunk_size=128, head_dim=256)
    inputs = make_inputs(case, "softmax")
    message = r"in float32 they take `chunk_size \* head_dim` up to 16384, not 32768"
    with pytest.raises(NotImplementedError, match=message):
        run(case, inputs, "triton")
    with caplog.at_level("WARNING"):
        logging.getLogger("transformers").propagate = True
        for name, x in run(case, inputs, "auto").items():
            assert torch.equal(x, run(case, inputs, "torch")[name]), name
        run(case, inputs, "auto")
    assert len([r for r in caplog.records if "up to 16384, not 32768" in r.getMessage()]) == 1

"""
What does not fit together is refused by an error that names the argument; what fits is taken in every combination.
"""

import pytest
import torch

from modeling_hsa.ops import chunk_attention, chunk_weights, select_chunks, visible_chunks


def integers(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64, **options)


def good_select(**changes):
    arguments = {
        "q": torch.zeros(2, 5, 1, 4),
        "landmarks": torch.zeros(2, 3, 1, 4),
        "topk": 2,
        "chunk_size": 16,
    }
    return select_chunks(**{**arguments, **changes})


def good_weights(**changes):
    arguments = {
        "scores": torch.zeros(2, 5, 1, 3),
        "indices": torch.zeros(2, 5, 1, 3, dtype=torch.int32),
        "kind": "softmax",
    }
    return chunk_weights(**{**arguments, **changes})


def good_attention(**changes):
    arguments = {
        "q": torch.zeros(2, 5, 4, 8),
        "k": torch.zeros(2, 32, 2, 8),
        "v": torch.zeros(2, 32, 2, 8),
        "weights": torch.zeros(2, 5, 1, 3),
        "indices": torch.zeros(2, 5, 1, 3, dtype=torch.int32),
        "chunk_size": 16,
    }
    return chunk_attention(**{**arguments, **changes})


ALL_OPS = pytest.mark.parametrize("op", [good_select, good_weights, good_attention], ids=["select", "weights", "attn"])
half = {"dtype": torch.bfloat16}
meta = {"device": "meta"}


@ALL_OPS
def test_arguments_of_the_error_tests_are_good(op):
    op()


@ALL_OPS
def test_triton_is_refused_where_it_cannot_run(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="'triton'.*CUDA device, not on 'cpu'.*Use 'auto' or 'torch'"):
        op(implementation="triton")


@ALL_OPS
@pytest.mark.parametrize("implementation", ["cuda", "Torch", "", None])
def test_unknown_implementation_is_refused(op, implementation):
    with pytest.raises(ValueError, match=r"`implementation` must be one of \('auto', .*got"):
        op(implementation=implementation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 4)}, r"`q` must have the shape \[B, L, Hr, d_r\], got \[2, 5, 4\]"),
        ({"topk": 0}, "`topk` must be at least 1, got 0"),
        ({"topk": -3}, "`topk` must be at least 1, got -3"),
        ({"distance_penalty": -0.5}, "`distance_penalty` must be a number of at least 0, got -0.5"),
        ({"distance_penalty": float("nan")}, "`distance_penalty` must be a number of at least 0, got nan"),
        ({"landmarks": torch.zeros(2, 3, 4)}, r"`landmarks` must have the shape \[2, \*, 1, 4\], got \[2, 3, 4\]"),
        ({"landmarks": torch.zeros(1, 3, 1, 4)}, r"`landmarks` must have the shape \[2, \*, 1, 4\]"),
        ({"landmarks": torch.zeros(2, 3, 2, 4)}, r"`landmarks` must have the shape \[2, \*, 1, 4\]"),
        ({"landmarks": torch.zeros(2, 3, 1, 5)}, r"`landmarks` must have the shape \[2, \*, 1, 4\]"),
        ({"landmarks": torch.zeros(2, 3, 1, 4, **half)}, "`landmarks` is torch.bfloat16 but `q` torch.float32. Cast"),
        ({"landmarks": torch.zeros(2, 3, 1, 4, **meta)}, "`landmarks` is on meta but `q` on cpu. Move"),
        ({"visible": (torch.zeros(2, 4), integers(2, 5))}, r"`visible\[0\]` must have the shape \[2, 5\]"),
        ({"visible": (integers(1, 5), integers(3, 5))}, r"`visible\[1\]` must have the shape \[2, 5\]"),
        ({"visible": (torch.zeros(5), torch.zeros(5))}, r"`visible\[0\]` must have the shape \[2, 5\], got \[5\]"),
        (
            {"visible": (torch.zeros(2, 5), integers(2, 5))},
            r"`visible\[0\]` must be int32 or int64, got torch.float32",
        ),
        ({"visible": (integers(1, 5), integers(1, 5, **meta))}, r"`visible\[1\]` is on meta but `q` on cpu"),
        ({"visible": (integers(2, 5), integers(2, 5)), "q_start": 3}, "`visible` replaces `q_start`. Leave out one"),
        ({"visible": (integers(2, 5), integers(2, 5)), "q_start": integers(2)}, "`visible` replaces `q_start`"),
        (
            {"q": torch.zeros(2, 5, 0, 4), "landmarks": torch.zeros(2, 3, 0, 4)},
            "`q` must have at least one of Hr, got",
        ),
        ({"q": torch.zeros(2, 5, 1, 0), "landmarks": torch.zeros(2, 3, 1, 0)}, "`q` must have at least one of d_r"),
        ({"q": integers(2, 5, 1, 4), "landmarks": integers(2, 3, 1, 4)}, "`q` must be of a floating-point dtype, got"),
        *(({"chunk_size": n}, f"`chunk_size` must be at least 1, got {n}") for n in (0, -16)),
        ({"q_start": -1}, "`q_start` must be at least 0, got -1"),
        ({"q_start": torch.zeros(2)}, "`q_start` must be int32 or int64, got torch.float32"),
        ({"q_start": integers(2, **meta)}, "`q_start` is on meta but `q` on cpu. Move"),
        ({"q_start": integers(3)}, r"`q_start` must have the shape \[2\], got \[3\]"),
        *(({"scale": x}, f"`scale` must be finite, got {x}") for x in (float("inf"), float("-inf"), float("nan"))),
        ({"distance_penalty": float("inf")}, "`distance_penalty` must be a number of at least 0, got inf"),
    ],
)
def test_select_chunks_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        good_select(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sigmoid"}, r"`kind` must be one of \('softmax', .*got 'sigmoid'"),
        ({"kind": None}, "`kind` must be one of .*got None"),
        ({"indices": torch.zeros(2, 5, 1, 2)}, r"`indices` must have the shape \[2, 5, 1, 3\], got \[2, 5, 1, 2\]"),
        ({"indices": torch.zeros(2, 5, 3)}, r"`indices` must have the shape \[2, 5, 1, 3\], got \[2, 5, 3\]"),
        ({"indices": torch.zeros(2, 5, 1, 3)}, "`indices` must be int32 or int64, got torch.float32"),
        ({"indices": integers(2, 5, 1, 3, **meta)}, "`indices` is on meta but `scores` on cpu"),
        ({"scores": integers(2, 5, 1, 3)}, "`scores` must be of a floating-point dtype, got torch.int64"),
        ({"scores": torch.zeros(5, 3), "indices": integers(5, 3)}, r"`scores` must have the shape \[B, L, Hr, K\]"),
        (
            {"scores": torch.zeros(2, 5, 1, 0), "indices": integers(2, 5, 1, 0)},
            "`indices` must have at least one of K",
        ),
    ],
)
def test_chunk_weights_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        good_weights(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 32)}, r"`q` must have the shape \[B, L, Hq, D\], got \[2, 5, 32\]"),
        ({"k": torch.zeros(2, 32, 2, 4)}, r"`k` must have the shape \[2, \*, \*, 8\], got \[2, 32, 2, 4\]"),
        ({"k": torch.zeros(1, 32, 2, 8)}, r"`k` must have the shape \[2, \*, \*, 8\]"),
        ({"k": torch.zeros(2, 2, 16, 2, 8)}, r"`k` must have the shape \[2, \*, \*, 8\], got \[2, 2, 16, 2, 8\]"),
        ({"v": torch.zeros(2, 16, 2, 8)}, r"`v` must have the shape \[2, 32, 2, 8\], got \[2, 16, 2, 8\]"),
        ({"k": torch.zeros(2, 32, 2, 8, **half)}, "`k` is torch.bfloat16 but `q` torch.float32. Cast"),
        ({"v": torch.zeros(2, 32, 2, 8, **half)}, "`v` is torch.bfloat16 but `q` torch.float32. Cast"),
        ({"v": torch.zeros(2, 32, 2, 8, **meta)}, "`v` is on meta but `q` on cpu. Move"),
        ({"indices": torch.zeros(2, 4, 1, 3)}, r"`indices` must have the shape \[2, 5, \*, \*\], got \[2, 4, 1, 3\]"),
        ({"weights": torch.zeros(2, 5, 1, 2)}, r"`weights` must have the shape \[2, 5, 1, 3\], got \[2, 5, 1, 2\]"),
        ({"weights": integers(2, 5, 1, 3)}, "`weights` must be of a floating-point dtype, got torch.int64"),
        ({"weights": torch.zeros(2, 5, 1, 3, **meta)}, "`weights` is on meta but `q` on cpu. Move"),
        ({"indices": torch.zeros(2, 5, 1, 3)}, "`indices` must be int32 or int64, got torch.float32"),
        ({"indices": torch.zeros(2, 5, 1, 3, dtype=torch.bool)}, "`indices` must be int32 or int64, got torch.bool"),
        ({"indices": integers(2, 5, 1, 3, **meta)}, "`indices` is on meta but `q` on cpu"),
        ({"indices": integers(2, 5, 1, 0), "weights": None}, "`indices` must have at least one of K, got the shape"),
        ({"indices": integers(2, 5, 0, 3), "weights": None}, "`indices` must have at least one of Hr"),
        ({"q": torch.zeros(2, 5, 0, 8)}, "`q` must have at least one of Hq"),
        ({"k": torch.zeros(2, 32, 0, 8), "v": torch.zeros(2, 32, 0, 8)}, "`k` must have at least one of Hkv"),
        (
            {name: integers(2, 32, 4, 8) for name in "qkv"} | {"indices": integers(2, 32, 1, 3), "weights": None},
            "`q` must be of a floating-point dtype, got torch.int64",
        ),
        *(({"chunk_size": n}, f"`chunk_size` must be at least 1, got {n}") for n in (0, -16)),
        ({"chunk_size": 24}, r"The length of `k` \(32\) must be a multiple of `chunk_size` \(24\)"),
        (
            {"k": torch.zeros(2, 32, 3, 8), "v": torch.zeros(2, 32, 3, 8)},
            "The 4 heads of `q` must be a multiple of the 3 of `k` and of the 1 of `indices`",
        ),
        (
            {"indices": torch.zeros(2, 5, 3, 3), "weights": torch.zeros(2, 5, 3, 3)},
            "The 4 heads of `q` must be a multiple of the 2 of `k` and of the 3 of `indices`",
        ),
        (
            {
                "q": torch.zeros(2, 5, 6, 8),
                "indices": torch.zeros(2, 5, 3, 3),
                "weights": torch.zeros(2, 5, 3, 3),
            },
            "The 6 heads of `q` .* 2 of `k` and of the 3 of `indices`, and one of these two a multiple of the other",
        ),
        *(
            ({"scale": scale}, f"`scale` must be more than 0 and finite, got {scale}")
            for scale in (0.0, -1.0, float("inf"), float("nan"))
        ),
    ],
)
def test_chunk_attention_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        good_attention(**changes)


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        (good_select, {"q": [[[[0.0]]]]}, "`q` must be a tensor, got list"),
        (good_select, {"landmarks": None}, "`landmarks` must be a tensor, got NoneType"),
        *((good_select, {"topk": x}, "`topk` must be an int, got") for x in (2.0, True, None, torch.tensor(2))),
        *((op, {"chunk_size": x}, "`chunk_size` must be an int, got") for op in (good_select, good_attention)
          for x in (16.0, "16", None)),
        (good_select, {"q_start": 1.5}, "`q_start` must be an int, got 1.5"),
        (good_select, {"visible": integers(2, 5)}, r"`visible` must be a pair of tensors, `\(first, end\)`"),
        (good_select, {"visible": (0, integers(2, 5))}, r"`visible\[0\]` must be a tensor, got int"),
        *((op, {"scale": "1"}, "`scale` must be a number, got '1'") for op in (good_select, good_attention)),
        (good_select, {"distance_penalty": None}, "`distance_penalty` must be a number, got None"),
        (good_weights, {"scores": None}, "`scores` must be a tensor, got NoneType"),
        (good_attention, {"indices": None}, "`indices` must be a tensor, got NoneType"),
        (good_attention, {"weights": 1.0}, "`weights` must be a tensor, got float"),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused(op, changes, message):
    with pytest.raises(TypeError, match=message):
        op(**changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 16), ValueError, "`length` must be at least 0, got -1"),
        ((5, 0), ValueError, "`chunk_size` must be at least 1, got 0"),
        ((5, 16, -2), ValueError, "`q_start` must be at least 0, got -2"),
        ((5, 16, torch.zeros(2)), ValueError, "`q_start` must be int32 or int64"),
        ((5, 16, integers(2, 1)), ValueError, r"`q_start` must have the shape \[B\], got \[2, 1\]"),
        ((5.0, 16), TypeError, "`length` must be an int, got 5.0"),
    ],
)
def test_visible_chunks_names_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        visible_chunks(*arguments)


# -- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_int32_and_int64_are_the_same(implementation):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    q, landmarks, k, v = draw(2, 5, 1, 4), draw(2, 3, 1, 4), draw(2, 48, 1, 4), draw(2, 48, 1, 4)
    results = []
    for dtype in (torch.int32, torch.int64):
        visible = (torch.zeros(1, 5, dtype=dtype), torch.arange(5, dtype=dtype)[None] // 2 + 1)
        start = torch.tensor([40, 3], dtype=dtype)
        arguments = {"topk": 2, "chunk_size": 16, "implementation": implementation}
        for options in ({"visible": visible}, {"q_start": start}):
            scores, indices = select_chunks(q, landmarks, **arguments, **options)
            weights = chunk_weights(scores, indices.to(dtype), "stick_breaking", implementation)
            attended = chunk_attention(
                q, k, v, weights, indices.to(dtype), chunk_size=16, implementation=implementation
            )
            results += [scores, indices, weights, attended]
    for narrow, wide in zip(results[:8], results[8:]):
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_may_have_a_dtype_of_their_own(dtype, implementation):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=generator).requires_grad_() for n in (5, 48, 48))
    weights = torch.rand(2, 5, 1, 2, generator=generator).to(dtype).requires_grad_()
    indices = torch.tensor([2, 0]).expand(2, 5, 1, 2)
    output = chunk_attention(q, k, v, weights, indices, chunk_size=16, implementation=implementation)
    output.square().sum().backward()
    same = weights.detach().float().requires_grad_()
    expected = chunk_attention(q, k, v, same, indices, chunk_size=16, implementation=implementation)
    expected.square().sum().backward()
    assert torch.allclose(output, expected, atol=1e-6) and output.dtype == torch.float32
    assert weights.grad.dtype == dtype and torch.allclose(weights.grad.float(), same.grad, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("shape", ["no rows", "no queries", "no chunks"])
def test_what_is_empty_gives_what_is_empty_and_gradients(shape, implementation):
    batch, length, chunks = (
        0 if shape == name else n for name, n in (("no rows", 2), ("no queries", 5), ("no chunks", 3))
    )
    sizes = ((length, 8), (chunks, 8), (length, 8), (16 * chunks, 8), (16 * chunks, 8))
    rq, lm, q, k, v = inputs = [torch.ones(batch, n, 1, d, requires_grad=True) for n, d in sizes]
    scores, indices = select_chunks(rq, lm, topk=2, chunk_size=16, q_start=20, implementation=implementation)
    weights = chunk_weights(scores, indices, "softmax", implementation)
    output = chunk_attention(q, k, v, weights, indices, chunk_size=16, implementation=implementation)
    assert scores.shape == indices.shape == (batch, length, 1, 2) and output.shape == q.shape
    gradients = torch.autograd.grad(output.sum() + scores[indices >= 0].sum(), inputs)
    assert [x.shape for x in gradients] == [x.shape for x in inputs] and not any(x.any() for x in gradients)

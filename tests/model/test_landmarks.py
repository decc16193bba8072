"""Landmarks that stand for the attention mass of their chunk, `chunk_landmark="mass"`."""

import pytest
import torch

from modeling_hsa.landmarks import mass_landmarks, mass_queries
from modeling_hsa.ops import chunk_attention, chunk_weights, select_chunks
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error
from tests.models import make_variant, tiny_config
from tests.rows import random_ids


CHUNKS, SIZE, HEADS, KV_HEADS, DIM = 6, 16, 4, 2, 8


@pytest.fixture
def keys() -> torch.Tensor:
    return 2 * torch.randn(CHUNKS, SIZE, KV_HEADS, DIM)


def log_mass(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The definition, in fp64: queries [CHUNKS, HEADS, DIM] -> [CHUNKS, HEADS]."""
    keys = keys.double().repeat_interleave(HEADS // KV_HEADS, dim=2)
    return (torch.einsum("nhd,nshd->nhs", queries.double(), keys) * DIM**-0.5).logsumexp(-1)


def score(queries: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    return (mass_queries(queries) * landmarks).sum(-1) * DIM**-0.5


def test_the_score_of_a_query_like_the_anchor_is_the_log_of_the_mass(keys):
    anchors = torch.randn(CHUNKS, HEADS, DIM)
    assert relative_error(score(anchors, mass_landmarks(anchors, keys)), log_mass(anchors, keys)) <= SAME_ARITHMETIC


def test_no_score_exceeds_the_log_of_the_mass(keys):
    anchors = torch.randn(CHUNKS, HEADS, DIM)
    for distance in (0.1, 1.0, 10.0):
        queries = anchors + distance * torch.randn_like(anchors)
        missing = log_mass(queries, keys) - score(queries, mass_landmarks(anchors, keys))
        assert (missing > 0).all()
        assert missing.mean() > 1e-3 * distance**2


def test_gradients(keys):
    anchors = torch.randn(CHUNKS, HEADS, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mass_landmarks, (anchors, keys.double().requires_grad_()))


@pytest.mark.parametrize("implementation", ["naive", "torch", "triton"])
def test_with_exact_landmarks_two_softmaxes_are_one_over_all_tokens(implementation):
    """`joint` is the softmax over all retrieved tokens; every chunk is retrieved, with the query as its anchor."""
    dim = 16
    keys, values = (torch.randn(1, CHUNKS * SIZE, 1, dim) for _ in range(2))
    query = torch.randn(1, 1, 1, dim)
    landmarks = mass_landmarks(query[0].expand(CHUNKS, 1, dim), keys.view(CHUNKS, SIZE, 1, dim))[None]
    options = {"chunk_size": SIZE, "implementation": implementation}
    scores, indices = select_chunks(
        mass_queries(query), landmarks, topk=CHUNKS, q_start=CHUNKS * SIZE, scale=dim**-0.5, **options
    )
    weights = chunk_weights(scores, indices, "softmax")
    factorised = chunk_attention(query, keys, values, weights, indices, **options)
    joint = chunk_attention(query, keys, values, None, indices, **options)
    assert relative_error(factorised, joint) <= OTHER_ORDER


def test_what_retrieval_scores_is_the_bound():
    """In a model: the scores that are returned, from the landmarks and the queries that its modules make."""
    model, ids = make_variant("mass_landmark_stride_3", retrieval_stride=1), random_ids(1, 64)
    seen = {}
    model.model.chunk_encoder.register_forward_hook(lambda module, inputs, output: seen.update(chunks=output))
    retrieval = model.model.layers[1].retrieval
    retrieval.q_norm.register_forward_hook(lambda module, inputs, output: seen.update(queries=output))
    with torch.no_grad():
        retrieved = model(ids, output_retrieval=True).retrieval[0]
    queries, keys = seen["queries"][0, -1], seen["chunks"].keys[0]  # [Hr, D], [C, S, Hkv, D]
    for head, (chunks, scores) in enumerate(zip(retrieved.indices[0, -1], retrieved.scores[0, -1])):
        for chunk, found in zip(chunks.tolist(), scores.tolist()):
            exact = (keys[chunk, :, head // 2] @ queries[head] * 8**-0.5).logsumexp(0).item()
            assert exact - 3 < found <= exact + 1e-4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"retrieval_dim": 16}, "`head_dim` \\+ 1 \\(9\\), got 16"),
        ({"hsa_num_key_value_heads": 2}, "a multiple of `hsa_num_key_value_heads` \\(2\\)"),
        ({"landmark_norm": True}, "does not go with `landmark_norm`"),
        ({"num_encoder_layers": 0}, "`chunk_landmark='mass'` needs `num_encoder_layers`"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{"chunk_landmark": "mass", "retrieval_dim": 9, **fields})

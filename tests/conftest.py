"""What all tests share: seeds, the skipping of GPU tests, Hypothesis settings, model variants and ways to read."""
# ruff: noqa: E402

import copy
import os

import pytest
import torch


# Without a GPU the kernels run in Triton's interpreter, which it asks for when it is imported: Transformers does that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, register_random, settings
from torch.utils._pytree import tree_leaves
from transformers import set_seed

from modeling_hsa import HSACache, HSAForCausalLM

from .helpers import InsideOperators, relative_error, tiny_model


# Relative errors in fp32: where the arithmetic is the same, and where sums are taken in another order.
SAME_ARITHMETIC = 1e-5
OTHER_ORDER = 1e-4

# The models are so small that threads only get in each other's way.
torch.set_num_threads(1)

settings.register_profile(
    "hsa", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("hsa")


class _TorchRandom:
    """Lets Hypothesis seed PyTorch, so that it can repeat an example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()
register_random(_torch_random)

# Lengths around the borders of the chunks (16 tokens) and of the blocks of the window attention (64 tokens).
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 100, 129)

# Every switch of the architecture, each away from its default.
VARIANTS = {
    "default": {},
    "stick_breaking": {"chunk_weighting": "stick_breaking"},
    "joint": {"chunk_weighting": "joint"},
    "standard_residual": {"hsa_residual": "standard"},
    "no_local_attention": {"hsa_local_attention": False},
    "mean_landmark": {"chunk_landmark": "mean"},
    "no_encoder": {"chunk_landmark": "mean", "num_encoder_layers": 0},
    "stride_3": {"retrieval_stride": 3},
    "stride_16": {"retrieval_stride": 16, "chunk_weighting": "stick_breaking"},
    "stride_20": {"retrieval_stride": 20, "hsa_local_attention": False},
    "distance_penalty": {"retrieval_distance_penalty": 0.3, "chunk_topk": 2},
    "two_retrieval_heads": {"num_retrieval_heads": 2},
    "four_retrieval_heads": {"num_retrieval_heads": 4, "hsa_num_key_value_heads": 2, "retrieval_stride": 3},
    "two_memory_heads": {"hsa_num_key_value_heads": 2, "chunk_weighting": "joint"},
    "landmark_norm": {"landmark_norm": True},
    "no_qk_norm": {"qk_norm": False},
    "more_topk_than_chunks": {"chunk_topk": 50},
    "window_of_one": {"sliding_window": 1},
    "window_of_100": {"sliding_window": 100},
    "window_beyond_the_input": {"sliding_window": 1000},
    "no_lower_layers": {"num_lower_layers": 0},
    "eager_attention": {"attn_implementation": "eager"},
}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)


@pytest.fixture(autouse=True)
def _free_gpu_memory(request):
    """Tests that run beside each other share one GPU: none keeps what it no longer uses."""
    yield
    if "gpu" in request.keywords and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def model() -> HSAForCausalLM:
    """The tiny model with default switches. Shared: do not change it."""
    return tiny_model()


def make_variant(name: str) -> HSAForCausalLM:
    """The tiny model with the switches of `VARIANTS[name]`."""
    overrides = dict(VARIANTS[name])
    attn_implementation = overrides.pop("attn_implementation", "sdpa")
    model = tiny_model(**overrides)
    model.set_attn_implementation(attn_implementation)
    return model


@pytest.fixture(scope="session", params=VARIANTS)
def variant_model(request) -> HSAForCausalLM:
    """The tiny model with every switch in turn. Shared: do not change it."""
    return make_variant(request.param)


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids of the tiny model; never 0, so that 0 can be the padding token."""
    return torch.randint(1, 99, shape)


def read(model, ids, sizes, cache=None, attention_mask=None, position_ids=None) -> tuple[torch.Tensor, HSACache]:
    """
    Reads `ids` [B, L] in segments of `sizes` tokens each, the last size repeating as often as needed.

    Args:
        attention_mask: [B, cached + L].
        position_ids: [1 | B, L].

    Returns: the logits [B, L, vocab_size] and the cache.
    """
    logits, start, sizes = [], 0, list(sizes)
    past = 0 if cache is None else cache.get_seq_length()
    while start < ids.shape[1]:
        end = min(start + sizes[0], ids.shape[1])
        sizes = sizes[1:] or sizes
        outputs = model(
            ids[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, : past + end],
            position_ids=None if position_ids is None else position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = outputs.past_key_values
        logits.append(outputs.logits)
        start = end
    return torch.cat(logits, dim=1), cache


class Rows:
    """
    A batch given as one string per row, in which every character is a column: `x` a token, `|` a token that starts a
    new document (packing), `.` padding. Tokens are random, and so is what padding holds.

    Attributes: ids, attention_mask and position_ids, int64 [B, L].
    """

    def __init__(self, *rows: str):
        length = max(map(len, rows))
        if any(len(row) != length for row in rows):
            raise ValueError(f"Rows must have one length, got {[len(row) for row in rows]}.")
        self.ids = random_ids(len(rows), length)
        self.attention_mask = torch.tensor([[int(column != ".") for column in row] for row in rows])
        self.position_ids = torch.randint(0, 1000, (len(rows), length))
        self._expected: dict[HSAForCausalLM, torch.Tensor] = {}
        self.documents: list[tuple[int, list[int]]] = []  # row and columns of each document
        for i, row in enumerate(rows):
            document: list[int] = []
            for column, kind in enumerate(row):
                if kind == ".":
                    continue
                if kind == "|" or not document:
                    document = []
                    self.documents.append((i, document))
                self.position_ids[i, column] = len(document)
                document.append(column)

    @property
    def is_packed(self) -> bool:
        rows = [row for row, _ in self.documents]
        return len(set(rows)) < len(rows)

    def inputs(self) -> dict[str, torch.Tensor]:
        """`attention_mask` where there is padding and `position_ids` where there is packing."""
        inputs = {}
        if not self.attention_mask.all():
            inputs["attention_mask"] = self.attention_mask
        if self.is_packed:
            inputs["position_ids"] = self.position_ids
        return inputs

    def select(self, order: list[int]) -> "Rows":
        """The batch with the rows `order` of this one."""
        selected = copy.copy(self)
        selected.ids, selected.attention_mask, selected.position_ids = (
            x[order] for x in (self.ids, self.attention_mask, self.position_ids)
        )
        selected.documents = [(i, columns) for i, row in enumerate(order) for r, columns in self.documents if r == row]
        selected._expected = {}
        return selected

    @torch.no_grad()
    def expected(self, model) -> torch.Tensor:
        """The logits [B, L, vocab_size] that every document has alone, without a cache; 0 for padding."""
        if model not in self._expected:
            expected = torch.zeros(*self.ids.shape, model.config.vocab_size)
            for row, columns in self.documents:
                expected[row, columns] = model(self.ids[row : row + 1, columns], use_cache=False).logits[0]
            self._expected[model] = expected
        return self._expected[model]

    def error(self, model, logits: torch.Tensor, start: int = 0) -> float:
        """
        The largest relative error of a document in `logits` [B, n, vocab_size], of the n columns from `start` on,
        to the same document alone.
        """
        expected = self.expected(model)
        errors = [0.0]
        for row, columns in self.documents:
            read = [column for column in columns if start <= column < start + logits.shape[1]]
            if read:
                actual = logits[row, [column - start for column in read]].detach()
                errors.append(relative_error(actual, expected[row, read]))
        return max(errors)


class Allocations(InsideOperators):
    """Records the tensors that operations make in storage of their own, so neither views nor what is written into."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[int, int]] = []  # elements of a tensor, and the address of its storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made.append((x.numel(), x.untyped_storage().data_ptr()))
        return result

    def elements(self, but=()) -> list[int]:
        """The number of elements of each tensor made, except for the tensors `but`."""
        excluded = {(x.numel(), x.untyped_storage().data_ptr()) for x in but}
        return [elements for elements, address in self.made if (elements, address) not in excluded]

"""`HSACache.fork`: forks and their parent go on independently, in any order, and share the chunk memory."""

import gc

import pytest
import torch

from modeling_hsa import HSACache, HSAStaticCache
from tests.helpers import OTHER_ORDER, Allocations, relative_error
from tests.models import VARIANTS, make_variant
from tests.rows import Rows, random_ids, read


# Rows of 100 columns that forks start from; chunks have 16 tokens.
PREFIXES = {
    "plain": ("x" * 100, "x" * 100),
    "padded": ("." * 37 + "x" * 63, "x" * 70 + "." * 30),
    "packed": ("|" + "x" * 69 + "|" + "x" * 29, "|" + "x" * 33 + "|" + "x" * 65),
}
SWITCHES = ("default", "joint", "stride_3", "two_memory_heads", "distance_penalty")


@pytest.fixture(scope="module")
def models():
    return {name: make_variant(name) for name in VARIANTS if name in SWITCHES}


class Branch:
    """A cache and the rows that were read into it."""

    def __init__(self, model, rows: Rows, cache: HSACache):
        self.model, self.rows, self.cache = model, rows, cache

    def fork(self) -> "Branch":
        return Branch(self.model, self.rows, self.cache.fork())

    def read(self, *columns: str, sizes=(1000,)) -> float:
        """Reads more columns, as `Rows` takes them. Returns the error of their logits."""
        rows, start = self.rows.extended(*columns), self.rows.ids.shape[1]
        inputs = rows.inputs()
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, start:]
        logits, _ = read(self.model, rows.ids[:, start:], sizes, self.cache, **inputs)
        self.rows = rows
        return rows.error(self.model, logits, start)

    def forget(self, columns: int) -> None:
        self.cache.crop(-columns)
        self.rows = self.rows.shortened(columns)


@torch.no_grad()
@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", SWITCHES)
def test_forks_and_their_parent_take_turns(models, name, prefix, offloading):
    model = models[name]
    parent = Branch(model, Rows(), HSACache(model.config, offloading=offloading))
    parent.read(*PREFIXES[prefix])
    first, second = parent.fork(), parent.fork()
    for branch, sizes in ((second, [1]), (parent, [40]), (first, [3, 1, 30]), (second, [33]), (parent, [1])):
        assert branch.read("x" * 40, "x" * 40, sizes=sizes) <= OTHER_ORDER
    third = first.fork()
    for branch in (first, third, parent, second, third):
        assert branch.read("x" * 20 + "." * 7, "x" * 27, sizes=[13]) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_a_fork_forgets_stays_with_the_others(models, prefix):
    model = models["default"]
    parent = Branch(model, Rows(), HSACache(model.config))
    parent.read(*PREFIXES[prefix])
    fork = parent.fork()
    fork.forget(9)  # over the end of a chunk, which is then made anew, of other tokens
    for branch in (fork, parent, fork):
        assert branch.read("x" * 35, "x" * 35) <= OTHER_ORDER


@torch.no_grad()
def test_rows_of_a_fork_can_be_changed(models):
    model = models["default"]
    parent = Branch(model, Rows(), HSACache(model.config))
    parent.read(*PREFIXES["padded"])
    fork = parent.fork()
    fork.read("x" * 20, "x" * 20)
    fork.cache.reorder_cache(torch.tensor([1, 1]))
    fork.rows = fork.rows.select([1, 1])
    for branch in (fork, parent, fork):
        assert branch.read("x" * 35, "x" * 35) <= OTHER_ORDER


@torch.no_grad()
def test_a_fork_copies_no_chunk_memory(models):
    model = models["default"]
    ids = random_ids(1, 64 * 16)
    _, cache = read(model, ids, [256])
    cache.reserve(80 * 16)
    read(model, random_ids(1, 16), [16], cache)  # grows to what is reserved
    keys = cache.memory.pages.keys
    with Allocations() as made:
        fork = cache.fork()
        read(model, random_ids(1, 20), [1], fork)
        read(model, random_ids(1, 20), [20], cache)
    assert max(made.elements()) < keys.numel()
    assert fork.memory.pages is cache.memory.pages and cache.memory.pages.keys is keys


@torch.no_grad()
def test_forks_that_are_gone_leave_their_room_to_others(models):
    model = models["default"]
    _, cache = read(model, random_ids(1, 100), [100])
    for _ in range(6):
        read(model, random_ids(1, 40), [40], cache.fork())
        gc.collect()
    assert cache.memory.pages.used <= 6 + 2 * 3


@torch.no_grad()
def test_a_fork_of_an_empty_cache(models):
    model, ids = models["default"], random_ids(2, 50)
    cache = HSACache(model.config)
    fork = cache.fork()
    for one in (fork, cache):
        logits, _ = read(model, ids, [20], one)
        assert relative_error(logits, model(ids, use_cache=False).logits) <= OTHER_ORDER


def test_a_static_cache_refuses(models):
    with pytest.raises(NotImplementedError, match="deepcopy"):
        HSAStaticCache(models["default"].config, 100).fork()

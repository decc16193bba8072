"""
A machine that does anything to caches in any order, and compares every forward with the documents alone. What it does
to the rows it does to `Rows` as well, so that these always say what the cache should hold.
"""

import contextlib
import copy
import tempfile

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, precondition, rule

from modeling_hsa import HSACache, HSAStaticCache
from tests.helpers import OTHER_ORDER
from tests.models import make_variant
from tests.rows import Rows


# Switches that change what a cache keeps, or in which order it is written.
NAMES = (
    "default", "stride_3", "stride_20", "no_local_attention", "joint", "two_retrieval_heads", "window_of_one",
    "full_attention", "early_encoder", "hsa_qk_norm_only", "no_hsa_mlp", "baseline", "ramba",
    "linear_attention_only",
)  # fmt: skip
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
MOST_COLUMNS = 112
MOST_ROWS = 4
# In bf16, where all chunks are retrieved, so that rounding cannot select others.
HALF_PRECISION = 0.1


class Branch:
    """A cache, and what it should hold."""

    def __init__(self, cache: HSACache, rows: Rows):
        self.cache, self.rows = cache, rows
        self.is_static = isinstance(cache, HSAStaticCache)
        self.forget()

    def forget(self) -> None:
        self.is_rough = False  # whether something in it was computed in half precision
        self.is_torn = False  # whether only a reset helps
        self.first_kept = 0  # the column to which `crop` has to be able to go back
        self.is_recording = False  # so that it stays where it is

    def copied(self, cache: HSACache) -> "Branch":
        other = copy.copy(self)
        other.cache = cache
        return other

    @property
    def columns(self) -> int:
        return self.rows.ids.shape[1]


class Failure(Exception):
    """Raised by a hook."""


@st.composite
def new_columns(draw, batch: int, most: int) -> list[str]:
    """Columns of each row, as `Rows` takes them."""
    length = min(most, draw(st.sampled_from([1, 1, 1, 2, 15, 16, 17, 40]) | st.integers(1, 50)))
    is_padded, is_packed = draw(st.booleans()), draw(st.integers(0, 2)) == 0
    rows = []
    for _ in range(batch):
        row = ["x"] * length
        if is_packed:
            row[draw(st.integers(0, length - 1))] = "|"
        if is_padded:
            start = draw(st.integers(0, length))
            end = draw(st.integers(start, length))
            row[start:end] = "." * (end - start)
        rows.append("".join(row))
    return rows


class CacheMachine(RuleBasedStateMachine):
    branches = Bundle("branches")

    @initialize(name=st.sampled_from(NAMES), changes_dtype=st.booleans())
    def make_model(self, name, changes_dtype):
        self.model = _model(name, changes_dtype)
        self.half = _half_model(name) if changes_dtype else None
        self.losses: list[torch.Tensor] = []
        self.made = 0
        self.folders: list[tempfile.TemporaryDirectory] = []

    # -- making and unmaking ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.made < 2)
    @rule(
        target=branches, kind=st.sampled_from(["device", "device", "host", "disk", "static"]), batch=st.integers(1, 3)
    )
    def make(self, kind, batch):
        config = self.model.config
        self.made += 1
        if kind == "static":
            cache = HSAStaticCache(config, MOST_COLUMNS)
        else:
            cache = HSACache(config, memory=kind, folder=tempfile.gettempdir() if kind == "disk" else None)
        return Branch(cache, Rows(*[""] * batch))

    @rule(target=branches, branch=branches, data=st.data())
    def copy(self, branch, data):
        can_fork = not branch.is_static
        make = HSACache.fork if can_fork and data.draw(st.integers(0, 3)) else copy.deepcopy
        other = branch.copied(make(branch.cache))
        for one in (branch, other):
            self.read(one, "no_grad", 4, data)
        return other

    @precondition(lambda self: self.made == 2)
    @rule(branch=consumes(branches))
    def drop(self, branch):
        """Gives the room of a fork back."""
        self.made = 1

    @rule(branch=branches, memory=st.sampled_from(["device", "host", "disk"]), keeps_folder=st.booleans())
    def keep(self, branch, memory, keeps_folder):
        """Goes on with what was saved, in the same session or a new one, and loaded."""
        if branch.is_static:
            return
        folder = branch.cache.session.folder if branch.cache.session and keeps_folder else self._new_folder()
        try:
            branch.cache.save_pretrained(folder)
        except ValueError:
            assert keeps_folder  # a fork has saved there
            branch.cache.save_pretrained(folder := self._new_folder())
        branch.cache = HSACache.from_pretrained(folder, self.model.config, memory=memory, verify=True)

    def _new_folder(self) -> str:
        self.folders.append(tempfile.TemporaryDirectory())
        return self.folders[-1].name

    @rule(branch=branches, batch=st.integers(1, 3))
    def reset(self, branch, batch):
        branch.cache.reset()
        # The storage of a static cache keeps its number of rows and its dtype.
        batch = len(branch.rows.strings) if branch.is_static else batch
        is_rough = branch.is_static and branch.is_rough
        branch.rows = Rows(*[""] * batch)
        branch.forget()
        branch.is_rough = is_rough

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _inputs(self, branch: Branch, rows: Rows, data) -> dict:
        """What a call is given that reads the columns of `rows` which the cache does not hold."""
        start, end = branch.columns, rows.ids.shape[1]
        inputs = {"input_ids": rows.ids[:, start:], "past_key_values": branch.cache}
        if not rows.attention_mask[:, start:].all() or data.draw(st.booleans()):
            inputs["attention_mask"] = rows.attention_mask[:, :end]
        if any("|" in row[start:] for row in rows.strings) or data.draw(st.booleans()):
            inputs["position_ids"] = rows.position_ids[:, start:]
        return inputs

    def _extended(self, branch: Branch, data) -> Rows | None:
        """The rows of a branch with more columns, if there is room for them."""
        most = MOST_COLUMNS - branch.columns
        if most < 1 or branch.is_torn:
            return None
        return branch.rows.extended(*data.draw(new_columns(len(branch.rows.strings), most)))

    @rule(branch=branches, mode=st.sampled_from(list(MODES)), precision=st.integers(0, 4), data=st.data())
    def read(self, branch, mode, precision, data):
        rows = self._extended(branch, data)
        if rows is not None:
            self._read(branch, rows, mode, precision, data)

    @rule(
        branch=branches,
        mode=st.sampled_from(list(MODES)),
        steps=st.integers(2, 20),
        first=st.sampled_from("xx|"),
        data=st.data(),
    )
    def decode(self, branch, mode, steps, first, data):
        """Tokens one by one."""
        for token in first + "x" * (steps - 1):
            if branch.is_torn or branch.columns == MOST_COLUMNS:
                return
            self._read(branch, branch.rows.extended(*[token] * len(branch.rows.strings)), mode, 4, data)

    def _read(self, branch: Branch, rows: Rows, mode: str, precision: int, data) -> None:
        model = self.half if self.half is not None and precision == 0 else self.model
        autocast = self.half is not None and precision == 1
        branch.is_rough |= autocast or model is self.half
        inputs = self._inputs(branch, rows, data)
        with MODES[mode](), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**inputs).logits
        error = rows.error(self.model, logits.float(), branch.columns)
        assert error <= (HALF_PRECISION if branch.is_rough else OTHER_ORDER), error
        branch.rows = rows
        self._forget(branch)
        assert branch.cache.get_seq_length() == branch.columns
        if mode == "grad":
            self.losses.append(logits[rows.attention_mask[:, -logits.shape[1] :].bool()].float().square().mean())

    @precondition(lambda self: self.losses)
    @rule()
    def backward(self):
        """Through calls long ago: what they still need has not been overwritten."""
        losses, self.losses = self.losses, []
        sum(losses).backward()
        for model in (self.model, self.half):
            if model is not None:
                model.zero_grad()

    @rule(
        branch=branches,
        mode=st.sampled_from(list(MODES)),
        error=st.sampled_from([Failure, KeyboardInterrupt]),
        data=st.data(),
    )
    def fail(self, branch, mode, error, data):
        """A call that fails in some module. The cache is then as it was, or says that it is not."""
        rows = self._extended(branch, data)
        if rows is None:
            return
        inner = self.model.model
        names = ["norm"] + ["chunk_encoder"] * hasattr(inner, "chunk_encoder")
        for i, layer in enumerate(inner.layers):
            names += [
                f"layers.{i}",
                *(f"layers.{i}.{name}" for name in ("self_attn", "retrieval") if hasattr(layer, name)),
            ]
        name, inputs = data.draw(st.sampled_from(names)), self._inputs(branch, rows, data)
        hook = inner.get_submodule(name).register_forward_hook(_raise(error))
        try:
            with MODES[mode](), contextlib.suppress(error):
                self.model(**inputs)
        finally:
            hook.remove()
        if branch.is_static and branch.cache.is_torn:
            assert inputs["input_ids"].shape[1] == 1 and "position_ids" in inputs  # it might have started a document
            branch.is_torn = True
            with pytest.raises(ValueError, match="reset"):
                self.model(**inputs)
        assert branch.cache.get_seq_length() == branch.columns

    # -- what else can be done to a cache -----------------------------------------------------------------------------

    @rule(branch=branches, columns=st.integers(0, 15) | st.integers(0, MOST_COLUMNS))
    def crop(self, branch, columns):
        columns = min(columns, branch.columns)
        if branch.is_static or columns and not branch.cache.is_croppable:
            with pytest.raises(NotImplementedError):
                branch.cache.crop(-columns)
            return
        try:
            branch.cache.crop(-columns)
        except ValueError:
            assert branch.columns - columns < branch.first_kept
            return
        if columns:
            branch.rows = branch.rows.shortened(columns)
        branch.is_recording = False
        self._forget(branch)

    def _forget(self, branch: Branch) -> None:
        if not branch.is_recording:
            branch.first_kept = max(branch.first_kept, branch.columns - self.model.config.sliding_window)

    @rule(branch=branches)
    def record(self, branch):
        if not branch.cache.is_croppable:
            return
        branch.cache.activate_past_recording()
        branch.is_recording = True

    def _select(self, branch: Branch, order: list[int]) -> None:
        branch.rows = branch.rows.select(order)
        assert branch.cache.batch_size in (-1, len(order))

    @rule(branch=branches, data=st.data())
    def reorder(self, branch, data):
        if branch.cache.batch_size < 0 or branch.is_torn:
            return
        batch = len(branch.rows.strings)
        order = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        branch.cache.reorder_cache(torch.tensor(order))
        self._select(branch, order)

    @rule(branch=branches, repeats=st.integers(1, 2))
    def repeat(self, branch, repeats):
        batch = len(branch.rows.strings)
        if branch.cache.batch_size < 0 or branch.is_torn or batch * repeats > MOST_ROWS:
            return
        branch.cache.batch_repeat_interleave(repeats)
        self._select(branch, [row for row in range(batch) for _ in range(repeats)])

    @rule(branch=branches, by_mask=st.booleans(), data=st.data())
    def select(self, branch, by_mask, data):
        if branch.cache.batch_size < 0 or branch.is_torn:
            return
        batch = len(branch.rows.strings)
        order = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=MOST_ROWS, unique=by_mask))
        indices = torch.tensor(order)
        if by_mask:
            order = sorted(order)
            indices = torch.zeros(batch, dtype=torch.bool).index_fill(0, indices, True)
        branch.cache.batch_select_indices(indices)
        self._select(branch, order)

    def teardown(self):
        if getattr(self, "losses", None):
            self.backward()
        for folder in getattr(self, "folders", []):
            folder.cleanup()


def _raise(error: type[BaseException]):
    def hook(*_):
        raise error

    return hook


_models: dict = {}


def _model(name: str, retrieves_all: bool = False):
    """The variants, each made once."""
    if (name, retrieves_all) not in _models:
        _models[name, retrieves_all] = make_variant(name, **({"chunk_topk": 50} if retrieves_all else {}))
    return _models[name, retrieves_all]


def _half_model(name: str):
    if (name, "half") not in _models:
        _models[name, "half"] = copy.deepcopy(_model(name, retrieves_all=True)).to(torch.bfloat16)
    return _models[name, "half"]


class TestAnything(CacheMachine.TestCase):
    settings = settings(max_examples=25, stateful_step_count=20)


@pytest.mark.slow
class TestAnythingForLong(CacheMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=50)

"""
What version 0.1.0 saved loads for ever, with the package and with the code that it saved, and gives the same logits.
`tests/fixtures/saved_by_0_1_0/make.py` says how the folder was made.
"""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_hsa import HSAForCausalLM
from tests.commands import REPOSITORY
from tests.helpers import SAME_ARITHMETIC, relative_error, run_without_the_package


SAVED = REPOSITORY / "tests/fixtures/saved_by_0_1_0"
TOLERANCE = SAME_ARITHMETIC  # sums in another order, as libraries take them

CODE = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

options = {"trust_remote_code": True, "dtype": torch.float32}
input_ids = load_file("logits.safetensors")["input_ids"]
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained("model", **options).eval()
    logits = {"model": model(input_ids).logits[:, ::11].clone()}
    model.save_pretrained("again")
    again = AutoModelForCausalLM.from_pretrained("again", **options).eval()
    logits["again"] = again(input_ids).logits[:, ::11].clone()
    logits["adapted"] = PeftModel.from_pretrained(model, "adapter").eval()(input_ids).logits[:, ::11].clone()
save_file(logits, "found.safetensors")
"""


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return load_file(SAVED / "logits.safetensors")


@torch.no_grad()
def assert_gives(model, input_ids: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(model.eval()(input_ids).logits[:, ::11], expected) <= TOLERANCE


def test_the_adapter_makes_a_difference(expected):
    assert relative_error(expected["adapted"], expected["model"]) > 0.1


def test_with_the_package(expected, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(SAVED / "model", dtype=torch.float32)
    assert type(model) is HSAForCausalLM
    assert_gives(model, expected["input_ids"], expected["model"])
    model.save_pretrained(tmp_path)
    again = HSAForCausalLM.from_pretrained(tmp_path)
    assert_gives(again, expected["input_ids"], expected["model"])
    adapted = PeftModel.from_pretrained(model, SAVED / "adapter")
    assert_gives(adapted, expected["input_ids"], expected["adapted"])
    assert_gives(adapted.merge_and_unload(), expected["input_ids"], expected["adapted"])


def test_an_adapter_of_transformers(expected):
    model = HSAForCausalLM.from_pretrained(SAVED / "model", dtype=torch.float32)
    model.load_adapter(str(SAVED / "adapter"))
    assert_gives(model, expected["input_ids"], expected["adapted"])


def unpack(folder: Path) -> Path:
    """A folder as it was saved, with the code."""
    shutil.copytree(SAVED, folder, dirs_exist_ok=True)
    with tarfile.open(folder / "model" / "code.tar.gz") as archive:
        archive.extractall(folder / "model", filter="data")
    return folder


@pytest.mark.slow
def test_with_the_code_that_was_saved(expected, tmp_path):
    run_without_the_package(CODE, unpack(tmp_path))
    found = load_file(tmp_path / "found.safetensors")
    for name, logits in found.items():
        assert relative_error(logits, expected["model" if name == "again" else name]) <= TOLERANCE, name


@pytest.mark.slow
def test_saving_over_it_brings_code_that_belongs_together(expected, tmp_path):
    """Of files that the new code no longer has, none is read."""
    folder = unpack(tmp_path) / "model"
    HSAForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    run_without_the_package(CODE, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    assert relative_error(found["model"], expected["model"]) <= TOLERANCE

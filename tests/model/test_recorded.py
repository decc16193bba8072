"""
What version 0.1.0 computed, whose numbers agreed with the authors' code, is what this one computes: for the weights in
`hub_card`, and for two configurations of the authors' code with made-up weights, converted by
`examples/convert_reference.py`. `tests/fixtures/recorded/make.py` says how the files were made.
"""

import runpy

import pytest
import torch
from safetensors.torch import load_file

from hsa_lab.reference import convert
from modeling_hsa import HSAForCausalLM
from tests.commands import REPOSITORY
from tests.helpers import relative_error


RECORDED = REPOSITORY / "tests/fixtures/recorded"
TOLERANCE = 3e-6  # rounding alone moves these numbers by 1e-6, against float64

make = runpy.run_path(str(RECORDED / "make.py"))


def test_logits_of_the_model_in_hub_card():
    expected = load_file(RECORDED / "shipped.safetensors")
    model = HSAForCausalLM.from_pretrained(REPOSITORY / "hub_card/hsa-books-10m", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(make["shipped_input"]()).logits[0, make["SHIPPED_POSITIONS"]]
    values, tokens = logits.topk(expected["tokens"].shape[-1])
    assert relative_error(values, expected["logits"]) <= TOLERANCE
    assert relative_error(logits.gather(1, expected["tokens"].long()), expected["logits"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["softmax_bypass", "stick_breaking_hsa_only"])
def test_outputs_of_converted_checkpoints(name, tmp_path):
    expected = load_file(RECORDED / f"{name}.safetensors")
    actual = make["outputs"](convert(make["write_checkpoint"](name, tmp_path / "checkpoint.safetensors")))
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        if key.startswith("indices"):
            assert torch.equal(actual[key], x), key
        else:
            assert relative_error(actual[key], x) <= TOLERANCE, key

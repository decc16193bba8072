"""
The numbers of the authors' public code: their checkpoints, converted by `examples/convert_reference_checkpoint.py`,
give the same activations and logits in fp32. The files hold random weights and what the authors' code computes with
them.
"""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_hsa import HSAForCausalLM
from modeling_hsa.layers import HSARetrievalLayer
from tests.helpers import relative_error


REPOSITORY = Path(__file__).parents[2]
REFERENCE = REPOSITORY.parent / "shared/data/reference"
SCRIPT = REPOSITORY / "examples/convert_reference_checkpoint.py"
TOLERANCE = 1e-4

script = runpy.run_path(str(SCRIPT))


class Reference:
    """A file of the authors' numbers, and what the converted model computes for the same input."""

    def __init__(self, name: str):
        self.file = REFERENCE / f"{name}.safetensors"
        with safe_open(self.file, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.expected = {key: file.get_tensor(key) for key in file.keys() if not key.startswith("param.")}
        self.model = script["convert"](self.file)
        self.hsa_outputs: list[torch.Tensor] = []
        self.model.model.chunk_encoder.register_forward_hook(self._remember_memory)
        for layer in self.model.model.layers:
            if isinstance(layer, HSARetrievalLayer):
                layer.register_forward_hook(lambda module, inputs, output: self.hsa_outputs.append(output))
        with torch.no_grad():
            self.outputs = self.model(self.expected["input_ids"], output_retrieval=True, use_cache=False)

    def _remember_memory(self, module, inputs, output):
        self.memory = output

    def activations(self, layer: str, what: str) -> list[torch.Tensor]:
        """`what` of the authors' layers of the kind `layer`, in the order of their layer list."""
        names = [name for name in self.expected if name.startswith("act.") and name.endswith(f":{layer}.{what}")]
        names.sort(key=lambda name: int(name.removeprefix("act.").partition(":")[0]))
        return [self.expected[name] for name in names]


@pytest.fixture(scope="module", params=["softmax_bypass", "stick_breaking_hsa_only"])
def reference(request) -> Reference:
    if not REFERENCE.exists():
        pytest.skip(f"needs the numbers of the authors' code in {REFERENCE}")
    return Reference(request.param)


def test_logits(reference):
    expected = reference.expected["logits"]
    assert reference.outputs.logits.shape == expected.shape
    assert relative_error(reference.outputs.logits, expected) <= TOLERANCE


def test_chunk_memory(reference):
    (landmarks,) = reference.activations("ChunkingLayer", "landmarks")
    (keys,), (values,) = (reference.activations("ChunkingLayer", what) for what in ("k", "v"))
    memory = reference.memory
    assert relative_error(memory.landmarks, landmarks) <= TOLERANCE
    assert relative_error(memory.keys.flatten(1, 2), keys) <= TOLERANCE
    assert relative_error(memory.values.flatten(1, 2), values) <= TOLERANCE


def test_selected_chunks_and_their_weights(reference):
    chunks = reference.activations("RetrievalLayer", "indices")
    weights = reference.activations("RetrievalLayer", "weights")
    assert len(chunks) == len(weights) == len(reference.outputs.retrieval) == reference.config["num_upper_groups"]
    for retrieved, expected_chunks, expected_weights in zip(reference.outputs.retrieval, chunks, weights):
        present = retrieved.indices >= 0
        # Chunk i is visible from token (i + 1) * S on; theirs has index 0 where there is none.
        visible = torch.arange(present.shape[1]) // reference.config["chunk_size"]
        assert torch.equal(present.sum(-1)[0, :, 0], visible.clamp(max=reference.config["chunk_topk"]))
        assert torch.equal(retrieved.indices.clamp(min=0).long(), expected_chunks)
        # Their softmax over no chunk at all is NaN or 0, ours is 0.
        assert retrieved.weights[~present].count_nonzero() == 0
        assert expected_weights[~present].nan_to_num().count_nonzero() == 0
        assert relative_error(retrieved.weights[present], expected_weights[present]) <= TOLERANCE


def test_outputs_of_the_hsa_layers(reference):
    expected = reference.activations("HierarchicalSparseAttention", "hidden")
    assert len(expected) == len(reference.hsa_outputs) == reference.config["num_upper_groups"]
    for actual, hidden in zip(reference.hsa_outputs, expected):
        assert relative_error(actual, hidden) <= TOLERANCE


def test_script_writes_a_folder_that_loads(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(reference.file), "--output", str(tmp_path)])
    script["main"]()
    assert str(tmp_path) in capsys.readouterr().out
    with torch.no_grad():
        logits = HSAForCausalLM.from_pretrained(tmp_path)(reference.expected["input_ids"]).logits
    assert torch.equal(logits, reference.outputs.logits)


def read_parameters(reference: Reference) -> dict[str, torch.Tensor]:
    with safe_open(reference.file, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith("param.")}


def write(file: Path, config: dict | None, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, file, metadata=None if config is None else {"config": json.dumps(config)})
    return file


def test_landmark_norms(reference, tmp_path):
    """With `enable_lmk_norm`, each of their retrieval layers norms landmarks and queries with weights of its own."""
    tensors, norms = read_parameters(reference), []
    layers = [name for name in tensors if re.fullmatch(r"param\.backbone\.layers\.\d+\.ln\.weight", name)]
    for i, name in enumerate(sorted(layers)):
        torch.manual_seed(i)
        norms.append(torch.rand(2, reference.config["retrieval_dim"]) + 0.5)
        for kind, weight in zip(("lmk_q_norm", "lmk_k_norm"), norms[-1]):
            tensors[name.replace("ln.weight", f"{kind}.weight")] = weight.clone()
    config = {**reference.config, "enable_lmk_norm": True}
    model = script["convert"](write(tmp_path / "x.safetensors", config, tensors))

    def normed(x, weight=1.0):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=reference.config["rms_norm_eps"]) * weight

    calls = []
    retrievals = [layer.retrieval for layer in model.model.layers if isinstance(layer, HSARetrievalLayer)]
    for retrieval in retrievals:
        retrieval.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0], output[0])))
    encoder = model.model.chunk_encoder
    projected = []
    encoder.landmark_proj.register_forward_hook(lambda module, inputs, output: projected.append(output))
    with torch.no_grad():
        model(reference.expected["input_ids"], use_cache=False)
        assert len(calls) == len(norms) == reference.config["num_upper_groups"]
        for (module, hidden, retrieved), (query_weight, landmark_weight) in zip(calls, norms):
            queries = normed(module.q_proj(module.norm(hidden)), query_weight)
            landmarks = normed(projected[0], landmark_weight)
            scores = queries[0] @ landmarks.T * queries.shape[-1] ** -0.5
            indices = retrieved.indices[0, :, 0]
            expected = scores.gather(1, indices.clamp(min=0).long())[indices >= 0]
            assert relative_error(retrieved.scores[0, :, 0][indices >= 0], expected) <= TOLERANCE


# -- what cannot be converted -----------------------------------------------------------------------------------------


def test_file_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no `config` in its metadata"):
        script["convert"](write(tmp_path / "x.safetensors", None, {"param.x": torch.zeros(1)}))


def test_switch_without_a_counterpart_is_refused(reference):
    with pytest.raises(ValueError, match="enable_softmax1"):
        script["convert_config"]({**reference.config, "enable_softmax1": True})


def test_unknown_parameter_is_refused(reference, tmp_path):
    tensors = {**read_parameters(reference), "param.backbone.layers.0.unknown.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="unknown.weight"):
        script["convert"](write(tmp_path / "x.safetensors", reference.config, tensors))


def test_missing_parameter_is_refused(reference, tmp_path):
    tensors = read_parameters(reference)
    del tensors["param.backbone.norm_f.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        script["convert"](write(tmp_path / "x.safetensors", reference.config, tensors))

"""
The numbers of the authors' public code: their checkpoints, converted by `examples/convert_reference.py`, give the same
activations and logits in fp32. The files hold random weights and what the authors' code computes with them. And what
of their configurations is read, refused or of no matter.
"""

import json
import re
from pathlib import Path

import convert_reference
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hsa_lab.reference import convert, convert_config, convert_name, reference_layers
from modeling_hsa import HSAForCausalLM
from modeling_hsa.layers import HSARetrievalLayer
from tests.helpers import relative_error


REPOSITORY = Path(__file__).parents[2]
REFERENCE = REPOSITORY.parent / "shared/data/reference"
TOLERANCE = 1e-4


class Reference:
    """A file of the authors' numbers, and what the converted model computes for the same input."""

    def __init__(self, name: str):
        self.file = REFERENCE / f"{name}.safetensors"
        with safe_open(self.file, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.expected = {key: file.get_tensor(key) for key in file.keys() if not key.startswith("param.")}
        self.model = convert(self.file)
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


def test_script_writes_a_folder_that_loads(reference, tmp_path, capsys):
    convert_reference.main([str(reference.file), "--output", str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().out
    with torch.no_grad():
        logits = HSAForCausalLM.from_pretrained(tmp_path)(reference.expected["input_ids"]).logits
    assert torch.equal(logits, reference.outputs.logits)


def read_parameters(reference: Reference) -> dict[str, torch.Tensor]:
    with safe_open(reference.file, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith("param.")}


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
    model = convert(write(tmp_path / "x.safetensors", config, tensors))

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


# -- in any clone: made-up checkpoints and configurations --

CONFIG = {
    "vocab_size": 40, "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 16, "num_lower_layers": 1, "num_upper_layers": 1, "num_upper_groups": 1, "encoder_layers": 1,
    "chunk_size": 64, "chunk_topk": 2, "retrieval_dim": 64, "num_kv_heads": 2, "sliding_window": 31,
    "enable_qk_norm": True, "enable_softmax": True, "hsa_only": False, "max_position_embeddings": 256,
    "initializer_range": 0.1, "rms_norm_eps": 1e-6, "layer_norm_epsilon": 1e-6, "rope_theta": 10000.0,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 5, "attention_dropout": 0.0, "lmk_token_id": 39,
    "model_type": "llama", "architectures": None, "transformers_version": "4.51.3", "use_cache": False,
}  # fmt: skip


def write(file: Path, config: dict | None, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, file, metadata=None if config is None else {"config": json.dumps(config)})
    return file


def make_checkpoint(config: dict) -> tuple[HSAForCausalLM, dict[str, torch.Tensor]]:
    """A random model of the configuration, and its weights under the authors' names."""
    torch.manual_seed(0)
    model = HSAForCausalLM(convert_config(config)).eval()
    ours, layers = dict(model.state_dict()), reference_layers(model.config)
    top = {"embed_tokens": "embeddings", "norm": "norm_f"}
    theirs = {f"backbone.{name}.weight": ours.pop(f"model.{here}.weight") for here, name in top.items()}
    theirs["lm_head.weight"] = ours.pop("lm_head.weight")
    for index, (module, names) in enumerate(layers):
        for their_name, our_name in names.items():
            for key in [key for key in ours if f"{key}.".startswith(f"{module}.{our_name}.")]:
                rest = key.removeprefix(f"{module}.{our_name}")
                theirs[f"backbone.layers.{index}.{their_name}{rest}"] = ours.pop(key)
    assert not ours and all(convert_name(name, layers) for name in theirs)
    if model.config.chunk_landmark == "cls":
        (name,) = (name for name in theirs if name.endswith("cls_emb"))
        theirs[name] = theirs[name][None, None]
    return model, {f"param.{name}": x.clone() for name, x in theirs.items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"hsa_residual": "bypass", "chunk_landmark": "cls", "sliding_window": 32}),
        ({"reset_hsa_residual": False}, {"hsa_residual": "bypass"}),
        ({"reset_hsa_residual": True}, {"hsa_residual": "standard"}),
        ({"enable_softmax": False}, {"chunk_weighting": "stick_breaking"}),
        ({"hsa_only": True}, {"hsa_local_attention": False}),
        ({"enable_enc_cls": False}, {"chunk_landmark": "mean", "num_encoder_layers": 1}),
        ({"encoder_layers": 0}, {"chunk_landmark": "mean", "num_encoder_layers": 0}),
        ({"singlehead_retrieval": True}, {"num_retrieval_heads": 1, "retrieval_dim": 64}),
        ({"num_kv_heads": 1}, {"num_retrieval_heads": 1, "retrieval_dim": 64, "hsa_num_key_value_heads": 1}),
        ({"attention_bias": True}, {"attention_bias": True}),
    ],
)
def test_switches_of_the_authors_code_are_read(tmp_path, changes, expected):
    model, tensors = make_checkpoint(CONFIG | changes)
    converted = convert(write(tmp_path / "x.safetensors", CONFIG | changes, tensors))
    assert {name: getattr(converted.config, name) for name in expected} == expected
    input_ids = torch.randint(40, (1, 200))
    with torch.no_grad():
        assert torch.equal(converted(input_ids).logits, model(input_ids).logits)


def test_switches_that_are_left_out_have_their_defaults():
    config = {name: x for name, x in CONFIG.items() if name not in ("enable_softmax", "hsa_only")}
    assert (
        convert_config(config).chunk_weighting == "stick_breaking" and not convert_config(config).hsa_local_attention
    )
    with pytest.raises(ValueError, match="`enable_qk_norm` .* must be True to be converted, got False"):
        convert_config({name: x for name, x in CONFIG.items() if name != "enable_qk_norm"})


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_qk_norm": False}, {"enable_softmax1": True}, {"enable_pos_decay": True}, {"enc_prenorm": True},
        {"mask_slide_window": True}, {"hsa_sliding_window": 63}, {"skip_hsa": True}, {"flash_inference": True},
        {"rope_scaling": {"rope_type": "yarn"}}, {"rope_theta": 500.0}, {"rms_norm_eps": 1e-5},
        {"layer_norm_epsilon": 1e-5}, {"hidden_act": "gelu"}, {"head_dim": 32}, {"state_size": 128},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_switches_without_a_counterpart_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}`"):
        convert_config(CONFIG | changes)


# -- what cannot be converted -----------------------------------------------------------------------------------------


def test_file_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no `config` in its metadata"):
        convert(write(tmp_path / "x.safetensors", None, {"param.x": torch.zeros(1)}))


def test_parameters_that_do_not_fit_are_refused(tmp_path):
    _, tensors = make_checkpoint(CONFIG)
    unknown = {**tensors, "param.backbone.layers.0.unknown.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="unknown.weight"):
        convert(write(tmp_path / "x.safetensors", CONFIG, unknown))
    del tensors["param.backbone.norm_f.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        convert(write(tmp_path / "x.safetensors", CONFIG, tensors))

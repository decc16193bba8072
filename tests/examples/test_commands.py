"""Every command explains itself, says in a line what a user got wrong, and overwrites nothing."""

import importlib
import json

import pytest
from transformers import LlamaConfig
from transformers.utils import logging

from hsa_lab import commands


COMMANDS = {
    "adapt": ["chats", "train"],
    "ask": [],
    "benchmark": ["kernels", "models", "cpu", "recall", "sessions"],
    "convert": [],
    "convert_reference": [],
    "evaluate": ["facts", "qa", "chat", "found", "wordings", "paper", "ruler", "babilong", "ppl"],
    "generate": [],
    "plot": ["retrieval", "training"],
    "prepare": ["corpus", "chronicle"],
    "pretrain": [],
    "study": [],
    "train": [],
}
HELPS = [(name, *sub) for name, subs in COMMANDS.items() for sub in ((), *((sub,) for sub in subs))]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process. Returns how it ended and what it printed."""

    def run(name: str, *words) -> tuple[str | int | None, str]:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            commands.run(importlib.import_module(f"examples.{name}").main)
        printed = capsys.readouterr()
        return end.value.code, printed.out + printed.err

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)  # of Transformers, which commands may change for their process


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_is_two_screens_with_an_example(run, words):
    name, *sub = words
    code, text = run(name, *sub, "--help")
    lines = text.splitlines()
    assert code == 0 and len(lines) <= 100
    if not sub:
        module = importlib.import_module(f"examples.{name}")
        assert f"python examples/{name}.py" in text
        assert module.__doc__.strip().splitlines()[0] in text
        for sub in COMMANDS[name]:
            assert any(line.split()[:1] == [sub] for line in lines)
    else:
        assert len([line for line in lines if line.startswith("  --")]) > 1


def test_help_of_train_lists_what_is_usual(run):
    _, text = run("train", "--help")
    for group in ("model, to continue or new:", "text:", "training, the usual flags of TrainingArguments; all others"):
        assert group in text
    assert "--hidden_size N               width of the stream (128)" in text
    assert "--max_steps N                 batches; -1: by --num_train_epochs (200)" in text
    assert "--max-steps" not in text and "--hub_model_id" not in text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nno JSON\n')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"stages": []}')
    LlamaConfig().save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-5").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "paper.json").write_text("{}")
    (tmp_path / "words.txt").write_text("rain " * 50)
    return tmp_path


TRAIN = ("train", "--output_dir", "out", "--use_cpu")
PRETRAIN = ("pretrain", "--corpus", "corpus", "--output", "out", "--recipe")
WRONG = [
    ((*TRAIN, "--train_files", "no.txt"), "`--train_files`, `--validation_files`: there is no file no.txt"),
    ((*TRAIN, "--train_files", "bad.jsonl"), "`--train_files`, `--validation_files`: cannot read bad.jsonl"),
    ((*TRAIN, "--nothing", "1"), "--nothing"),
    ((*TRAIN, "--hidden_size", "wide"), "argument --hidden_size/--hidden-size: invalid int value: 'wide'"),
    ((*TRAIN, "--chunk_weighting", "none", "--synthetic_characters", "20000"), "`chunk_weighting` must be one of"),
    ((*TRAIN, "--resume_from_checkpoint", "last"), "`--resume_from_checkpoint last`: there is no checkpoint in out"),
    ((*TRAIN, "--resume_from_checkpoint", "True"), "`--resume_from_checkpoint True`: there is no checkpoint in out"),
    ((*TRAIN, "--resume_from_checkpoint", "no"), "`--resume_from_checkpoint`: there is no folder no"),
    (("train", "--output_dir", "run", "--use_cpu"), "run holds a run. Go on with `--resume_from_checkpoint last`"),
    ((*PRETRAIN, "no.json"), "No such file or directory: 'no.json'"),
    ((*PRETRAIN, "bad.json"), "bad.json: "),
    ((*PRETRAIN, "empty.json"), "empty.json: the recipe lacks ['model', 'optimizer']"),
    (("convert", "no", "--output", "out"), "cannot load no: "),
    (("convert", "no", "--output", "run"), "--output: run is not an empty folder"),
    (("evaluate", "paper", "--model", "no", "--haystack", "words.txt", "--output", "out"), "cannot load no: "),
    (
        ("evaluate", "paper", "--model", "no", "--haystack", "words.txt", "--output", "results"),
        "`--output`: results already holds paper.json. Take another folder, or delete it",
    ),
    (("adapt", "train", "--recipe", "no.json", "--base", "no", "--streams", "s", "--output", "out"), "'no.json'"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda x: " ".join(x)[:60] if isinstance(x, tuple) else "")
def test_what_a_user_gets_wrong_is_one_line(run, folder, words, message):
    code, printed = run(*words)
    said = printed.splitlines()[-1] if code == 2 else code
    assert message in said and said.startswith(f"{words[0]}.py") and "\n" not in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize("value", ["last", "True"])
def test_the_newest_checkpoint_is_found(folder, value):
    train = importlib.import_module("examples.train")
    (folder / "run" / "checkpoint-20").mkdir()
    args = train.ExampleTrainingArguments("run", resume_from_checkpoint=value, use_cpu=True)
    assert train.find_checkpoint(args) == "run/checkpoint-20"


@pytest.mark.slow
def test_the_toy_recipe_of_the_page_of_commands(tmp_path):
    from tests.commands import REPOSITORY, run_example

    files = {"train_files": tmp_path / "toy.txt", "vocab_size": 512, "output": tmp_path / "corpus"}
    run_example("prepare.py", tmp_path, "chronicle", characters=100_000, facts=0, output=tmp_path / "toy.txt")
    run_example("prepare.py", tmp_path, "corpus", **files)
    run = run_example(
        "pretrain.py", tmp_path, recipe=REPOSITORY / "examples/recipes/toy.json", corpus=tmp_path / "corpus",
        output=tmp_path / "toy", log_every=5, workers=0,
    )  # fmt: skip
    assert f"done. Model, log and checkpoint are in {tmp_path / 'toy'}." in run.stdout
    entries = [json.loads(line) for line in (tmp_path / "toy" / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in entries} == {"all chunks", "8 of 16 chunks"}
    assert entries[-1]["text_loss"] < entries[0]["text_loss"]

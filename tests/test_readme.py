"""What the README says can be pasted."""

import re
import shlex
from pathlib import Path

import pytest

from .test_examples import REPOSITORY, TINY_RUN, run_example


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


MAIN_JOB, TESTS = (block.strip() for block in blocks("bash"))
SNIPPETS = blocks("python")


def scripts(line: str) -> list[list[str]]:
    """The words of each `python ...` command of a line of commands joined by `&&`."""
    commands = [shlex.split(command) for command in line.split("&&")]
    return [words[1:] for words in commands if words[0] == "python"]


@pytest.mark.parametrize("line", [MAIN_JOB, TESTS], ids=["main job", "tests"])
def test_setup_is_one_line_that_installs_first(line):
    assert "\n" not in line
    install, *rest = line.split(" && ")
    extra = re.fullmatch(r"pip install -e '\.\[(\w+)\]'", install)[1]
    assert re.search(rf"^{extra} =$", (REPOSITORY / "setup.cfg").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for script, *_ in scripts(line):
        assert (REPOSITORY / script).is_file()
    assert rest


def test_links_and_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README) + re.findall(
        r"`((?:examples|modeling_hsa)/[^`]*)`", README
    )
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


@pytest.fixture(scope="module")
def main_job(tmp_path_factory) -> Path:
    """A folder in which the scripts of the main job ran, with the README's arguments and small sizes."""
    folder = tmp_path_factory.mktemp("readme")
    small = {
        "examples/synthetic_text.py": {"characters": 20_000},
        "examples/train.py": {**TINY_RUN, "max_steps": 5, "attn_implementation": "sdpa"},
        "examples/generate.py": {"max_new_tokens": 8},
    }
    outputs = {}
    for script, *words in scripts(MAIN_JOB):
        outputs[script] = run_example(Path(script).name, folder, *words, folder=folder, **small[script])
    assert list(outputs) == list(small)
    generation = outputs["examples/generate.py"]
    assert "Reading the prompt: 100%" in generation.stderr
    assert "Retrieved by the last token of the prompt" in generation.stdout
    return folder


@pytest.mark.slow
def test_main_job_leaves_the_files_it_promises(main_job):
    for file in ("model.safetensors", "tokenizer.json", "modeling_hsa.py", "loss_curve.png"):
        assert (main_job / "out" / "chronicle" / file).is_file()
    assert (main_job / "out" / "chronicle.txt").is_file()


@pytest.mark.slow
def test_snippets_run_one_after_the_other(main_job, monkeypatch, capsys):
    monkeypatch.chdir(main_job)
    namespace = {"__name__": "readme"}
    printed = []
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)
        printed.append(capsys.readouterr().out)
    assert len(SNIPPETS) == 7
    loading, reading, _, _, retrieval, _, _ = printed
    assert loading.startswith("On May 3,")
    assert reading.splitlines()[0].startswith("What is the password of")
    assert re.match(r"[01]\.\d\d  '", retrieval)
    for folder in ("tuned", "merged"):
        assert (main_job / "out" / folder / "model.safetensors").is_file()

"""What the README says can be pasted."""

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, run_example


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


MAIN_JOB, TESTS = (block.strip() for block in blocks("bash"))
SNIPPETS = blocks("python")
CARDS = ["hub_card/README.md", "hub_card/hsa-books-10m/README.md"]


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


@pytest.mark.parametrize(
    "name", ["README.md", *CARDS, *(f"docs/{file.name}" for file in sorted((REPOSITORY / "docs").glob("*.md")))]
)
def test_links_and_files_exist(name):
    file = REPOSITORY / name
    text = file.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", text)
    assert links or name == "docs/conversion.md"
    for target, heading in links:
        assert not heading or heading in headings(file.parent / target), f"{target}#{heading}"
    links = [file.parent / target for target, _ in links]
    links += [REPOSITORY / path for path in re.findall(r"`((?:examples|modeling_hsa|docs|tests)/[^` ]*)`", text)]
    for link in links:
        assert link.exists(), link


def headings(file: Path) -> list[str]:
    """The names that links give the headings of a Markdown file."""
    names = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names]


@pytest.mark.slow
def test_main_job_prints_what_the_readme_shows(tmp_path):
    """With the README's arguments, on a shorter text."""
    ((script, *words),) = scripts(MAIN_JOB)
    run = run_example(Path(script).name, tmp_path, *words, folder=tmp_path, characters=50_000)
    assert "Reading the prompt: 100%" in run.stderr and "5 of 5 right." in run.stdout
    (shown,) = blocks("text")
    for line in shown.splitlines()[:2]:
        assert line in run.stdout
    answered = (
        r"What is the .*\?\n-> \d{5}   \(right\)\n   \[-*\^-*\] \d+% of the way, chunk .* of .*, weight \d\.\d\d\n"
    )
    assert re.search(answered, shown) and len(re.findall(answered, run.stdout)) == 5


@pytest.mark.slow
def test_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    for folder in ("hub_card", "examples"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    namespace = {"__name__": "readme"}
    printed = []
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)
        printed.append(capsys.readouterr().out)
    assert len(SNIPPETS) == 7
    loading, reading, _, _, retrieval, _, _ = printed
    assert loading.startswith("It was a dark night, and")
    lines = reading.splitlines()
    assert len(lines) == 3
    for line in lines:
        question, fact = line.split(" -- ")
        assert question.endswith(re.search(r"\d+", fact)[0] + ".")
    assert re.match(r"[01]\.\d\d  '", retrieval)
    for folder in ("tuned", "merged"):
        assert list((tmp_path / "out" / folder).glob("model*.safetensors"))

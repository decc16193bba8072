"""What README and docs say can be pasted, and leads somewhere."""

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.commands import REPOSITORY, environment, run_example


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
USE = (REPOSITORY / "docs" / "use.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


MAIN_JOB, TESTS = (block.strip() for block in blocks("bash"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "hub_card/README.md",
    *(str(card.relative_to(REPOSITORY)) for card in sorted((REPOSITORY / "hub_card").glob("*/README.md"))),
    *(f"docs/{file.name}" for file in sorted((REPOSITORY / "docs").glob("*.md"))),
]
WITHOUT_LINKS = {"CHANGELOG.md", "docs/conversion.md", "docs/api.md"}


def scripts(line: str) -> list[list[str]]:
    """The words of each `python ...` command of a line of commands joined by `&&`."""
    commands = [shlex.split(command) for command in line.split("&&")]
    return [words[1:] for words in commands if words[0] == "python"]


def test_readme_is_two_screens():
    lines = README.splitlines()
    assert len(lines) <= 170
    assert [line for line in lines if len(line) > 119] == []
    assert "<details>" not in README


@pytest.mark.parametrize("line", [MAIN_JOB, TESTS], ids=["main job", "tests"])
def test_setup_is_one_line_that_installs_first(line):
    assert "\n" not in line
    install, *rest = line.split(" && ")
    extra = re.fullmatch(r"pip install -e '\.\[(\w+)\]'", install)[1]
    assert re.search(rf"^{extra} =$", (REPOSITORY / "setup.cfg").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for script, *_ in scripts(line):
        assert (REPOSITORY / script).is_file()
    assert rest


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_exist(name):
    file = REPOSITORY / name
    text = file.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
    assert links or name in WITHOUT_LINKS
    for target, heading in links:
        page = file.parent / target if target else file
        assert not heading or heading in headings(page), f"{target}#{heading}"
    links = [file.parent / target for target, _ in links]
    links += [REPOSITORY / path for path in re.findall(r"`((?:examples|modeling_hsa|docs|tests)/[^` ]*)`", text)]
    links += [REPOSITORY / path for path in re.findall(r"(?<=python )[\w/]+\.py", "\n".join(blocks("sh", text)))]
    for link in links:
        assert link.exists(), link


def headings(file: Path) -> list[str]:
    """The names that links give the headings of a Markdown file."""
    names = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names]


def test_the_repository_has_one_address():
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    url, paper = settings["metadata"]["url"], settings["metadata"]["project_urls"].split(" = ")[1]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == url and citation["preferred-citation"]["url"] == paper
    assert f"repo_url: {url}\n" in (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"https://github\.com/[\w-]+/hsa-transformers", README)) == {url} and paper in README
    assert citation["authors"][0]["name"] == settings["metadata"]["author"]


def test_what_the_main_job_printed_is_on_record():
    """Each line that the README shows, the last one shortened, is of the record of a whole run."""
    (shown,) = blocks("text")
    recorded = (REPOSITORY / "benchmarks" / "results" / "ask" / "output.txt").read_text(encoding="utf-8")
    for line in shown.splitlines():
        assert line.strip().removeprefix("... ").removesuffix(" ...") in recorded, line


@pytest.mark.slow
def test_main_job_prints_what_the_readme_shows(tmp_path):
    """In the form that the README shows; without a network the small model answers, here about a shorter text."""
    ((script, *words),) = scripts(MAIN_JOB)
    run = run_example(Path(script).name, tmp_path, *words, folder=tmp_path, characters=50_000)
    assert "hsa-books-10m answers: its base has to be downloaded, and HF_HUB_OFFLINE is set" in run.stderr
    assert "Reading the prompt: 100%" in run.stderr and "5 of 5 right." in run.stdout
    (shown,) = blocks("text")
    answered = r"\?\n-> .*   \(right\)\n   \[-*\^-*\] \d+% of the way, chunk .* of .*, weight \d\.\d\d\n"
    assert re.search(answered.replace(r"\?", r"\."), shown) and len(re.findall(answered, run.stdout)) == 5


def run_snippets(snippets: list[str], folder: Path) -> list[str]:
    """
    What each of them prints, one after the other in a process of their own. Raises: AssertionError where one fails or
    Python or Transformers warns of it or of the package. (Other packages may call what is deprecated.)
    """
    for name in ("hub_card", "examples"):
        (folder / name).symlink_to(REPOSITORY / name)
    script = folder / "snippets.py"
    script.write_text("print('<<<')\n".join(["", *snippets]), encoding="utf-8")
    command = [sys.executable, "-W", "default::FutureWarning", "-W", "default::DeprecationWarning", str(script)]
    run = subprocess.run(command, env=environment(folder / "cache"), cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    warned = r"(snippets|modeling_hsa/.*|configuration_hsa/.*)\.py:\d+: \w*Warning|^\[?(transformers|WARNING)"
    assert not re.search(warned, run.stderr, flags=re.MULTILINE), run.stderr[-3000:]
    return run.stdout.split("<<<\n")[1:]


@pytest.mark.slow
def test_snippets_of_the_readme(tmp_path):
    snippets = blocks("python")
    # A Llama where the snippet finds one of the Hub.
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    stops = """
inputs = tokenizer("The password of", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
"""
    loading, asking, tuning, converting = run_snippets([*snippets[:2], snippets[2] + stops, snippets[3]], tmp_path)
    assert asking.strip() == "48213."
    assert tuning.endswith("The password of Bruno the glassblower is 48213.<|endoftext|>\n")
    for folder in ("tuned", "hsa-smollm2"):
        assert list((tmp_path / "out" / folder).glob("model*.safetensors"))


@pytest.mark.slow
def test_snippets_of_the_page_on_use(tmp_path):
    snippets = blocks("python", USE)
    loading, reading, kept, retrieval, lora, compiled, new = run_snippets(snippets, tmp_path)
    assert loading.startswith("It was a dark night, and")
    lines = reading.splitlines()
    assert len(lines) == 3
    for line in lines:
        question, fact = line.split(" -- ")
        assert question.endswith(re.search(r"\d+", fact)[0] + ".")
    assert kept == "" and list((tmp_path / "out" / "session").glob("*.safetensors"))
    assert re.match(r"[01]\.\d\d  '", retrieval)
    assert list((tmp_path / "out" / "merged").glob("model*.safetensors"))

"""Figures of README, docs and cards are those of the files of results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.commands import REPOSITORY


RESULTS = [
    file
    for folder in ("benchmarks/results", "hub_card/*/results")
    for file in sorted(REPOSITORY.glob(f"{folder}/**/*"))
    if file.suffix in (".json", ".jsonl", ".txt") and file.name not in ("recipe.json", "commits.json")
]
COMMITS = json.loads((REPOSITORY / "benchmarks/results/commits.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tables():
    """The module `benchmarks/tables.py`."""
    spec = importlib.util.spec_from_file_location("benchmark_tables", REPOSITORY / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(tables):
    assert list(tables.stale()) == [], "run `python benchmarks/tables.py --update`"


def test_a_wrong_figure_is_found_and_mended(tables):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    costs = tables.costs()
    wrong = text.replace(" 28.3 ", " 27.3 ")
    assert wrong != text and tables.filled(wrong, {"costs": costs}) == text
    with pytest.raises(ValueError, match="must be one mark `<!-- costs -->`"):
        tables.filled(text.replace("<!-- costs -->", ""), {"costs": costs})


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{x}.md" for x in ("results", "training", "kernels"))])
def test_no_table_of_figures_is_without_a_source(tables, name):
    """Every table with a number in most of its cells stands between marks, or is one of those that are words."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- (\w+) -->", text)) - {"end"} == set(tables.TABLES[name])
    rest = re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    rows = re.findall(r"^\|.*\|$", rest, flags=re.MULTILINE)
    figures = [row for row in rows if len(re.findall(r"\| [\d.,+/ %-]+(?= \|)", row)) > 1]
    assert figures == []


def names_commit(file: Path) -> bool:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        return False
    return "commit" in content or all(isinstance(part, dict) and "commit" in part for part in content.values())


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_every_file_of_results_has_its_commit(file):
    """It says so, part by part or as a whole; a log or a text may have a file beside it that does."""
    name = str(file.relative_to(REPOSITORY))
    named = any(map(names_commit, [file] if file.suffix == ".json" else file.parent.glob("*.json")))
    assert named or COMMITS.get(name, {}).keys() & {"measured", "recorded"}, f"{name}: no commit, nor in commits.json"


def test_commits_are_of_files_that_exist():
    assert all((REPOSITORY / name).is_file() for name in COMMITS if name != "note")

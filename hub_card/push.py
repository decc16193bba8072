"""
Bring the folder of a model up to date with its results, and push the model to the Hub.

    python hub_card/push.py hsa-books-10m --update                      # tables and plots
    python hub_card/push.py hsa-books-10m --repo_id me/hsa-books-10m    # upload

`--update` writes what is made from the files in `results/`: the tables of the card between the marks `<!-- name -->`
and `<!-- end -->`, and the plots of retrieval. Where that would change anything but plots, an upload is refused. What
is uploaded is what `hub_card/build.py` writes.
"""

import argparse
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples"), str(REPOSITORY / "hub_card")]

from build import MODELS, build, names  # noqa: E402

from hsa_lab.results import read_rows, short  # noqa: E402


def percent(row: dict) -> str:
    """Accuracy with its interval, and the number of samples where they are few."""
    few = f", n={row['samples']}" if row["samples"] < 10 else ""
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f}{few})"


def recall(row: dict) -> str:
    return f"{100 * row['recall']:.1f} / {100 * row['accuracy_if_retrieved']:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_length(rows: list[dict], value=percent) -> str:
    """A table of tasks by lengths."""
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["task"], row["length"]): value(row) for row in rows}
    tasks = dict.fromkeys(row["task"] for row in rows)
    body = [[task, *(cells.get((task, length), "") for length in lengths)] for task in tasks]
    return table(["tokens", *map(short, lengths)], body)


def change(row: dict) -> str:
    return f"{row['change']['mean']:+.3f} ({row['change']['low']:+.3f} to {row['change']['high']:+.3f})"


def foreign_table(folder: Path) -> str:
    rows = json.loads((folder / "results" / "ppl_foreign.json").read_text(encoding="utf-8"))["rows"]
    names = {"last": "the text before", "foreign": "text of another book"}
    short_context, *_ = (short(row["length"]) for row in rows)
    cells = [
        (names[row["task"]], short(row["length"]), change(row))
        for row in rows
        if row["change"]["from"] != row["length"]
    ]
    return table(
        [f"before the last {short_context}", "tokens in all", "change of the loss"], [list(cell) for cell in cells]
    )


def perplexity_table(folder: Path) -> str:
    rows = json.loads((folder / "results" / "ppl.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["task"] == "last"]
    cells = {
        "perplexity per token": lambda row: f"{row['perplexity']['mean']:.1f}",
        "bits per byte": lambda row: f"{row['bits_per_byte']['mean']:.3f}",
        "change of the loss, nats per token": change,
    }
    return table(
        ["tokens of context", *(short(row["length"]) for row in rows)],
        [[name, *(cell(row) for row in rows)] for name, cell in cells.items()],
    )


def tables(folder: Path) -> dict[str, str]:
    """Every table of the card by the name of its mark."""
    results = folder / "results"
    paper = read_rows(sorted(results.glob("paper_*.json")))
    made = {"paper": by_length(paper), "recall": by_length(paper, recall)}
    made |= {"perplexity": perplexity_table(folder), "foreign": foreign_table(folder)}
    for name in ("facts", "ruler", "babilong"):
        made[name] = by_length(read_rows([results / f"{name}.json"]))
    return made


def update(folder: Path) -> None:
    """Writes all derived files of `folder` but the plots."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name, made in tables(folder).items():
        parts = re.split(rf"(?<=<!-- {name} -->\n)(?:(?!<!--).)*(?=<!-- end -->)", card, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"README.md must have one mark `<!-- {name} -->` with an end, has {len(parts) - 1}.")
        card = f"{made}\n".join(parts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def plot(folder: Path) -> None:
    results = folder / "results"
    files = map(str, sorted(results.glob("paper_*.json")))
    script = REPOSITORY / "examples" / "plot.py"
    command = [sys.executable, script, "retrieval", "--results", folder.name, *files, "--output", results]
    subprocess.run(command, check=True)


def stale(folder: Path) -> list[str]:
    """The files that `update` would change."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / "fresh"
        shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
        update(fresh)
        files = {file.relative_to(root) for root in (folder, fresh) for file in root.rglob("*") if file.is_file()}
        files = {file for file in files if file.suffix != ".safetensors" and "__pycache__" not in file.parts}
        pairs = {str(file): (folder / file, fresh / file) for file in files}
        return sorted(f for f, (a, b) in pairs.items() if not (a.exists() and b.exists() and filecmp.cmp(a, b, False)))


def push(name: str, repo_id: str, private: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        build(name, folder)
        card = (folder / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(card.replace(f'"{name}"', f'"{repo_id}"'), encoding="utf-8")
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        print(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model, card and results"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=names(), help="the model")
    parser.add_argument("--update", action="store_true", help="bring the folder up to date")
    parser.add_argument("--repo_id", help="where to push it: user or organisation / name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    arguments = parser.parse_args()
    if not arguments.update and arguments.repo_id is None:
        parser.error("nothing to do: give `--update`, `--repo_id`, or both")
    folder = MODELS / arguments.name
    if arguments.update:
        update(folder)
        plot(folder)
    if arguments.repo_id is not None:
        if files := stale(folder):
            sys.exit(f"Not up to date: {', '.join(files)}. Run with `--update`, and look at what changes.")
        push(arguments.name, arguments.repo_id, arguments.private)


if __name__ == "__main__":
    main()

"""
Bring the folder of a model up to date with its results, and push the model to the Hub.

    python hub_card/push.py hsa-books-10m --update                      # tables and plots
    python hub_card/push.py hsa-books-10m --repo_id me/hsa-books-10m    # upload

`--update` writes what is made from the files in `results/`: the tables of the card between the marks `<!-- name -->`
and `<!-- end -->` (`cards.py` makes them), and the plots of retrieval. Where that would change anything but plots, an
upload is refused. What is uploaded is what `hub_card/build.py` writes.
"""

import argparse
import filecmp
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
from cards import TABLES  # noqa: E402


def update(folder: Path) -> None:
    """Writes all derived files of `folder` but the plots."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name, made in TABLES[folder.name](folder).items():
        parts = re.split(rf"(?<=<!-- {name} -->\n)(?:(?!<!--).)*(?=<!-- end -->)", card, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"README.md must have one mark `<!-- {name} -->` with an end, has {len(parts) - 1}.")
        card = f"{made}\n".join(parts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def plot(folder: Path) -> None:
    """Draws the plots of retrieval, if the card shows them."""
    if "(results/accuracy.png)" not in (folder / "README.md").read_text(encoding="utf-8"):
        return
    results = folder / "results"
    files = map(str, sorted(results.glob("paper_*.json")))
    script = REPOSITORY / "examples" / "plot.py"
    command = [sys.executable, script, "retrieval", "--results", folder.name, *files, "--output", results]
    subprocess.run(command, check=True)


def stale(folder: Path) -> list[str]:
    """The files that `update` would change."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / folder.name
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

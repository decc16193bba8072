"""
Plots that compare results of several models or runs.

    python examples/plot.py retrieval --results HSA out/hsa/*/paper.json --results Llama out/llama/paper.json \\
        --output out/plots
    python examples/plot.py training --log HSA out/books/log.jsonl --log "full attention" out/full/log.jsonl \\
        --task far --output emergence.png
"""

import json
from argparse import Namespace
from pathlib import Path

from hsa_lab.commands import add_commands, make_parser, run
from hsa_lab.plots import draw_curves, draw_depths, draw_lengths, named
from hsa_lab.results import read_rows


RETRIEVAL = """
Accuracy by length and depth, of results of `evaluate.py`, of one model or several, from one run or several each.

Writes accuracy.png, the accuracy of every task by length with its 95 % interval, and depth_<task>.png of the first
model for every task with one needle: accuracy by depth and length.
"""
TRAINING = """
Accuracy of one task during several runs of `pretrain.py`.

Draws the accuracy by answer token against the tokens trained on, in as many stages as have the task, and prints the
tokens after which it was at least a half and at least 90 % (as logged: the mean since the entry before).
"""
MARKS = (0.5, 0.9)


def plot_retrieval(arguments: Namespace) -> None:
    models = {}
    for label, *files in arguments.results:
        if not files or label in models:
            raise ValueError(f"`--results {label}` must name a file, and each label once.")
        models[label] = read_rows([Path(file) for file in files])
    draw_lengths(models, arguments.output / "accuracy.png")
    first = next(iter(models.values()))
    for task in dict.fromkeys(row["task"] for row in first):
        rows = [row for row in first if row["task"] == task]
        if all("depth" in row["records"] for row in rows):
            draw_depths(rows, arguments.output / f"depth_{task}.png")


def read_curve(file: Path, task: str) -> list[tuple[int, float]]:
    """Tokens and accuracy. Raises: ValueError if the log has no such task."""
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    curve = [(entry["tokens"], entry[task]["accuracy"]) for entry in entries if task in entry]
    if not curve:
        names = sorted({name for entry in entries for name, value in entry.items() if isinstance(value, dict)})
        raise ValueError(f"`--log`: {file} has no task {task!r}, but {', '.join(names) or 'none'}.")
    return curve


def plot_training(arguments: Namespace) -> None:
    curves = {label: read_curve(Path(file), arguments.task) for label, file in arguments.logs}
    for label, curve in curves.items():
        first = {mark: next((tokens for tokens, accuracy in curve if accuracy >= mark), None) for mark in MARKS}
        said = (f"{mark:.0%} {'never' if at is None else f'at {at / 1e6:.1f}M'}" for mark, at in first.items())
        print(f"{label}:", *said)
    lines = {
        label: ([tokens / 1e6 for tokens, _ in c], [accuracy for _, accuracy in c]) for label, c in curves.items()
    }
    title = f"{named(arguments.task)}: accuracy by answer token"
    draw_curves(lines, arguments.output, title, "million tokens", "accuracy", ylim=(0, 1.02))


def main() -> None:
    parser = make_parser(__doc__)
    commands = add_commands(parser, {"retrieval": RETRIEVAL, "training": TRAINING})
    add = commands["retrieval"].add_argument
    add("--results", nargs="+", action="append", required=True, metavar=("LABEL", "FILE"), help="may be repeated")
    add("--output", type=Path, required=True, help="folder for the plots")
    add = commands["training"].add_argument
    add(
        "--log",
        nargs=2,
        action="append",
        required=True,
        metavar=("LABEL", "FILE"),
        dest="logs",
        help="may be repeated",
    )
    add("--task", required=True, help="name of a task in the recipes")
    add("--output", type=Path, required=True, help="file of the plot")
    arguments = parser.parse_args()
    {"retrieval": plot_retrieval, "training": plot_training}[arguments.command](arguments)
    print(f"Written to {arguments.output}.")


if __name__ == "__main__":
    run(main)

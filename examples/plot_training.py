"""
Accuracy of one task during several runs of `pretrain.py`.

    python examples/plot_training.py --log HSA out/books/log.jsonl --log "full attention" out/full/log.jsonl \\
        --task far --output emergence.png

Draws the accuracy by answer token against the tokens trained on, in as many stages as have the task, and prints the
tokens after which it was at least a half and at least 90 % (as logged: the mean since the entry before).
"""

import argparse
import json
from pathlib import Path


MARKS = (0.5, 0.9)


def read_curve(file: Path, task: str) -> list[tuple[int, float]]:
    """Tokens and accuracy. Raises: ValueError if the log has no such task."""
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    curve = [(entry["tokens"], entry[task]["accuracy"]) for entry in entries if task in entry]
    if not curve:
        names = sorted({name for entry in entries for name, value in entry.items() if isinstance(value, dict)})
        raise ValueError(f"{file} has no task {task!r}, but {', '.join(names) or 'none'}.")
    return curve


def first_at(curve: list[tuple[int, float]], least: float) -> int | None:
    return next((tokens for tokens, accuracy in curve if accuracy >= least), None)


def plot(curves: dict[str, list[tuple[int, float]]], task: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.4, 3.6))
    for label, curve in curves.items():
        axis.plot([tokens / 1e6 for tokens, _ in curve], [accuracy for _, accuracy in curve], label=label)
    axis.set(title=f"{task}: accuracy by answer token", xlabel="million tokens", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", nargs=2, action="append", required=True, metavar=("LABEL", "FILE"), dest="logs")
    parser.add_argument("--task", required=True, help="name of a task in the recipes")
    parser.add_argument("--output", type=Path, required=True, help="file of the plot")
    arguments = parser.parse_args()
    try:
        curves = {label: read_curve(Path(file), arguments.task) for label, file in arguments.logs}
    except (OSError, ValueError) as error:
        parser.error(f"`--log`: {error}")
    for label, curve in curves.items():
        marks = [(least, first_at(curve, least)) for least in MARKS]
        print(f"{label}:", *(f"{least:.0%} {'never' if at is None else f'at {at / 1e6:.1f}M'}" for least, at in marks))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, arguments.task, arguments.output)


if __name__ == "__main__":
    main()

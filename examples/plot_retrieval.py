"""
Plots of results of `eval_ruler.py`, of one model or several, from one run or several each.

    python examples/plot_retrieval.py --results HSA out/hsa/*/paper.json --results Llama out/llama/paper.json \\
        --output out/plots

Writes accuracy.png, the accuracy of every task by length with its 95 % interval, and depth_<task>.png of the first
model for every task with one needle: accuracy by depth and length.
"""

import argparse
import json
from pathlib import Path

from eval_ruler import depth_cells
from evaluation import heat_map, short


def read_rows(files: list[Path]) -> list[dict]:
    """The rows of all files that have results, by length. Raises: ValueError if two are of one task and length."""
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    rows = sorted((row for row in rows if "error" not in row), key=lambda row: row["length"])
    cells = [(row["task"], row["length"]) for row in rows]
    if double := {cell for cell in cells if cells.count(cell) > 1}:
        task, length = sorted(double)[0]
        raise ValueError(f"Two of the files have results of {task} at {length:,} tokens: leave one out.")
    return rows


def plot_accuracy(models: dict[str, list[dict]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for rows in models.values() for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), squeeze=False, sharey=True)
    for axis, task in zip(axes[0], tasks):
        for label, rows in models.items():
            rows = [row for row in rows if row["task"] == task]
            if not rows:
                continue
            x, y = ([row[name] for row in rows] for name in ("length", "accuracy"))
            line = axis.plot(x, y, marker="o", markersize=4, label=label)[0]
            low, high = ([row[name] for row in rows] for name in ("low", "high"))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        lengths = sorted({row["length"] for rows in models.values() for row in rows})
        axis.set_xticks(lengths, [short(length) for length in lengths], rotation=45)
        axis.minorticks_off()
        axis.set(title=task, xlabel="tokens", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="best")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", nargs="+", action="append", required=True, metavar=("LABEL", "FILE"), help="may be repeated"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the plots")
    arguments = parser.parse_args()
    models = {}
    try:
        for label, *files in arguments.results:
            if not files or label in models:
                raise ValueError(f"`--results {label}` must name a file, and each label once.")
            models[label] = read_rows([Path(file) for file in files])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot_accuracy(models, arguments.output / "accuracy.png")
    first = next(iter(models.values()))
    for task in dict.fromkeys(row["task"] for row in first):
        rows = [row for row in first if row["task"] == task]
        if all("depth" in row["records"] for row in rows):
            heat_map(depth_cells(rows, on_grid=False), arguments.output / f"depth_{task}.png", f"{task}: accuracy")


if __name__ == "__main__":
    main()

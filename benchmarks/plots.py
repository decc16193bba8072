"""
Draws the plots of benchmarks/results again, from the files of results beside them.

    python benchmarks/plots.py

(Those of the cards of trained models are drawn by `hub_card/push.py`, the training of a run by its command.)
"""

import json
import math
import sys
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples")]

from hsa_lab.benchmarks import cpu, kernels, models, recall  # noqa: E402
from hsa_lab.plots import draw_curves, draw_lengths, draw_losses, draw_pretraining  # noqa: E402
from hsa_lab.results import read_rows  # noqa: E402


RESULTS = REPOSITORY / "benchmarks" / "results"
CARD = REPOSITORY / "hub_card" / "hsa-books-10m" / "results"
SMOOTHED = 5  # entries of a log
RUNS = {
    "HSA": CARD,
    "one question a row": RESULTS / "pretraining" / "one_question",
    "stick-breaking weights": RESULTS / "pretraining" / "stick_breaking",
    "4,096 tokens from the start": RESULTS / "pretraining" / "no_short_stages",
    "no loss on retrieval": RESULTS / "pretraining" / "no_retrieval_loss",
    "full attention": RESULTS / "pretraining" / "full_attention",
    "window only": RESULTS / "pretraining" / "window_only",
}


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def rows_of_parts(file: Path) -> dict[str, list[dict]]:
    return {part: result["rows"] for part, result in read(file).items()}


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def draw_emergence(file: Path) -> None:
    """Answers beyond the window in the first two stages; where all rows are long, of all many-question rows."""
    curves = {}
    for label, run in RUNS.items():
        entries = [entry for entry in log(run) if entry["tokens"] <= 61e6]
        name = "far" if any("far" in entry for entry in entries) else "dense"
        entries = [entry for entry in entries if name in entry]
        curves[label] = [entry["tokens"] / 1e6 for entry in entries], [entry[name]["accuracy"] for entry in entries]
    draw_curves(
        curves, file, "answer tokens beyond the window that are right", "million tokens", "share", ylim=(0, 1.02)
    )


def draw_rounds(file: Path) -> None:
    """Answers right in the rounds of the converted model, in a row, by family: means of SMOOTHED entries."""
    curves, starts = {}, []
    before = 0
    for name in ("first_run", "second_run", "third_run"):
        starts.append(before / 1e6)
        entries = log(RESULTS / "adaptation" / name)
        for family in (key for key, value in entries[-1].items() if isinstance(value, dict) and key != "all"):
            kept = [entry for entry in entries if family in entry]
            means = [
                sum(entry[family]["answers"] for entry in kept[i : i + SMOOTHED]) / SMOOTHED
                for i in range(len(kept) - SMOOTHED + 1)
            ]
            x, y = curves.setdefault(family, ([], []))
            x += [(before + entry["tokens"]) / 1e6 for entry in kept[SMOOTHED - 1 :]] + [math.nan]
            y += [*means, math.nan]  # a gap between rounds
        before += entries[-1]["tokens"]
    title = "answers right in training, by family"
    draw_curves(curves, file, title, "million tokens", "share", starts[1:], ylim=(0, 1.02))


def main() -> None:
    models.Models.plot(rows_of_parts(RESULTS / "gpu" / "models.json"), RESULTS / "gpu")
    kernels.Kernels.plot(rows_of_parts(RESULTS / "gpu" / "kernels.json"), RESULTS / "gpu")
    measurements = [*read(RESULTS / "cpu/results.json")["measurements"]]
    measurements += read(RESULTS / "cpu_memory/results.json")["measurements"]
    cpu.plot(measurements, RESULTS / "cpu" / "benchmark.png")
    recall.plot(read(RESULTS / "associative_recall/results.json"), RESULTS / "associative_recall")
    paper = {label: sorted(RUNS[label].glob("paper*.json")) for label in ("HSA", "full attention", "window only")}
    models_of = {label: read_rows(files) for label, files in paper.items()}
    draw_lengths(models_of, RESULTS / "pretraining" / "accuracy.png")
    draw_rounds(RESULTS / "adaptation" / "rounds.png")
    draw_emergence(RESULTS / "pretraining" / "emergence.png")
    draw_pretraining(log(CARD), CARD / "training.png")
    draw_losses(read(CARD / "ppl.json")["rows"], CARD / "ppl.png")


if __name__ == "__main__":
    main()

"""Tables and plots of the results of the study, on the page that says what they mean."""

import json
import math
import re
from pathlib import Path
from statistics import fmean

from ..plots import common_legend, draw_band, length_ticks, panels
from ..results import interval, short, wilson
from .cells import TABLES


NONE = "–"


def read_results(folder: Path, table: str, scale: str) -> list[dict]:
    """The results of all runs of a table at a scale."""
    files = sorted((folder / f"{table}-{scale}").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def write_report(folder: Path, page: Path) -> None:
    """
    Puts the table and the plot of every table and scale that has results between the comments `<!-- table NAME -->`
    and `<!-- end of table NAME -->` of the page; plots are beside it. Raises: ValueError where the page has none.
    """
    text = page.read_text(encoding="utf-8")
    for table in TABLES:
        found = {}
        for results_folder in sorted(folder.glob(f"{table}-*")):
            scale = results_folder.name.removeprefix(f"{table}-")
            if scale not in ("toy", "short") and (results := read_results(folder, table, scale)):
                found[scale] = results
        parts = []
        for scale, results in found.items():
            plot = page.with_name(f"{page.stem}_{table}_{scale}.png".replace(".", "_", scale.count(".")))
            lines = combine(table, results)
            draw(lines, plot, TABLES[table].title)
            parts.append(f"{describe(results)}\n\n{markdown(lines)}\n\n![{TABLES[table].title}]({plot.name})")
        if parts:
            text = replace_part(text, table, "\n\n".join(parts))
    page.write_text(text, encoding="utf-8")


def replace_part(text: str, table: str, part: str) -> str:
    begin, end = f"<!-- table {table} -->", f"<!-- end of table {table} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"`--page`: it has no place {begin} ... {end} for the results of table {table}.")
    return pattern.sub(lambda _: f"{begin}\n\n{part}\n\n{end}", text)


def describe(results: list[dict]) -> str:
    """Where the runs were made, and of what."""

    def names(of) -> str:
        return ", ".join(sorted({str(of(result)) for result in results}))

    tokens = names(lambda result: f"{result['training']['tokens'] / 1e6:.0f}M")
    hardware = names(lambda result: result["hardware"].get("gpu", result["hardware"]["cpu"]))
    return (
        f"{len(results)} runs, seeds {names(lambda result: result['seed'])}, {tokens} tokens each; {hardware}, "
        f"torch {names(lambda result: result['hardware']['torch'])}, "
        f"commit {names(lambda result: (result['commit'] or 'unknown')[:10])}."
    )


def combine(table: str, results: list[dict]) -> dict[str, dict]:
    """
    For every cell and test, in the order of the table: `seeds`, and rows of the same length of several seeds made one,
    by length: `accuracy` (mean of the tasks, with `low` and `high`), `recall`, `precision`, and `perplexity`.
    """
    lines = {}
    for name, cell in TABLES[table].cells.items():
        runs = [result for result in results if result["cell"] == name]
        for test in cell.all_tests() if runs else ():
            tests = [run["tests"][test] for run in runs]
            lines[f"{name}, {test}" if test else name] = {
                "seeds": len(runs),
                "emergence": [run["training"]["emergence"]["0.9"] for run in runs],
                "retrieval": [_retrieval(rows) for rows in _by_length([test["retrieval"] for test in tests])],
                "text": [_text(rows) for rows in _by_length([test["text"] for test in tests])],
            }
    return lines


def _by_length(of_seeds: list[list[dict]]) -> list[list[list[dict]]]:
    """The rows of every seed, length by length. What did not fit into memory is left out."""
    lengths = sorted({row["length"] for rows in of_seeds for row in rows})
    grouped = [[[r for r in rows if r["length"] == n and "error" not in r] for rows in of_seeds] for n in lengths]
    return [seeds for of_length in grouped if (seeds := [rows for rows in of_length if rows])]


def _retrieval(of_seeds: list[list[dict]]) -> dict:
    """
    The mean of the tasks. Its interval is the wider one of Student's over the seeds and Wilson's over all samples: a
    few seeds that agree do not show how far the samples are chance.
    """
    rows = [row for rows in of_seeds for row in rows]
    samples = sum(row["samples"] for row in rows)
    spread = interval([fmean(row["accuracy"] for row in rows) for rows in of_seeds])
    low, high = wilson(sum(row["accuracy"] * row["samples"] for row in rows), samples)
    if spread["low"] is not None:
        low, high = max(0.0, min(low, spread["low"])), min(1.0, max(high, spread["high"]))
    retrieved = [(row["accuracy_if_retrieved"], row["retrieved"]) for row in rows if row.get("retrieved")]
    return {
        "length": rows[0]["length"],
        "accuracy": spread["mean"],
        "low": low,
        "high": high,
        "recall": fmean(row["recall"] for row in rows) if all("recall" in row for row in rows) else None,
        "precision": sum(a * n for a, n in retrieved) / sum(n for _, n in retrieved) if retrieved else None,
    }


def _text(of_seeds: list[list[dict]]) -> dict:
    """The loss of the last tokens, with Student's interval over the seeds, or over the windows of a single one."""
    losses = [rows[0]["loss"] for rows in of_seeds]
    loss = interval([loss["mean"] for loss in losses]) if len(losses) > 1 else losses[0]
    bits = fmean(rows[0]["bits_per_byte"]["mean"] for rows in of_seeds)
    return {"length": of_seeds[0][0]["length"], "loss": loss, "bits_per_byte": bits}


def markdown(lines: dict[str, dict]) -> str:
    """Retrieval at every length, then text, one row a cell and test."""
    tables = []
    if any(line["retrieval"] for line in lines.values()):
        lengths = sorted({row["length"] for line in lines.values() for row in line["retrieval"]})
        head = ["accuracy, %", *map(short, lengths), "recall", "right if retrieved", "emergence"]
        tables.append([head] + [_retrieval_cells(name, line, lengths) for name, line in lines.items()])
    lengths = sorted({row["length"] for line in lines.values() for row in line["text"]})
    head = ["perplexity", *map(short, lengths), "bits per byte gained"]
    tables.append([head] + [_text_cells(name, line, lengths) for name, line in lines.items()])
    return "\n\n".join(_table(rows) for rows in tables)


def _retrieval_cells(name: str, line: dict, lengths: list[int]) -> list[str]:
    rows = {row["length"]: row for row in line["retrieval"]}
    cells = [f"{name} ({line['seeds']})"]
    for length in lengths:
        row = rows.get(length)
        cells.append(f"{100 * row['accuracy']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" if row else NONE)
    ends = [rows[length] for length in (min(rows, default=0), max(rows, default=0)) if length in rows]
    for measure in ("recall", "precision"):
        values = [NONE if row[measure] is None else f"{100 * row[measure]:.0f}" for row in ends]
        cells.append(" / ".join(values) if set(values) - {NONE} else NONE)
    tokens = [f"{value / 1e6:.0f}M" if value else "not" for value in line["emergence"]]
    return [*cells, ", ".join(tokens)]


def _text_cells(name: str, line: dict, lengths: list[int]) -> list[str]:
    rows = {row["length"]: row for row in line["text"]}
    cells = [f"{name} ({line['seeds']})"]
    for length in lengths:
        loss = rows[length]["loss"] if length in rows else None
        spread = "" if loss is None or loss["low"] is None else f" ± {_half_width(loss):.1f}"
        cells.append(NONE if loss is None else f"{math.exp(loss['mean']):.1f}{spread}")
    if not rows:
        return [*cells, NONE]
    return [*cells, f"{rows[min(rows)]['bits_per_byte'] - rows[max(rows)]['bits_per_byte']:.3f}"]


def _half_width(loss: dict) -> float:
    """Of the interval of the perplexity."""
    return (math.exp(loss["high"]) - math.exp(loss["low"])) / 2


def _table(rows: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def draw(lines: dict[str, dict], file: Path, title: str) -> None:
    """Accuracy and perplexity by length, with intervals."""
    kinds = [kind for kind in ("retrieval", "text") if any(line[kind] for line in lines.values())]
    with panels(file, len(kinds), 6.4, 4.4) as axes:
        for axis, kind in zip(axes, kinds):
            lengths = set()
            for name, line in lines.items():
                rows = line[kind] if kind == "retrieval" else [_perplexity(row) for row in line["text"]]
                draw_band(
                    axis, [row["length"] for row in rows], rows, "accuracy" if kind == "retrieval" else "mean", name
                )
                lengths |= {row["length"] for row in rows}
            axis.set_xscale("log", base=2)
            length_ticks(axis, lengths)
            axis.set(xlabel="tokens", ylabel="accuracy" if kind == "retrieval" else "perplexity of books")
        axes[0].set_title(title, fontsize=10)
        common_legend(axes)


def _perplexity(row: dict) -> dict:
    values = {key: None if value is None else math.exp(value) for key, value in row["loss"].items()}
    return {"length": row["length"]} | values

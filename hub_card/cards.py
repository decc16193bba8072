"""The tables of the cards of trained models, each made of the files in the `results/` of its model."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from hsa_lab.results import interval, read_rows, short


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


def books_tables(folder: Path) -> dict[str, str]:
    """Of hsa-books-10m."""
    results = folder / "results"
    paper = read_rows(sorted(results.glob("paper_*.json")))
    made = {"paper": by_length(paper), "recall": by_length(paper, recall)}
    made |= {"perplexity": perplexity_table(folder), "foreign": foreign_table(folder)}
    for name in ("facts", "ruler", "babilong"):
        made[name] = by_length(read_rows([results / f"{name}.json"]))
    return made


# -- of a converted model --

ASKED = {
    "facts": "facts, of kinds not trained on",
    "facts, trained kinds": "facts, of trained kinds",
    "documents": "made-up documents",
    "events": "events",
    "missing": "what the text does not tell",
}
# What was wanted, in percent, of what is measured at 4K tokens: the file of results and its task.
WANTED = {
    ("facts", "facts"): (85, "facts, of kinds not trained on"),
    ("babilong", "qa1"): (99, "BABILong qa1"),
    ("babilong", "qa2"): (85, "BABILong qa2"),
}
WANTED_OF_CHATS = 0.05  # nats
PASSAGES = {"alone": "the passage alone", "qa": "hidden in books, 4K"}
SHOWN = 110  # characters of an answer


def counted(row: dict) -> str:
    """Accuracy with its interval, and the number of questions."""
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f}, n={row['samples']})"


def measured_table(rows: list[dict], names: dict[str, str] | None = None) -> str:
    """By task and length: the accuracy, and how often all that is needed was retrieved."""
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["task"], row["length"]): row for row in rows}
    body = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [cells.get((task, length)) for length in lengths]
        shares = (f"{100 * row['retrieved'] / row['samples']:.0f}" for row in of_task if row and "retrieved" in row)
        body.append([(names or {}).get(task, task), *(counted(row) if row else "" for row in of_task)])
        body[-1].append(" / ".join(shares))
    head = ["tokens", *map(short, lengths), f"retrieved, {' / '.join(map(short, lengths))}"]
    return table(head, body)


def refusals_table(rows: list[dict]) -> str:
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["task"], row["length"]): f"{100 * row['refused']:.0f}" for row in rows}
    body = [[text, *(cells.get((task, length), "") for length in lengths)] for task, text in ASKED.items()]
    return table(["tokens", *map(short, lengths)], body)


def wanted_table(folder: Path) -> str:
    body = []
    for (name, task), (wanted, text) in WANTED.items():
        rows = {(row["task"], row["length"]): row for row in read_rows([folder / "results" / f"{name}.json"])}
        body.append([text, f"{wanted} %", counted(rows[task, 4096]).replace(" (", " % (")])
    (row,) = json.loads((folder / "results" / "chat.json").read_text(encoding="utf-8"))["rows"]
    body.append(["divergence from the base in chats", f"{WANTED_OF_CHATS} nats", f"{row['kl']['mean']:.3f} nats"])
    return table(["at 4K tokens", "wanted", "measured"], body)


def passages_table(rows: list[dict]) -> str:
    cells = {row["task"]: counted(row) for row in rows}
    body = [[text, cells[task], cells[f"{task}, base"]] for task, text in PASSAGES.items()]
    return table(["F1", "this model", "base"], body)


def text_table(folder: Path) -> str:
    """Perplexity of books, and the loss beside that of the base in the same windows."""
    rows = json.loads((folder / "results" / "ppl.json").read_text(encoding="utf-8"))["rows"]
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["task"], row["length"]): row for row in rows}

    def against_base(length: int) -> str:
        if ("last, base", length) not in cells:
            return ""
        losses = (cells[task, length]["records"]["loss"] for task in ("last", "last, base"))
        return change({"change": interval([ours - theirs for ours, theirs in zip(*losses, strict=True)])})

    body = []
    for task, text in {"last": "this model", "last, base": "base"}.items():
        found = (cells.get((task, length)) for length in lengths)
        body.append([text, *(f"{row['perplexity']['mean']:.1f}" if row else "" for row in found)])
    body.append(["loss of this model, against the base, nats per token", *map(against_base, lengths)])
    body.append(["loss of this model, against that with 4K", *(change(cells["last", length]) for length in lengths)])
    return table(["tokens of context", *map(short, lengths)], body)


def chat_table(folder: Path) -> str:
    (row,) = json.loads((folder / "results" / "chat.json").read_text(encoding="utf-8"))["rows"]
    kl = row["kl"]
    return table(
        ["conversations", "tokens", "divergence from the base, nats per token", "the same token likeliest"],
        [[f"{row['samples']}", f"{row['tokens']:,}", f"{kl['mean']:.3f} ({kl['low']:.3f}-{kl['high']:.3f})",
          f"{100 * row['same']:.1f} %"]],
    )  # fmt: skip


def eight_bits_table(folder: Path) -> str:
    rows = json.loads((folder / "results" / "eight_bits.json").read_text(encoding="utf-8"))["rows"]
    cells = {(row["way"], row["kind"]): row for row in rows}
    kinds, ways = (list(dict.fromkeys(row[field] for row in rows)) for field in ("kind", "way"))
    names = {"8 bits": "adapter in 8 bits", "bf16": "all weights in bf16"}
    body = []
    for way in ways:
        found = [cells[way, kind] for kind in kinds]
        shown = [f"{x['kl']['mean']:.5f}, {100 * x['same']['mean']:.2f} %" for x in found]
        body.append([names[way], *shown])
    sizes = (f"{kind}, {cells[ways[0], kind]['tokens']:,} tokens" for kind in kinds)
    return table(["nats per token, the same token likeliest", *sizes], body)


def excerpt(text: str) -> str:
    """The beginning, in one line, that Markdown leaves as it is."""
    text = " ".join(text.split())
    cut = text if len(text) <= SHOWN else text[:SHOWN].rsplit(" ", 1)[0] + " ..."
    return re.sub(r"([*_|<>`\[\]])", r"\\\1", cut)


def said_table(folder: Path) -> str:
    said = json.loads((folder / "results" / "chat.json").read_text(encoding="utf-8"))["said"]
    body = [[excerpt(answer[name]) for name in ("prompt", "model", "base")] for answer in said]
    return table(["asked", "this model", "base"], body)


def converted_tables(folder: Path) -> dict[str, str]:
    """Of hsa-smollm2-135m."""

    def rows(*names: str) -> list[dict]:
        return read_rows([folder / "results" / f"{name}.json" for name in names])

    return {
        "facts": measured_table(rows("facts"), ASKED),
        "wanted": wanted_table(folder),
        "refusals": refusals_table(rows("facts")),
        "passages": passages_table(rows("qa")),
        "paper": measured_table(rows("paper", "paper_1m")),
        "ruler": measured_table(rows("ruler", "ruler_64k")),
        "babilong": measured_table(rows("babilong")),
        "perplexity": text_table(folder),
        "chat": chat_table(folder),
        "eight_bits": eight_bits_table(folder),
        "said": said_table(folder),
    }


# What makes the tables of a card, by mark, from the folder of its model.
TABLES: dict[str, Callable[[Path], dict[str, str]]] = {
    "hsa-books-10m": books_tables,
    "hsa-smollm2-135m": converted_tables,
}

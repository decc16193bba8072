"""
The tables of README.md and docs/ that hold figures, each made of the files of results.

    python benchmarks/tables.py            # names what is out of date
    python benchmarks/tables.py --update   # writes it

A table stands between the marks `<!-- name -->` and `<!-- end -->`. (Those of the cards of trained models are written
by `hub_card/push.py`.)
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
CARD = REPOSITORY / "hub_card" / "hsa-books-10m" / "results"
RUNS = RESULTS / "pretraining"
CONVERTED = REPOSITORY / "hub_card" / "hsa-smollm2-135m" / "results"
ROUNDS = ("first_run", "second_run", "third_run")  # of the converted model
TASKS = {
    "s_niah": "S-NIAH: a needle of 7 random tokens",
    "mq_niah": "MQ-NIAH: 6 needles, 2 asked for",
    "vt": "VT: 2 chains of 3 variables",
}
K = 1024

Row = dict
TABLES: dict[str, dict[str, Callable[[], str]]] = {}


def goes_to(file: str):
    """The table that a function makes, under its name, is one of `file`."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES.setdefault(file, {})[make.__name__] = make
        return make

    return register


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


@cache
def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def accuracies(*files: Path) -> dict[tuple[str, int], Row]:
    """The rows of evaluations by task and length."""
    return {(row["task"], row["length"]): row for file in files for row in read(file)["rows"]}


def percent(row: Row, digits: int = 0) -> str:
    """Accuracy; of few samples how many were right."""
    if row["samples"] < 10:
        return f"{round(row['accuracy'] * row['samples'])} of {row['samples']}"
    return f"{100 * row['accuracy']:.{digits if 0 < row['accuracy'] < 1 else 0}f}"


def joined(rows: dict[tuple[str, int], Row], length: int) -> str:
    """The three tasks in one cell."""
    kept = [rows[task, length] for task in TASKS if (task, length) in rows]
    if kept and kept[0]["samples"] < 10 and all(row["accuracy"] == 1 for row in kept):
        return f"{kept[0]['samples']} of {kept[0]['samples']} each"
    return " / ".join(f"{100 * row['accuracy']:.0f}" for row in kept)


def context_rows(file: Path, task: str = "last") -> dict[int, Row]:
    return {row["length"]: row for row in read(file)["rows"] if row["task"] == task}


def perplexity(file: Path, length: int) -> str:
    return f"{context_rows(file)[length]['perplexity']['mean']:.1f}"


def change(file: Path, length: int, task: str = "last") -> str:
    found = context_rows(file, task)[length]["change"]
    return f"{found['mean']:+.3f} ({found['low']:.3f} to {found['high']:.3f})"


def measured(part: str, file: str = "gpu/models.json", **fields) -> Row:
    """The one row of a benchmark that has these fields."""
    rows = [row for row in read(RESULTS / file)[part]["rows"] if fields.items() <= row.items()]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of {part} in {file} have {fields}.")
    return rows[0]


def both(field: str, form: str, scale: float = 1, **fields) -> str:
    """The field of HSA and of Llama."""
    return " / ".join(form.format(measured(model=model, **fields)[field] * scale) for model in ("hsa", "llama"))


# -- README.md --


@goes_to("README.md")
def costs() -> str:
    hsa, full = accuracies(*CARD.glob("paper_*.json")), accuracies(*(RUNS / "full_attention").glob("paper*.json"))

    def times(model: str) -> str:
        lengths = (4 * K, 16 * K, 64 * K, 512 * K)
        return " / ".join(f"{measured('prefill', model=model, length=x)['ms']:,.0f}" for x in lengths)

    def speed(model: str) -> str:
        rows = (measured("models", model=model, length=x, compile="off")["tokens_per_s"] for x in (4 * K, 64 * K))
        return " / ".join(f"{x / 1000:.0f}" for x in rows)

    def memory(model: str) -> str:
        """By the slope from one measured length to another."""
        (a, low), (b, high) = ((x, measured("prefill", model=model, length=x)["cache_mib"]) for x in (4 * K, 512 * K))
        return f"{(high + (high - low) / (b - a) * (K * K - b)) / K:.2g} GiB"

    def found(rows: dict, length: int) -> str:
        return f"{100 * rows['s_niah', length]['accuracy']:.0f}" if ("s_niah", length) in rows else "-"

    needles = [" / ".join(found(rows, x) for x in (4 * K, 8 * K, 16 * K, K * K)) + " %" for rows in (hsa, full)]
    books = [perplexity(RUNS / "full_attention" / name, 4 * K) for name in ("ppl_hsa.json", "ppl.json")]
    return table(
        ["", "HSA", "full attention"],
        [
            ["1. perplexity of books, 4K tokens of context", *books],
            ["2. a needle is found in 4K / 8K / 16K / 1M tokens", *needles],
            ["3. reading 4K / 16K / 64K / 512K tokens, ms", times("hsa"), times("llama")],
            ["4. training on rows of 4K / 64K tokens, thousand tokens/s", speed("hsa"), speed("llama")],
            ["5. cache of a million tokens", memory("hsa"), memory("llama")],
        ],
    )


# -- docs/results.md --


@goes_to("docs/results.md")
def extrapolation() -> str:
    lengths = {4 * K: "4K", 16 * K: "16K", 64 * K: "64K", 256 * K: "256K", K * K: "1M", 32 * K * K: "32M"}
    rows = accuracies(*CARD.glob("paper_*.json"))
    body = [[text, *(percent(rows[task, length], 1) for length in lengths)] for task, text in TASKS.items()]
    return table(["tokens", *lengths.values()], body)


@goes_to("docs/results.md")
def recall() -> str:
    runs = read(RESULTS / "associative_recall" / "results.json")["by_length"]
    first = runs[0]["tokens"]

    def line(text: str, field: str) -> list[str]:
        return [text, *(f"{row[field]:.3f}" for row in runs)]

    return table(
        ["tokens", *(f"{row['tokens']:,}" + (" (training)" if row["tokens"] == first else "") for row in runs)],
        [
            ["chunks in memory", *(f"{row['chunks']:,}" for row in runs)],
            line("accuracy", "accuracy"),
            line("chunk of the answer among the 4 retrieved", "recall"),
            line("accuracy, HSA layers switched off", "accuracy_hsa_off"),
        ],
    )


@goes_to("docs/results.md")
def forgetting() -> str:
    rows = read(RESULTS / "forgetting" / "results.json")["rows"]
    cells = ([row["way"], *(f"{row[f'loss_{of}']:.2f}" for of in ("new", "books")), str(row["found"])] for row in rows)
    return table(["", "new sentences", "books", "facts found"], cells)


@goes_to("docs/results.md")
def gpu_training() -> str:
    shapes = [(8, 4 * K), (2, 16 * K), (1, 64 * K)]

    def line(text: str, field: str, form: str, scale: float = 1) -> list[str]:
        cells = (both(field, form, scale, part="models", batch=b, length=x, compile="off") for b, x in shapes)
        return [text, *cells]

    return table(
        ["batch x tokens", *(f"{batch} x {length:,}" for batch, length in shapes)],
        [
            line("training, HSA / Llama, thousand tokens/s", "tokens_per_s", "{:.0f}", 1e-3),
            line("MFU, HSA / Llama", "mfu", "{:.2f}"),
            line("peak memory, HSA / Llama, GiB", "peak_mib", "{:.1f}", 1 / K),
        ],
    )


@goes_to("docs/results.md")
def gpu_prefill() -> str:
    lengths = [n * K for n in (4, 16, 64, 128, 256, 512)]
    earlier = {row["length"]: row for row in read(RESULTS / "gpu/earlier/models.json")["prefill"]["rows"]
               if row["model"] == "hsa"}  # fmt: skip
    lines = {"HSA / Llama, ms": "ms", "cache, MiB": "cache_mib", "beyond it, MiB": "beyond_cache_mib"}
    rows = [[text, *(both(f, "{:,.0f}", part="prefill", length=x) for x in lengths)] for text, f in lines.items()]
    rows.insert(
        1, ["HSA in an earlier run, ms", *(f"{earlier[x]['ms']:,.0f}" if x in earlier else "" for x in lengths)]
    )
    return table(["tokens", *(f"{length:,}" for length in lengths)], rows)


SHAPES = [
    {"batch": 8, "length": 4096, "heads": 16, "kv_heads": 1, "dim": 64, "topk": 8},
    {"batch": 2, "length": 16384, "heads": 16, "kv_heads": 1, "dim": 64, "topk": 8},
    {"batch": 1, "length": 65536, "heads": 16, "kv_heads": 1, "dim": 64, "topk": 8},
    {"batch": 4, "length": 4096, "heads": 32, "kv_heads": 2, "dim": 128, "topk": 16},
    {"batch": 1, "length": 65536, "heads": 32, "kv_heads": 2, "dim": 128, "topk": 16},
]
SHAPE = "batch x tokens, query / key-value heads, dim, chunks"


def shape(fields: Row) -> str:
    heads = f"{fields['heads']} / {fields['kv_heads']}"
    return f"{fields['batch']} x {fields['length']:,}, {heads}, {fields['dim']}, {fields['topk']}"


def passes(shape: Row, pattern: str, implementation: str, file: str = "gpu/kernels.json", graph: bool = True) -> Row:
    """Times of forward, backward and both, of CUDA graphs or as called."""
    fields = shape | {"pattern": pattern, "implementation": implementation}
    row = measured("kernels", file, **fields)
    forward, both = (row[f"graph_{name}" if graph else name] for name in ("forward_ms", "both_ms"))
    return {"forward": forward, "backward": both - forward if graph else row["backward_ms"], "both": both}


def digits(value: float) -> str:
    """Three digits of what is 1 and more, two decimals of what is less."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


@goes_to("docs/results.md")
def gpu_kernels() -> str:
    rows = []
    for fields in SHAPES:
        shared, random = (passes(fields, pattern, "triton") for pattern in ("shared", "random"))
        nsa, causal = passes(fields, "random", "fla nsa"), passes(fields, "random", "sdpa")
        rows.append([shape(fields)] + [
            f"{digits(a)} / {digits(b)}" for a, b in (
                (shared["forward"], random["forward"]), (shared["backward"], random["backward"]),
                (nsa["forward"], nsa["backward"]), (causal["forward"], causal["backward"]),
            )
        ])  # fmt: skip
    return table(
        [SHAPE, "forward, shared / random, ms", "backward, shared / random, ms",
         "NSA, random, forward / backward, ms", "causal, forward / backward, ms"], rows,
    )  # fmt: skip


@goes_to("docs/results.md")
def cpu() -> str:
    rows = read(RESULTS / "cpu/results.json")["measurements"]
    lengths = [n * K for n in (1, 4, 16, 64)]

    def line(text: str, what: str, field: str, form: Callable[[float], str]) -> list[str]:
        cells = []
        for length in lengths:
            found = {row["model"]: row[field] for row in rows
                     if (row["what"], row["length"]) == (what, length) and field in row}  # fmt: skip
            cells.append(" / ".join(form(found[model]) for model in ("hsa", "llama")) if len(found) == 2 else "")
        return [text, *cells]

    def seconds(value: float) -> str:
        return f"{value:.2f}" if value < 1 else f"{value:.1f}"

    return table(
        ["tokens", *(f"{length:,}" for length in lengths)],
        [
            line("training step, HSA / Llama, s", "backward", "seconds", lambda x: f"{x:.1f}"),
            line("peak memory of it, MiB", "backward", "peak_mib", "{:,.0f}".format),
            line("prefill, s", "prefill", "seconds", seconds),
            line("cache, MiB", "prefill", "cache_mib", "{:.0f}".format),
            line("decoding, ms per token", "decode", "seconds", lambda x: f"{1000 * x:.1f}"),
        ],
    )


# -- docs/training.md --

RECIPES = {
    "": ("HSA", ""),
    "one_question": ("one question a row instead of 6", "40M tokens"),
    "stick_breaking": ("stick-breaking weights", ""),
    "no_retrieval_loss": ("no loss on retrieval", "40M tokens"),
    "no_short_stages": ("4,096 tokens and 8 of 64 chunks from the start", "40M tokens"),
    "full_attention": ("full attention with RoPE", ""),
    "window_only": ("no HSA layers, ten of window attention", ""),
}
RECIPE_FILES = {"": "books", "full_attention": "books_full", "window_only": "books_window"}


def reached(run: str, least: float) -> str:
    """After how many tokens at least that share of the answer tokens beyond the window was right."""
    log = (RUNS / run if run else CARD) / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    entries = [entry for entry in entries if "far" in entry or run == "no_short_stages"]
    name = "far" if any("far" in entry for entry in entries) else "dense"
    entries = [entry for entry in entries if name in entry]
    at = next((entry for entry in entries if entry[name]["accuracy"] >= least), None)
    if at is None:
        return f"not by {entries[-1]['tokens'] / 1e6:.0f}M"
    return f"{at['tokens'] / 1e6:.1f}M" + (", in the second stage" if at["stage"].startswith("16") else "")


@goes_to("docs/training.md")
def emergence() -> str:
    rows = []
    for run, (text, note) in RECIPES.items():
        recipe = RECIPE_FILES.get(run, f"books_{run}")
        link = f"[recipe](../examples/recipes/{recipe}.json)" + (f", {note}" if note else "")
        rows.append([f"{text} ({link})", reached(run, 0.5), reached(run, 0.9)])
    return table(["", "half of them", "90 %"], rows)


@goes_to("docs/training.md")
def against_others() -> str:
    lengths = {4 * K: "4K", 8 * K: "8K", 16 * K: "16K"}
    files = {
        "window only: S-NIAH / MQ-NIAH / VT": (RUNS / "window_only").glob("paper*.json"),
        "full attention": (RUNS / "full_attention").glob("paper*.json"),
        "HSA": CARD.glob("paper_*.json"),
    }
    rows = {text: accuracies(*found) for text, found in files.items()}
    return table(["tokens", *lengths.values()], [[t, *(joined(r, x) for x in lengths)] for t, r in rows.items()])


@goes_to("docs/training.md")
def perplexities() -> str:
    lengths = {4 * K: "4K", 8 * K: "8K", 16 * K: "16K"}
    files = {
        "window only": RUNS / "window_only/ppl.json",
        "full attention": RUNS / "full_attention/ppl.json",
        "HSA": RUNS / "full_attention/ppl_hsa.json",
    }
    body = [[text, *(perplexity(file, length) for length in lengths)] for text, file in files.items()]
    return table(["tokens of context", *lengths.values()], body)


@goes_to("docs/training.md")
def several_books() -> str:
    runs = [RUNS / "one_book_a_row", RUNS / "no_distance_penalty"]
    lines = {
        "28K tokens of another book before the last 4K": ("ppl_foreign.json", 32 * K, "foreign"),
        "the text before, 1M tokens in all, most of them of other books": ("ppl.json", K * K, "last"),
        "the text before, 64K tokens": ("ppl.json", 64 * K, "last"),
    }
    body = [
        [text, *(change(run / file, length, task) for run in runs)] for text, (file, length, task) in lines.items()
    ]
    return table(["change of the loss, nats per token", "one book a row", "several books"], body)


@goes_to("docs/training.md")
def weightings() -> str:
    lengths = {4 * K: "4K", 16 * K: "16K", 64 * K: "64K", 256 * K: "256K", K * K: "1M", 32 * K * K: "32M"}
    runs = {"softmax": RUNS / "no_distance_penalty", "stick-breaking": RUNS / "stick_breaking"}
    rows = []
    for text, run in runs.items():
        found = accuracies(*run.glob("paper_*.json"))
        rows.append([f"S-NIAH / MQ-NIAH / VT, {text}", *(joined(found, length) for length in lengths)])
    for text, run in runs.items():
        known = context_rows(run / "ppl.json")
        cells = (perplexity(run / "ppl.json", length) if length in known else "" for length in lengths)
        rows.append([f"perplexity, {text}", *cells])
    return table(["", *lengths.values()], rows)


@goes_to("docs/training.md")
def distance_penalty() -> str:
    folders = {
        "[0, as in the paper](../benchmarks/results/pretraining/no_distance_penalty)": RUNS / "no_distance_penalty",
        "[0.4, as in hub_card](../hub_card/hsa-books-10m/results)": CARD,
    }
    lines = {
        "28K tokens of another book before the last 4K": ("ppl_foreign.json", 32 * K, "foreign"),
        "the 28K tokens of text before them": ("ppl_foreign.json", 32 * K, "last"),
        "the text before, 64K tokens in all": ("ppl.json", 64 * K, "last"),
        "the text before, 1M tokens in all, most of them of other books": ("ppl.json", K * K, "last"),
    }
    body = [[t, *(change(folder / f, x, task) for folder in folders.values())] for t, (f, x, task) in lines.items()]
    return table(["change of the loss against 4K tokens", *folders], body)


FAMILIES = ("facts", "document", "events", "program", "quotes", "qa", "stories", "ruler")
LAST = 5  # entries of a log


@goes_to("docs/training.md")
def rounds() -> str:
    """How the rounds ended: means of the last entries of their logs."""
    rows = []
    for number, name in enumerate(ROUNDS, 1):
        folder = RESULTS / "adaptation" / name
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        seconds = read(folder / "state.json")["seconds"]
        found = [[entry[family]["answers"] for entry in log[-LAST:] if family in entry] for family in FAMILIES]
        shares = " / ".join(f"{100 * sum(x) / len(x):.0f}" if x else "-" for x in found)
        weight = sum(sum(entry["weight"]) / len(entry["weight"]) for entry in log[-LAST:]) / LAST
        chats = sum(entry["distill_chat"] for entry in log[-LAST:]) / LAST
        row = [f"{log[-1]['tokens'] / 1e6:.1f}M, {seconds:,.0f} s", shares, f"{weight:.2f}", f"{chats:.3f}"]
        rows.append([f"{number} ([log, recipe](../benchmarks/results/adaptation/{name}))", *row])
    return table(
        ["round", "tokens, time", f"answers right, %: {' / '.join(FAMILIES)}", "weight of the chunk", "chats, nats"],
        rows,
    )


ASKED = {
    "facts": "facts of kinds it was not trained on",
    "facts, trained kinds": "facts of kinds it was trained on, in other wordings",
    "documents": "made-up documents",
    "events": "events",
    "missing": 'questions without an answer in the text, "not found"',
    "qa": "questions about passages in books, F1",
}


@goes_to("docs/training.md")
def rounds_measured() -> str:
    kept = {
        (name, cell["model"], cell["kind"]): (cell["score"], *cell["interval"])
        for name in ROUNDS[:2]
        for cell in read(RESULTS / "adaptation" / name / "answers.json")["cells"]
        if cell["length"] == 4 * K
    }
    tested = accuracies(CONVERTED / "facts.json", CONVERTED / "qa.json")
    kept |= {("third_run", "model", task): (row["accuracy"], row["low"], row["high"])
             for (task, length), row in tested.items() if length == 4 * K}  # fmt: skip

    def score(*cell: str) -> str:
        if cell not in kept:
            return ""
        found, low, high = (round(100 * x) for x in kept[cell])
        return f"{found} [{low}, {high}]"

    columns = {"base": ("first_run", "base"), "round 1": ("first_run", "model"), "round 2": ("second_run", "model"),
               "round 3, test": ("third_run", "model")}  # fmt: skip
    body = [[text, *(score(*column, task) for column in columns.values())] for task, text in ASKED.items()]
    return table(["percent, 4,096 tokens", *columns], body)


@goes_to("docs/results.md")
def converted() -> str:
    facts, paper = accuracies(CONVERTED / "facts.json"), accuracies(*CONVERTED.glob("paper*.json"))
    ruler, babi = accuracies(*CONVERTED.glob("ruler*.json")), accuracies(CONVERTED / "babilong.json")
    lines = {
        ASKED["facts"]: (facts, "facts"), ASKED["documents"]: (facts, "documents"),
        ASKED["missing"]: (facts, "missing"),
        "S-NIAH, in chat form": (paper, "s_niah"), "MQ-NIAH": (paper, "mq_niah"), "VT": (paper, "vt"),
        "RULER, one needle with a UUID": (ruler, "niah_single_3"), "RULER, four queries": (ruler, "niah_multiquery"),
        "RULER, UUIDs among nothing but such needles": (ruler, "niah_multikey_3"),
        "BABILong qa1": (babi, "qa1"), "BABILong qa2": (babi, "qa2"),
    }  # fmt: skip
    lengths = {4 * K: "4K", 64 * K: "64K", K * K: "1M"}
    body = [[text, *(percent(rows[task, x]) if (task, x) in rows else "" for x in lengths)]
            for text, (rows, task) in lines.items()]  # fmt: skip
    return table(["percent right", *lengths.values()], body)


# -- docs/kernels.md --


def ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.2 else f"{value:.3f}"


def ratios(fields: Row, file: str, graph: bool) -> list[str]:
    """Of forward, backward and both: our time over that of the peer, with shared and with random chunks."""
    cells = []
    for name, pattern, peer in (
        ("forward", None, "fla nsa"),
        ("backward", None, "fla nsa"),
        ("both", "random", "sdpa"),
    ):
        pair = (
            passes(fields, of, "triton", file, graph)[name] / passes(fields, pattern or of, peer, file, graph)[name]
            for of in ("shared", "random")
        )
        cells.append(" / ".join(map(ratio, pair)))
    return cells


HEAD = [SHAPE, "forward, shared / random", "backward, shared / random", "both, against causal, shared / random"]


@goes_to("docs/kernels.md")
def peers_as_graphs() -> str:
    return table(HEAD, [[shape(fields), *ratios(fields, "gpu/kernels.json", True)] for fields in SHAPES])


@goes_to("docs/kernels.md")
def peers_as_called() -> str:
    rows = []
    for fields in SHAPES:
        now, before = (ratios(fields, f"gpu/{file}kernels.json", False) for file in ("", "earlier/"))
        rows.append([shape(fields), *now, ", ".join(before)])
    return table(["called", *HEAD[1:], "all three in the run before"], rows)


@goes_to("docs/kernels.md")
def window() -> str:
    cases = {
        "4,096 tokens, forward / backward": {"case": "whole", "queries": 4 * K},
        "16,384 tokens": {"case": "whole", "queries": 16 * K},
        "65,536 tokens": {"case": "whole", "queries": 64 * K},
        "a segment of 4,096 after 511 cached": {"case": "segment", "queries": 4 * K},
        "one token": {"case": "decode", "queries": 1},
    }
    ways = {"`varlen_attn`": "sdpa", "masked blocks": "sdpa, blocks", "FlexAttention": "flex"}

    def time(**fields) -> str:
        row = measured("window", "gpu/kernels.json", **fields)
        return " / ".join(f"{row[name]:.2f}" for name in ("forward_ms", "backward_ms") if row.get(name) is not None)

    body = [[text, *(time(**case, implementation=way) for way in ways.values())] for text, case in cases.items()]
    return table(["ms", *ways], body)


# -- the files --


def filled(text: str, made: dict[str, str]) -> str:
    """The text of a file with its tables. Raises: ValueError where a mark is missing or there twice."""
    for name, content in made.items():
        parts = re.split(rf"(?<=<!-- {name} -->\n)(?:(?!<!--).)*(?=<!-- end -->)", text, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"There must be one mark `<!-- {name} -->` with an end, but there are {len(parts) - 1}.")
        text = f"{content}\n".join(parts)
    return text


def stale() -> dict[str, str]:
    """The files that are out of date, with what they should hold."""
    found = {}
    for name, makers in TABLES.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        fresh = filled(text, {mark: make() for mark, make in makers.items()})
        if fresh != text:
            found[name] = fresh
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what is out of date")
    update = parser.parse_args().update
    found = stale()
    for name, text in found.items():
        print(f"{name}: {'written' if update else 'out of date'}")
        if update:
            (REPOSITORY / name).write_text(text, encoding="utf-8")
    sys.exit(1 if found and not update else 0)


if __name__ == "__main__":
    main()

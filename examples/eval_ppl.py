"""
Does more context help? Perplexity and bits per byte of held-out text, by the length of the context.

    python examples/eval_ppl.py --model out/books --haystack books/validation.jsonl.gz --output out/books/ppl \\
        --lengths 512 1024 2048 4096 8192 16384 --samples 50

`--haystack` is the held-out text: .txt, .jsonl, .jsonl.gz, or its tokens (validation.npy of prepare_corpus.py).

    last        for every length, the loss of the last `--last` tokens of windows of that length (of a shorter window,
                of all its tokens but the first). The windows of a sample all end at the same place, so that the same
                tokens are predicted at every length, and curves differ in the context alone. `change` is the paired
                difference from the shortest length, whose interval is the narrower for it.
    foreign     (only if asked for) as `last`, but of each window only as many tokens as the shortest length has are
                left; what is before them is replaced by text from the opposite side of the ring: other documents.
    positions   the loss of every token, from the third on, of windows of the longest length, by its position: one pass
                shows where a model stops gaining, or breaks.

The documents are a ring, the first following the last, with the end-of-text token after each. Windows end at seeded
places, such that windows of up to `within` tokens lie inside of one document: the longest of `--lengths` that half of
the documents have. Longer windows go on into the documents before. No token is seen twice in one window.

Text is read in segments, so that memory beyond the model's cache is that of one segment. Intervals are Student's, at
95 %, over samples; bits per byte are all bits over all bytes of the text that was scored. Windows that overlap are not
independent: `distinct` says how many fit side by side, and where it is below the number of samples the interval holds
for these texts and not for others.

Results: ppl.json, ppl.png. Windows have no token for the beginning of the text, as most lie in the middle of one.
"""

import json
import math
import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from evaluation import (
    Clock,
    Results,
    batches,
    columns,
    load,
    make_parser,
    nll,
    parse,
    read_haystack,
    sample_rng,
    short,
)


TASKS = ("last", "foreign", "positions")
DEFAULT_TASKS = ["last", "positions"]
LENGTHS = tuple(2**i for i in range(9, 16))
COLUMNS = ("loss", "change", "perplexity", "bits_per_byte")
FIRST_BUCKET = 64  # positions; the others double


def student(trials: int) -> float:
    """
    The 97.5 % quantile of Student's t of `trials` samples: tabulated, then the expansion of Abramowitz and Stegun,
    26.7.5, which is right to 0.01 from there on.
    """
    v = trials - 1
    if v < 4:
        return (math.inf, 12.706, 4.303, 3.182)[v]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean of the samples with its 95 % interval, which one sample has not."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = student(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ratio(above: list[float], below: list[float]) -> dict[str, float | None]:
    """Ratio of two sums over samples, with its 95 % interval by the delta method."""
    mean = sum(above) / max(sum(below), 1)
    spread = interval([(a - mean * b) * len(below) / max(sum(below), 1) for a, b in zip(above, below)])
    return {"mean": mean} | {k: None if spread[k] is None else mean + spread[k] for k in ("low", "high")}


def ring_window(stream: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` tokens of `stream` [N] from `start` on, going on at the beginning after the end; int64 [count]."""
    if len(stream) == 0:
        raise ValueError("`--haystack` holds no tokens.")
    parts, start = [stream[:0]], start % len(stream)
    while count > 0:
        parts.append(stream[start : start + count])
        count -= len(parts[-1])
        start = 0
    return np.concatenate(parts).astype(np.int64)


def document_bounds(stream: np.ndarray, end_of_text: int | None) -> np.ndarray:
    """Document i is `stream[bounds[i] : bounds[i + 1]]`, its end-of-text token included. int64 [documents + 1]."""
    ends = np.flatnonzero(stream == end_of_text) + 1 if end_of_text is not None else np.empty(0, dtype=np.int64)
    return np.unique(np.concatenate([[0], ends, [len(stream)]]))


class Places:
    """Where windows end: uniform over the places of all documents that have `within` tokens before them."""

    def __init__(self, bounds: np.ndarray, lengths: list[int]):
        """`bounds`: of `document_bounds`."""
        sizes = np.diff(bounds)
        fitting = [length for length in lengths if (sizes >= length).mean() >= 0.5]
        self.within = max(fitting, default=0)
        # Ends of a document: bounds[i] + within ... bounds[i + 1], of windows [end - length, end).
        self.counts = np.maximum(sizes - self.within + 1, 0) if self.within else sizes
        self.first = bounds[:-1] + (self.within or 1)

    def draw(self, rng: np.random.Generator) -> int:
        place = int(rng.integers(self.counts.sum()))
        document = int(np.searchsorted(np.cumsum(self.counts), place, side="right"))
        return int(self.first[document]) + place - int(self.counts[:document].sum())


def text_bytes(tokenizer, tokens: np.ndarray) -> int:
    """Bytes of the text that `tokens` stand for; special tokens have none."""
    return len(
        tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()
    )


class LossResults(Results):
    """Results with losses instead of scores."""

    def add_losses(self, task: str, length: int, row: dict, records: list[dict]) -> None:
        self.rows.append({"task": task, "length": length} | row | {"records": columns(records)})
        self.file.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def bucket_edges(length: int) -> list[int]:
    """Borders of the buckets of positions: 2, 64, 128, 256, ..., length. (Token 0 is not predicted.)"""
    edges, edge = [2], FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


class Evaluation:
    """One model on one text. `stream` [N]: all tokens of it."""

    def __init__(self, arguments: Namespace, model, tokenizer, stream: np.ndarray):
        self.arguments, self.model, self.tokenizer, self.stream = arguments, model, tokenizer, stream
        self.places = Places(document_bounds(stream, tokenizer.eos_token_id), arguments.lengths)
        self.shortest = {}  # number of scored tokens -> shortest length with so many, and the losses of its samples
        self.results = LossResults("ppl", arguments, model)
        self.results.content["text"] = {"tokens": len(stream), "within": self.places.within}

    def windows(self, pairs: list[tuple[int, int]], length: int, foreign: int = 0) -> tuple[list[int], torch.Tensor]:
        """
        Where the windows of some samples (seed, index) end, and their tokens [B, length]. Of these, the first
        `foreign` are from the opposite side of the ring.
        """
        ends = [self.places.draw(sample_rng(seed, "ppl", 0, index)) for seed, index in pairs]
        tokens = np.stack([ring_window(self.stream, end - length, length) for end in ends])
        for row, end in zip(tokens, ends):
            row[:foreign] = ring_window(self.stream, end - length + len(self.stream) // 2, foreign)
        return ends, torch.from_numpy(tokens).to(self.model.device)

    def losses(self, tokens: torch.Tensor, count: int) -> np.ndarray:
        """Loss of each of the last `count` tokens, fp32 [B, count]."""
        segment, offload = self.arguments.segment, self.arguments.offload
        return nll(self.model, tokens, count, segment, offload).cpu().numpy()

    def last(self, length: int, task: str = "last") -> None:
        """
        Adds the row of one length: loss, perplexity and bits per byte of the last tokens, and how the loss differs
        from that of the shortest length with the same tokens, sample by sample. `task`: "last" or "foreign".
        """
        foreign = length - min(self.arguments.lengths) if task == "foreign" else 0
        # The first token of a window has no context, and is not predicted.
        count, clock, records = min(self.arguments.last, length - 1), Clock(), []
        for pairs in batches(self.arguments, task, length):
            ends, tokens = self.windows(pairs, length, foreign)
            for pair, end, row, loss in zip(pairs, ends, tokens.cpu().numpy(), self.losses(tokens, count)):
                mean = float(loss.mean(dtype=np.float64))
                records.append({"seed": pair[0], "index": pair[1], "end": end, "loss": mean})
                records[-1]["bytes"] = text_bytes(self.tokenizer, row[-count:])
        losses = [record["loss"] for record in records]
        bits = [count * loss / math.log(2) for loss in losses]
        base, base_losses = self.shortest.setdefault(count, (length, losses))
        loss, change = interval(losses), interval([a - b for a, b in zip(losses, base_losses)])
        row = {
            "scored_tokens": count,
            "samples": len(records),
            "distinct": len(self.stream) // length,
            "loss": loss,
            "change": {"from": base} | change,
            "perplexity": {key: None if value is None else math.exp(value) for key, value in loss.items()},
            "bits_per_byte": ratio(bits, [record["bytes"] for record in records]),
            "seconds": round(clock.seconds, 3),
        }
        self.results.add_losses(task, length, row, records)
        print(short(length).rjust(8), *(_text(row[name]).ljust(30) for name in COLUMNS), flush=True)

    def positions(self) -> None:
        """Adds one row for the longest length: the loss by position."""
        length, clock, records = max(self.arguments.lengths), Clock(), []
        edges = bucket_edges(length)
        for pairs in batches(self.arguments, "positions", length):
            ends, tokens = self.windows(pairs, length)
            # The first is read on its own, into a cache that `--offload` acts on.
            for pair, end, loss in zip(pairs, ends, self.losses(tokens, length - 2).astype(np.float64)):
                means = [float(loss[a - 2 : b - 2].mean()) for a, b in zip(edges, edges[1:])]
                records.append({"seed": pair[0], "index": pair[1], "end": end, "loss": means})
        buckets = [interval(list(values)) for values in zip(*(record["loss"] for record in records))]
        row = {"edges": edges, "samples": len(records), "losses": buckets, "seconds": round(clock.seconds, 3)}
        self.results.add_losses("positions", length, row, records)
        for a, b, loss in zip(edges, edges[1:], buckets):
            print(f"{a:>8,} - {b - 1:>9,}  {_text(loss)}")


def _text(value: dict[str, float | None]) -> str:
    spread = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{spread}"


def draw(rows: list[dict], file: Path) -> None:
    """Loss by length of the context, and by position, with the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {}
    for task, where in (("last", ""), ("foreign", ", foreign text before")):
        if kept := [row for row in rows if row["task"] == task]:
            label = f"loss of the last {kept[-1]['scored_tokens']:,} tokens{where}"
            lines[label, "length of the context (tokens)"] = [(row["length"], row["loss"]) for row in kept]
    for row in rows:
        if row["task"] == "positions":
            middles = [math.sqrt(a * b) for a, b in zip(row["edges"], row["edges"][1:])]
            lines["loss by position", "position (tokens)"] = list(zip(middles, row["losses"]))
    figure, axes = plt.subplots(1, len(lines), figsize=(4.8 * len(lines), 3.8), squeeze=False)
    for axis, ((title, label), points) in zip(axes[0], lines.items()):
        x, mean = [x for x, _ in points], [y["mean"] for _, y in points]
        low, high = ([y["mean"] if y[k] is None else y[k] for _, y in points] for k in ("low", "high"))
        axis.plot(x, mean, "o-")
        axis.fill_between(x, low, high, alpha=0.2)
        axis.set(title=title, xlabel=label, ylabel="nats per token")
        axis.set_xscale("log", base=2)
        if len(x) < 12 and label.startswith("length"):
            axis.set_xticks(x, [short(length) for length in x])
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def check(parser: ArgumentParser, arguments: Namespace, tokens: int) -> None:
    """Ends the program with the name of the flag that does not go with a text of so many tokens, and the fix."""
    if arguments.last < 1:
        parser.error(f"`--last` must be at least 1, got {arguments.last}")
    if min(arguments.lengths) < 3:
        parser.error("`--lengths` must be at least 3: the first tokens of a window are not scored")
    if max(arguments.lengths) > tokens:
        parser.error(
            f"`--lengths` {max(arguments.lengths)} is more than the {tokens} tokens of `--haystack`: give more text "
            "or leave that length out"
        )
    if "foreign" in arguments.tasks and max(arguments.lengths) > tokens // 2:
        parser.error(
            f"`--lengths` {max(arguments.lengths)} is more than half of the {tokens} tokens of `--haystack`, so that "
            "`foreign` has no other text: give more text or leave that length out"
        )


def main() -> None:
    parser = make_parser(__doc__, TASKS, LENGTHS)
    parser.set_defaults(tasks=DEFAULT_TASKS)
    parser.add_argument("--last", type=int, default=1024, help="tokens at the end of each window that are scored")
    arguments = parse(parser)
    arguments.lengths = sorted(set(arguments.lengths))
    model, tokenizer = load(arguments)
    stream = read_haystack(arguments.haystack, tokenizer)
    check(parser, arguments, len(stream))
    evaluation = Evaluation(arguments, model, tokenizer, stream)
    for task in ("last", "foreign"):
        if task in arguments.tasks:
            print(f"{task}\n{'tokens':>8}", *(name.replace("_", " ").ljust(30) for name in COLUMNS))
            for length in arguments.lengths:
                evaluation.last(length, task)
    if "positions" in arguments.tasks:
        evaluation.positions()
    draw(evaluation.results.rows, arguments.output / "ppl.png")
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()

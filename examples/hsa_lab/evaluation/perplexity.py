"""
Does more context help? Perplexity and bits per byte of held-out text, by the length of the context.

    python examples/evaluate.py ppl --model out/books --haystack books/validation.jsonl.gz --output out/books/ppl \\
        --lengths 512 1024 2048 4096 8192 16384 --samples 50

`--haystack` is the held-out text: .txt, .jsonl, .jsonl.gz, or its tokens (validation.npy of `prepare.py corpus`).

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

import math
from argparse import ArgumentParser, Namespace

import numpy as np
import torch

from ..commands import at_least
from ..plots import draw_losses
from ..results import interval, ratio, short
from ..tokens import document_bounds, ring_window, sample_rng
from .harness import Evaluation


COLUMNS = ("loss", "change", "perplexity", "bits_per_byte")
FIRST_BUCKET = 64  # positions; the others double


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


def bucket_edges(length: int) -> list[int]:
    """Borders of the buckets of positions: 2, 64, 128, 256, ..., length. (Token 0 is not predicted.)"""
    edges, edge = [2], FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


class Perplexity(Evaluation):
    name, tasks, lengths = "ppl", ("last", "foreign", "positions"), tuple(2**i for i in range(9, 16))
    asks = False

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--batch_size", type=at_least(1), default=1, help="windows scored at a time")
        parser.add_argument(
            "--last", type=at_least(1), default=1024, help="tokens at the end of each window that are scored"
        )

    @classmethod
    def check(cls, arguments: Namespace) -> None:
        arguments.tasks = arguments.tasks or ["last", "positions"]
        super().check(arguments)
        arguments.lengths = sorted(set(arguments.lengths))
        if min(arguments.lengths) < 3:
            raise ValueError("`--lengths` must be at least 3: the first tokens of a window are not scored")

    def prepare(self) -> None:
        arguments, tokens, longest = self.arguments, len(self.haystack), max(self.arguments.lengths)
        if longest > tokens:
            raise ValueError(
                f"`--lengths` {longest} is more than the {tokens} tokens of `--haystack`: give more text or lower it"
            )
        if "foreign" in arguments.tasks and longest > tokens // 2:
            raise ValueError(
                f"`--lengths` {longest} is more than half of the {tokens} tokens of `--haystack`, so that `foreign` "
                "has no other text: give more text or leave that length out"
            )
        self.places = Places(document_bounds(self.haystack, self.tokenizer.eos_token_id), arguments.lengths)
        # (model, number of scored tokens) -> shortest length with so many, and the losses of its samples
        self.shortest = {}

    def run(self) -> None:
        self.results.content["text"] = {"tokens": len(self.haystack), "within": self.places.within}
        for task in ("last", "foreign"):
            if task in self.arguments.tasks:
                print(f"{task}\n{'tokens':>8}", *(name.replace("_", " ").ljust(30) for name in COLUMNS))
                for length in self.arguments.lengths:
                    self.evaluate(task, length)
        if "positions" in self.arguments.tasks:
            self.evaluate("positions", max(self.arguments.lengths))
        draw_losses([row for row in self.results.rows if "error" not in row], self.arguments.output / "ppl.png")
        print(f"Results are in {self.arguments.output}.")

    def row(self, task: str, length: int) -> tuple[dict, list[dict]]:
        return self.positions(length) if task == "positions" else self.last(task, length)

    def windows(self, pairs: list[tuple[int, int]], length: int, foreign: int = 0) -> tuple[list[int], torch.Tensor]:
        """
        Where the windows of some samples (seed, index) end, and their tokens [B, length]. Of these, the first
        `foreign` are from the opposite side of the ring.
        """
        ends = [self.places.draw(sample_rng(seed, "ppl", 0, index)) for seed, index in pairs]
        tokens = np.stack([ring_window(self.haystack, end - length, length) for end in ends])
        for row, end in zip(tokens, ends):
            row[:foreign] = ring_window(self.haystack, end - length + len(self.haystack) // 2, foreign)
        return ends, torch.from_numpy(tokens).to(self.model.device)

    def last(self, task: str, length: int) -> tuple[dict, list[dict]]:
        """
        The row of one length: loss, perplexity and bits per byte of the last tokens, and how the loss differs from
        that of the shortest length with the same tokens, sample by sample. `task`: "last" or "foreign".
        """
        foreign = length - min(self.arguments.lengths) if task == "foreign" else 0
        # The first token of a window has no context, and is not predicted.
        count, records = min(self.arguments.last, length - 1), []
        for pairs in self.batches(task, length, self.arguments.batch_size):
            ends, tokens = self.windows(pairs, length, foreign)
            losses = self.reader.losses(tokens, count).cpu().numpy()
            for pair, end, row, loss in zip(pairs, ends, tokens.cpu().numpy(), losses):
                mean = float(loss.mean(dtype=np.float64))
                records.append({"seed": pair[0], "index": pair[1], "end": end, "loss": mean})
                records[-1]["bytes"] = text_bytes(self.tokenizer, row[-count:])
        losses = [record["loss"] for record in records]
        bits = [count * loss / math.log(2) for loss in losses]
        base, base_losses = self.shortest.setdefault((self.model, count), (length, losses))
        loss, change = interval(losses), interval([a - b for a, b in zip(losses, base_losses)])
        row = {
            "scored_tokens": count,
            "samples": len(records),
            "distinct": len(self.haystack) // length,
            "loss": loss,
            "change": {"from": base} | change,
            "perplexity": {key: None if value is None else math.exp(value) for key, value in loss.items()},
            "bits_per_byte": ratio(bits, [record["bytes"] for record in records]),
        }
        print(short(length).rjust(8), *(_text(row[name]).ljust(30) for name in COLUMNS), flush=True)
        return row, records

    def positions(self, length: int) -> tuple[dict, list[dict]]:
        """The row of the longest length: the loss by position."""
        edges, records = bucket_edges(length), []
        for pairs in self.batches("positions", length, self.arguments.batch_size):
            ends, tokens = self.windows(pairs, length)
            # The first is read on its own, into a cache that `--offload` acts on.
            losses = self.reader.losses(tokens, length - 2).cpu().numpy().astype(np.float64)
            for pair, end, loss in zip(pairs, ends, losses):
                means = [float(loss[a - 2 : b - 2].mean()) for a, b in zip(edges, edges[1:])]
                records.append({"seed": pair[0], "index": pair[1], "end": end, "loss": means})
        buckets = [interval(list(values)) for values in zip(*(record["loss"] for record in records))]
        for a, b, loss in zip(edges, edges[1:], buckets):
            print(f"{a:>8,} - {b - 1:>9,}  {_text(loss)}")
        return {"edges": edges, "samples": len(records), "losses": buckets}, records


def _text(value: dict[str, float | None]) -> str:
    spread = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{spread}"

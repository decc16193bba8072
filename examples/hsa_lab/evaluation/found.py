"""
How sure must a chat model be of an answer before it is believed? And how often is "not found" right?

    python examples/evaluate.py found --model hub_card/hsa-smollm2-135m --haystack books/validation.jsonl.gz \\
        --output out/found

Asks what `examples/ask.py` asks, in the same way: facts, events and made-up documents hidden in books, and what the
text does not tell. An answer is believed unless it says that the text does not tell, or its least likely token is less
likely than a threshold. That is right for right answers, and wrong for wrong ones and where the text has none. The
threshold that is right most often on the questions of the first seed is chosen (of several the middle one), and
measured on those of the others. Results: found.json.
"""

from argparse import ArgumentParser, Namespace
from itertools import islice
from pathlib import Path

import torch

from ..asking import Asker
from ..chat_rows.evaluation import Sample, make_texts
from ..chat_rows.haystack import Haystack
from ..chat_rows.splits import SPLITS
from ..commands import add_model_flags, at_least, text_file
from ..results import Results
from ..tokens import encode, read_haystack


KINDS = ("facts", "events", "documents", "missing")
THRESHOLDS = [i / 50 for i in range(46)]
HAYSTACK = 200_000  # tokens that are read of it


class Found:
    """A chat model that says whether it found something."""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        add_model_flags(parser)
        group = parser.add_argument_group("evaluation")
        group.add_argument("--output", type=Path, required=True, help="folder for the results")
        group.add_argument(
            "--haystack", nargs="+", type=text_file, required=True, metavar="FILE", help="books of the same split"
        )
        group.add_argument("--length", type=at_least(1), default=1536, help="tokens of a text with its question")
        group.add_argument("--texts", type=at_least(1), default=5, help="of each kind and seed")
        group.add_argument("--questions_of_text", type=at_least(1), default=4, help="about one text")
        group.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1], help="of the texts")
        group.add_argument("--split", choices=SPLITS[1:], default="validation", help="of what is asked about")

    @classmethod
    def check(cls, arguments: Namespace) -> None:
        """Nothing that the flags do not say themselves."""

    def __init__(self, arguments: Namespace, model, tokenizer):
        self.arguments, self.tokenizer, self.asker = arguments, tokenizer, Asker(model, tokenizer)
        if self.asker.chat is None:
            raise ValueError("`--model`: its tokenizer has no chat template, so it cannot say that it found nothing")
        self.haystack = Haystack(read_haystack(arguments.haystack, tokenizer, HAYSTACK), tokenizer)
        self.results = Results("found", arguments, model)

    def run(self) -> None:
        threshold = None
        for seed in self.arguments.seeds:
            records = [record for kind in KINDS for record in self.records(kind, seed)]
            threshold = choose(records) if threshold is None else threshold
            self.results.content["threshold"] = threshold
            row = {"samples": len(records), "threshold": threshold, **decisions(records, threshold)}
            row |= {"said": decisions(records, 0.0)}
            self.results.add(f"seed {seed}", self.arguments.length, row, records)
            print(f"seed {seed}, threshold {threshold}: {_shown(row)}")
            print(f"seed {seed}, what the model says alone: {_shown(row['said'])}")
        print(f"Written to {self.results.file}.")

    def records(self, kind: str, seed: int) -> list[dict]:
        """The answers to the questions of a kind."""
        options = self.arguments
        texts = make_texts(
            kind, self.tokenizer, self.haystack, options.length, options.questions_of_text, options.split, seed
        )
        return [self.record(*asked) for samples in islice(texts, options.texts) for asked in self.read(samples)]

    def read(self, samples: list[Sample]):
        """Questions about one text, each with the text and the cache of it."""
        after = len(encode(self.tokenizer, f"\n\n{samples[0].question}")) + len(self.asker.chat.reply)
        document = torch.tensor(samples[0].tokens[None, :-after], device=self.asker.model.device)
        cache = self.asker.reader.read(document)
        return [(sample, document, cache) for sample in samples]

    def record(self, sample: Sample, document: torch.Tensor, cache) -> dict:
        reply, size = self.asker.ask(document, cache, sample.question), self.asker.model.config.chunk_size
        weights = reply.recorder.weights()
        evidence = {c for start, end in sample.evidence for c in range(start // size, (end - 1) // size + 1)}
        return {
            "kind": sample.kind,
            "question": sample.question,
            "expected": sample.expected,
            "answer": reply.text,
            "right": float(sample.metric != "refusal" and sample.score(reply.text) == 1),
            "said": reply.says_not_found,
            "confidence": reply.confidence,
            "weight": max(weights.values(), default=0.0),
            "source": next(iter(weights), None) in evidence if evidence else None,
        }


def decisions(records: list[dict], threshold: float) -> dict[str, float | None]:
    """
    What comes of a threshold: the share of all decisions that are right, of the questions with and without an answer
    that are "not found", of the answers believed that are right, and of those whose heaviest passage is the source.
    """
    believed = [not record["said"] and record["confidence"] >= threshold for record in records]
    answered = [record["kind"] != "missing" for record in records]
    right = [bool(record["right"]) for record in records]
    return {
        "decided": _share(a == b for a, b in zip(believed, right)),
        "not_found_answered": _share(not b for b, a in zip(believed, answered) if a),
        "not_found_missing": _share(not b for b, a in zip(believed, answered) if not a),
        "right_believed": _share(r for r, b in zip(right, believed) if b),
        "source_believed": _share(
            record["source"] for record, b in zip(records, believed) if b and record["source"] is not None
        ),
    }


def choose(records: list[dict]) -> float:
    """The middle one of the thresholds at which most decisions are right."""
    decided = [decisions(records, threshold)["decided"] for threshold in THRESHOLDS]
    best = [threshold for threshold, share in zip(THRESHOLDS, decided) if share == max(decided)]
    return best[len(best) // 2]


def _share(of) -> float | None:
    found = list(of)
    return sum(found) / len(found) if found else None


def _shown(row: dict) -> str:
    names = {
        "decided": "of the decisions are right",
        "not_found_answered": "of what the text tells and",
        "not_found_missing": "of what it does not tell are not found",
        "right_believed": "of the answers that are believed are right",
        "source_believed": "of their passages are the source",
    }
    return ", ".join(f"{row[name]:.1%} {said}" for name, said in names.items() if row[name] is not None)

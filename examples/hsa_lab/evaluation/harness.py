"""
What the evaluations share: flags, samples that depend on nothing but their seed, and one row of results a task and
length, with what the model retrieved where it is an HSA model.

Questions about texts of less than `LONG` tokens have a text each, and are read in batches. A longer text is read once,
and up to `--questions_of_text` questions are asked about it; `texts` of a row says how many texts there were. (Answers
about one text are not quite independent: intervals, which count questions, are a little too narrow there.)
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

from ..chat_rows.chat import ChatFormat
from ..chat_rows.splits import SPLITS
from ..commands import add_model_flags, at_least, refuse_results, text_file
from ..models import load
from ..plots import draw_depths
from ..reading import make_reader, retrieval_recall
from ..results import Results, short, summarise
from ..tokens import read_haystack


LONG = 1 << 16  # tokens from which on a text is read once for several questions
BATCH_TOKENS = 1 << 18  # of prompts read at once, on a GPU


@dataclass
class Question:
    """
    A prompt, what its answer is compared with, and where the answer is.

    `tokens`: int64 [L]. `needles`: the tokens (start, end) of what the answer follows from, none if that says nothing.
    `score`: of the text that the model writes in up to `most` tokens, from 0 to 1. `record`: what else is recorded.
    """

    tokens: np.ndarray
    most: int
    score: Callable[[str], float]
    needles: list[tuple[int, int]] = field(default_factory=list)
    record: dict = field(default_factory=dict)


def labelled(text: str, model: str) -> str:
    """What rows of a model are called: "facts", and "facts, base"."""
    return f"{text}, {model}" if model else text


class Evaluation:
    """
    One model on the tasks of one kind. A subclass says `question`, or `records` where there is more to a row than
    greedy answers to questions.
    """

    name: ClassVar[str]  # of the sub-command, and of the file of results
    tasks: ClassVar[tuple[str, ...]]  # that `--tasks` may name
    lengths: ClassVar[tuple[int, ...]] = (4096,)  # default of `--lengths`
    needs_haystack: ClassVar[bool] = True
    asks: ClassVar[bool] = True  # questions, that is, and has the flags that say how many at once
    forms: ClassVar[tuple[str, ...]] = ("text",)  # of prompts: "text", that is continued, "chat", or either
    haystack_tokens: ClassVar[int | None] = None  # of which no more are read than so many, or twice the longest prompt

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the flags that all evaluations share; a subclass goes on with its own."""
        add_model_flags(parser)
        group = parser.add_argument_group("evaluation")
        group.add_argument("--output", type=Path, required=True, help="folder for the results and plots")
        group.add_argument("--tasks", nargs="+", choices=cls.tasks, metavar="TASK", help=f"of {', '.join(cls.tasks)}")
        group.add_argument(
            "--lengths", type=at_least(1), nargs="+", default=list(cls.lengths), help="tokens, question included"
        )
        group.add_argument("--samples", type=at_least(1), default=100, help="per task, length and seed")
        group.add_argument("--seeds", type=at_least(0), nargs="+", default=[0], help="of the samples")
        group.add_argument(
            "--haystack", nargs="+", type=text_file, default=[], required=cls.needs_haystack, metavar="FILE",
            help="text to hide things in: .txt, .jsonl or .jsonl.gz with 'text', or token ids as .npy",
        )  # fmt: skip
        group.add_argument("--base", help="another model, folder or Hub id, to measure beside the first")
        group.add_argument("--base_length", type=at_least(1), default=8192, help="tokens of its longest texts")
        if cls.asks:
            group.add_argument(
                "--most_read", type=at_least(1), metavar="TOKENS",
                help="of the texts of a task, length and seed: of longer texts fewer samples, at least one",
            )  # fmt: skip
            group.add_argument(
                "--questions_of_text", type=at_least(1), default=10, help=f"about one text, from {LONG:,} tokens on"
            )
            group.add_argument(
                "--batch_tokens", type=at_least(0),
                help=f"of prompts read at once; 0: one prompt at a time (default: {BATCH_TOKENS} on a GPU, else 0)",
            )  # fmt: skip
        if "chat" in cls.forms:
            group.add_argument("--split", choices=SPLITS[1:], default="test", help="of what chats are asked about")
        if cls.forms == ("text", "chat"):
            group.add_argument(
                "--chat", choices=("auto", "yes", "no"), default="auto",
                help="whether prompts are messages of a chat; auto: where the tokenizer has a chat template",
            )  # fmt: skip
        group.add_argument(
            "--segment",
            type=at_least(0),
            help="tokens of a prompt read at a time; 0: all at once; else by the model",
        )
        group.add_argument("--offload", action="store_true", help="keep the chunk memory of an HSA model on the CPU")

    @classmethod
    def check(cls, arguments: argparse.Namespace) -> None:
        """Raises: ValueError for arguments that make no sense, before the model is loaded. Fills in `--tasks`."""
        refuse_results("--output", arguments.output, f"{cls.name}.json")
        arguments.tasks = arguments.tasks or list(cls.tasks)

    def __init__(self, arguments: argparse.Namespace, model, tokenizer):
        self.arguments, self.model, self.tokenizer = arguments, model, tokenizer
        self.chat = self.find_chat()
        if self.asks and arguments.batch_tokens is None:
            arguments.batch_tokens = BATCH_TOKENS if model.device.type == "cuda" else 0
        self.reader = make_reader(model, arguments.segment, arguments.offload)
        self.readers = {"": self.reader}
        if arguments.base:
            base, _ = load(argparse.Namespace(**{**vars(arguments), "model": arguments.base, "config": []}))
            self.readers["base"] = make_reader(base, arguments.segment)
        most = self.haystack_tokens and max(2 * max(arguments.lengths), self.haystack_tokens)
        self.haystack = read_haystack(arguments.haystack, tokenizer, most) if arguments.haystack else None
        self.prepare()
        self.results = Results(self.name, arguments, model)
        self.results.content["form"] = "text" if self.chat is None else "chat"

    def find_chat(self) -> ChatFormat | None:
        """The chat format of the tokenizer, if prompts are to be in it. Raises: ValueError if it has none."""
        wanted = getattr(self.arguments, "chat", "yes" if self.forms == ("chat",) else "no")
        if wanted == "auto":
            wanted = "yes" if self.tokenizer.chat_template else "no"
        return ChatFormat(self.tokenizer) if wanted == "yes" else None

    def prepare(self) -> None:
        """What is made once. Raises: ValueError where arguments do not go with the model or the text."""

    def question(self, task: str, length: int, seed: int, index: int) -> Question:
        """One sample. Raises: ValueError where the length has no room for it."""
        raise NotImplementedError

    def questions(self, task: str, length: int, seed: int, index: int, most: int) -> list[Question]:
        """Up to `most` questions about one text, which begin alike. Raises: ValueError as `question`."""
        return [self.question(task, length, seed, index)]

    def cells(self) -> list[tuple[str, int]]:
        return [(task, length) for length in self.arguments.lengths for task in self.arguments.tasks]

    def run(self) -> None:
        """Every task at every length, one row each, a table of them, and plots."""
        cells = self.cells()
        for cell in cells:  # what does not fit should not show after hours
            self.try_out(*cell)
        for cell in cells:
            self.evaluate(*cell)
        print(self.results.table())
        self.draw()
        print(f"Results are in {self.arguments.output}.")

    def try_out(self, task: str, length: int) -> None:
        self.questions(task, length, self.arguments.seeds[0], 0, 1)

    def evaluate(self, task: str, length: int) -> None:
        """Adds a row, and another one of `--base` where the text is short enough for it."""
        for name, reader in self.readers.items():
            if not name or length <= self.arguments.base_length:
                self.reader, self.model = reader, reader.model
                self.evaluate_one(task, length, labelled(task, name))

    def evaluate_one(self, task: str, length: int, label: str) -> None:
        """Adds a row. Where memory does not suffice it says so, and the other rows are measured."""
        on_gpu, start = self.model.device.type == "cuda", time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            row, records = self.row(task, length)
        except torch.OutOfMemoryError:
            self.results.add(label, length, {"error": "out of memory"})
        else:
            row |= {"seconds": round(time.perf_counter() - start, 3)}
            if on_gpu:
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            self.results.add(label, length, row, records)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    def row(self, task: str, length: int) -> tuple[dict, list[dict]]:
        """What a row says, and its records."""
        records = self.records(task, length)
        row = summarise(records)
        texts = len({(record["seed"], record["index"]) for record in records})
        return row | ({"texts": texts} if texts < len(records) else {}), records

    def records(self, task: str, length: int) -> list[dict]:
        """One record a question: the greedy answer and its score."""
        records, ending = [], {} if self.chat is None else {"eos_token_id": int(self.chat.end[0])}
        size = max(1, self.arguments.batch_tokens // max(length, 1)) if length < LONG else 1
        most = self.arguments.questions_of_text if length >= LONG else 1
        for pairs in self.batches(task, length, size):
            texts = [self.questions(task, length, *pair, most) for pair in pairs]
            asked = [(pair, question) for pair, text in zip(pairs, texts) for question in text]
            prompts = [torch.from_numpy(question.tokens).to(self.model.device) for _, question in asked]
            generate = self.reader.generate_batch if len(texts) > 1 else self.reader.generate_on_text
            answers = generate(prompts, max(question.most for _, question in asked), **ending)
            for ((seed, index), question), (new, chunks) in zip(asked, answers):
                answer = self.tokenizer.decode(new[: question.most], skip_special_tokens=True)
                record = {"seed": seed, "index": index, "score": float(question.score(answer))}
                record |= self.recall(chunks, question.needles, slice(0, question.most))
                records.append(record | {"answer": answer.strip()[:400]} | question.record)
        return records

    def recall(
        self, chunks: torch.Tensor | None, needles: list[tuple[int, int]], tokens: slice | torch.Tensor
    ) -> dict:
        """The recall of the needles by the chosen tokens of `chunks`, where something was retrieved."""
        if chunks is None or not needles:
            return {}
        return {"recall": retrieval_recall(chunks[tokens], needles, self.model.config.chunk_size)}

    def batches(self, task: str, length: int, size: int = 1) -> Iterator[list[tuple[int, int]]]:
        """Lists of up to `size` pairs (seed, index) of one cell, under a progress bar."""
        samples = self.arguments.samples
        if self.asks and self.arguments.most_read is not None:
            samples = min(samples, max(1, self.arguments.most_read // max(length, 1)))
        pairs = [(seed, index) for seed in self.arguments.seeds for index in range(samples)]
        with tqdm(total=len(pairs), desc=f"{task} {short(length)}", unit="sample") as bar:
            for i in range(0, len(pairs), size):
                yield pairs[i : i + size]
                bar.update(len(pairs[i : i + size]))

    def draw(self) -> None:
        """A map of depth x length for every task with one needle."""
        for task in self.arguments.tasks:
            rows = [row for row in self.results.rows if row["task"] == task and "depth" in row.get("records", {})]
            if rows:
                draw_depths(rows, self.arguments.output / f"{self.name}_{task}.png")

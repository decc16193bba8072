"""
What the evaluations share: flags, samples that depend on nothing but their seed, and one row of results a task and
length, with what the model retrieved where it is an HSA model.
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

from ..commands import add_model_flags, at_least, text_file
from ..plots import draw_depths
from ..reading import make_reader, retrieval_recall
from ..results import Results, short, summarise
from ..tokens import read_haystack


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


class Evaluation:
    """
    One model on the tasks of one kind. A subclass says `question`, or `records` where there is more to a row than
    greedy answers to questions.
    """

    name: ClassVar[str]  # of the sub-command, and of the file of results
    tasks: ClassVar[tuple[str, ...]]  # that `--tasks` may name
    lengths: ClassVar[tuple[int, ...]] = (4096,)  # default of `--lengths`
    needs_haystack: ClassVar[bool] = True
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
        group.add_argument(
            "--segment",
            type=at_least(0),
            help="tokens of a prompt read at a time; 0: all at once; else by the model",
        )
        group.add_argument("--offload", action="store_true", help="keep the chunk memory of an HSA model on the CPU")

    @classmethod
    def check(cls, arguments: argparse.Namespace) -> None:
        """Raises: ValueError for arguments that make no sense, before the model is loaded. Fills in `--tasks`."""
        arguments.tasks = arguments.tasks or list(cls.tasks)

    def __init__(self, arguments: argparse.Namespace, model, tokenizer):
        self.arguments, self.model, self.tokenizer = arguments, model, tokenizer
        self.reader = make_reader(model, arguments.segment, arguments.offload)
        most = self.haystack_tokens and max(2 * max(arguments.lengths), self.haystack_tokens)
        self.haystack = read_haystack(arguments.haystack, tokenizer, most) if arguments.haystack else None
        self.prepare()
        self.results = Results(self.name, arguments, model)

    def prepare(self) -> None:
        """What is made once. Raises: ValueError where arguments do not go with the model or the text."""

    def question(self, task: str, length: int, seed: int, index: int) -> Question:
        """One sample. Raises: ValueError where the length has no room for it."""
        raise NotImplementedError

    def run(self) -> None:
        """Every task at every length, one row each, a table of them, and plots."""
        cells = [(task, length) for length in self.arguments.lengths for task in self.arguments.tasks]
        for cell in cells:  # what does not fit should not show after hours
            self.try_out(*cell)
        for cell in cells:
            self.evaluate(*cell)
        print(self.results.table())
        self.draw()
        print(f"Results are in {self.arguments.output}.")

    def try_out(self, task: str, length: int) -> None:
        self.question(task, length, self.arguments.seeds[0], 0)

    def evaluate(self, task: str, length: int) -> None:
        """Adds a row. Where memory does not suffice it says so, and the other rows are measured."""
        on_gpu, start = self.model.device.type == "cuda", time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            row, records = self.row(task, length)
        except torch.OutOfMemoryError:
            self.results.add(task, length, {"error": "out of memory"})
        else:
            row |= {"seconds": round(time.perf_counter() - start, 3)}
            if on_gpu:
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            self.results.add(task, length, row, records)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    def row(self, task: str, length: int) -> tuple[dict, list[dict]]:
        """What a row says, and its records."""
        records = self.records(task, length)
        return summarise(records), records

    def records(self, task: str, length: int) -> list[dict]:
        """One record a sample: the greedy answer and its score."""
        records = []
        for ((seed, index),) in self.batches(task, length):
            question = self.question(task, length, seed, index)
            ids = torch.from_numpy(question.tokens)[None].to(self.model.device)
            new, recorder = self.reader.generate(ids, question.most)
            answer = self.tokenizer.decode(new, skip_special_tokens=True)
            record = {"seed": seed, "index": index, "score": float(question.score(answer))}
            record |= self.recall(recorder.chunks, 0, question.needles)
            records.append(record | {"answer": answer.strip()[:200]} | question.record)
        return records

    def recall(
        self, chunks: torch.Tensor | None, row: int, needles: list[tuple[int, int]], tokens=slice(None)
    ) -> dict:
        """The recall of the needles by the chosen tokens of a row of `chunks`, where something was retrieved."""
        if chunks is None or not needles:
            return {}
        return {"recall": retrieval_recall(chunks[row, tokens], needles, self.model.config.chunk_size)}

    def batches(self, task: str, length: int, size: int = 1) -> Iterator[list[tuple[int, int]]]:
        """Lists of up to `size` pairs (seed, index) of one cell, under a progress bar."""
        pairs = [(seed, index) for seed in self.arguments.seeds for index in range(self.arguments.samples)]
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

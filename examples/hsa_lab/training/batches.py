"""Batches of pretraining: rows of text and of retrieval tasks, each made from nothing but the seed and its number."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..tasks.retrieval import FACT_KINDS, KINDS, RetrievalTasks
from ..tokens import excerpt


class Batches(Dataset):
    """
    Batch i of a stage, of B = `rows`: input_ids int64 [B, L]; task int64 [B], which of the mixture a row is; answers
    bool [B, L], the tokens of answers; source int64 [B, L], the earlier position that such a token is copied from, -1
    for others.
    """

    def __init__(self, corpus: Path, tasks: RetrievalTasks, stage: dict, seed: tuple[int, ...], rows: int):
        self.file, self.tasks, self.stage, self.seed, self.rows = corpus / "train.npy", tasks, stage, seed, rows
        self.tokens = None
        dense = [task.get("options", {}) for task in stage["mixture"] if task["task"] == "dense"]
        if any(FACT_KINDS.keys() & options.get("kinds", KINDS) for options in dense):
            tasks.make_facts()  # here, once, and not in every worker

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        if self.tokens is None:  # every worker maps the file for itself
            self.tokens = np.load(self.file, mmap_mode="r")
        rng = np.random.default_rng((*self.seed, i))
        mixture = self.stage["mixture"]
        shares = np.array([task["share"] for task in mixture], dtype=float)
        chosen = rng.choice(len(mixture), size=self.rows, p=shares / shares.sum())
        made = [self._row(mixture[task], rng) for task in chosen]
        ids, answers, source = (torch.from_numpy(np.stack(x)) for x in zip(*made))
        return ids, torch.from_numpy(chosen), answers, source

    def _row(self, task: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length, options = self.stage["length"], task.get("options", {})
        source = np.full(length, -1)
        if task["task"] == "text":
            return excerpt(self.tokens, length, rng, np.int64, **options), source >= 0, source
        sample = self.tasks.make(task["task"], rng, self.tokens, length, **options)
        for (start, end), answer in zip(sample.values.tolist(), sample.asked.tolist()):
            if answer >= 0:
                _mark_copy(sample.tokens, (start, end), sample.answers[answer].tolist(), source)
        return sample.tokens.astype(np.int64), sample.answer_mask, np.where(sample.answer_mask, source, -1)


def _mark_copy(tokens: np.ndarray, value: tuple[int, int], answer: tuple[int, int], source: np.ndarray) -> None:
    """Where the tokens of `value` stand in the answer, writes where each is copied from."""
    size = value[1] - value[0]
    for at in range(answer[0], answer[1] - size + 1):
        if (tokens[at : at + size] == tokens[value[0] : value[1]]).all() and (source[at : at + size] < 0).all():
            source[at : at + size] = np.arange(*value)
            return

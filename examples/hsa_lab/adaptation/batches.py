"""Batches of rows, with the tokens that each loss is computed for: made from nothing but the seed and their number."""

from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..chat_rows.mixture import PLAIN, Materials, rows
from ..chat_rows.rows import ANSWER, TEXT, VALUE, Row, evidence_chunks


TAUGHT = (*PLAIN, "chat")  # families whose rows the base teaches; the others are about what it would not see or know
# First words of the families of plans.
FAMILIES = ("document", "events", "facts", "program", "qa", "quotes", "ruler", "stories")
SPARE = 2  # plans more than rows, as some are left out


class Tokens(NamedTuple):
    """
    N tokens that losses are computed for, filled up with such as count nothing.

    place   int64 [N], in the flattened batch, of the token before, which predicts it
    target  int64 [N]
    weight  fp32 [N], of its cross-entropy in the loss of the batch
    taught  fp32 [N], of its divergence from the teacher
    label   int64 [N], what it is counted as: of an answer, its number; then text, chat, and what fills up
    """

    place: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    taught: torch.Tensor
    label: torch.Tensor


class Batch(NamedTuple):
    """
    ids       int64 [B, L], of which the first rows are those for the teacher
    asked     `Tokens` of rows with questions
    plain     `Tokens` of rows for the teacher
    families  int64 [T], the family (of `FAMILIES`) of every answer
    seekers   int64 [P], places that predict what was asked for
    evidence  int64 [P, C], the complete chunks that hold the evidence for it, filled up with -2
    """

    ids: torch.Tensor
    asked: Tokens
    plain: Tokens
    families: torch.Tensor
    seekers: torch.Tensor
    evidence: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        moved = (
            Tokens(*(x.to(device, non_blocking=True) for x in part)) if isinstance(part, Tokens)
            else part.to(device, non_blocking=True) for part in self
        )  # fmt: skip
        return Batch(*moved)


class Batches(Dataset):
    """
    Batch i of a stage, of `rows` rows.

    Args:
        chunk_size: of the model.
        logits_at_once: the numbers of tokens are multiples of it.
    """

    def __init__(
        self,
        materials: Materials,
        recipe: dict,
        stage: int,
        rows: int,
        seed: int,
        chunk_size: int,
        logits_at_once: int,
    ):
        self.materials, self.recipe, self.stage = materials, recipe, recipe["stages"][stage]
        self.seed, self.chunk_size, self.logits_at_once = f"{seed} {stage}", chunk_size, logits_at_once
        shares = self.stage["families"]
        plain = sum(share for family, share in shares.items() if family in TAUGHT) / sum(shares.values())
        self.taught = round(rows * plain)
        self.asked = rows - self.taught

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([number, *self.seed.encode()])
        made = [
            *self._rows(number, self.taught, {f: s for f, s in self.stage["families"].items() if f in TAUGHT}),
            *self._rows(number, self.asked, {f: s for f, s in self.stage["families"].items() if f not in TAUGHT}),
        ]
        return self.pack(made, rng)

    def _rows(self, number: int, count: int, families: dict[str, float]) -> list[Row]:
        if not count:
            return []
        recipe = {"families": families, "questions": self.stage["questions"]}
        seed = f"{self.seed} {number}"
        return list(islice(rows(self.materials, recipe, self.stage["length"], seed, count + SPARE), count))

    def pack(self, made: list[Row], rng: np.random.Generator) -> Batch:
        """The batch of rows of which the first `taught` are for the teacher."""
        losses, sampled = self.recipe["losses"], self.recipe["sampled"]
        ids = np.stack([row.ids for row in made]).astype(np.int64)
        roles = np.stack([row.roles for row in made])
        roles[:, 0] = 0  # which nothing predicts
        plain, asked = roles.copy(), roles.copy()
        plain[self.taught :], asked[: self.taught] = 0, 0
        drawn = rng.random(roles.shape)
        text = (asked == TEXT) & (drawn < sampled["text"])
        plain_text, chat = (plain == TEXT) & (drawn < sampled["distill"]), plain >= ANSWER
        answer, value = asked >= ANSWER, asked == VALUE

        turn, families = self._turns(made, roles.shape)
        count = len(families)
        counted = answer * np.where(value, losses["value_weight"], 1.0)
        of_text = losses["text"] / max(text.sum() + plain_text.sum(), 1)
        weight = counted * (losses["answers"] / max(counted.sum(), 1)) + text * of_text
        taught = plain_text * (losses["distill_text"] / max(plain_text.sum(), 1))
        taught = taught + chat * (losses["distill_chat"] / max(chat.sum(), 1))
        label = np.where(answer, turn, np.where(chat, count + 1, count))
        seekers, evidence = self._evidence(made, roles.shape[1])
        return Batch(
            torch.from_numpy(ids),
            self._tokens(answer | text, ids, weight, taught, label, count + 2),
            self._tokens(plain_text | chat, ids, plain_text * of_text, taught, label, count + 2),
            torch.tensor(families, dtype=torch.int64),
            seekers,
            evidence,
        )

    def _tokens(self, chosen: np.ndarray, ids, weight, taught, label, filler: int) -> Tokens:
        places = np.flatnonzero(chosen)
        missing = -len(places) % self.logits_at_once

        def take(values: np.ndarray, fill: int, dtype) -> torch.Tensor:
            return torch.from_numpy(np.pad(values.ravel()[places].astype(dtype), (0, missing), constant_values=fill))

        place = torch.from_numpy(np.pad(places.astype(np.int64) - 1, (0, missing)))
        return Tokens(
            place, take(ids, 0, np.int64), take(weight, 0, np.float32), take(taught, 0, np.float32),
            take(label, filler, np.int64),
        )  # fmt: skip

    def _turns(self, made: list[Row], shape: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
        """For every token of an answer its number [B, L], and the family of every answer."""
        turn, families = np.zeros(shape, np.int64), []
        for number, row in enumerate(made[self.taught :], self.taught):
            for family, _, start, end in row.turns:
                turn[number, start:end] = len(families)
                families.append(FAMILIES.index(family.split(" ")[0]))
        return turn, families

    def _evidence(self, made: list[Row], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        places, chunks = [], []
        for number, row in enumerate(made[self.taught :], self.taught):
            of_turns: dict[int, list[int]] = {}
            for of, chunk in evidence_chunks(np.array(row.evidence).reshape(-1, 3), self.chunk_size).tolist():
                of_turns.setdefault(of, []).append(chunk)
            for of, wanted in of_turns.items():
                _, _, start, end = row.turns[of]
                wanted = [chunk for chunk in wanted if (chunk + 1) * self.chunk_size < start]
                for token in range(start, end) if wanted else ():
                    if token == start or row.roles[token] == VALUE:
                        places.append(number * length + token - 1)
                        chunks.append(wanted)
        evidence = np.full((len(chunks), max(map(len, chunks), default=1)), -2, np.int64)
        for row_of, wanted in zip(evidence, chunks):
            row_of[: len(wanted)] = wanted
        return torch.tensor(places, dtype=torch.int64), torch.from_numpy(evidence)

"""
Rows of training tokens: a document with things hidden in it, and several questions about it as turns of a chat.

    builder = RowBuilder(tokenizer, {"books": Haystack("out/books.npy", tokenizer)})
    rows = builder.build(plans, 1024, random.Random(0))

A `Plan` is a row in words: what is hidden, in what, and what is asked. `RowBuilder` makes tokens of it, exactly as
many as asked for: the haystack takes what the rest leaves.
"""

import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .chat import ChatFormat
from .haystack import Haystack


# What a token is (`Row.roles`).
IGNORED = 0  # markup of the chat and questions
TEXT = 1  # of a haystack
HIDDEN = 2  # what was put into it
ANSWER = 3  # the rest of an answer, the token that ends it among it
VALUE = 4  # what was asked for

NEAR = 0.15  # share of the rows whose hidden things are in the last quarter of the text


@dataclass
class Turn:
    """
    A question and its answer in parts, (text, whether it was asked for). `evidence`: the keys of the pieces that it
    follows from. `kind` is for statistics.
    """

    question: str
    answer: list[tuple[str, bool]]
    evidence: list[Hashable]
    kind: str = ""


@dataclass
class Plan:
    """
    blocks      what is hidden; each is a list of pieces (text, keys) that stay together. A piece says by its first
                characters how it follows what is before it: " ", "\\n" or "\\n\\n"
    haystack    the name of one; in which the blocks are put
    turns       what is asked afterwards
    intro       the beginning of the first message
    hint        stands before the first question
    groups      a group for each block: they are mixed, but those of one group stay in their order (default: all stay)
    """

    family: str
    blocks: list[list[tuple[str, Sequence[Hashable]]]]
    turns: list[Turn]
    haystack: str = "books"
    intro: str = ""
    hint: str = ""
    groups: list[int] | None = None


@dataclass
class Row:
    """
    `ids`: uint16 [L]. `roles`: uint8 [L]. `turns`: (family, kind of question, first token of the answer, its end).
    `evidence`: (turn, first token, end) of what its answer follows from.
    """

    ids: np.ndarray
    roles: np.ndarray
    turns: list[tuple[str, str, int, int]] = field(default_factory=list)
    evidence: list[tuple[int, int, int]] = field(default_factory=list)


class RowBuilder:
    """
    Makes rows of plans.

    Args:
        tokenizer: with a chat template and at most 65,536 tokens.
        haystacks: by name.
    """

    def __init__(self, tokenizer, haystacks: dict[str, Haystack]):
        self.tokenizer, self.haystacks, self.chat = tokenizer, haystacks, ChatFormat(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.blank = self.encode(["\n\n"])["\n\n"]

    def encode(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """The token ids of every text, all in one batch."""
        texts = list(dict.fromkeys(texts))
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return {text: np.array(encoding.ids, dtype=np.uint16) for text, encoding in zip(texts, encodings)}

    # -- rows of plans --

    def build(self, plans: Sequence[Plan], length: int | None, rng: random.Random) -> list[Row]:
        """
        Rows of `length` tokens; None: without any haystack. A plan that does not fit loses questions; if that is not
        enough, it is left out.
        """
        texts, answers = [], []
        for plan in plans:
            texts += [text for block in plan.blocks for text, _ in block]
            texts += [first_question(plan, i, turn) for i, turn in enumerate(plan.turns)]
            texts += [plan.intro + "\n\n"] if plan.intro else []
            answers += ["".join(text for text, _ in turn.answer) for turn in plan.turns]
        ids = self.encode(texts)
        spans = self.backend.encode_batch(answers, add_special_tokens=False)
        rows, done = [], 0
        for plan in plans:
            of_plan = spans[done : done + len(plan.turns)]
            done += len(plan.turns)
            row = self._assemble(plan, length, rng, ids, of_plan)
            rows += [row] if row is not None else []
        return rows

    def _assemble(self, plan: Plan, length: int | None, rng, ids: dict[str, np.ndarray], answers: list) -> Row | None:
        turns = list(zip(plan.turns, answers))
        turns = [(turn, ids[first_question(plan, i, turn)], answer) for i, (turn, answer) in enumerate(turns)]
        blocks = [[(ids[text], keys) for text, keys in block] for block in plan.blocks]
        # A document is followed by a blank line before the haystack goes on.
        blank = [bool(block) and block[0][0].startswith("\n") for block in plan.blocks]
        intro = ids[plan.intro + "\n\n"] if plan.intro else self.blank[:0]
        needed = len(self.chat.start) + len(intro) + sum(len(t) for block in blocks for t, _ in block)
        needed += sum(blank) * len(self.blank) + len(self.chat.finish) - len(self.chat.next)
        between = len(self.chat.reply) + len(self.chat.end) + len(self.chat.next)
        sizes = [len(question) + len(answer.ids) + between for _, question, answer in turns]
        length = length or needed + sum(sizes)
        while len(turns) > 1 and needed + sum(sizes) > length:
            turns.pop()
            sizes.pop()
        room = length - needed - sum(sizes)
        if room < 0 or not turns:
            return None

        writer = _Writer(length)
        writer.add(self.chat.start, IGNORED)
        writer.add(intro, IGNORED)
        self._document(writer, plan, blocks, blank, room, rng)
        for i, (turn, question, answer) in enumerate(turns):
            writer.add(question, IGNORED)
            writer.add(self.chat.reply, IGNORED)
            start = writer.size
            writer.add(np.array(answer.ids, dtype=np.uint16), _answer_roles(turn.answer, answer.offsets))
            writer.add(self.chat.end, ANSWER)
            writer.row.turns.append((plan.family, turn.kind, start, writer.size))
            for key in turn.evidence:
                writer.row.evidence += [(i, first, end) for first, end in writer.places.get(key, [])]
            writer.add(self.chat.next if i < len(turns) - 1 else self.chat.finish, IGNORED)
        return writer.row

    def _document(self, writer: "_Writer", plan: Plan, blocks: list, blank: list[bool], room: int, rng) -> None:
        """The haystack with the blocks in it."""
        body, cuts = self.haystacks[plan.haystack].excerpt(room, rng) if room else (self.blank[:0], np.zeros(0, int))
        if not len(cuts):
            cuts = np.array([0])
        if rng.random() < NEAR and cuts[-1] > 0:
            cuts = cuts[cuts >= min(room * 3 // 4, cuts[-1])]
        places = sorted(int(cuts[rng.randrange(len(cuts))]) for _ in blocks)
        order = interleave(plan.groups, rng) if plan.groups else range(len(blocks))
        at = 0
        for place, i in zip(places, order):
            writer.add(body[at:place], TEXT)
            at = place
            for tokens, keys in blocks[i]:
                for key in keys:
                    writer.places.setdefault(key, []).append((writer.size, writer.size + len(tokens)))
                writer.add(tokens, HIDDEN)
            if blank[i]:
                writer.add(self.blank, HIDDEN)
        writer.add(body[at:], TEXT)

    # -- rows without questions --

    def text_row(self, haystack: str, length: int, rng: random.Random) -> Row:
        tokens, _ = self.haystacks[haystack].excerpt(length, rng)
        return Row(tokens, np.full(length, TEXT, np.uint8))

    def chat_row(self, conversations: Sequence[list[tuple[str, str]]], length: int, rng: random.Random) -> Row:
        """Conversations, [(question, answer), ...] each, drawn until the row is full. The last one is cut off."""
        writer = _Writer(length)
        while writer.size < length:
            turns = rng.choice(conversations)
            ids = self.encode({text for turn in turns for text in turn})
            for i, (question, answer) in enumerate(turns):
                writer.add(self.chat.next if i else self.chat.start, IGNORED)
                writer.add(ids[question], IGNORED)
                writer.add(self.chat.reply, IGNORED)
                start = writer.size
                writer.add(np.concatenate([ids[answer], self.chat.end]), ANSWER)
                if start < length:
                    writer.row.turns.append(("chat", "chat", start, min(writer.size, length)))
            writer.add(self.chat.finish, IGNORED)
        return writer.row


class _Writer:
    """A row that is being filled."""

    def __init__(self, length: int):
        self.row = Row(np.zeros(length, np.uint16), np.zeros(length, np.uint8))
        self.size = 0
        self.places: dict[Hashable, list[tuple[int, int]]] = {}

    def add(self, tokens: np.ndarray, role: int | np.ndarray) -> None:
        end = self.size + len(tokens)
        room = max(len(self.row.ids) - self.size, 0)
        self.row.ids[self.size : end] = tokens[:room]
        self.row.roles[self.size : end] = role if isinstance(role, int) else role[:room]
        self.size = end


def first_question(plan: Plan, i: int, turn: Turn) -> str:
    """The first question comes after the document, in the same message."""
    if i:
        return turn.question
    return "\n\n" + (plan.hint + " " if plan.hint else "") + turn.question


def _answer_roles(answer: list[tuple[str, bool]], offsets: list[tuple[int, int]]) -> np.ndarray:
    """The role of every token [N] of an answer: VALUE where it has a character of what was asked for."""
    roles, wanted, size = np.full(len(offsets), ANSWER, np.uint8), [], 0
    for text, asked in answer:
        if asked:
            wanted.append((size, size + len(text)))
        size += len(text)
    for i, (start, end) in enumerate(offsets):
        if any(start < last and first < end for first, last in wanted):
            roles[i] = VALUE
    return roles


def interleave(groups: list[int], rng: random.Random) -> list[int]:
    """The numbers of the blocks, in random order but for those of one group, which stay in theirs."""
    mixed = rng.sample(groups, len(groups))
    waiting = {group: [i for i, g in enumerate(groups) if g == group][::-1] for group in set(groups)}
    return [waiting[group].pop() for group in mixed]


# -- shards --


def save_rows(rows: Sequence[Row], prefix: str | Path) -> None:
    """
    Writes rows of one length: PREFIX.ids.npy uint16 [R, L], PREFIX.roles.npy uint8 [R, L], PREFIX.turns.npy int32
    [T, 3] (row, first token of the answer, its end) and PREFIX.evidence.npy int32 [E, 3] (turn, an index into those;
    first token, end), and PREFIX.kinds.txt with family and kind of question of every turn.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    turns, evidence, kinds = [], [], []
    for number, row in enumerate(rows):
        evidence += [(len(turns) + turn, start, end) for turn, start, end in row.evidence]
        turns += [(number, start, end) for _, _, start, end in row.turns]
        kinds += [f"{family} {kind}" for family, kind, _, _ in row.turns]
    np.save(f"{prefix}.ids.npy", np.stack([row.ids for row in rows]))
    np.save(f"{prefix}.roles.npy", np.stack([row.roles for row in rows]))
    np.save(f"{prefix}.turns.npy", np.array(turns, np.int32).reshape(-1, 3))
    np.save(f"{prefix}.evidence.npy", np.array(evidence, np.int32).reshape(-1, 3))
    Path(f"{prefix}.kinds.txt").write_text("".join(f"{kind}\n" for kind in kinds), encoding="utf-8")


def evidence_chunks(evidence: np.ndarray, chunk_size: int) -> np.ndarray:
    """
    The chunks that hold evidence: int32 [N, 2] of (turn, chunk) for evidence int32 [E, 3] of (turn, first token, end).
    """
    pairs = {
        (int(t), c) for t, start, end in evidence for c in range(start // chunk_size, (end - 1) // chunk_size + 1)
    }
    return np.array(sorted(pairs), np.int32).reshape(-1, 2)

"""
Questions to evaluate a model with, about things that are not trained on, and what a right answer is.

    for sample in make_questions("facts", tokenizer, haystack, length_tokens=4096, count=100):
        answer = ...                       # generated for sample.messages, or for sample.tokens
        score = sample.score(answer)       # 0 to 1

`make_texts` makes several questions about each text instead. `KINDS` says what there is: facts in kinds and wordings
of the split, or in trained kinds, or in trained wordings; events; questions of passages, scored by F1; and questions
that the text does not answer.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from .documents import DOCUMENTS, make_document
from .events import Events
from .facts import World
from .haystack import Haystack
from .qa import Passage, support
from .rows import Plan, RowBuilder, Turn, first_question
from .splits import check_split


# Kinds of questions: what split the kinds of fact and the wordings are of, "own" or "train", for those about facts.
KINDS = {
    "facts": ("own", "own"),
    "facts, trained kinds": ("train", "own"),
    "facts, trained wordings": ("own", "train"),
    "facts, both trained": ("train", "train"),
    "documents": ("own", "own"),
    "events": ("own", "own"),
    "missing": ("own", "own"),
    "qa": None,
}
HIDDEN_FACTS = 8  # facts in a text, of which one is asked for
REFUSAL = re.compile(
    r"(?:\b(?:not|no|never|nothing|nowhere|cannot|unable|without)|n't)\b.{0,60}"
    r"\b(say|says|said|mention\w*|state\w*|give\w*|find|found|text|document|provid\w*|specif\w*|contain\w*|answer\w*|"
    r"information|clear|known?|listed|included|available)\b|\bunknown\b|\bgives no\b|\bno information\b",
    re.I | re.S,
)


@dataclass
class Sample:
    """
    One question about one text.

    messages    of a chat: the text and, at its end, the question
    tokens      the same in the chat template, with the beginning of the answer [L]
    expected    strings that a right answer contains (facts), or right answers (qa); none if the text has no answer
    metric      "contains", "f1" or "refusal"
    kind        of `KINDS`; for passages with their source, like "qa quoref"
    evidence    (first token, end) of what the answer follows from
    """

    messages: list[dict[str, str]]
    tokens: np.ndarray
    question: str
    expected: list[str]
    metric: str
    kind: str
    evidence: list[tuple[int, int]] = field(default_factory=list)

    def score(self, answer: str) -> float:
        """From 0 to 1; see `contains`, `f1` and `is_refusal`."""
        if self.metric == "refusal":
            return float(is_refusal(answer))
        if self.metric == "f1":
            return max(f1(answer, expected) for expected in self.expected)
        return sum(contains(answer, expected) for expected in self.expected) / len(self.expected)


def normalise(text: str) -> str:
    """As for SQuAD: lower case, without punctuation, articles and spaces that are not needed."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, expected: str) -> float:
    """The harmonic mean of precision and recall of the words, as for SQuAD."""
    given, wanted = normalise(answer).split(), normalise(expected).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    if not given or not wanted:
        return float(given == wanted)
    return 2 * common / (len(given) + len(wanted))


def contains(answer: str, expected: str) -> bool:
    """
    Whether `expected` is in the answer, as whole words, in whatever case. Marks at its ends, commas of thousands and a
    unit after a number are not needed.
    """
    answer, expected = (re.sub(r"(?<=\d),(?=\d{3})", "", text.lower()) for text in (answer, expected))
    forms = {expected, expected.strip(string.punctuation)}
    if number := re.fullmatch(r"(?:[$€£]|eur )?([\d.]+)(?: ?[a-z°%/]+)*", expected):
        forms.add(number[1])
    return any(re.search(rf"(?<![\w.]){re.escape(form)}(?!\w|[.,:]\d)", answer) for form in forms if form)


def is_refusal(answer: str) -> bool:
    """Whether an answer says that the text does not tell."""
    return bool(REFUSAL.search(answer.split("\n")[0]))


def make_questions(
    kind: str,
    tokenizer,
    haystack: Haystack,
    length_tokens: int | None,
    count: int,
    split: str = "test",
    seed: int = 0,
    passages: tuple[Passage, ...] = (),
) -> Iterator[Sample]:
    """
    `count` questions of a kind in `KINDS`, each about a text of its own.

    Args:
        length_tokens: of the text with the question and room for the right answer; None: only what would be hidden in
            a longer text, like the passage alone.
        haystack: of books of the same split.
        passages: of the same split, for "qa".

    Raises: ValueError if there is no such kind or split, no passages for "qa", or `length_tokens` is too small.
    """
    texts = make_texts(kind, tokenizer, haystack, length_tokens, 1, split, seed, passages)
    return (sample for sample, *_ in islice(texts, count))


def make_texts(
    kind: str,
    tokenizer,
    haystack: Haystack,
    length_tokens: int | None,
    questions: int,
    split: str = "test",
    seed: int = 0,
    passages: tuple[Passage, ...] = (),
) -> Iterator[list[Sample]]:
    """
    Texts without end, as many as are asked for, of each up to `questions` questions about it, whose `tokens` begin
    alike. The longest of them with its right answer has `length_tokens`. The rest is as with `make_questions`.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of questions {kind!r}: take one of {', '.join(KINDS)}.")
    if kind == "qa" and not passages:
        raise ValueError("Questions of kind 'qa' need `passages`.")
    builder = RowBuilder(tokenizer, {"books": haystack})
    made, number = 0, 0
    while True:
        rng = random.Random(f"{kind} {check_split(split)} {length_tokens} {seed} {number}")
        number += 1
        if number > 100 * (made + 1):
            raise ValueError(f"Hardly any question of kind {kind!r} fits into {length_tokens} tokens: take more.")
        if kind == "qa":
            plan, asked = _passages(passages, number * questions, questions, seed)
        else:
            plan, asked = _facts(rng, kind, split, length_tokens, questions)
        if plan is not None and (samples := _samples(builder, plan, length_tokens, rng, asked)):
            made += 1
            yield samples


@dataclass
class Asked:
    """What is right about a turn of a plan. See `Sample`."""

    question: str
    expected: list[str]
    metric: str
    kind: str


def _facts(
    rng: random.Random, kind: str, split: str, length: int | None, questions: int
) -> tuple[Plan | None, list[Asked]]:
    """A plan with up to so many questions, and what is right about each."""
    kinds, wordings = (split if of == "own" else of for of in KINDS[kind])
    world = teller = World(split, rng, kinds, wordings)
    if kind == "events":
        teller = Events(world)
        told = [event for _ in range(HIDDEN_FACTS) if (event := teller.add()) is not None]
        blocks = [[(f" {world.wrap(teller.state(event))}", [event])] for event in told]
    elif kind == "documents":
        blocks = [make_document(rng.choice(list(DOCUMENTS)), world, min((length or 1500) // 2, 1500))]
    else:
        while len(world.facts) < HIDDEN_FACTS:
            world.add()
        blocks = [[(f" {world.wrap(world.state([fact]))}", [fact])] for fact in world.facts]
        rng.shuffle(blocks)
    asks = "missing" if kind == "missing" else "direct"
    is_told = any(facts for block in blocks for _, facts in block)
    found = [teller.ask(asks, short=False) for _ in range(questions)] if is_told else []
    turns = [Turn(q.text, q.answer, q.facts, q.kind) for q in found if q is not None]
    metric = "refusal" if kind == "missing" else "contains"
    asked = [Asked(q.text, q.expected, metric, kind) for q in found if q is not None]
    return (Plan(kind, blocks, turns) if turns else None), asked


def _passages(passages: tuple[Passage, ...], first: int, questions: int, seed: int) -> tuple[Plan | None, list[Asked]]:
    """
    The questions from number `first` on, in an order that is always the same and that each seed begins elsewhere, each
    with its passage, of which there are no two that could be confused.
    """
    known = [(p, q, a) for p in passages for q, a in p.questions if a]
    random.Random("qa").shuffle(known)
    first += seed * len(known) // 3  # so that seeds 0 to 2 share questions only where they ask more than a third
    blocks, turns, asked, seen = [], [], [], set()
    for number in range(first, first + questions):
        passage, question, answer = known[number % len(known)]
        alone = passage.source if passage.source == "ropes" else passage.title or passage.text
        if alone in seen:
            continue
        seen.add(alone)
        head = f"{passage.title}\n" if passage.title else ""
        blocks.append([("\n\n" + head + s if i == 0 else s, [(number, i)]) for i, s in enumerate(passage.sentences)])
        text = f'In "{passage.title}": {question}' if passage.title else question
        evidence = [(number, i) for i in support(passage, question, answer)]
        turns.append(Turn(text, [(answer, True)], evidence, passage.source))
        asked.append(Asked(text, [answer], "f1", f"qa {passage.source}"))
    return Plan("qa", blocks, turns, hint="Answer in a few words."), asked


def _samples(builder: RowBuilder, plan: Plan, length: int | None, rng, asked: list[Asked]) -> list[Sample]:
    """A sample for each turn of the plan, as if it was the only one; none if they do not fit."""
    chat, firsts = builder.chat, [first_question(plan, 0, turn) for turn in plan.turns]
    answers = ["".join(text for text, _ in turn.answer) for turn in plan.turns]
    ids = builder.encode([*firsts, *answers, *(turn.question for turn in plan.turns)])
    if length is not None:
        # The row holds all turns; the text in it is as long as if it held the longest alone.
        longest = max(len(ids[first]) + len(ids[answer]) for first, answer in zip(firsts, answers))
        between = len(chat.reply) + len(chat.end) + len(chat.next)
        later = [len(ids[t.question]) + len(ids[a]) + between for t, a in zip(plan.turns[1:], answers[1:])]
        length += len(ids[firsts[0]]) + len(ids[answers[0]]) + sum(later) - longest
    rows = builder.build([plan], length, rng)
    if not rows or len(rows[0].turns) < len(plan.turns):
        return []
    row = rows[0]
    end = row.turns[0][2] - len(chat.reply) - len(ids[firsts[0]])
    text = builder.tokenizer.decode(row.ids[len(chat.start) : end])
    samples = []
    for number, (first, of) in enumerate(zip(firsts, asked)):
        tokens = np.concatenate([row.ids[:end], ids[first], chat.reply]).astype(np.int64)
        evidence = [(a, b) for turn, a, b in row.evidence if turn == number]
        messages = [{"role": "user", "content": text + first}]
        samples.append(Sample(messages, tokens, of.question, of.expected, of.metric, of.kind, evidence))
    return samples

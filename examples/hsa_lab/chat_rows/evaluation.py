"""
Questions to evaluate a model with, about things that are not trained on, and what a right answer is.

    for sample in make_questions("facts", tokenizer, haystack, length_tokens=4096, count=100):
        answer = ...                       # generated for sample.messages, or for sample.tokens
        score = sample.score(answer)       # 0 to 1

`KINDS` says what there is: facts in kinds and wordings of the split, or in trained kinds, or in trained wordings;
events; questions of passages, scored by F1; and questions that the text does not answer.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .documents import DOCUMENTS, make_document
from .events import Events
from .facts import Question, World
from .haystack import Haystack
from .qa import Passage, support
from .rows import Plan, RowBuilder, Turn
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
    r"(?:\b|n')(not|t|no|never|nothing|nowhere|cannot|unable|without)\b.{0,60}"
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
    if kind not in KINDS:
        raise ValueError(f"There is no kind of questions {kind!r}: take one of {', '.join(KINDS)}.")
    if kind == "qa" and not passages:
        raise ValueError("Questions of kind 'qa' need `passages`.")
    builder = RowBuilder(tokenizer, {"books": haystack})
    made, number = 0, 0
    while made < count:
        rng = random.Random(f"{kind} {check_split(split)} {length_tokens} {seed} {number}")
        number += 1
        if number > 100 * (made + 1):
            raise ValueError(f"Hardly any question of kind {kind!r} fits into {length_tokens} tokens: take more.")
        if kind == "qa":
            plan, question, expected, metric = _passage(passages, number)
        else:
            plan, question, expected, metric = _fact(rng, kind, split, length_tokens)
        if plan is None:
            continue
        name = f"qa {plan.turns[0].kind}" if kind == "qa" else kind
        sample = _sample(builder, plan, length_tokens, rng, question, expected, metric, name)
        if sample is not None:
            made += 1
            yield sample


def _fact(rng: random.Random, kind: str, split: str, length: int | None):
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
    if not blocks or not any(facts for block in blocks for _, facts in block):
        return None, "", [], ""
    question: Question | None = teller.ask("missing" if kind == "missing" else "direct", short=False)
    if question is None:
        return None, "", [], ""
    turn = Turn(question.text, question.answer, question.facts, question.kind)
    metric = "refusal" if kind == "missing" else "contains"
    return Plan(kind, blocks, [turn]), question.text, question.expected, metric


def _passage(passages: tuple[Passage, ...], number: int):
    """The questions in turn, in an order that is always the same, each with its passage."""
    asked = [(p, q, a) for p in passages for q, a in p.questions if a]
    random.Random("qa").shuffle(asked)
    passage, question, answer = asked[number % len(asked)]
    head = f"{passage.title}\n" if passage.title else ""
    block = [("\n\n" + head + s if i == 0 else s, [i]) for i, s in enumerate(passage.sentences)]
    text = f'In "{passage.title}": {question}' if passage.title else question
    turn = Turn(text, [(answer, True)], support(passage, question, answer), passage.source)
    return Plan("qa", [block], [turn], hint="Answer in a few words."), text, [answer], "f1"


def _sample(
    builder: RowBuilder, plan: Plan, length: int | None, rng, question, expected, metric, kind
) -> Sample | None:
    if not (rows := builder.build([plan], length, rng)):
        return None
    row = rows[0]
    first = row.turns[0][2]
    start, end = len(builder.chat.start), first - len(builder.chat.reply)
    text = builder.tokenizer.decode(row.ids[start:end])
    evidence = [(a, b) for _, a, b in row.evidence]
    messages = [{"role": "user", "content": text}]
    return Sample(messages, row.ids[:first].astype(np.int64), question, expected, metric, kind, evidence)

"""
Questions about passages, from rows in which prompt templates have put passage and question together.

    passages = read_passages("../shared/data/qa/train.jsonl.gz", "train")
    plan = qa_plan(rng, passages, 8, 4096)

The rows of the file have "source", "template", "prompt" and "completion". `TEMPLATES` takes passage and question out
of the prompts of five sources, whose answers stand in the passage. All rows with one passage belong to one split: that
of `splits.passage_split`, and for plots of films that of the film's title, as there are two plots of each. A tenth is
for tests.
"""

import gzip
import json
import random
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .families import conversation
from .rows import Plan, Turn
from .splits import check_split, passage_split, split_of
from .tables import wordings


# What of a prompt is the passage, the question and, of some, title, relation, subject or answer, by source.
TEMPLATES = {
    "adversarial_qa": (
        r"Extract the answer.*?\nQuestion: (?P<q>.*?)\nContext: (?P<p>.*)",
        r'Given the following passage\s+"(?P<p>.*)",\s+answer the following question\..*?Question: (?P<q>.*)',
        r'Question: "(?P<q>.*?)"\s+Context: "(?P<p>.*)"\s+Answer:',
        r'I know that the answer to the question "(?P<q>.*?)" is in "(?P<p>.*)"\. Can you tell me what it is\?',
    ),
    "quoref": (
        r"A friend asked [^:]*: (?P<q>.*?), using the article: (?P<p>.*), what would be the answer \?",
        r"Read the following paragraph [^:]*: (?P<q>.*?)\n\n(?P<p>.*)",
        r"I have a test where [^:]*: (?P<q>.*?) \?\n\n(?P<p>.*)",
        r"(?P<q>[^\n]*)\n\nAnswer the above question based on the context below:\n\n(?P<p>.*)",
        r"What is the answer for the question: (?P<q>.*?) from the following article \?\n\n(?P<p>.*)",
        r"The following article contains [^:]*: (?P<q>.*?) , can you please find it\?\s+(?P<p>.*)",
        r"The answer to the question: (?P<q>.*?) is inside the article: (?P<p>.*), can you guess it \?",
        r"This article: (?P<p>.*) contains an answer for the question: (?P<q>.*?), what is it \?",
        r"Given the following context:\n\n(?P<p>.*)\n\nanswer the following question:\n\n(?P<q>.*)",
        r"Found the following article online, [^:]*: (?P<q>.*?)\n\n(?P<p>.*)",
    ),
    "duorc": (
        r".*?Question: (?P<q>[^\n]*)\n(?:If there [^\n]*\n)?[^\n:]*[Tt]itle: (?P<t>[^\n]*)\n[^\n:]*: (?P<p>.*)",
        r"I am a movie director .*?Plot title: (?P<t>[^\n]*)\nMovie plot: (?P<p>.*)\nMy question: (?P<q>.*)",
    ),
    "ropes": (
        r"Given the background: (?P<p>.*)\n\nAnswer the following question: (?P<q>.*)",
        r"(?:Background: )?(?P<p>.*)\n\nGiven the paragraph above, please answer [^:]*:\s*(?P<q>.*)",
        r"Please answer correctly the following question [^\n]*\n\n(?P<q>[^\n]*)\n\n(?P<p>.*)",
        r"I read this background [^:]*: (?P<p>.*)\n\nUsing the knowledge [^:]*: (?P<q>.*)",
        r"[^:\n]* new situation: (?P<p>.*)\n\n[^:\n]* question ?: (?P<q>.*)",
        r"I can use this background: (?P<p>.*)\n\nAnswer this question please: (?P<q>.*)",
    ),
    "wiki_hop": (
        r"Information:\s+(?P<p>.*)\n\n[^\n]*object entity[^\n]*of '(?P<r>[^']*)' with[^\n]*'(?P<s>.*?)'[?.].*",
        r"Information:\s+(?P<p>.*)\n\n[^\n]*entity that related to '(?P<s>.*?)' with[^\n]*of '(?P<r>[^']*)'.*",
        r"Information:\s+(?P<p>.*)\n\n'(?P<s>[^\n]*?)' is related to[^\n]*relation of '(?P<r>[^']*)'\?.*",
        r"Information:\s+(?P<p>.*)\n\n[^\n]*relation '(?P<r>[^']*)' with the subject '(?P<s>.*?)'\..*",
        r"Information:\s+(?P<p>.*)\n\n[^\n]*with which '(?P<s>.*?)' exhibits the relationship of '(?P<r>[^']*)'.*",
        r"Information:\s+(?P<p>.*)\n\nWhat entity does '(?P<s>.*?)' has the relation '(?P<r>[^']*)' with\?",
    ),
}
# Other ways to say that there is no answer.
NO_ANSWER = (
    "no answer",
    "not answerable",
    "can't answer",
    "no i can't",
    "insufficient information to provide an answer",
)
RELATIONS = (
    "What is the {r} of {s}?",
    'Which "{r}" goes with {s}?',
    "Find the {r} of {s} in the text.",
    "Tell me the {r} of {s}.",
)
HINTS = (
    "Answer with words of the text.",
    "Answer in a few words.",
    "Keep the answer short.",
    "A short answer will do.",
    "Quote the answer from the text.",
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(0-9])")
MISSING = 0.06  # share of the questions that are those of a passage that is not there
PASSAGE_TOKENS = 4.0  # characters of a passage a token, about


@dataclass
class Passage:
    text: str
    title: str = ""
    questions: list[tuple[str, str]] = field(default_factory=list)  # with their answers, "" if there is none
    source: str = ""

    @property
    def sentences(self) -> list[str]:
        """The passage in sentences, each with what is before it."""
        lines = [SENTENCE_END.split(line) for line in self.text.split("\n") if line.strip()]
        return [
            "\n" * (i == 0 and n > 0) + " " * (i > 0) + s for n, line in enumerate(lines) for i, s in enumerate(line)
        ]


@cache
def _patterns() -> dict[str, list[re.Pattern]]:
    return {source: [re.compile(t, re.S) for t in templates] for source, templates in TEMPLATES.items()}


def take_apart(row: dict[str, str]) -> tuple[str, str, str, str] | None:
    """Passage, title, question and answer of a row, or None if it is of another form or its answer is not in it."""
    for pattern in _patterns().get(row["source"], []):
        if match := pattern.fullmatch(row["prompt"].strip()):
            break
    else:
        return None
    found = match.groupdict()
    passage, answer = found["p"].strip(), row["completion"].strip()
    if "s" in found:
        question = random.Random(passage).choice(RELATIONS).format(r=found["r"].replace("_", " "), s=found["s"])
        passage = "\n".join(line.lstrip("- ") for line in passage.split("\n") if line.strip())
    else:
        question = found["q"].split("\n\nHint:")[0].strip()
    if answer.lower().rstrip(".") in NO_ANSWER:
        answer = ""
    elif _plain(answer) not in _plain(passage) or not _plain(answer):
        return None
    if not 8 <= len(question) <= 300 or len(passage) < 60 or _plain(answer) and _plain(answer) in _plain(question):
        return None
    return passage, (found.get("t") or "").strip(), question, answer.strip('"')


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@cache
def read_passages(path: str | Path, split: str) -> tuple[Passage, ...]:
    """The passages of one split with all their questions, in the order of the file."""
    check_split(split)
    found: dict[str, Passage] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if (taken := take_apart(row)) is None:
                continue
            text, title, question, answer = taken
            of = split_of("film " + _plain(title)) if title else passage_split(text)
            if of == split:
                passage = found.setdefault(title + _plain(text)[:200], Passage(text, title, source=row["source"]))
                if question not in (q for q, _ in passage.questions):
                    passage.questions.append((question, answer))
    return tuple(found.values())


def support(passage: Passage, question: str, answer: str) -> list[int]:
    """The sentences that hold the answer; of more than two, those that share most words with the question."""
    wanted, asked = _plain(answer), set(_plain(question).split())
    sentences = [_plain(sentence) for sentence in passage.sentences]
    found = [i for i, sentence in enumerate(sentences) if f" {wanted} " in f" {sentence} "]
    found = found or [i for i, sentence in enumerate(sentences) if wanted.split(" ")[0] in sentence.split()]
    return sorted(sorted(found, key=lambda i: -len(asked & set(sentences[i].split())))[:2])


def qa_plan(
    rng: random.Random, passages: tuple[Passage, ...], questions: int, length: int, haystack: str = "books"
) -> Plan:
    """Passages at random places of a long text, and their questions."""
    blocks, turns, room, titles = [], [], int(length * 0.75), set()
    for number, passage in enumerate(rng.choices(passages, k=40)):
        size = len(passage.text) / PASSAGE_TOKENS + 40 * len(passage.questions)
        # Questions of ropes, like "Who is older?", would be ambiguous beside another passage of theirs.
        alone = passage.source if passage.source == "ropes" else passage.title or passage.text
        if size > room or alone in titles:
            continue
        room -= size
        titles.add(alone)
        sentences = passage.sentences
        head = f"{passage.title}\n" if passage.title else ""
        blocks.append([("\n\n" + head + s if i == 0 else s, [(number, i)]) for i, s in enumerate(sentences)])
        for question, answer in passage.questions:
            # Of several films a question must say which it is about.
            text = f'In "{passage.title}": {question}' if passage.title else question
            if answer:
                # The questions of wiki_hop need several passages, and nobody says which.
                found = support(passage, question, answer) if passage.source != "wiki_hop" else []
                keys = [(number, i) for i in found]
                turns.append(Turn(text, [(answer, True)], keys, passage.source))
            else:
                turns.append(Turn(text, [(rng.choice(wordings("refusal qa")), False)], [], "missing"))
        if len(turns) >= questions:
            break
    rng.shuffle(turns)
    turns = turns[:questions]
    for i in range(len(turns)):
        if rng.random() < MISSING and (other := _unanswerable(rng, passages, blocks)) is not None:
            turns[i] = other
    parts = conversation(rng, False)
    parts["hint"] = " ".join(filter(None, [parts["hint"], rng.choice(HINTS)]))
    return Plan("qa", blocks, turns, haystack, **parts)


def _unanswerable(rng: random.Random, passages: tuple[Passage, ...], blocks: list) -> Turn | None:
    """A question of a passage that is not there, whose answer is nowhere in those that are."""
    passage = rng.choice(passages)
    question, answer = rng.choice(passage.questions)
    text = _plain("".join(text for block in blocks for text, _ in block))
    asked = [word for word in _plain(question).split() if len(word) > 3]
    if not answer or _plain(answer) in text or passage.source == "ropes" or all(word in text for word in asked):
        return None
    text = f'In "{passage.title}": {question}' if passage.title else question
    return Turn(text, [(rng.choice(wordings("refusal qa")), False)], [], "missing")

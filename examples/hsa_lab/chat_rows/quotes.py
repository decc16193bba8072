"""
Questions about passages of books themselves: how a sentence goes on, which word is missing, who says something. There
are as many as there are books, in nobody's wordings, so they teach to find and to copy any text.
"""

import random
import re

from .families import conversation
from .haystack import Haystack
from .qa import SENTENCE_END
from .rows import Plan, Turn
from .tables import wordings


PASSAGE_TOKENS = (60, 160)
ROOM = 0.6  # share of a row that passages may take
QUESTION_TOKENS = 60  # with its answer and markup
# A quotation has so many words, and so has an answer.
WORDS = (4, 14)
SPEECH = re.compile(
    r"[\"\u201c](?P<q>[^\"\u201c\u201d\n]{20,160}?)[,.!?]*[\"\u201d],? "
    r"(?:(?:said|asked|cried|replied|answered|exclaimed|whispered|returned) (?P<a>(?:(?:Mr|Mrs|Miss|Dr|Sir|Lady)\.? )?"
    r"[A-Z][a-z]+(?: [A-Z][a-z]+)?)|(?P<b>[A-Z][a-z]+(?: [A-Z][a-z]+)?) (?:said|asked|cried|replied|answered))\b"
)
MARKS = ",.;:!?"
RARE = re.compile(r"[A-Z0-9]\w{2,}|\w{7,}")  # words that are left out: others would be guessed
NAMELESS = {"He", "She", "They", "It", "The", "And", "But", "Then", "There", "Who", "What", "You", "We", "One"}


def quote_plan(rng: random.Random, source: Haystack, tokenizer, questions: int, length: int) -> Plan:
    """Passages drawn from `source`, at random places of another text, and questions about their very words."""
    blocks, turns, room = [], [], int((length - questions * QUESTION_TOKENS) * ROOM)
    while len(turns) < questions and room > PASSAGE_TOKENS[1]:
        tokens, cuts = source.excerpt(rng.randrange(*PASSAGE_TOKENS), rng)
        room -= len(tokens)
        passage = tokenizer.decode(tokens[: cuts[-1]] if len(cuts) and cuts[-1] else tokens)
        sentences = SENTENCE_END.split(" ".join(passage.split()))
        number = len(blocks)
        blocks.append([(" " + sentence, [(number, i)]) for i, sentence in enumerate(sentences)])
        for _ in range(rng.randrange(2, 6)):
            turn = _question(rng, sentences, number)
            if turn is not None and turn.question not in (other.question for other in turns):
                turns.append(turn)
    rng.shuffle(turns)
    return Plan("quotes", blocks, turns[:questions], "books", **conversation(rng, False))


def _question(rng: random.Random, sentences: list[str], number: int) -> Turn | None:
    kind = rng.choice(("next", "next", "before", "blank", "blank", "after", "speaker"))
    if kind == "speaker":
        return _speaker(rng, sentences, number)
    place = rng.randrange(len(sentences))
    words = sentences[place].split()
    if kind == "after":
        if place + 1 == len(sentences) or not all(WORDS[0] <= len(s.split()) <= 30 for s in sentences[place:][:2]):
            return None
        return _turn(rng, kind, sentences[place], sentences[place + 1], [(number, place), (number, place + 1)])
    if len(words) < 2 * WORDS[0]:
        return None
    key = [(number, place)]
    if kind == "blank":
        rare = [
            i for i, word in enumerate(words) if i and re.fullmatch(r"[A-Z0-9]\w{2,}|\w{7,}", word.strip(",.;:!?"))
        ]
        if not rare:
            return None
        at = rng.choice(rare)
        start, end = max(0, at - rng.randrange(3, 9)), at + rng.randrange(3, 9)
        answer = words[at].strip(MARKS)
        shown = [*words[start:at], words[at].replace(answer, "____"), *words[at + 1 : end]]
        return _turn(rng, kind, " ".join(shown), answer, key)
    at = rng.randrange(WORDS[0], len(words) - WORDS[0] + 1)
    before, after = words[:at], words[at:]
    if kind == "next":
        given, wanted = before[-WORDS[1] :], after[: WORDS[1]]
    else:
        given, wanted = after[: WORDS[1]], before[-WORDS[1] :]
    return _turn(rng, kind, " ".join(given), " ".join(wanted), key)


def _speaker(rng: random.Random, sentences: list[str], number: int) -> Turn | None:
    text = " ".join(sentences)
    said = [m for m in SPEECH.finditer(text) if (m["a"] or m["b"]).split()[0] not in NAMELESS]
    if not said:
        return None
    match = rng.choice(said)
    name, ends, evidence = match["a"] or match["b"], 0, []
    for i, sentence in enumerate(sentences):
        if match.start() < ends + len(sentence) and ends < match.end():
            evidence.append((number, i))
        ends += len(sentence) + 1
    return _turn(rng, "speaker", match["q"], name, evidence)


def _turn(rng: random.Random, kind: str, quotation: str, answer: str, evidence: list) -> Turn:
    quotation = quotation.replace('"', "'").strip()
    question = rng.choice(wordings(f"quote {kind}")).format(q=quotation)
    return Turn(question, [(answer, True)], evidence, kind)

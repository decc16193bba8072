"""
The forms of RULER's tasks (needles with several keys and values, chains of variables, frequent words) in other words
and haystacks than its own, which stay unseen for the evaluation.
"""

import random
import string
import uuid
from collections import Counter

from .families import conversation
from .rows import Plan, Turn, interleave
from .splits import number_split
from .tables import words
from .values import Source


KINDS = ("needles", "needles", "needles", "pile", "noise", "chain", "chain", "common", "coded")
# What a needle is about, one and several.
SECRETS = (
    ("lucky number", "lucky numbers"),
    ("secret code", "secret codes"),
    ("hidden word", "hidden words"),
    ("access token", "access tokens"),
    ("prize value", "prize values"),
    ("private key", "private keys"),
    ("winning ticket", "winning tickets"),
    ("reference", "references"),
)
UNFIT = {"lucky number": 1, "hidden word": 0}  # forms of value (`_value`) that are no such thing
NEEDLES = (
    "One of the {many} of {key} is {value}.",
    "{key} has the {one} {value}.",
    "For {key}, take down this {one}: {value}.",
    "Here is another {one} for {key}: {value}.",
    "{value} counts among the {many} of {key}.",
    "Remember {value}, as it belongs to the {many} of {key}.",
)
ONE = (
    "What is the {one} of {key}?",
    "Which {one} belongs to {key}?",
    "Give me the {one} for {key}.",
    "Look for {key}: what is its {one}?",
)
ALL = (
    "What are all the {many} of {key}?",
    "Which {many} belong to {key}? Name them all.",
    "List the {many} for {key}.",
    "The text holds several {many} for {key}. Which?",
)
SEVERAL = (
    "What are the {many} of {keys}?",
    "Give the {many} that belong to {keys}.",
    "For {keys}, list the {many}.",
)
LINES = (
    "The road was dry. The wind was cold. A dog barked. Nobody came. It was late.",
    "One step and another step. The clock goes on. The rain falls. The lamp is lit.",
    "Water runs down the hill. Birds sit on the wire. The day is long. We wait here.",
    "Dust on the shelf. Salt on the table. The door is shut. The kettle sings.",
)
FIRST = ("let {a} = {v}", "{a} := {v}", "set {a} to {v}", "{a} starts as {v}.", "store {v} in {a}")
NEXT = ("let {b} = {a}", "{b} := {a}", "set {b} to the value of {a}", "{b} becomes a copy of {a}.", "store {a} in {b}")
CHAINED = (
    "Which variables hold {v}? Give all of them.",
    "List every variable whose value is {v}.",
    "Follow the assignments: which variables end up with {v}?",
    "Name all the variables that equal {v}.",
)
COMMON = (
    "Which {n} words occur most often in the list?",
    "Name the {n} most frequent words of the list.",
    "Some words of the list are repeated more than others. Which {n} are repeated most?",
)
CODED = (
    "The text is made of invented words. Which {n} are used most?",
    "Count the invented words: what are the {n} most frequent?",
    "Which {n} of these strange words appear more often than all others?",
)


def ruler_plan(rng: random.Random, questions: int, length: int, split: str = "train", kind: str | None = None) -> Plan:
    """A row of a kind in `KINDS` for about `length` tokens."""
    kind, source = kind or rng.choice(KINDS), Source(split, rng)
    if kind == "chain":
        return _chains(source, questions, length)
    if kind in ("common", "coded"):
        return _frequent(source, kind, length)
    return _needles(source, kind, questions, length)


def _key(source: Source, form: int) -> str:
    if form == 0:
        return f"{source.word('adj')}-{source.word('noun')}"
    if form == 1:
        return f"{source.word('noun')} {source.rng.randrange(10, 1000)}"
    if form == 2:
        return f"{source.word('colour')} {source.word('animal')}"
    return _uuid(source)


def _value(source: Source, form: int) -> str:
    rng = source.rng
    if form == 0:
        digits = rng.randrange(4, 9)
        return _of_split(source, lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)))
    if form == 1:
        return f"{source.word('adj')}-{source.word('noun')}"
    return _uuid(source)


def _uuid(source: Source) -> str:
    return _of_split(source, lambda: str(uuid.UUID(int=source.rng.getrandbits(128), version=4)))


def _of_split(source: Source, draw) -> str:
    while number_split(text := draw()) != source.split:
        pass
    return text


def _needles(source: Source, kind: str, questions: int, length: int) -> Plan:
    rng = source.rng
    wording, key_form, value_form = rng.choice(NEEDLES), rng.choice((0, 0, 1, 2, 3)), rng.choice((0, 0, 1, 2))
    fitting = [pair for pair in SECRETS if UNFIT.get(pair[0]) != value_form]
    one, many = rng.choice(fitting)
    if value_form == 2:
        questions = min(questions, 5)
    values = rng.choice((1, 1, 2, 3, 4))
    keys = max(1, questions // values)
    needles = {}
    if kind == "pile":
        # All of the text is needles, of which most are not asked for.
        tokens = 22 + 30 * (key_form == 3) + 30 * (value_form == 2)
        total = max(questions, (length - 60 * questions) * 3 // 4 // tokens)
        values, keys = 1, total
    while len(needles) < keys:
        needles.setdefault(_key(source, key_form), [_value(source, value_form) for _ in range(values)])
    told = [(key, value) for key, found in needles.items() for value in found]
    rng.shuffle(told)
    break_ = "\n" if kind == "pile" else " "
    texts = [_sentence(wording.format(one=one, many=many, key=key, value=value)) for key, value in told]
    blocks = [[(break_ + text, [pair])] for text, pair in zip(texts, told)]
    if kind == "pile":
        blocks = [[("\n\n" + text[1:] if i == 0 else text, keys) for i, [(text, keys)] in enumerate(blocks)]]
    elif kind == "noise":
        blocks = [_noise(rng, blocks, length)]
    turns, names = [], rng.sample(list(needles), min(len(needles), questions))
    while names:
        asked = [names.pop() for _ in range(min(len(names), rng.choice((1, 1, 1, 2, 4))))]
        pairs = sorted(((k, v) for k in asked for v in needles[k]), key=lambda p: (asked.index(p[0]), told.index(p)))
        if len(asked) > 1:
            text = rng.choice(SEVERAL).format(many=many, keys=", ".join(asked[:-1]) + " and " + asked[-1])
        else:
            text = rng.choice(ONE if values == 1 else ALL).format(one=one, many=many, key=asked[0])
        of = ", ".join(asked[:-1]) + " and " + asked[-1] if len(asked) > 1 else asked[0]
        lead = f"The {one} of {of} is " if len(pairs) == 1 else f"The {many} of {of} are "
        turns.append(Turn(text, [(lead, False), *_listed([value for _, value in pairs]), (".", False)], pairs, kind))
    return Plan("ruler " + kind, blocks, turns, "books", **conversation(rng, False))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] if text.split(" ", 1)[0].isalpha() else text


def _listed(values: list[str]) -> list[tuple[str, bool]]:
    parts = []
    for i, value in enumerate(values):
        parts += [("" if i == 0 else " and " if i == len(values) - 1 else ", ", False), (value, True)]
    return parts[1:]


def _noise(rng: random.Random, blocks: list, length: int) -> list:
    """The blocks, of one piece each, between lines that are all the same, in the order given."""
    line = rng.choice(LINES)
    count = max(1, (length * 2 // 3 - 70 * len(blocks)) // (len(line) // 4 + 1))
    pieces: list = [("\n" + line, [])] * count
    places = sorted((rng.randrange(1, count + 1) for _ in blocks), reverse=True)
    for place, block in zip(places, reversed(blocks)):
        text, keys = block[0]
        pieces.insert(place, ("\n" + text.lstrip(), keys))
    return [("\n" + pieces[0][0], pieces[0][1]), *pieces[1:]]


def _chains(source: Source, questions: int, length: int) -> Plan:
    """Chains of assignments, each with a value of its own, in books or between lines that are all the same."""
    rng, blocks, groups, turns, used = source.rng, [], [], [], set()
    first, following = rng.choice(FIRST), rng.choice(NEXT)
    upper, size = rng.random() < 0.5, rng.randrange(2, 6)
    letters = string.ascii_uppercase if upper else string.ascii_lowercase

    def name() -> str:
        while (
            text := "".join(rng.choice(letters) for _ in range(size)) + ("" if size > 2 else str(rng.randrange(10)))
        ) in used:
            pass
        used.add(text)
        return text

    for chain in range(max(1, questions // 3)):
        value = _value(source, 0)
        names = [name() for _ in range(rng.randrange(2, 6))]
        lines = [first.format(a=names[0], v=value)]
        lines += [following.format(a=a, b=b) for a, b in zip(names, names[1:])]
        keys = [(chain, i) for i in range(len(lines))]
        # Lines of code stand alone, sentences anywhere.
        blocks += [[("\n" + line if not line.endswith(".") else " " + line, [key])] for line, key in zip(lines, keys)]
        groups += [chain] * len(lines)
        text = rng.choice(CHAINED).format(v=value)
        turns.append(Turn(text, [*_listed(names), (".", False)], keys, "chain"))
    rng.shuffle(turns)
    if rng.random() < 0.4:
        blocks, groups = [_noise(rng, [blocks[i] for i in interleave(groups, rng)], length)], None
    return Plan("ruler chain", blocks, turns, "books", groups=groups, **conversation(rng, False))


def _frequent(source: Source, kind: str, length: int) -> Plan:
    """A list of words, a few of which come more often, or a text of invented words with falling frequencies."""
    rng = source.rng
    room = int(length * rng.uniform(0.3, 0.8))
    if kind == "common":
        pools = ("noun", "adj", "animal", "profession", "food", "instrument")
        vocabulary = sorted({w for pool in pools for w in words()[pool][source.split] if w.isalpha()})
        often, seldom, top = rng.choice((8, 12, 20)), rng.choice((1, 2, 3)), rng.choice((3, 5, 10))
        top = min(top, max(1, room // 12 // often))
        chosen = rng.sample(vocabulary, min(len(vocabulary), top + max(3, (room // 6 - top * often) // seldom)))
        listed = chosen[:top] * often + chosen[top:] * seldom
        rng.shuffle(listed)
        style = rng.randrange(3)
        text = "\n\n" + ("", ", ", " ")[style].join(
            f"{i + 1}) {word}\n" if style == 0 else word for i, word in enumerate(listed)
        ).rstrip("\n")
        answer, question = chosen[:top], rng.choice(COMMON)
    else:
        syllables = ["".join(p) for p in zip(rng.choices("bdfgklmnprstvz", k=40), rng.choices("aeiou", k=40))]
        invented = list(dict.fromkeys("".join(rng.choices(syllables, k=3)) for _ in range(max(6, room // 40))))
        top, power = 3, rng.choice((1.6, 2.0))
        counts = [max(1, int(room / 5 * 0.55 / (i + 1) ** power)) for i in range(len(invented))]
        for i in reversed(range(top)):
            counts[i] = max(counts[i], counts[i + 1] + 1)
        listed = [word for word, count in zip(invented, counts) for _ in range(count)]
        rng.shuffle(listed)
        text, answer, question = "\n\n" + " ".join(listed), invented[:top], rng.choice(CODED)
        answer = [word for word, _ in Counter(listed).most_common(top)]
    turn = Turn(question.format(n=top), [*_listed(answer), (".", False)], [], kind)
    return Plan("ruler " + kind, [[(text, [])]], [turn], "books", **conversation(rng, False))

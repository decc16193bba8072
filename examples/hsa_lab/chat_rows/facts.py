"""
Facts in hundreds of kinds and thousands of wordings, and questions about them.

    world = World("train", random.Random(0))
    fact, *_ = world.add()
    world.state([fact])         # "The scales showed 412 kg for the machine "pump 318"."
    world.ask("direct", short=False)

A `World` is what is told in one row. No two things in it are mentioned in the same way, and a question that gives a
value and asks for the thing is only asked where one thing has that value. See tables.py for kinds and wordings.
"""

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache

from .tables import Attribute, EntityType, Kind, compounds, kinds, wordings
from .values import Source


OPEN, CLOSE = "\x02", "\x03"  # around what an answer is about, until `parts` takes them out
SPECIFIC = 0.6  # share of the statements and questions in a wording of their attribute's own
FRAMED = 0.2  # share of the questions with something said before or after them
PLAIN = 0.5  # share of the sentences that stand in a text as they are
# Kinds of question and how often they are asked.
QUESTIONS = {
    "direct": 0.54,
    "reverse": 0.12,
    "both": 0.08,
    "hop": 0.05,
    "group": 0.05,
    "check": 0.04,
    "missing": 0.12,
}


@dataclass(eq=False)
class Entity:
    type: EntityType
    name: str
    told: dict[str, "Fact"] = field(default_factory=dict)  # by attribute

    def mention(self, rng: random.Random) -> str:
        return rng.choice(self.type.mentions).replace("{n}", self.name)

    def mentions(self) -> set[str]:
        return {mention.replace("{n}", self.name).lower() for mention in self.type.mentions} | {self.name.lower()}


@dataclass(eq=False)
class Fact:
    entity: Entity
    attribute: Attribute
    value: str

    @property
    def kind(self) -> Kind:
        return Kind(self.entity.type, self.attribute)


@dataclass
class Question:
    """
    A question and its answer.

    `answer` is text in parts: (text, whether it is what was asked for). `facts` are those that it follows from, none
    if the text does not tell. `expected` are the strings that a right answer contains.
    """

    kind: str
    text: str
    answer: list[tuple[str, bool]]
    facts: list[Fact]
    expected: list[str]


class World:
    """
    The facts of one row, with names and values of a split.

    Args:
        split: "train", "validation" or "test".
        rng: decides everything.
        kinds_split, wordings_split: other splits for the kinds of fact and for the wordings, to measure what each is
            worth.
        compounds: share of the attributes that are made up of two words, as compounds.txt says.
    """

    def __init__(
        self,
        split: str,
        rng: random.Random,
        kinds_split: str | None = None,
        wordings_split: str | None = None,
        compounds: float = 0.0,
    ):
        self.source, self.rng = Source(split, rng), rng
        self.split = wordings_split or split
        self.kinds_split, self.compounds = kinds_split or split, compounds
        self.by_type = _kinds_by_type(self.kinds_split)
        self.entities: list[Entity] = []
        self.facts: list[Fact] = []
        self.order: dict[Fact, int] = {}  # where a fact is told in the text, set by who tells it
        self._mentions, self._asked = set(), set()
        self._types, self._weights = list(self.by_type), [len(found) for found in self.by_type.values()]

    # -- things and what is told about them --

    def add(
        self, count: int | None = None, attributes: int | None = None, shared: bool = False, types: set | None = None
    ) -> list[Fact]:
        """
        Facts about `count` new things of one type, the same `attributes` of each (default: few of both). `shared`:
        with one common value. `types`: names of the types allowed; others are taken if none is.
        """
        rng = self.rng
        count = count or rng.choice((1, 1, 2, 2, 3, 4))
        allowed = [(t, w) for t, w in zip(self._types, self._weights) if not types or t.name in types]
        chosen, weights = zip(*allowed) if allowed else (self._types, self._weights)
        of = rng.choices(chosen, weights)[0]
        chosen = self._attributes(of, attributes or rng.choice((1, 1, 2, 3)))
        if shared:
            chosen = [a for a in chosen if a.value.split()[0] in ("pool", "name", "city", "date", "word", "place")][:1]
            if not chosen:
                return self.add(count, attributes)
            common = self.source.value(chosen[0].value)
        facts = []
        for _ in range(count):
            if (entity := self._new_entity(of)) is None:
                break
            for attribute in chosen:
                value = common if shared else self._new_value(attribute, entity)
                if value is None:
                    continue
                fact = entity.told[attribute.label] = Fact(entity, attribute, value)
                facts.append(fact)
        self.facts += facts
        return facts

    def _attributes(self, of: EntityType, count: int) -> list[Attribute]:
        chosen, barred = [], set()
        for attribute in self.rng.sample(self.by_type[of], len(self.by_type[of])):
            if self.rng.random() < self.compounds:
                attribute = self.rng.choice(compounds(self.kinds_split))
            if attribute.label not in barred:
                barred.add(attribute.label)
                chosen.append(attribute)
                barred |= attribute.conflicts
            if len(chosen) == count:
                break
        return chosen

    def _new_entity(self, of: EntityType, keep: bool = True) -> Entity | None:
        for _ in range(50):
            name = self.source.name(self.rng.choice(of.names))
            entity = Entity(of, name[0].upper() + name[1:] if of.name in ("hotel", "shop") else name)
            if not entity.mentions() & self._mentions:
                self._mentions |= entity.mentions()
                if keep:
                    self.entities.append(entity)
                return entity
        return None

    def _new_value(self, attribute: Attribute, entity: Entity) -> str | None:
        """A value that is no part of the mention of its thing."""
        for _ in range(20):
            value = self.source.value(attribute.value)
            if value.lower() not in entity.name.lower() and entity.name.lower() not in value.lower():
                return value
        return None

    # -- wordings --

    def state(self, facts: list[Fact]) -> str:
        """One sentence that tells one fact, or two facts of one thing."""
        fact, rng = facts[0], self.rng
        if len(facts) == 2:
            wording = rng.choice(wordings("pair", self.split))
            more = {"m": facts[1].attribute.label, "w": facts[1].value}
            return _fill(wording, fact, fact.entity.mention(rng), **more)
        own = _own(fact.attribute, "statements", self.split)
        wording = rng.choice(own if own and rng.random() < SPECIFIC else wordings("statement", self.split))
        return _fill(wording, fact, fact.entity.mention(rng))

    def wrap(self, sentence: str) -> str:
        """The sentence as it is, or as somebody's words, as a note and so on."""
        if self.rng.random() < PLAIN:
            return sentence
        wording = self.rng.choice(wordings("wrapped", self.split))
        inner = sentence[:-1] if sentence.endswith(".") else sentence
        if '"' in wording:
            inner, sentence = inner.replace('"', "'"), sentence.replace('"', "'")
        who = self.source.value("name") if self.rng.random() < 0.5 else self.source.word("first")
        return wording.format(s=sentence, c=inner, who=who)

    def _sentence(self, fact: Fact, mention: str, own: bool, mark: str) -> str:
        """The sentence of an answer, with its value or its thing between OPEN and CLOSE."""
        wording = "The {l} of {e} is {v}."
        if own and fact.attribute.wording_split(fact.attribute.statements[0]) in ("train", self.split):
            wording = fact.attribute.statements[0]
        return _fill(wording, fact, mention, mark)

    # -- questions --

    def ask(self, kind: str, short: bool) -> Question | None:
        """A question of a kind in `QUESTIONS` that was not asked before, or None if there is nothing to ask."""
        for _ in range(8):
            question = getattr(self, "_ask_" + kind)(short)
            if question is None:
                return None
            key = (kind, question.text) if not question.facts else (kind, *map(id, question.facts))
            leaked = kind not in ("check", "missing") and any(
                e.lower() in question.text.lower() for e in question.expected
            )
            if key not in self._asked and not leaked:
                self._asked.add(key)
                if self.rng.random() < FRAMED:
                    question.text = self.rng.choice(wordings("asked", self.split)).format(q=question.text)
                return question
        return None

    def questions(self, count: int, short: bool, shares: dict[str, float] = QUESTIONS) -> list[Question]:
        """Up to `count` questions of mixed kinds, in random order."""
        found = []
        for kind in self.rng.choices(list(shares), list(shares.values()), k=count):
            question = self.ask(kind, short) or self.ask("direct", short)
            if question is not None:
                found.append(question)
        return found

    def _question(self, fact: Fact, mention: str) -> tuple[str, bool]:
        """A question for the value of a fact, and whether in a wording of its own."""
        own = _own(fact.attribute, "questions", self.split)
        specific = bool(own) and self.rng.random() < SPECIFIC
        wording = self.rng.choice(own if specific else wordings("question", self.split))
        if fact.attribute.value == "name" and not specific:
            wording = re.sub(r"\b([Ww])hat (?=is|was)", r"\1ho ", wording)
        return _fill(wording, fact, mention), specific

    def _ask_direct(self, short: bool) -> Question:
        fact = self.rng.choice(self.facts)
        mention = fact.entity.mention(self.rng)
        text, own = self._question(fact, mention)
        answer = [(fact.value, True)] if short else parts(self._sentence(fact, mention, own, "v"))
        return Question("direct", text, answer, [fact], [fact.value])

    def _unique(self) -> list[Fact]:
        counts = Counter((fact.attribute.label, fact.value.lower()) for fact in self.facts)
        return [fact for fact in self.facts if counts[fact.attribute.label, fact.value.lower()] == 1]

    def _reverse(self, fact: Fact) -> str:
        own = _own(fact.attribute, "reverse", self.split)
        group = "reverse human" if fact.entity.type.human else "reverse"
        specific = own and self.rng.random() < SPECIFIC
        return _fill(self.rng.choice(own if specific else wordings(group, self.split)), fact, fact.entity.name)

    def _ask_reverse(self, short: bool) -> Question | None:
        if not (unique := self._unique()):
            return None
        fact = self.rng.choice(unique)
        mention = fact.entity.mention(self.rng)
        if short:
            answer = [(fact.entity.name, True)]
        elif self.rng.random() < 0.5:
            answer = parts(self._sentence(fact, mention, False, "e"))
        else:
            answer = parts(_fill(self.rng.choice(wordings("reverse answer")), fact, mention, "e"))
        return Question("reverse", self._reverse(fact), answer, [fact], [fact.entity.name])

    def _two(self, facts: list[Fact]) -> tuple[Fact, Fact] | None:
        """A fact of `facts` and another one of the same thing."""
        several = [fact for fact in facts if len(fact.entity.told) > 1]
        if not several:
            return None
        first = self.rng.choice(several)
        return first, self.rng.choice([fact for fact in first.entity.told.values() if fact is not first])

    def _ask_both(self, short: bool) -> Question | None:
        if (two := self._two(self.facts)) is None:
            return None
        first, second = two
        text = _fill(
            self.rng.choice(wordings("both", self.split)),
            first,
            first.entity.mention(self.rng),
            m=second.attribute.label,
        )
        if short:
            answer = [(first.value, True), (", ", False), (second.value, True)]
        else:
            labels = first.attribute.label, second.attribute.label
            answer = [(f"The {labels[0]} is ", False), (first.value, True), (f" and the {labels[1]} is ", False)]
            answer += [(second.value, True), (".", False)]
        return Question("both", text, answer, [first, second], [first.value, second.value])

    def _ask_hop(self, short: bool) -> Question | None:
        if (two := self._two(self._unique())) is None:
            return None
        given, asked = two
        text = _fill(self.rng.choice(wordings("hop", self.split)), given, given.entity.name, m=asked.attribute.label)
        sentence = self._sentence(asked, asked.entity.mention(self.rng), False, "v")
        answer = [(asked.value, True)] if short else parts(sentence)
        return Question("hop", text, answer, [given, asked], [asked.value])

    def _ask_group(self, short: bool) -> Question | None:
        groups = defaultdict(list)
        for fact in self.facts:
            groups[fact.attribute.label, fact.value.lower()].append(fact)
        groups = [g for g in groups.values() if 2 <= len(g) <= 5 and len({fact.entity.type for fact in g}) == 1]
        if not groups:
            return None
        group = sorted(self.rng.choice(groups), key=lambda fact: self.order.get(fact, 0))
        text = _fill(self.rng.choice(wordings("group", self.split)), group[0], "")
        names = [fact.entity.name for fact in group]
        answer = []
        for i, name in enumerate(names):
            answer += [(("" if i == 0 else " and " if i == len(names) - 1 else ", "), False), (name, True)]
        return Question("group", text, answer[1:] + ([] if short else [(".", False)]), group, names)

    def _ask_check(self, short: bool) -> Question | None:
        fact, true = self.rng.choice(self.facts), self.rng.random() < 0.5
        mention, value = fact.entity.mention(self.rng), fact.value
        if not true:
            others = [f.value for f in self.facts if f.attribute is fact.attribute and f.value != fact.value]
            value = self.rng.choice(others) if others else self._new_value(fact.attribute, fact.entity)
            if value is None or value.lower() == fact.value.lower():
                return None
        text = _fill(self.rng.choice(wordings("check", self.split)), Fact(fact.entity, fact.attribute, value), mention)
        word = "Yes" if true else "No"
        if short:
            return Question("check", text, [(word, True)], [fact], [word])
        answer = [
            (word, True),
            (f", the {fact.attribute.label} of {mention} is ", False),
            (fact.value, True),
            (".", False),
        ]
        return Question("check", text, answer, [fact], [word, fact.value])

    def _ask_missing(self, short: bool) -> Question | None:
        """Something else about a thing in the text, or the same about a thing that is not, or no thing's value."""
        way, like = self.rng.random(), self.rng.choice(self.facts)
        entity, group = like.entity, "refusal"
        attribute = self._untold(entity) if way < 0.5 else like.attribute
        if attribute is None or way >= 0.5:
            attribute, entity = like.attribute, self._new_entity(like.entity.type, keep=False)
        if entity is None or (value := self._new_value(attribute, entity)) is None:
            return None
        fact, mention = Fact(entity, attribute, value), entity.mention(self.rng)
        text = self._question(fact, mention)[0]
        if way > 0.85:
            if any(f.value.lower() == value.lower() for f in self.facts):
                return None
            text, group = self._reverse(fact), "refusal reverse"
        answer = self.rng.choice(wordings("refusal short" if short else group))
        return Question("missing", text, parts(_fill(answer, fact, mention)), [], [])

    def _untold(self, entity: Entity) -> Attribute | None:
        told = [fact.attribute for fact in entity.told.values()]
        barred = {a.label for a in told}.union(*(a.conflicts for a in told))
        if self.rng.random() < self.compounds:
            attribute = self.rng.choice(compounds(self.kinds_split))
            return attribute if attribute.label not in barred else None
        free = [a for a in self.by_type[entity.type] if a.label not in barred]
        return self.rng.choice(free) if free else None


def parts(marked: str) -> list[tuple[str, bool]]:
    """Text with OPEN and CLOSE as parts: (text, whether it was between them)."""
    found = []
    for i, piece in enumerate(marked.replace(CLOSE, OPEN).split(OPEN)):
        if piece:
            found.append((piece, i % 2 == 1))
    return found


def _fill(wording: str, fact: Fact, mention: str, mark: str = "", **more: str) -> str:
    """The wording with its places filled, and a capital at its beginning unless that looks like a code."""
    value = fact.value
    article = ("an " if value[0].lower() in "aeiou" else "a ") + value
    kind = fact.entity.type
    fields = {"e": mention, "v": value, "av": article, "l": fact.attribute.label, "t": kind.name, "p": kind.plural}
    if mark == "v":
        fields |= {"v": OPEN + value + CLOSE, "av": article[: -len(value)] + OPEN + value + CLOSE}
    elif mark == "e":
        # What is asked for is the name alone.
        fields["e"] = mention.replace(fact.entity.name, OPEN + fact.entity.name + CLOSE)
    text = _template(wording).format(**fields, **more)
    start = len(text) - len(text.lstrip(OPEN + '"'))
    first = text[start:].split(" ", 1)[0].rstrip(",:" + CLOSE)
    if first.isalpha() and first.islower():
        text = text[:start] + text[start].upper() + text[start + 1 :]
    return text


@cache
def _template(wording: str) -> str:
    return wording.replace("{a v}", "{av}")


@cache
def _own(attribute: Attribute, group: str, split: str) -> tuple[str, ...]:
    """The attribute's own wordings of a split."""
    return tuple(w for w in getattr(attribute, group) if attribute.wording_split(w) == split)


@cache
def _kinds_by_type(split: str) -> dict[EntityType, list[Attribute]]:
    found = defaultdict(list)
    for kind in kinds():
        if kind.split == split:
            found[kind.type].append(kind.attribute)
    return dict(found)


def wording_counts() -> dict[str, tuple[int, int]]:
    """Of each kind of fact, how many statements and how many questions there are for it."""
    general = len(set(wordings("statement"))), len(set(wordings("question")))
    return {
        kind.name: (len(kind.attribute.statements) + general[0], len(kind.attribute.questions) + general[1])
        for kind in kinds()
    }

"""
Events and their clauses: reads events.txt, and says who does what in the active, the passive, as a question and so on.

    event.clause()                        # "Ana Cruz will send the minutes to Tom by Friday"
    event.passive(["object", "time"])     # "the minutes will be sent by Friday"
    event.asked("time", passive=False)    # [("By when", "will Ana Cruz send the minutes", "Ana Cruz will send ...")]
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from .splits import place_split, split_of
from .tables import FOLDER


OPEN, CLOSE = "\x02", "\x03"  # around what an answer is about, as in facts.py
PEOPLE = ("person", "medic", "player", "party", "party2", "company", "company2", "name")
PERSONS = ("person", "medic", "player")  # who can speak
PLACES = ("city", "place")


@dataclass(frozen=True, eq=False)
class Pool:
    """Things by name; `kind`: "who", "where" or "what" asks for them."""

    kind: str
    members: tuple[str, ...]
    ends: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        return _members(self, split)


@cache
def _members(pool: Pool, split: str) -> tuple[str, ...]:
    return tuple(member for i, member in enumerate(pool.members) if place_split(i) == split)


@dataclass(frozen=True)
class Role:
    """
    What an action may have: `spec` says how a value is drawn, `before` and `after` stand around it, and each of `wh`
    asks for it by a word in front and, maybe, a preposition that stays where the role would stand.
    """

    before: str
    spec: str
    after: str
    wh: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Action:
    """Something that happens. `forms` are base, third person, past, participle and gerund."""

    domain: str
    forms: tuple[str, str, str, str, str]
    modes: str
    agent: Role
    object: Role | None
    roles: tuple[Role, ...]
    reasons: str

    @property
    def base(self) -> str:
        return self.forms[0]

    @property
    def split(self) -> str:
        return split_of("action " + self.base)

    @property
    def passive(self) -> bool:
        return self.object is not None and "a" not in self.modes


@dataclass(frozen=True)
class Part:
    """A role with its value."""

    role: Role
    text: str
    plural: bool = False


@dataclass(eq=False)
class Event:
    """
    An action with its parts by name: "agent" and "object", which need not be there, then numbered roles, "time" or
    "deadline", and "reason", in the order of a sentence. `mode`: p past, f future, r rule. `modal`: what a finite verb
    begins with, and the rest: ("is", "going to").
    """

    action: Action
    mode: str
    parts: dict[str, Part]
    modal: tuple[str, str] = ("will", "")
    stamped: bool = False  # told with a time of day beside it

    # The interface of a fact, for documents.
    @property
    def value(self) -> str:
        return self.parts["object" if "object" in self.parts else "agent"].text

    def rest(self, names: Iterable[str], mark: Iterable[str] = (), gap: str = "", end: str = "", object_: bool = True):
        """Object and roles among `names`; the preposition `end` where `gap` would be."""
        said = []
        for name, part in self.parts.items():
            if name == gap and end:
                said.append(end)
            elif name in names and name not in ("agent", gap) and (object_ or name != "object"):
                text = OPEN + part.text + CLOSE if name in mark else part.text
                said.append(part.role.before + text + part.role.after)
        return "".join(" " + text for text in said)

    def _finite(self) -> str:
        base, third, past, _, _ = self.action.forms
        first, more = self.modal
        if self.mode == "p":
            return past
        if first == "does":
            return f"has to {base}" if more else third
        return " ".join(filter(None, (first, more, base)))

    def _inverted(self) -> tuple[str, str]:
        """What stands before and after the subject of a question."""
        first, more = ("did", "") if self.mode == "p" else self.modal
        return first, " ".join(filter(None, (more, self.action.base)))

    def _passive_verb(self, plural: bool) -> tuple[str, str]:
        first, more = self.modal
        participle = self.action.forms[3]
        if self.mode == "p":
            return ("were" if plural else "was"), participle
        if first == "does":
            return (("have" if plural else "has"), "to be " + participle) if more else (_be(plural), participle)
        return (_be(plural) if first == "is" else first), " ".join(filter(None, (more, "be", participle)))

    def _subject(self, name: str, mark: Iterable[str]) -> str:
        text = self.parts[name].text
        return OPEN + text + CLOSE if name in mark else text

    def clause(self, names: Iterable[str] | None = None, mark: Iterable[str] = ()) -> str:
        """Active, with the agent."""
        names = self.parts if names is None else names
        return f"{self._subject('agent', mark)} {self._finite()}{self.rest(names, mark)}"

    def passive(self, names: Iterable[str] | None = None, mark: Iterable[str] = ()) -> str:
        """Passive, with "by" and the agent if that is among `names`."""
        names = self.parts if names is None else names
        first, verb = self._passive_verb(self.parts["object"].plural)
        by = f" by {self._subject('agent', mark)}" if "agent" in names and "agent" in self.parts else ""
        return f"{self._subject('object', mark)} {first} {verb}{by}{self.rest(names, mark, object_=False)}"

    def verb_phrase(self, form: int | None = None, names: Iterable[str] | None = None) -> str:
        """Without the agent: in one of `Action.forms`, or finite."""
        verb = self._finite() if form is None else self.action.forms[form]
        return verb + self.rest(self.parts if names is None else names)

    def yes_no(self, names: Iterable[str]) -> str:
        first, verb = self._inverted()
        return f"{first} {self.parts['agent'].text} {verb}{self.rest(names)}"

    def asked(self, name: str, names: Iterable[str], role: Role, passive: bool) -> list[tuple[str, str, str]]:
        """
        The ways to ask for the part `name`, which need not be there: (word, question after it, clause after it), with
        the parts `names` in them.
        """
        names = [n for n in names if n != name]
        if name == "agent":
            if passive:
                first, verb = self._passive_verb(self.parts["object"].plural)
                said = self.rest(names, object_=False)
                subject = self.parts["object"].text
                return [("By whom", f"{first} {subject} {verb}{said}", f"{subject} {first} {verb}{said}")]
            said = self._finite() + self.rest(names)
            return [(word, said, said) for word, _ in role.wh]
        if name == "object" and passive:
            first, verb = self._passive_verb(self.parts["object"].plural and role.wh[0][0].startswith("How many"))
            by = f" by {self.parts['agent'].text}" if "agent" in names else ""
            said = f"{first} {verb}{by}{self.rest(names)}"
            return [(role.wh[0][0], said, said)]
        ways = []
        several = bool(set(names) - {"agent", "object"})
        for word, end in role.wh[:1] if several else role.wh:  # not "What did she lose it on on Friday?"
            said = self.rest(names, gap=name, end=end, object_=not passive)
            if end and name not in self.parts:
                said += " " + end
            if passive:
                first, verb = self._passive_verb(self.parts["object"].plural)
                subject = self.parts["object"].text
                by = f" by {self.parts['agent'].text}" if "agent" in names else ""
                ways.append((word, f"{first} {subject} {verb}{by}{said}", f"{subject} {first} {verb}{by}{said}"))
            else:
                first, verb = self._inverted()
                subject = self.parts["agent"].text
                ways.append((word, f"{first} {subject} {verb}{said}", f"{subject} {self._finite()}{said}"))
        return ways


def _be(plural: bool) -> str:
    return "are" if plural else "is"


# -- the table --


@dataclass
class _Table:
    actions: list[Action] = field(default_factory=list)
    pools: dict[str, Pool] = field(default_factory=dict)
    wordings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    alike: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


@cache
def table() -> _Table:
    """What events.txt holds. Raises: ValueError for a line of another form."""
    found, sections = _Table(), []
    for line in (FOLDER / "events.txt").read_text(encoding="utf-8").splitlines():
        if re.match(r"\[(actions|pool|form|ask|refuse|answer)\b", line):
            sections.append((line.strip("[]"), []))
        elif line.startswith("! "):
            group = {verb.strip() for verb in line[2:].split(",")}
            for verb in group:
                found.alike[verb] |= group
        elif line.strip() and not line.startswith("# "):
            sections[-1][1].append(line)
    for head, lines in sections:
        name, _, more = head.partition(" | ")
        kind, *words = name.split()
        if kind == "pool":
            members = tuple(m.strip() for line in lines for m in line.split(",") if m.strip())
            ends = tuple(end.strip() for end in more.split(";") if end.strip())
            found.pools[words[0]] = Pool(words[1] if len(words) > 1 else "what", members, ends)
        elif kind != "actions":
            found.wordings[name] = lines
    for head, lines in sections:
        if head.startswith("actions"):
            domain, _, reasons = head.removeprefix("actions ").partition(" | ")
            found.actions += [_action(domain, reasons or "reasons", line, found.pools) for line in lines]
    return found


@cache
def wordings(group: str, split: str) -> tuple[str, ...]:
    """The forms or questions of a group, like "form any", that belong to a split by their place."""
    return tuple(w for i, w in enumerate(table().wordings[group]) if place_split(i) == split)


@cache
def actions(split: str) -> tuple[Action, ...]:
    return tuple(action for action in table().actions if action.split == split)


def _action(domain: str, reasons: str, line: str, pools: dict[str, Pool]) -> Action:
    fields = [part.strip() for part in line.split("|")]
    if len(fields) not in (4, 5):
        raise ValueError(f"events.txt: {line!r} needs verb, modes, who and what, and may have roles.")
    verb, modes, agent, thing, *roles = fields
    roles = [_role(role.strip(), pools) for role in "".join(roles).split(";") if role.strip()]
    return Action(
        domain,
        _forms(verb),
        modes,
        _role("{" + agent + "}", pools),
        None if thing == "-" else _role(thing if thing.startswith("{") else "{" + thing + "}", pools),
        tuple(roles),
        reasons,
    )


def _role(text: str, pools: dict[str, Pool]) -> Role:
    pattern, _, words = text.partition(" = ")
    if (match := re.fullmatch(r"([^{]*)\{([^}]+)\}(.*)", pattern)) is None:
        raise ValueError(f"events.txt: {text!r} is no role.")
    before, spec, after = match.groups()
    head, *more = spec.split()
    if head in pools:
        kind, spec = (more or [pools[head].kind])[0], head
    elif head in PEOPLE:
        kind = "who"
    else:
        kind = "where" if head in PLACES else head
    return Role(before, spec, after, _question_words(before.strip(), kind, words))


def _question_words(before: str, kind: str, words: str) -> tuple[tuple[str, str], ...]:
    if words:
        return tuple((word.strip(), "") for word in words.split("/"))
    front = before.capitalize() + " " if before else ""
    if kind == "where":
        return (("Where", ""),)
    if kind == "who":
        return ((front + "whom", ""), ("Who", before)) if before else (("Who", ""),)
    word = "how much" if kind == "money" else "what"
    both = ((front + word, ""), (word.capitalize(), before)) if before else ((word.capitalize(), ""),)
    return both


def _forms(verb: str) -> tuple[str, str, str, str, str]:
    base, *irregular = verb.split("/")
    word, _, particle = base.partition(" ")
    past = irregular[0] if irregular else _past(word)
    participle = irregular[-1] if irregular else past
    third = word + "es" if re.search(r"(s|x|ch|sh|o)$", word) else re.sub(r"(?<![aeiou])y$", "ie", word) + "s"
    if past == word + word[-1] + "ed" or word in DOUBLED:
        gerund = word + word[-1] + "ing"
    else:
        gerund = (word if word.endswith("ee") else word.removesuffix("e")) + "ing"
    gerund = gerund if word != "shoe" else "shoeing"
    return tuple(f"{form} {particle}".strip() for form in (word, third, past, participle, gerund))


DOUBLED = ("cut", "dig", "forget", "win", "swim", "run", "put", "get", "set")


def _past(word: str) -> str:
    if word.endswith("e"):
        return word + "d"
    return re.sub(r"(?<![aeiou])y$", "i", word) + "ed"

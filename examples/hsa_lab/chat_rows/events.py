"""
Events: what somebody does with something, when, where, why; sentences that tell them, and questions about each part.

    events = Events(world)
    event = events.add()
    events.state(event)         # "It was agreed that Ana Cruz will send the minutes to Tom by Friday."
    events.ask("direct", short=False)

No two events of one action share a part, so that any of them says which one is meant. See events.txt for actions and
wordings, and clauses.py for the grammar.
"""

import re
from dataclasses import dataclass, field
from functools import cache

from .clauses import CLOSE, OPEN, PERSONS, Action, Event, Part, Role, actions, table, wordings
from .facts import FRAMED, Question, World, parts
from .tables import wordings as general
from .tables import words
from .values import LETTERS


MOST_ALIKE = 3  # events of one action in a row
SAME = 0.3  # share of the events that are of an action that was told before
KNOWN = 0.3  # share of the people who have done something else
UNSAID = 0.12  # share of the events that do not tell who
PASSIVE = 0.2
FRAGMENT = 0.15  # share of the sentences as answers that are the part alone
VARIED = 0.4  # share of the things of training rows that get an adjective
ENDED = 0.35  # share of the things with more words behind them
OWN = 0.35  # share of the questions in a wording for their part alone, where there is one
SMALL = 100  # numbers below belong to all splits
# Kinds of question and how often they are asked.
QUESTIONS = {"direct": 0.70, "both": 0.08, "check": 0.06, "missing": 0.16}
WHEN = {
    "date": ("on ", ("When", "On which day", "On what date")),
    "weekday": ("on ", ("When", "On which day", "On what day of the week")),
    "month": ("in ", ("When", "In which month")),
    "time": ("at ", ("When", "At what time")),
    "deadline": ("by ", ("By when", "By what date")),
}
REASON = Role("because ", "", "", (("Why", ""),))
CAUSE = Role("because of ", "", "", (("Why", ""),))
HEADINGS = 0.3  # and for heads of documents
# What kinds of document tell: modes of the events and those who act, or all.
STYLES = {
    "chat": ("pf", PERSONS),
    "minutes": ("ffp", None),
    "contract": ("r", ("party",)),
    "mail": ("pf", None),
    "notes": ("p", None),
    "log": ("p", ("systems",)),
}


@dataclass(eq=False)
class Heading:
    """
    What the head of a document tells: `values` answer the questions of the group "ask `group`" of events.txt, in which
    `fields` stand.
    """

    group: str
    values: list[str]
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        return self.group, *self.fields.values()


class Events:
    """
    The events of one row, told beside the facts of `world`, whose names, values and random numbers they take.

    Args:
        split: of the actions and wordings; default: that of `world`.
    """

    def __init__(self, world: World, split: str | None = None):
        self.world, self.source, self.rng = world, world.source, world.rng
        self.split = split or world.source.split
        self.told: list[Event] = []
        self.headings: list[Heading] = []  # set by who tells them
        self._people: list[str] = []
        self._asked: set = set()

    # -- what happens --

    def add(self, style: str | None = None) -> Event | None:
        """A new event, one that fits a kind of document in `STYLES`; None if the split has none."""
        modes, agents = STYLES.get(style, ("pppfffr", None))
        fitting = _fitting(self.split, modes, agents)
        again = [event.action for event in self.told if event.action in fitting]
        for _ in range(20):
            if not fitting:
                return None
            action = self.rng.choice(again if again and self.rng.random() < SAME else list(fitting))
            if sum(event.action.base == action.base for event in self.told) >= MOST_ALIKE:
                continue
            mode = self.rng.choice([mode for mode in modes if mode in action.modes])
            if (event := self._draw(action, mode, style)) is not None:
                self.told.append(event)
                return event
        return None

    def forget(self, untold: list[Event]) -> None:
        """Takes back events that nothing tells."""
        self.told = [event for event in self.told if event not in untold]

    def _draw(self, action: Action, mode: str, style: str | None) -> Event | None:
        rng, found = self.rng, {}
        said = not action.passive or mode == "r" or style in ("chat", "log") or rng.random() >= UNSAID
        if said:
            # In a chat those speak who have a name.
            chat = style == "chat"
            found["agent"] = Part(action.agent, self._person("player")) if chat else self._part(action.agent)
        if action.object is not None:
            found["object"] = self._part(action.object)
        most, asked = rng.choice((1, 1, 2, 2, 3)), set()
        extra = 0
        for number, role in enumerate(_roles(action, mode)):
            ways = {word for word, _ in role.wh}
            if extra < most and not ways & asked and rng.random() < 0.6:
                found[f"role {number}"] = self._part(role)
                asked |= ways
                extra += 1
        if mode != "r" and style != "log" and (extra == 0 or (extra < most and rng.random() < 0.7)):
            found |= self._when(mode)
        if mode != "r" and (len(found) < 3 or rng.random() < 0.3):
            found["reason"] = self._why(action, mode)
        event = Event(action, mode, found, self._modal(action, mode))
        return event if self._is_new(event) else None

    def _modal(self, action: Action, mode: str) -> tuple[str, str]:
        if mode == "r" and "m" in action.modes:
            return "may", ""
        if mode == "r":
            return self.rng.choice((("does", ""), ("must", ""), ("shall", ""), ("does", "have to")))
        return self.rng.choice((("will", ""), ("will", ""), ("will", ""), ("is", "going to")))

    def _is_new(self, event: Event) -> bool:
        values = [part.text.lower() for part in event.parts.values()]
        if any(one in other for i, one in enumerate(values) for j, other in enumerate(values) if i != j):
            return False
        same = [e for e in self.told if e.action.base == event.action.base]
        others = [part.text.lower() for e in same for part in e.parts.values()]
        return not any(one in other or other in one for one in values for other in others)

    def _when(self, mode: str) -> dict[str, Part]:
        kind = self.rng.choice(("date", "date", "weekday", "month", "time"))
        if mode == "f" and self.rng.random() < 0.5:
            kind = "deadline"
        if kind in ("weekday", "month"):
            text = self.source.word(kind)
        elif kind == "time":
            text = self.source.value("time")
        elif kind == "deadline" and self.rng.random() < 0.3:
            text = self.rng.choice((self.source.word("weekday"), f"the end of {self.source.word('month')}"))
        else:
            for _ in range(5):
                text = self.source.value("date")
                if mode == "p" or not text[:4].isdigit():
                    break
            if self.rng.random() < (0.9 if mode == "f" else 0.3):
                text = re.sub(r"(?<=\w),? \d{4}$", "", text)
        before, words_ = WHEN[kind]
        role = Role(before, kind, "", tuple((word, "") for word in words_))
        return {"deadline" if kind == "deadline" else "time": Part(role, text)}

    def _why(self, action: Action, mode: str) -> Part:
        if action.reasons == "reasons" and mode == "p" and self.rng.random() < 0.2:
            return Part(CAUSE, self.source.word("cause"))
        return Part(REASON, self.draw(action.reasons)[0])

    def _part(self, role: Role) -> Part:
        text, plural = self.draw(role.spec)
        return Part(role, text, plural)

    # -- values --

    def draw(self, spec: str) -> tuple[str, bool]:
        """A value of a pool of events.txt or of values.py, and whether it is plural."""
        head, *more = spec.split()
        if (pool := table().pools.get(head)) is not None:
            text = self.rng.choice(pool.of(self.source.split))
            if self.source.split == "train" and text.startswith("the ") and self.rng.random() < VARIED:
                text = f"the {self.source.word('adj')} {text[4:]}"
            if pool.ends and self.rng.random() < ENDED:
                text += " " + self.rng.choice(pool.ends)
            return self._named(text.replace("*", "")), "*" in text
        if head in PERSONS:
            return self._person(head), False
        if head in ("party", "party2"):
            return (self.draw("parties")[0] if self.rng.random() < 0.7 else self.source.value("company")), False
        if head in ("company", "company2"):
            return self.source.value("company"), False
        if head == "int" and int(more[1]) < SMALL:
            number, unit = self.rng.randint(int(more[0]), int(more[1])), " ".join(more[2:])
            return f"{number}{unit}" if unit == "%" else f"{number} {unit}", True
        if head in words() and head not in ("place", "city"):
            text = self.source.word(head)
            return text, head in ("food", "crop") and text.endswith("s")
        return self.source.value(spec), head == "int"

    def _named(self, text: str) -> str:
        text = re.sub(r"\{(name|company|date)\}", lambda match: self.source.value(match[1]), text)
        if not re.search(r"\{d[3-9]\}", text):
            # Of few numbers none may be of the split.
            text = re.sub(r"\{A\}", lambda match: self.rng.choice(LETTERS), text)
            text = re.sub(r"\{d([12])\}", lambda match: str(self.rng.randrange(2, 10 ** int(match[1]))), text)
        return self.source.name(text) if "{" in text else text

    def _person(self, kind: str) -> str:
        """Somebody, whose first and last name nobody else in the row has."""
        if kind != "medic" and self._people and self.rng.random() < KNOWN:
            return self.rng.choice(self._people)
        way = self.rng.random()
        if kind == "medic":
            return self.draw("medics")[0]
        if kind == "person" and way < 0.2:
            return self.draw("roles")[0]
        name = self._stranger(way > 0.7)
        self._people.append(name)
        return name

    def _stranger(self, first: bool = False) -> str:
        """A name, or a first name, no part of which is that of somebody known."""
        known = {word for person in self._people for word in person.split()}
        for _ in range(20):
            name = self.source.word("first") if first else self.source.value("name")
            if not known & set(name.split()):
                break
        return name

    def meet(self, people: list[str]) -> None:
        """People who are mentioned anyway, and may do something."""
        self._people += people

    # -- telling --

    def state(self, event: Event) -> str:
        """A sentence that tells an event."""
        group = "any"
        if "agent" not in event.parts:
            return self._fill(self._form("form passive"), event)
        if event.mode == "r":
            group = "rule" if event.action.agent.spec == "party" and event.modal[0] != "may" else "any"
        elif event.action.agent.spec in PERSONS and self.rng.random() < 0.6:
            group = "future person" if event.mode == "f" else "past person"
        if event.mode == "f" and group != "any" and self.rng.random() < 0.15:
            return self._fill(self._form("form todo", event), event)
        if group == "any" and event.action.passive and self.rng.random() < PASSIVE:
            return self._fill(self._form("form passive"), event)
        return self._fill(self._form("form " + group), event)

    def line_of_chat(self, event: Event) -> tuple[str, str]:
        """Who says it, in the first person, and what."""
        group = "form chat" if event.mode == "f" else "form chat past"
        return event.parts["agent"].text, self._fill(self._form(group), event, capital=False)

    def line_of_log(self, event: Event, clock: str) -> str:
        """A line of a log, which is written at that time of day."""
        role = Role("at ", "time", "", (("When", ""), ("At what time", "")))
        text = self._fill(self._form("form log"), event, capital=False)
        if self.rng.random() < 0.6:
            text = text.replace(" the ", " ", 1).replace(" because ", ": ", 1)
        reason = event.parts.pop("reason", None)
        event.parts["time"], event.stamped = Part(role, clock), True
        if reason is not None:
            event.parts["reason"] = reason
        return text

    def _form(self, group: str, event: Event | None = None) -> str:
        found = wordings(group, self.split)
        if event is not None and not {"time", "deadline"} & event.parts.keys():
            found = [form for form in found if "{when}" not in form]
        return self.rng.choice(found)

    def _fill(self, form: str, event: Event, capital: bool = True) -> str:
        said = event.parts
        untimed = [name for name in said if name not in ("time", "deadline")]

        def said_by(match: re.Match) -> str:
            name = match[1]
            if name == "clause":
                return event.clause()
            if name == "passive":
                return event.passive()
            if name == "A":
                return said["agent"].text
            if name == "who":
                return self._stranger()
            if name == "act":
                return event.verb_phrase()
            if name == "when":
                return next(part.role.before + part.text for n, part in said.items() if n in ("time", "deadline"))
            text = event.verb_phrase({"ger": 4, "pp": 3}.get(name, 0), untimed if name.lower() == "core" else None)
            return text[0].upper() + text[1:] if name[0].isupper() else text

        return self._begin(re.sub(r"\{(\w+)\}", said_by, form)) if capital else re.sub(r"\{(\w+)\}", said_by, form)

    @staticmethod
    def _begin(text: str) -> str:
        """With a capital, unless it begins with what looks like a code."""
        start = len(text) - len(text.lstrip(OPEN + '"'))
        first = text[start:].split(" ", 1)[0].rstrip(",:" + CLOSE)
        if first.replace("'", "").isalpha() and first.islower():
            return text[:start] + text[start].upper() + text[start + 1 :]
        return text

    # -- questions --

    def questions(self, count: int, short: bool) -> list[Question]:
        """Up to `count` questions of mixed kinds, some for headings, in random order."""
        shares = QUESTIONS | ({"heading": HEADINGS if self.told else 9.0} if self.headings else {})
        kinds = self.rng.choices(list(shares), list(shares.values()), k=count)
        asked = [self.ask(kind, short) or self.ask("direct", short) for kind in kinds]
        return [question for question in asked if question is not None]

    def ask(self, kind: str, short: bool) -> Question | None:
        """A question of a kind in `QUESTIONS` that was not asked before, or None if there is nothing to ask."""
        for _ in range(10):
            question = getattr(self, "_ask_" + kind)(short) if self.told or kind == "heading" else None
            if question is None:
                continue
            about, text = [id(fact) for fact in question.facts], question.text.lower()
            key = (kind, *about, *question.expected) if about else (kind, text)
            leaked = kind not in ("check", "heading") and any(e.lower() in text for e in question.expected)
            if key not in self._asked and not leaked:
                self._asked.add(key)
                if self.rng.random() < FRAMED:
                    question.text = self.rng.choice(general("asked", self.split)).format(q=question.text)
                return question
        return None

    def _given(self, event: Event, asked: str) -> list[str]:
        """The parts that a question for another part tells."""
        names, rng = [name for name in ("agent", "object") if name in event.parts], self.rng
        others = [name for name in event.parts if name not in ("agent", "object", "reason", asked)]
        if others and (asked in ("agent", "object") and rng.random() < 0.4 or rng.random() < 0.15):
            names.append(rng.choice(others))
        if not {"agent", "object"} & set(names) - {asked}:
            names += others or ["reason"]  # nothing else would say which event is meant
        return [name for name in event.parts if name in names]

    def _ways(self, event: Event, name: str, role: Role) -> list[tuple[str, str, str]]:
        """The ways to ask for a part, as `Event.asked` gives them."""
        names, passive = self._given(event, name), False
        if event.action.passive:
            passive = "agent" not in event.parts and name != "agent" or self.rng.random() < PASSIVE
        if passive and name not in ("agent", "object") and self.rng.random() < 0.7:
            names = [given for given in names if given != "agent"]
        if passive and name == "agent" and role.wh[0][0] != "Who":
            passive = False
        return event.asked(name, names, role, passive)

    def _question(self, event: Event, name: str, role: Role) -> tuple[str, str, str]:
        """A question for a part, and its words and clause, as a refusal says them again."""
        word, inverted, said = self.rng.choice(self._ways(event, name, role))
        fields = {"Wh": word, "wh": word[0].lower() + word[1:], "inv": inverted, "sub": said}
        if (group := self._own_questions(event, name, role)) and self.rng.random() < OWN:
            given, agent = self._given(event, name), event.parts.get("agent")
            given = [part for part in given if part != name]
            fields |= {"A": agent.text if agent else "", "act": event.verb_phrase(None, given)}
            fields |= {"inf": event.verb_phrase(0, given), "ger": event.verb_phrase(4, given)}
        else:
            group = "ask any"
        text = self.rng.choice(wordings(group, self.split)).format(**fields)
        return self._begin(text), fields["wh"], said

    @staticmethod
    def _own_questions(event: Event, name: str, role: Role) -> str | None:
        """The group of questions that only fit one part."""
        person = event.action.agent.spec in PERSONS
        own = person if event.mode == "f" else event.modal[0] != "may"
        if name == "agent" and role.wh[0][0] == "Who" and own:
            return "ask agent " + {"f": "future", "p": "past", "r": "rule"}[event.mode]
        if name == "deadline" and person and "agent" in event.parts:
            return "ask deadline"
        return "ask reason" if name == "reason" else None

    def _answer(self, event: Event, names: list[str], short: bool) -> list[tuple[str, bool]]:
        if short:
            answer = [part for name in names for part in ((event.parts[name].text, True), (", ", False))]
            return answer[:-1]
        if len(names) == 1 and self.rng.random() < FRAGMENT:
            part = event.parts[names[0]]
            return parts(self._begin(f"{part.role.before}{OPEN}{part.text}{CLOSE}{part.role.after}."))
        core = [name for name in event.parts if name in ("agent", "object", *names)]
        if "agent" not in event.parts or (event.action.passive and self.rng.random() < PASSIVE):
            return parts(self._begin(event.passive(core, names) + "."))
        return parts(self._begin(event.clause(core, names) + "."))

    @staticmethod
    def _expected(part: Part) -> str:
        return re.sub(r"^(the|an?) ", "", part.text)

    def _ask_direct(self, short: bool) -> Question | None:
        event = self.rng.choice(self.told)
        name = self.rng.choice(list(event.parts))
        if name == "agent" and "object" not in event.parts and len(event.parts) == 1:
            return None
        text, _, _ = self._question(event, name, event.parts[name].role)
        answer = self._answer(event, [name], short)
        return Question("direct", text, answer, [event], [self._expected(event.parts[name])])

    def _ask_both(self, short: bool) -> Question | None:
        event = self.rng.choice(self.told)
        others = [name for name in event.parts if name not in ("agent", "object")]
        if len(event.parts) < 3 or not others:
            return None
        second = self.rng.choice(others)
        first = self.rng.choice([name for name in event.parts if name != second])
        if first == "agent" and "object" not in event.parts:
            return None
        names = [name for name in ("agent", "object") if name in event.parts]
        passive = "agent" not in event.parts
        word, inverted, said = event.asked(first, names, event.parts[first].role, passive)[0]
        word2 = event.parts[second].role.wh[0][0]
        if word == word2:
            return None
        fields = {"Wh": word, "wh": word[0].lower() + word[1:], "inv": inverted, "sub": said}
        form = self.rng.choice(wordings("ask both", self.split))
        text = form.format(wh2=word2[0].lower() + word2[1:], **fields)
        text = re.sub(r"And (\w)", lambda match: "And " + match[1].lower(), text)
        expected = [self._expected(event.parts[name]) for name in (first, second)]
        return Question("both", self._begin(text), self._answer(event, [first, second], short), [event], expected)

    def _ask_check(self, short: bool) -> Question | None:
        event = self.rng.choice([e for e in self.told if "agent" in e.parts] or [None])
        if event is None:
            return None
        name, true = self.rng.choice(list(event.parts)), self.rng.random() < 0.5
        part, said = event.parts[name], dict(event.parts)
        if not true:
            if name in ("reason", "time", "deadline"):
                other = self._why(event.action, event.mode) if name == "reason" else None
                other = other or self._when(event.mode).get(name)
            else:
                other = self._part(part.role)
            if other is None or other.text.lower() in part.text.lower() or part.text.lower() in other.text.lower():
                return None
            said[name] = other
        shown = [n for n in event.parts if n in ("agent", "object", name)]
        asked = Event(event.action, event.mode, said, event.modal)
        yes_no = asked.yes_no(shown)
        form = self.rng.choice(wordings("ask check", self.split))
        text = form.format(Q=yes_no[0].upper() + yes_no[1:], clause=asked.clause(shown))
        word = "Yes" if true else "No"
        if short:
            return Question("check", text, [(word, True)], [event], [word])
        answer = [(word, True), (", ", False), *parts(event.clause(shown, [name]) + ".")]
        return Question("check", text, answer, [event], [word, self._expected(part)])

    def _ask_heading(self, short: bool) -> Question | None:
        """Who was there, who wrote to whom and so on, where one head only can be meant."""
        heading = self.rng.choice(self.headings)
        if sum(other.key == heading.key for other in self.headings) > 1:
            return None
        text = self.rng.choice(wordings("ask " + heading.group, self.split)).format(**heading.fields)
        said = [part for i, value in enumerate(heading.values) for part in ((", ", False), (value, True))][1:]
        if len(heading.values) > 1:
            said[-2] = (" and ", False)
        if not short:
            form = dict(line.split(": ", 1) for line in table().wordings["answer"])[heading.group]
            before, after = (part.format(**heading.fields) for part in form.split("{v}"))
            said = [part for part in ((before, False), *said, (after, False)) if part[0]]
        return Question("direct", text, said, [heading], heading.values)

    def _ask_missing(self, short: bool) -> Question | None:
        """A part that is not told, or any part of what does not happen."""
        way, event = self.rng.random(), self.rng.choice(self.told)
        found = self._untold(event) if way < 0.55 else self._strange(event, way < 0.8)
        if found is None:
            return None
        event, name, role = found
        text, word, said = self._question(event, name, role)
        if short:
            answer = self.rng.choice(general("refusal short"))
        else:
            answer = self.rng.choice(table().wordings["refuse"]).format(wh=word, sub=said)
        return Question("missing", text, [(answer, False)], [], [])

    def _untold(self, event: Event) -> tuple[Event, str, Role] | None:
        """A part of an event that the text does not tell."""
        told = {word for part in event.parts.values() for word, _ in part.role.wh}
        roles = _roles(event.action, event.mode)
        found = [("role", role) for role in roles if not told & {word for word, _ in role.wh}]
        if "agent" not in event.parts:
            found += [("agent", event.action.agent)] * 2
        if event.mode != "r" and "reason" not in event.parts:
            found.append(("reason", REASON))
        timed = any(_is_about_time(part.role) for part in event.parts.values())
        if event.mode != "r" and not event.stamped and not timed and not {"time", "deadline"} & event.parts.keys():
            found.append(("time", Role("on ", "date", "", (("When", ""), ("On which day", "")))))
        if not found:
            return None
        return event, *self.rng.choice(found)

    def _strange(self, like: Event, known: bool) -> tuple[Event, str, Role] | None:
        """An event that does not happen: `known` people do it, or it is done to a known thing."""
        told = {event.action.base for event in self.told}
        if known and self.rng.random() < 0.5:
            # Somebody else than the one who does it, with another thing.
            action, agent = like.action, self.rng.choice(self.told).parts.get("agent")
            doers = [e.parts["agent"].text for e in self.told if e.action.base == action.base and "agent" in e.parts]
            if agent is None or agent.text in doers or action.agent.spec not in PERSONS:
                return None
            if agent.role.spec not in PERSONS:
                return None
        else:
            action = self.rng.choice(actions(self.split))
            alike = table().alike[action.base] | {action.base}
            agent = like.parts.get("agent") if known else self._part(action.agent)
            if told & alike or agent is None or (known and agent.role.spec != action.agent.spec):
                return None
        mode = self.rng.choice([mode for mode in action.modes if mode in "pfr"])
        strange = Event(action, mode, {"agent": agent}, self._modal(action, mode))
        if action.object is not None:
            thing = like.parts.get("object") if not known else None
            fits = thing is not None and action.object.spec == thing.role.spec
            strange.parts["object"] = thing if fits else self._part(action.object)
        if not self._is_new_but_known(strange):
            return None
        choices = [("role", role) for role in _roles(action, mode)]
        if "object" in strange.parts:
            choices.append(("object", action.object))
            if not known:
                choices.append(("agent", action.agent))
        if mode != "r":
            choices += [("reason", REASON), ("time", Role("on ", "date", "", (("When", ""),)))]
        name, role = self.rng.choice(choices)
        return strange, name, role

    def _is_new_but_known(self, strange: Event) -> bool:
        """Whether no told event of the action has a part of it."""
        texts = [part.text.lower() for part in strange.parts.values()]
        same = [e for e in self.told if e.action.base == strange.action.base]
        return not any(
            one in part.text.lower() or part.text.lower() in one
            for e in same for part in e.parts.values() for one in texts
        )  # fmt: skip


def _roles(action: Action, mode: str) -> list[Role]:
    """The roles that an action may have: what is past has no "within" and "every"."""
    return [role for role in action.roles if mode != "p" or not role.before.startswith(("within", "every"))]


def _is_about_time(role: Role) -> bool:
    """Whether a role may answer "when", too: "after 3 hours"."""
    return role.spec.startswith(("int", "periods")) and role.before.startswith(("after", "within", "every", "in"))


@cache
def _fitting(split: str, modes: str, agents: tuple[str, ...] | None) -> dict[Action, None]:
    return {
        action: None
        for action in actions(split)
        if set(modes) & set(action.modes) and (agents is None or action.agent.spec in agents)
    }

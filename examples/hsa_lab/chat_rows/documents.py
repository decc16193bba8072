"""
Made-up documents that are full of facts: minutes, contracts, chat logs, mails, log files, code, settings, tables,
records and notes.

    pieces = make_document("minutes", world, 600)

A document is a list of pieces: (text, the facts it tells). The text of a piece begins with its line ends.
"""

import json
from collections import defaultdict
from functools import cache

from .clauses import Event
from .events import Events, Heading
from .facts import Entity, Fact, World
from .splits import number_split
from .tables import FOLDER


Piece = tuple[str, list[Fact | Event | Heading]]
# Characters a token, about, by kind of document: those with many numbers have fewer.
CHARACTERS = {"log": 1.8, "table": 2.2, "records": 2.5, "code": 2.5, "chat": 2.7}
OTHER_CHARACTERS = 3.2
TECHNICAL = {"server", "database", "service", "app", "printer", "router", "function", "repository", "job", "sensor"}


@cache
def fillers() -> dict[str, tuple[str, ...]]:
    found, name = defaultdict(list), ""
    for line in (FOLDER / "fillers.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line and not line.startswith("# Lines"):
            found[name].append(line.replace("\\n", "\n"))
    return {name: tuple(lines) for name, lines in found.items()}


def _filler(world: World, group: str) -> str:
    source, text = world.source, world.rng.choice(fillers()[group])
    while "{who}" in text:
        text = text.replace("{who}", source.value("name"), 1)
    noun = source.word("noun")
    for mark, word in (("{first}", source.word("first")), ("{noun}", noun), ("{Noun}", noun.capitalize())):
        text = text.replace(mark, word)
    return text.replace("{n}", str(world.rng.randrange(2, 9)))


class _Writer:
    """Collects pieces until they are about as long as asked for. `events`: told beside the facts, by their share."""

    def __init__(self, characters: float, events: Events | None, share: float):
        self.pieces: list[Piece] = []
        self.room, self.events, self.share = characters, events, share

    def event(self, style: str) -> Event | None:
        """Now and then an event."""
        return self.events.add(style) if self.events and self.events.rng.random() < self.share else None

    def head(self, text: str, *headings: Heading) -> bool:
        """Adds a piece with headings, which count where events are told."""
        found = list(headings) if self.events else []
        if added := self.add(text, found):
            if self.events:
                self.events.headings += found
        return added

    def add(self, text: str, facts: list[Fact | Event | Heading] | None = None) -> bool:
        """Adds a piece if there is room, and says whether there was."""
        if self.pieces and len(text) > self.room:
            return False
        self.pieces.append((text, facts or []))
        self.room -= len(text)
        return True


def _statements(world: World, writer: _Writer, style: str, share: float):
    """For ever: a sentence and its facts, or None where a filler should stand."""
    while True:
        facts = world.add()
        world.rng.shuffle(facts)
        while facts:
            if world.rng.random() > share:
                yield None
                continue
            if (event := writer.event(style)) is not None:
                yield writer.events.state(event), [event]
                continue
            told = [facts.pop()]
            partner = next((f for f in facts if f.entity is told[0].entity), None)
            if partner is not None and world.rng.random() < 0.25:
                facts.remove(partner)
                told.append(partner)
            yield world.state(told), told


def _clock(world: World, minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _chat(world: World, writer: _Writer) -> None:
    source, rng = world.source, world.rng
    people = [source.word("first") for _ in range(rng.randrange(2, 6))]
    minutes = rng.randrange(480, 1000)
    style = rng.randrange(4)
    date = source.value("date")
    heading = rng.choice(("Chat export", "#general", "Messages", "Channel log"))
    writer.head(f"\n\n{heading}, {date}", Heading("chat date", [date]))
    if writer.events:
        writer.events.meet(people)
    for told in _statements(world, writer, "chat", 0.45):
        minutes += rng.randrange(4)
        text, facts = told or (_filler(world, "chat"), [])
        who, clock = rng.choice(people), _clock(world, minutes)
        if facts and isinstance(facts[0], Event) and rng.random() < 0.7:
            who, text = writer.events.line_of_chat(facts[0])
        elif facts and rng.random() < 0.4:
            opening = ("fyi: ", "btw, ", "for the record: ", "hey, ", "just heard: ", "reminder: ", "ok so: ")
            text = rng.choice(opening) + text
        line = (f"[{clock}] {who}: {text}", f"{who} ({clock}): {text}", f"<{who}> {text}", f"{clock} {who} > {text}")
        if not writer.add("\n" + line[style], facts):
            return


def _minutes(world: World, writer: _Writer) -> None:
    source, rng = world.source, world.rng
    heading = rng.choice(("Minutes", "Minutes of the meeting", "Record of the session", "Protocol"))
    present = [source.value("name") for _ in range(rng.randrange(3, 6))]
    if writer.events:
        writer.events.meet(present)
    date, absent = source.value("date"), source.value("name")
    asked = [Heading("minutes date", [date]), Heading("minutes present", present)]
    asked += [Heading("minutes number", [str(len(present))]), Heading("minutes was", ["Yes"], {"x": present[0]})]
    asked += [Heading("minutes was", ["No"], {"x": absent})] if absent not in present else []
    writer.head(f"\n\n{heading}, {date}\nPresent: {', '.join(present)}", *asked)
    item, told = 0, _statements(world, writer, "minutes", 0.5)
    while True:
        item += 1
        topic, number = source.word("topic"), str(item)
        asked = [Heading("item topic", [topic], {"n": number}), Heading("item number", [number], {"x": topic})]
        if not writer.head(f"\n\n{item}. {topic.capitalize()}\n" + _filler(world, "minutes"), *asked):
            return
        for _ in range(rng.randrange(2, 6)):
            text, facts = next(told) or (_filler(world, "minutes"), [])
            if not writer.add(" " + text, facts):
                return


def _contract(world: World, writer: _Writer) -> None:
    source, rng = world.source, world.rng
    first, second = source.value("company"), source.value("company")
    asked = [Heading("contract parties", [first, second]), Heading("contract other", [second], {"x": first})]
    writer.head(f"\n\nAGREEMENT\nbetween {first} and {second}", *asked)
    clause, told, sign = 0, _statements(world, writer, "contract", 0.45), rng.choice(("§ ", "Clause ", "Article ", ""))
    while True:
        clause += 1
        if not writer.add(f"\n\n{sign}{clause}"):
            return
        for part in range(1, rng.randrange(3, 6)):
            text, facts = next(told) or (_filler(world, "contract"), [])
            if not writer.add(f"\n({part}) {text}", facts):
                return


def _mail(world: World, writer: _Writer) -> None:
    source, rng = world.source, world.rng
    told = _statements(world, writer, "mail", 0.6)
    while True:
        sender, to = source.value("name"), source.value("name")
        topic = source.word("topic")
        subject = rng.choice(("", "Re: ", "Fwd: ")) + topic
        asked = [Heading("mail subject", [topic], {"x": sender, "y": to})]
        asked += [Heading("mail sender", [sender], {"y": to}), Heading("mail recipient", [to], {"x": sender})]
        if not writer.head(f"\n\nFrom: {sender}\nTo: {to}\nSubject: {subject}\n\nDear {to.split()[0]},\n", *asked):
            return
        for i in range(rng.randrange(3, 8)):
            text, facts = next(told) or (_filler(world, "mail"), [])
            if not writer.add(("\n" if i == 0 else " ") + text, facts):
                return
        writer.add(f"\n\n{rng.choice(('Best wishes', 'Regards', 'Yours', 'Kind regards', 'Cheers'))},\n{sender}")


def _notes(world: World, writer: _Writer) -> None:
    rng, told = world.rng, _statements(world, writer, "notes", 0.8)
    writer.add("\n\n" + rng.choice(("Notes", "Notebook", "What I want to remember", "Diary", "Summary of the week")))
    while True:
        bullet = rng.choice(("- ", "* ", "", ""))
        for i in range(rng.randrange(2, 7)):
            text, facts = next(told) or (_filler(world, "notes"), [])
            before = "\n" + bullet if bullet else ("\n\n" if i == 0 else " ")
            if not writer.add(before + text, facts):
                return


def _profiles(world: World, writer: _Writer) -> None:
    """A short article about each of some things."""
    while True:
        for thing in _group(world, 4):
            facts = world.rng.sample(list(thing.told.values()), len(thing.told))
            if not writer.add(f"\n\n{thing.name}\n"):
                return
            for i, fact in enumerate(facts):
                if not writer.add(("\n" if i == 0 else " ") + world.state([fact]), [fact]):
                    return


def _log(world: World, writer: _Writer) -> None:
    source, rng = world.source, world.rng
    writer.add("\n\n" + rng.choice(("Log file", "system.log", "service log", "Output of the last run")))
    day, seconds = f"{rng.randrange(2019, 2030)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}", 0
    seconds = rng.randrange(20000)
    while True:
        facts = world.add(types=TECHNICAL)
        while facts:
            seconds += rng.randrange(1, 40)
            if (event := writer.event("log")) is not None:
                while number_split(clock := f"{_clock(world, seconds // 60)}:{seconds % 60:02d}") != source.split:
                    seconds += 1
                if not writer.add(f"\n{day} {clock} " + writer.events.line_of_log(event, clock), [event]):
                    return
                continue
            stamp = f"\n{day} {_clock(world, seconds // 60)}:{seconds % 60:02d} "
            if rng.random() < 0.5:
                if not writer.add(stamp + _filler(world, "log")):
                    return
                continue
            fact = facts.pop()
            label, name, value = fact.attribute.label, fact.entity.name, fact.value
            text = rng.choice(
                (
                    f"INFO {name}: {label} set to {value}",
                    f"INFO {name} {label.replace(' ', '_')}={value}",
                    f"NOTICE [{name}] {label} changed, now {value}",
                    f"DEBUG {source.word('noun')}: {label} of {name} is {value}",
                )
            )
            if not writer.add(stamp + text, [fact]):
                return


def _group(world: World, most: int, types: set[str] | None = None) -> list[Entity]:
    """New things of one type with the same attributes."""
    facts = world.add(world.rng.randrange(3, most + 1), world.rng.randrange(2, 6), types=types)
    return list(dict.fromkeys(fact.entity for fact in facts))


def _table(world: World, writer: _Writer) -> None:
    style = world.rng.choice(("markdown", "csv", "tabs"))
    while True:
        if not (things := _group(world, 14)):
            return
        heads = [things[0].type.name, *things[0].told]
        rule = "\n|" + "---|" * len(heads) if style == "markdown" else ""
        if not writer.add(f"\n\nTable: {things[0].type.plural}" + _line(heads, style) + rule):
            return
        for thing in things:
            facts = list(thing.told.values())
            if not writer.add(_line([thing.name, *(fact.value for fact in facts)], style), facts):
                return


def _line(cells: list[str], style: str) -> str:
    if style == "markdown":
        return f"\n| {' | '.join(cells)} |"
    if style == "csv":
        return "\n" + ",".join(f'"{cell}"' if "," in cell else cell for cell in cells)
    return "\n" + "\t".join(cells)


def _key(label: str) -> str:
    return label.lower().replace(" ", "_").replace("-", "_")


def _records(world: World, writer: _Writer) -> None:
    """JSON, YAML, INI, or lists under a heading."""
    style = world.rng.randrange(4)
    while True:
        things = _group(world, 8)
        if not things or not writer.add(f"\n\n{things[0].type.plural.capitalize()}:"):
            return
        for thing in things:
            pairs = [(fact.attribute.label, fact.value) for fact in thing.told.values()]
            if style == 0:
                text = json.dumps({"name": thing.name} | {_key(k): v for k, v in pairs}, indent=2, ensure_ascii=False)
            elif style == 1:
                text = f"- name: {thing.name}" + "".join(f"\n  {_key(label)}: {value}" for label, value in pairs)
            elif style == 2:
                text = f"[{thing.name}]" + "".join(f"\n{_key(label)} = {value}" for label, value in pairs)
            else:
                text = f"\n{thing.name}" + "".join(f"\n  {label.capitalize()}: {value}" for label, value in pairs)
            if not writer.add("\n" + text, list(thing.told.values())):
                return


def _code(world: World, writer: _Writer) -> None:
    """A source file whose constants and calls tell facts."""
    rng, source = world.rng, world.source
    writer.add(f'\n\n"""Settings of {source.word("noun")}."""\n')
    while True:
        if rng.random() < 0.3 and not writer.add("\n" + _filler(world, "code")):
            return
        things, style = _group(world, 5, TECHNICAL if rng.random() < 0.7 else None), rng.randrange(4)
        for thing in things:
            pairs = [(fact.attribute.label, fact.value) for fact in thing.told.values()]
            slug = "".join(c if c.isalnum() else "_" for c in thing.name).strip("_")
            if style == 0:
                body = "".join(f"\n{slug}_{_key(label)}".upper() + f" = {value!r}" for label, value in pairs)
            elif style == 1:
                inner = ", ".join(f"{_key(label)}={value!r}" for label, value in pairs)
                body = f"\nregister({thing.type.name.replace(' ', '_')}={thing.name!r}, {inner})"
            elif style == 2:
                inner = "".join(f'\n    "{label}": {value!r},' for label, value in pairs)
                body = f"\n{_key(thing.type.plural)}[{thing.name!r}] = {{{inner}\n}}"
            else:
                inner = "".join(f"\n    # {world.state([fact])}" for fact in thing.told.values())
                body = f"\ndef open_{slug.lower()}():{inner}\n    return connect({thing.name!r})\n"
            if not writer.add(body, list(thing.told.values())):
                return


DOCUMENTS = {
    "chat": _chat,
    "minutes": _minutes,
    "contract": _contract,
    "mail": _mail,
    "notes": _notes,
    "profiles": _profiles,
    "log": _log,
    "table": _table,
    "records": _records,
    "code": _code,
}


def make_document(
    kind: str, world: World, tokens: int, events: Events | None = None, share: float = 0.5
) -> list[Piece]:
    """
    A document of a kind in `DOCUMENTS` of at most about `tokens` tokens, whose facts are new ones of `world`. Where it
    consists of sentences, `share` of them tell new ones of `events`.

    Raises: ValueError if there is no such kind.
    """
    if kind not in DOCUMENTS:
        raise ValueError(f"There is no kind of document {kind!r}: take one of {', '.join(DOCUMENTS)}.")
    writer = _Writer(tokens * CHARACTERS.get(kind, OTHER_CHARACTERS), events, share)
    before, happened = len(world.facts), len(events.told) if events else 0
    DOCUMENTS[kind](world, writer)
    if kind in ("table", "records", "profiles") and not writer.pieces[-1][1]:
        writer.pieces.pop()  # a heading with nothing below it
    told = {id(fact) for _, facts in writer.pieces for fact in facts}
    # What a generator had drawn beyond the last piece is told nowhere.
    untold = [fact for fact in world.facts[before:] if id(fact) not in told]
    for fact in untold:
        fact.entity.told.pop(fact.attribute.label, None)
    world.facts = world.facts[:before] + [fact for fact in world.facts[before:] if id(fact) in told]
    if events:
        events.forget([event for event in events.told[happened:] if id(event) not in told])
    return writer.pieces

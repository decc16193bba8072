"""
Reads the tables of this folder: words.txt, entities.txt, attributes.txt, compounds.txt and wordings.txt. Each says at
its top how it is written. What they hold is divided among the splits here, once.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .splits import SPLITS, place_split, split_of


FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class EntityType:
    """A type of thing: how its names are made ("{Adj} {Noun}") and how a text mentions one ("the ship {n}")."""

    name: str
    plural: str
    names: tuple[str, ...]
    mentions: tuple[str, ...]
    human: bool

    @property
    def split(self) -> str:
        return split_of("type " + self.name)


@dataclass(eq=False)
class Attribute:
    """What can be told about some types of things. `value` is a specification for `values.maker`."""

    label: str
    value: str
    types: tuple[str, ...]
    statements: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    reverse: list[str] = field(default_factory=list)
    conflicts: set[str] = field(default_factory=set)

    @property
    def split(self) -> str:
        return split_of("attribute " + self.label)

    def wording_split(self, wording: str) -> str:
        """The split of one of its own wordings: the attribute's, and if that is trained on, the wording's."""
        return self.split if self.split != "train" else split_of("wording " + wording)


@dataclass(frozen=True)
class Kind:
    """A kind of fact: an attribute of a type of thing."""

    type: EntityType
    attribute: Attribute

    @property
    def name(self) -> str:
        return f"{self.type.name} / {self.attribute.label}"

    @property
    def split(self) -> str:
        """Trained on if both type and attribute are; a test if either is for tests."""
        splits = {self.type.split, self.attribute.split}
        return "test" if "test" in splits else "validation" if "validation" in splits else "train"


def _lines(name: str) -> list[str]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("# ")]


@cache
def words() -> dict[str, dict[str, tuple[str, ...]]]:
    """Of each pool, the words of each split, by their place. In a closed pool every split has all of them."""
    members, closed, pool = defaultdict(dict), set(), ""
    for line in _lines("words.txt"):
        if header := re.fullmatch(r"\[(\w+)( closed)?\]", line):
            pool = header[1]
            closed |= {pool} if header[2] else set()
        else:
            members[pool].update(dict.fromkeys(word.strip() for word in line.split(",") if word.strip()))
    of_word = {}
    for found in (found for pool, found in members.items() if pool not in closed):
        for i, word in enumerate(found):
            # A word of several pools is where the first has it.
            of_word.setdefault(word.lower(), place_split(i))
    return {
        pool: {split: tuple(w for w in found if pool in closed or of_word[w.lower()] == split) for split in SPLITS}
        for pool, found in members.items()
    }


@cache
def entity_types() -> dict[str, EntityType]:
    types = {}
    for line in _lines("entities.txt"):
        name, plural, names, mentions = (part.strip() for part in line.split("|"))
        human, name = name.startswith("human "), name.removeprefix("human ")
        split = [tuple(part.strip() for part in parts.split(";")) for parts in (names, mentions)]
        types[name] = EntityType(name, plural, *split, human)
    return types


@cache
def attributes() -> tuple[Attribute, ...]:
    found, types = [], sorted(entity_types(), key=len, reverse=True)
    for line in _lines("attributes.txt"):
        mark, text = line[0], line[2:].strip()
        if mark == "@":
            label, value, of = (part.strip() for part in text.split("|"))
            names = re.findall("|".join(types), of)
            if "".join(names).replace(" ", "") != of.replace(" ", ""):
                raise ValueError(f"attributes.txt: unknown type in {line!r}.")
            found.append(Attribute(label, value, tuple(names)))
        elif mark == "!":
            group = {label.strip() for label in text.split(",")}
            if unknown := group - {attribute.label for attribute in found}:
                raise ValueError(f"attributes.txt: unknown attributes {sorted(unknown)}.")
            for attribute in found:
                if attribute.label in group:
                    attribute.conflicts |= group - {attribute.label}
        else:
            {"S": found[-1].statements, "Q": found[-1].questions, "R": found[-1].reverse}[mark].append(text)
    return tuple(found)


@cache
def compounds(split: str) -> tuple[Attribute, ...]:
    """The attributes of compounds.txt of a split. Labels in which one of another split stands are left out."""
    parts, name = defaultdict(list), ""
    for line in _lines("compounds.txt"):
        if line.startswith("["):
            name = line.strip("[]")
        elif name == "modifiers":
            parts[name] += [word.strip() for word in line.split(",") if word.strip()]
        else:
            parts[name].append(tuple(part.strip() for part in line.split("|")))
    known = {attribute.label for attribute in attributes()}
    foreign = re.compile(r"\b(" + "|".join(a.label for a in attributes() if a.split != split) + r")\b", re.I)
    found = []
    for modifier in dict.fromkeys(parts["modifiers"]):
        for head, value in parts["heads"]:
            attribute = Attribute(f"{modifier} {head}", value, ())
            if modifier not in head and attribute.split == split and attribute.label not in known:
                if not foreign.search(attribute.label):
                    found.append(attribute)
    return tuple(found)


@cache
def kinds() -> tuple[Kind, ...]:
    return tuple(Kind(entity_types()[name], attribute) for attribute in attributes() for name in attribute.types)


@cache
def wordings(group: str, split: str | None = None) -> tuple[str, ...]:
    """The general wordings of a group of wordings.txt; with a split, those that belong to it by their place."""
    found, name = defaultdict(list), ""
    for line in _lines("wordings.txt"):
        if header := re.fullmatch(r"\[([\w ]+)\]", line):
            name = header[1]
        else:
            found[name].append(line)
    if group not in found:
        raise KeyError(f"wordings.txt has no group {group!r}.")
    return tuple(w for i, w in enumerate(found[group]) if split is None or place_split(i) == split)

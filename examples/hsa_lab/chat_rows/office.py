"""
A made-up document to ask about: minutes, a contract, a chat log and a source file, with questions about each.

    text, questions = make_office(seed=1, characters=40_000, count=8)

Names, values, kinds of fact and wordings are those of the test split, which nothing is trained on.
"""

import random
from typing import NamedTuple

from .documents import CHARACTERS, OTHER_CHARACTERS, make_document
from .events import Events
from .facts import World
from .programs import program_plan


SPLIT = "test"
PARTS = ("minutes", "contract", "chat")  # and, as the last, a source file
MISSING = 4  # of so many questions one is about what the text does not tell
CODE = 130  # characters of a source file for each question that it is made for, about


class Asked(NamedTuple):
    """A question, and strings that a right answer contains: none if the text does not tell."""

    text: str
    expected: list[str]


def make_office(seed: int, characters: int, count: int) -> tuple[str, list[Asked]]:
    """
    A text of about `characters` and `count` questions about it, a quarter of them about what it does not tell.

    Raises: ValueError if the text is too short for so many questions.
    """
    rng, room = random.Random(f"office {seed}"), characters // (len(PARTS) + 1)
    world = World(SPLIT, rng)
    teller = Events(world)
    parts, owner = [], {}
    for number, kind in enumerate(PARTS):
        pieces = make_document(kind, world, int(room / CHARACTERS.get(kind, OTHER_CHARACTERS)), teller, share=0.4)
        parts.append("".join(text for text, _ in pieces).strip())
        owner |= {id(told): number for _, all_told in pieces for told in all_told}
    plan = program_plan(rng, max(2, room // CODE), room, SPLIT)
    parts.append("\n\n\n".join("".join(text for text, _ in block).strip() for block in plan.blocks))
    code = [Asked(turn.question, [text for text, is_asked in turn.answer if is_asked]) for turn in plan.turns]

    missing, found = count // MISSING, [[] for _ in parts]
    each = -(-(count - missing) // len(parts))
    askers = [world, teller] if world.facts else []  # who knows nothing cannot ask
    for _ in range(100 * count * bool(askers)):
        question = rng.choice(askers).ask("direct", short=False)
        if question is not None and question.expected:
            found[owner[id(question.facts[0])]].append(Asked(question.text, question.expected))
    found[-1] = [asked for asked in code if asked.expected]
    answered = [of_part[i] for i in range(each) for of_part in found if i < len(of_part)][: count - missing]
    untold = [question for _ in range(50 * missing * bool(askers)) if (question := world.ask("missing", short=False))]
    asked = answered + [Asked(question.text, question.expected) for question in untold[:missing]]
    if len(asked) < count:
        raise ValueError(f"A text of {characters:,} characters is too short for {count} questions.")
    return "\n\n\n".join(parts), asked

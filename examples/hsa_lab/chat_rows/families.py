"""Plans of rows about facts and events: hidden one by one in a long text, or in a made-up document."""

import random

from .documents import DOCUMENTS, make_document
from .events import Events
from .facts import QUESTIONS, Question, World
from .rows import Plan, Turn
from .tables import wordings


SHORT_ANSWERS = 0.35  # share of the conversations in which the user asks for short answers
INTRODUCED = 0.6  # share of the conversations that begin with a sentence about the text
DISTRACTORS = 0.6  # facts that nobody asks for, in relation to the questions
COMPOUNDS = 0.35  # share of the attributes that are made up
PAIRED = 0.12  # share of the facts told together with another one of the same thing
EVENTFUL = 0.6  # share of the rows of documents that tell events, too
MOST_HEADINGS = 4  # that count as events when questions are dealt out
QUESTION_TOKENS = 45  # with its answer and markup, and its sentence in the text: about so many


def conversation(rng: random.Random, short: bool) -> dict[str, str]:
    """The `intro` and the `hint` of a plan."""
    intro = rng.choice(wordings("intro")) if rng.random() < INTRODUCED else ""
    hint = rng.choice(wordings("outro")) if rng.random() < 0.2 else ""
    if short:
        hint = " ".join(filter(None, [hint, rng.choice(wordings("short"))]))
    return {"intro": intro, "hint": hint}


def ask(world: World, count: int, short: bool, shares: dict[str, float] = QUESTIONS) -> list[Turn]:
    return _turns(world.questions(count, short, shares))


def _turns(questions: list[Question]) -> list[Turn]:
    return [Turn(question.text, question.answer, question.facts, question.kind) for question in questions]


def facts_plan(rng: random.Random, questions: int, haystack: str = "books", split: str = "train") -> Plan:
    """Sentences with facts in a long text."""
    world, short = World(split, rng, compounds=COMPOUNDS), rng.random() < SHORT_ANSWERS
    wanted = questions + rng.randrange(int(questions * DISTRACTORS) + 1)
    if rng.random() < 0.5:
        world.add(rng.randrange(2, 4), 1, shared=True)
    while len(world.facts) < wanted:
        world.add()
    return _hide(world, rng, questions, haystack, short)


def _hide(world: World, rng: random.Random, questions: int, haystack: str, short: bool) -> Plan:
    blocks, facts = [], rng.sample(world.facts, len(world.facts))
    while facts:
        told = [facts.pop()]
        partner = next((fact for fact in facts if fact.entity is told[0].entity), None)
        if partner is not None and rng.random() < PAIRED:
            facts.remove(partner)
            told.append(partner)
        sentence = world.wrap(world.state(told))
        # In source code a sentence is a comment.
        blocks.append([(f"# {sentence}\n" if haystack == "code" else f" {sentence}", told)])
        world.order |= dict.fromkeys(told, len(blocks))
    turns = ask(world, questions, short)
    return Plan("facts", blocks, turns, haystack, **conversation(rng, short))


def events_plan(rng: random.Random, questions: int, haystack: str = "books", split: str = "train") -> Plan:
    """Sentences with events in a long text."""
    world, short = World(split, rng), rng.random() < SHORT_ANSWERS
    events, blocks = Events(world), []
    for _ in range(max(2, questions * 2 // 3) + rng.randrange(int(questions * DISTRACTORS) + 1)):
        if (event := events.add()) is not None:
            blocks.append([(f" {world.wrap(events.state(event))}", [event])])
    turns = _turns(events.questions(questions, short))
    return Plan("events", blocks, turns, haystack, **conversation(rng, short))


def document_plan(
    rng: random.Random, questions: int, length: int, kinds: list[str] | None = None, split: str = "train"
) -> Plan:
    """One or more made-up documents, with questions about any of their facts, and books around them."""
    world, short = World(split, rng, compounds=COMPOUNDS), rng.random() < SHORT_ANSWERS
    room = int((length - questions * QUESTION_TOKENS) * rng.uniform(0.35, 0.85))
    events, share = Events(world) if rng.random() < EVENTFUL else None, rng.choice((0.3, 0.6, 0.9))
    chosen = [rng.choice(kinds or list(DOCUMENTS)) for _ in range(1 if room < 1200 else rng.randrange(1, 5))]
    blocks = []
    for kind in chosen:
        pieces = make_document(kind, world, room // len(chosen), events, share)
        blocks.append(pieces)
        for i, (_, facts) in enumerate(pieces):
            world.order |= dict.fromkeys(facts, len(blocks) * 1000 + i)
    happened = len(events.told) + min(len(events.headings), MOST_HEADINGS) if events else 0
    if not world.facts and not happened:
        return facts_plan(rng, questions, split=split)
    about_events = round(questions * happened / (happened + len(world.facts)))
    turns = ask(world, questions - about_events, short)
    if about_events:
        turns += _turns(events.questions(about_events, short))
        rng.shuffle(turns)
    return Plan("document " + "+".join(sorted(set(chosen))), blocks, turns, "books", **conversation(rng, short))

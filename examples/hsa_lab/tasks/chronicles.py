"""
A seeded generator of readable English-like text: the chronicle of a made-up town, with facts hidden in it.

People, trades, weather and small events fill the text. Here and there stands a fact that nothing else in the text
gives away, like "The password of Ada the glassblower is 48213.", with a question and its answer. The same arguments
give the same text, on every machine.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple


NAMES = (
    "Ada Alma Anselm Beatrix Bruno Cecily Clement Cora Cyril Dora Edgar Edith Elias Emma Esther Felix Flora Frieda "
    "Gideon Greta Hanna Hector Hilda Hugo Ida Ingrid Isaac Jasper Joan Jonas Judith Klara Lambert Leah Lena Leopold "
    "Lucas Magda Mabel Martin Matilda Miriam Nora Oliver Olga Oscar Otto Paula Peter Quentin Rosa Ruth Samuel Selma "
    "Silas Simon Stella Theo Thomas Ursula Vera Viktor Walter Wilma Yvonne Zelda"
).split()
TRADES = (
    "baker barber beekeeper bookbinder brewer carpenter carter chandler clockmaker cobbler cooper dyer farrier "
    "ferryman fiddler fishmonger gardener glassblower glover goldsmith grocer hatter innkeeper lamplighter locksmith "
    "mason midwife miller painter potter printer ropemaker saddler schoolmaster shepherd tailor tanner tinker "
    "watchman weaver wheelwright"
).split()
TOWN_STARTS = (
    "Alder Amber Ash Birch Black Bram Clay Cold Elm Fair Fen Grey Hazel Long Marsh Oak Red Stone Thorn".split()
)
TOWN_ENDS = (
    "bourne bridge bury cliff dale field ford gate ham hollow mere mouth stead ton water well wick wood".split()
)
PLACES = (
    "the market square|the old bridge|the mill pond|the north gate|the churchyard|the harbour wall|the tannery yard|"
    "the schoolhouse|the lower orchard|the weighing house|the bell tower|the ferry landing|the corn exchange|"
    "the inn by the river|the quarry road|the common well|the lime kilns|the rope walk|the guildhall"
).split("|")
GOODS = (
    "wool|barley|candles|salt|apples|lamp oil|honey|nails|herring|linen|rope|turnips|tallow|copper pans|onions|"
    "leather|soap|flour|cheese|roof slates"
).split("|")
ANIMALS = (
    "a grey mare|two geese|a lame goat|the miller's dog|a stray cat|a flock of crows|an old ox|a swarm of bees"
).split("|")
WEATHER = (
    "rain fell from dawn until dusk|a dry wind came down from the hills|fog lay on the river all morning|"
    "the frost was so hard that the pumps stood still|the sun shone as if it were paid to|"
    "thunder was heard far away|snow covered the roofs|the sky stayed the colour of pewter|"
    "the evening was mild and full of gnats|hail broke eleven panes in the guildhall"
).split("|")
MONTHS = "January February March April May June July August September October November December".split()
KINDS_OF_SECRET = ("password", "locker number", "ledger number", "house number", "signal code")

EVENTS = (
    "{person} carried {number} baskets of {goods} to {place}.",
    "At {place}, {person} and {other} argued about the price of {goods}.",
    "{person} sold {goods} to {other} and would not say for how much.",
    "Nobody at {place} had seen {animal} so early in the year.",
    "{person} mended the roof of {other}, who paid in {goods}.",
    "A letter for {person} lay at {place} for {number} days before anyone opened it.",
    "{other} heard music near {place} and went to look, but found only {animal}.",
    "The council met at {place} and spoke of {goods} until the candles were gone.",
    "{person} lent {number} coins to {other}, in front of everyone at {place}.",
    "It was said that {person} had buried {goods} behind {place}.",
    "{person} taught the children of {other} to count with {goods}.",
    "{animal} ran through {place} and upset a cart of {goods}.",
    "{person} walked to {place} and back {number} times, and gave no reason.",
    "For {number} days the people of {town} ate little but {goods}.",
    "{other} dreamed of {place} and told {person}, who laughed.",
    "A stranger asked {person} the way to {place}, and thanked {other} instead.",
    "{person} found a spoon, a key and some {goods} under a stone near {place}.",
    "The bell rang {number} times for {other}, who had come home at last.",
)


class Fact(NamedTuple):
    """A sentence of a document, and what to ask about it."""

    sentence: str
    question: str
    answer: str
    start: int  # offset of the sentence in the text, in characters
    answer_start: int  # offset of the answer in the text, in characters


class Document(NamedTuple):
    text: str
    facts: tuple[Fact, ...]  # in the order of the text


def make_document(seed: int, characters: int, facts: int = 0, questions: bool = False) -> Document:
    """
    Writes one chronicle.

    Args:
        seed: decides everything that is random.
        characters: length to reach: the chronicle ends with the sentence that reaches it.
        facts: sentences that each tell a five-digit number of one person, at random places of the text. They count
            towards `characters`, and all of them are there even if the text gets longer by them.
        questions: whether all facts, shuffled, are asked and answered after the chronicle (beyond `characters`).

    Returns:
        The text, and its facts with their questions, answers and offsets.

    Raises:
        ValueError: for a negative number, or more facts than there are people to have secrets.
    """
    most = len(NAMES) * len(TRADES) * len(KINDS_OF_SECRET)
    if characters < 0 or not 0 <= facts <= most:
        raise ValueError(
            f"`characters` must be at least 0 and `facts` from 0 to {most}, got {characters} and {facts}."
        )
    rng = random.Random(f"chronicle {seed}")
    secrets = _make_secrets(rng, facts)
    room = max(characters - sum(len(sentence) + 1 for sentence, _, _ in secrets), 0)
    places = sorted(rng.randrange(room + 1) for _ in secrets)

    story = _tell(rng)
    parts, length, told = [], 0, 0  # of the text so far, and of the story alone
    found = []
    for secret, place in zip([*secrets, None], [*places, room]):
        while told < place:
            separator, sentence = next(story)
            parts.append(separator + sentence)
            told += len(parts[-1])
            length += len(parts[-1])
        if secret is not None:
            sentence, question, answer = secret
            separator = " " if parts else ""
            parts.append(separator + sentence)
            start = length + len(separator)
            found.append(Fact(sentence, question, answer, start, start + sentence.index(answer)))
            length += len(parts[-1])
    if questions and found:
        asked = rng.sample(found, len(found))
        parts.append("\n\n" + "\n".join(f"{fact.question} {fact.answer}." for fact in asked))
    return Document("".join(parts) + "\n", tuple(found))


def make_documents(
    seed: int, characters: int, documents: int, facts: int = 0, questions: bool = False
) -> list[Document]:
    """`documents` chronicles of `characters` characters each, all different. See `make_document`."""
    return [make_document(seed * 1_000_003 + i, characters, facts, questions) for i in range(documents)]


def _make_secrets(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """`count` triples of sentence, question and answer, no two about the same thing."""
    names, trades, kinds = len(NAMES), len(TRADES), len(KINDS_OF_SECRET)
    secrets = []
    for number in rng.sample(range(names * trades * kinds), count):
        number, name = divmod(number, names)
        kind, trade = divmod(number, trades)
        of_whom = f"{KINDS_OF_SECRET[kind]} of {NAMES[name]} the {TRADES[trade]}"
        answer = str(rng.randrange(10_000, 100_000))
        secrets.append((f"The {of_whom} is {answer}.", f"What is the {of_whom}?", answer))
    return secrets


def _tell(rng: random.Random) -> Iterator[tuple[str, str]]:
    """The story, for ever: pairs of what separates a sentence from the text before it, and the sentence."""
    town = rng.choice(TOWN_STARTS) + rng.choice(TOWN_ENDS)
    people = [f"{name} the {rng.choice(TRADES)}" for name in rng.sample(NAMES, 12)]
    year, month, day = rng.randrange(1400, 1800), 0, rng.randrange(1, 20)
    yield "", f"The chronicle of {town}, begun in the year {year} by {people[0]}."
    while True:
        day += rng.randrange(1, 9)
        if day > 28:
            day, month = day - 28, month + 1
        if month == len(MONTHS):
            year, month = year + 1, 0
            yield "\n\n", f"Here begins the year {year}."
        yield "\n\n", f"On {MONTHS[month]} {day}, {rng.choice(WEATHER)}."
        for _ in range(rng.randrange(3, 8)):
            person, other = rng.sample(people, 2)
            animal = rng.choice(ANIMALS)
            sentence = rng.choice(EVENTS).format(
                person=person,
                other=other,
                place=rng.choice(PLACES),
                goods=rng.choice(GOODS),
                animal=animal,
                number=rng.randrange(2, 20),
                town=town,
            )
            yield " ", sentence[0].upper() + sentence[1:]

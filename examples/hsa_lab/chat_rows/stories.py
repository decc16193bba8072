"""
Stories of bAbI told between the sentences of a long text, as in BABILong, several in one row.

    stories = read_stories("../shared/data/babi", "qa2", "train")
    plan = story_plan(rng, {"qa2": stories}, 4)

Of every file the last tenth of the stories is for tests and the tenth before it for choices; a story of theirs that
also stands further up is not trained on (`read_stories`, which rows and `evaluate.py babilong` both use). Each file of
`en` is the beginning of the one in `en-10k`, so only one of the two is read. All but the first story of a row get
other people, things and rooms, so that no question has two answers.
"""

import gzip
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .families import conversation
from .rows import Plan, Turn
from .splits import check_split
from .tables import words


TASKS = tuple(f"qa{i}" for i in range(1, 11))
PEOPLE = ("Mary", "John", "Sandra", "Daniel", "Bill", "Fred", "Jeff", "Julie")
THINGS = ("football", "apple", "milk")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office", "school", "park", "cinema")
OTHER_THINGS = (
    "umbrella lamp basket kettle violin hammer candle letter bucket pillow mirror ladder carpet bottle telescope "
    "blanket trumpet needle spoon compass suitcase notebook whistle teapot brush camera wallet drum"
).split()
OTHER_ROOMS = (
    "attic cellar library stable workshop pantry balcony garage studio nursery porch chapel laundry greenhouse lobby "
    "courtyard gallery canteen museum bakery barn hut tower harbour station market"
).split()
# Whether a text with such words was renamed in whole words: "Mary", but not "Maryland".
NAMES = re.compile(r"\b(" + "|".join(PEOPLE + THINGS + ROOMS) + r")\b")
HINTS = (
    "Answer with a single word.",
    "One word is enough.",
    "Answer in one word; if there are several things, put commas between them.",
    "Just the word, please.",
    "Reply with nothing but the answer.",
)


@dataclass(frozen=True)
class Story:
    """`facts`: the statements before the question. `support`: the numbers of those that the answer follows from."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


def find_file(folder: str | Path, task: str) -> Path:
    """
    The largest file of a task: in the folder en-10k of `folder`, else itself, else its folder en.

    Raises: FileNotFoundError if there is none.
    """
    for place in ("en-10k", ".", "en"):
        if found := sorted((Path(folder) / place).glob(f"{task}_*_train.txt*")):
            return found[0]
    raise FileNotFoundError(f"There is no {task}_*_train.txt or .txt.gz in {folder}, its en-10k or its en.")


@cache
def read_stories(folder: str | Path, task: str, split: str) -> tuple[Story, ...]:
    """
    The questions of one split of a task, each with the statements before it, none twice.

    Lines are `ID text`, or `ID question <tab> answer <tab> IDs of the supporting facts`; ID 1 begins a new story.
    """
    check_split(split)
    by_story, path = [], find_file(folder, task)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            number, _, text = line.strip().partition(" ")
            if number == "1":
                facts, places = [], {}
                by_story.append([])
            question, *answer = text.split("\t")
            if answer:
                support = tuple(places[i] for i in answer[1].split())
                by_story[-1].append(Story(tuple(facts), question.strip(), answer[0].strip(), support))
            else:
                places[number] = len(facts)
                facts.append(question.strip())
    first, second = len(by_story) * 8 // 10, len(by_story) * 9 // 10
    parts = {"train": by_story[:first], "validation": by_story[first:second], "test": by_story[second:]}
    found = dict.fromkeys(story for stories in parts[split] for story in stories)
    for other in {"train": ("validation", "test"), "validation": ("test",), "test": ()}[split]:
        held = {(s.facts, s.question) for stories in parts[other] for s in stories}
        found = {story: None for story in found if (story.facts, story.question) not in held}
    return tuple(found)


def rename(story: Story, rng: random.Random, taken: set[str], people: tuple[str, ...]) -> Story:
    """The story with other people, things and rooms, none of which is in `taken`, where they are put."""
    whole = " ".join((*story.facts, story.question, story.answer.replace(",", " ")))
    new = {}
    for name in dict.fromkeys(NAMES.findall(whole)):
        pool = people if name in PEOPLE else OTHER_THINGS if name in THINGS else OTHER_ROOMS
        # Rooms may be shared among the stories of different people.
        free = [word for word in pool if word not in new.values() and (name in ROOMS or word not in taken)]
        new[name] = rng.choice(free or pool)
    taken |= {word for name, word in new.items() if name not in ROOMS}

    def change(text: str) -> str:
        return NAMES.sub(lambda match: new[match[0]], text)

    return Story(tuple(map(change, story.facts)), change(story.question), change(story.answer), story.support)


def story_plan(
    rng: random.Random, stories: dict[str, tuple[Story, ...]], count: int, most: int = 10**9, split: str = "train"
) -> Plan:
    """
    Up to `count` stories with a question each, of the tasks in `stories`, and at most about `most` tokens of them; the
    first under its own names.
    """
    people, taken, relations = words()["first"][split], set(PEOPLE), 0
    blocks, groups, turns, size = [], [], [], 0
    for number in range(count):
        task = rng.choice(list(stories))
        story = rng.choice(stories[task])
        size += sum(len(fact) for fact in story.facts) // 3
        if number and (size > most or (task == "qa4" and relations)):
            continue
        relations += task == "qa4"  # tells where rooms lie: once in a row, or the stories contradict each other
        if number or rng.random() < 0.5:
            story = rename(story, rng, taken, people)
        for i, fact in enumerate(story.facts):
            blocks.append([(" " + fact, [(number, i)])])
            groups.append(number)
        answer = [(story.answer.replace(",", ", "), True)]
        turns.append(Turn(story.question, answer, [(number, i) for i in story.support], task))
    rng.shuffle(turns)
    parts = conversation(rng, False)
    parts["hint"] = " ".join(filter(None, [parts["hint"], rng.choice(HINTS)]))
    return Plan("stories", blocks, turns, "books", groups=groups, **parts)

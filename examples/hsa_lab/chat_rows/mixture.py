"""
The mixture of rows to train on, by a recipe.

    materials = Materials.load(tokenizer, "out/streams", "train", qa="../shared/data/qa/train.jsonl.gz")
    for row in rows(materials, recipe, 1024, seed=0):
        ...

A recipe is a dictionary: "families" with the share of the rows of each (see `FAMILIES`), and "questions" a row by
length. `RECIPE` is the default. The same seed gives the same rows, and different workers take different seeds.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .families import document_plan, events_plan, facts_plan
from .haystack import Haystack
from .programs import program_plan
from .qa import Passage, qa_plan, read_passages
from .quotes import quote_plan
from .rows import Plan, Row, RowBuilder
from .ruler_forms import ruler_plan
from .splits import check_split
from .stories import TASKS, Story, read_stories, story_plan


RECIPE = {
    "families": {
        "facts": 0.18,
        "events": 0.10,
        "facts in code": 0.04,
        "facts in reference": 0.03,
        "documents": 0.16,
        "qa": 0.08,
        "programs": 0.03,
        "quotes": 0.06,
        "stories": 0.12,
        "ruler": 0.12,
        "text": 0.10,
        "code": 0.02,
        "reference": 0.02,
        "chat": 0.0,
    },
    # Questions of a row, by its length; of a length that is not listed, those of the next smaller one.
    "questions": {"256": 2, "512": 4, "1024": 8, "2048": 12, "4096": 16},
}
PLAIN = {"text": "books", "code": "code", "reference": "reference"}  # families of text alone, and their haystacks
PLANS_AT_ONCE = 64
STORY_TOKENS = 0.6  # share of a row that stories may take


@dataclass
class Materials:
    """
    What rows are made of, all of one split.

    passages       with questions
    stories        of bAbI, by task
    conversations  [(question, answer), ...] each, of the model that is converted
    """

    builder: RowBuilder
    split: str
    passages: tuple[Passage, ...] = ()
    stories: dict[str, tuple[Story, ...]] = field(default_factory=dict)
    conversations: list[list[tuple[str, str]]] = field(default_factory=list)

    @classmethod
    def load(
        cls,
        tokenizer,
        streams: str | Path,
        split: str,
        qa: str | Path | None = None,
        babi: str | Path | None = None,
        chats: str | Path | None = None,
    ) -> "Materials":
        """
        Reads the materials of a split.

        Args:
            streams: folder with books-SPLIT.npy and maybe code-SPLIT.npy and reference-SPLIT.npy
                (`haystack.save_stream`).
            qa: file of `qa.read_passages`.
            babi: folder of `stories.read_stories`.
            chats: JSON lines with "prompt" and "answer", or "messages" of user and assistant in turn.

        Raises: FileNotFoundError for something that is named and not there.
        """
        folder = Path(streams)
        haystacks = {"books": Haystack(folder / f"books-{check_split(split)}.npy", tokenizer)}
        for name in ("code", "reference"):
            if (stream := folder / f"{name}-{split}.npy").exists():
                haystacks[name] = Haystack(stream, tokenizer, code=name == "code")
        stories = {task: read_stories(babi, task, split) for task in TASKS} if babi else {}
        passages = read_passages(qa, split) if qa else ()
        return cls(RowBuilder(tokenizer, haystacks), split, passages, stories, read_chats(chats) if chats else [])

    def missing(self) -> set[str]:
        """The families there is nothing for."""
        found = {"qa": self.passages, "stories": self.stories, "chat": self.conversations}
        missing = {name for name, material in found.items() if not material}
        absent = {"code", "reference"} - self.builder.haystacks.keys()
        return missing | absent | {f"facts in {name}" for name in absent}


def read_chats(path: str | Path) -> list[list[tuple[str, str]]]:
    """Conversations of a file of JSON lines. Raises: ValueError for a line of another form, with its number."""
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, row in enumerate(map(json.loads, lines), 1):
            if "messages" in row:
                contents = [message["content"] for message in row["messages"] if message["role"] != "system"]
            else:
                contents = [row.get("prompt"), row.get("answer")]
            if not contents or len(contents) % 2 or None in contents:
                raise ValueError(f"{path}, line {number}: needs `prompt` and `answer`, or `messages` in pairs.")
            found.append(list(zip(contents[::2], contents[1::2])))
    return found


def make_plan(family: str, materials: Materials, questions: int, length: int, rng: random.Random) -> Plan:
    """A plan of a family that asks questions."""
    split = materials.split
    if family.startswith("facts"):
        plan = facts_plan(rng, questions, family.removeprefix("facts").removeprefix(" in ") or "books", split)
    elif family == "events":
        plan = events_plan(rng, questions, split=split)
    elif family == "documents":
        plan = document_plan(rng, questions, length, split=split)
    elif family == "qa":
        plan = qa_plan(rng, materials.passages, questions, length)
    elif family == "programs":
        plan = program_plan(rng, questions, length, split)
    elif family == "quotes":
        plan = quote_plan(rng, materials.builder.haystacks["books"], materials.builder.tokenizer, questions, length)
    elif family == "stories":
        # Half of the rows have stories of one task, as an evaluation has.
        tasks = materials.stories if rng.random() < 0.5 else (rng.choice(list(materials.stories)),)
        chosen = {task: materials.stories[task] for task in tasks}
        count = questions if rng.random() < 0.5 else rng.randrange(1, questions + 1)
        plan = story_plan(rng, chosen, count, int(length * STORY_TOKENS), split)
    elif family == "ruler":
        plan = ruler_plan(rng, questions, length, split)
    else:
        raise ValueError(f"There is no family {family!r}: take some of {', '.join(RECIPE['families'])}.")
    return plan


def questions_of(recipe: dict, length: int) -> int:
    """How many questions a row of `length` tokens has."""
    sizes = {int(size): count for size, count in recipe["questions"].items()}
    fitting = [size for size in sizes if size <= length]
    return sizes[max(fitting)] if fitting else 1


def rows(
    materials: Materials, recipe: dict, length: int, seed: int | str, at_once: int = PLANS_AT_ONCE
) -> Iterator[Row]:
    """
    Rows of `length` tokens, for ever, of which so many are made at once.

    Raises: ValueError if the recipe names families that do not exist or that there is nothing for.
    """
    shares = {family: share for family, share in recipe["families"].items() if share > 0}
    if unknown := shares.keys() - RECIPE["families"].keys():
        raise ValueError(f"The recipe has unknown families: {', '.join(sorted(unknown))}.")
    if lacking := shares.keys() & materials.missing():
        raise ValueError(f"There is no material for {', '.join(sorted(lacking))}: name it, or set the share to 0.")
    rng, builder = random.Random(f"{materials.split} {length} {seed}"), materials.builder
    questions = questions_of(recipe, length)
    while True:
        drawn = rng.choices(list(shares), list(shares.values()), k=at_once)
        made: list[Row] = []
        for family in drawn:
            if family in PLAIN:
                made.append(builder.text_row(PLAIN[family], length, rng))
            elif family == "chat":
                made.append(builder.chat_row(materials.conversations, length, rng))
        asked = [family for family in drawn if family not in PLAIN and family != "chat"]
        plans = [make_plan(family, materials, questions, length, rng) for family in asked]
        made += builder.build([plan for plan in plans if plan.turns], length, rng)
        rng.shuffle(made)
        yield from made

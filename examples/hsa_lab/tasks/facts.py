"""
Facts in plain English, one in a long text, and a question about it: which wordings does a model answer?

number, word, uuid    The value of the fact. Sentence and question have a wording of `retrieval.py`, drawn at random,
                      which `pretrain.py` trains on, where a model was trained with it. Names, trades and what is asked
                      for are from the lists here, of which none is in the lists of training.
reworded              A number, in a wording that is not in training.
"""

import uuid

import numpy as np

from ..tokens import encode, excerpt, first_ids
from .retrieval import FACT_QUESTIONS, FACT_SENTENCES


NAMES = "Omar Giulia Kwame Xochitl Wolfgang Priya Zoltan Bjorn Yasmin Thaddeus Ngozi Svetlana".split()
TRADES = "pilot dentist programmer astronaut barista violinist plumber botanist surgeon referee".split()
THINGS = ("phone number", "ticket", "pin code", "account number", "seat", "nickname", "call sign", "licence")
WORDS = "granite banana marvelon copper zeppelin quillwort saffron obelisk thimble kestrel".split()
REWORDED = (
    ("{name}'s {what} is {value}.", "What is {name}'s {what}?"),
    ("Remember that {name} the {trade} chose {value} as {what}.", "Which {what} did {name} the {trade} choose?"),
    ("As {what}, {name} the {trade} wrote down {value}.", "What did {name} the {trade} write down as {what}?"),
    ("{value}: that was the {what} of the {trade} called {name}.", "The {trade} called {name} had the {what}"),
)
TASKS = ("number", "word", "uuid", "reworded")


def make_fact(task: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """A sentence, a question and the value."""
    words = {"name": NAMES, "trade": TRADES, "what": THINGS}
    words = {key: options[rng.integers(len(options))] for key, options in words.items()}
    if task == "word":
        value = WORDS[rng.integers(len(WORDS))]
    elif task == "uuid":
        value = str(uuid.UUID(bytes=rng.bytes(16), version=4))
    else:
        value = str(rng.integers(10**4, 10**7))
    if task == "reworded":
        sentence, question = REWORDED[rng.integers(len(REWORDED))]
    else:
        sentence = FACT_SENTENCES[rng.integers(len(FACT_SENTENCES))]
        question = FACT_QUESTIONS[rng.integers(len(FACT_QUESTIONS))]
    return sentence.format(value=value, **words), question.format(**words), value


def make_prompt(
    fact: tuple[str, str, str], rng: np.random.Generator, tokenizer, haystack: np.ndarray, length: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """
    The prompt, int64 [length], with the fact at a random place, and the tokens (start, end) of the fact.

    Raises: ValueError for a length without room.
    """
    sentence, question, _ = fact
    sentence, question = (np.array(encode(tokenizer, f" {text}"), np.int64) for text in (sentence, question))
    head = np.array(first_ids(tokenizer), np.int64)
    room = length - len(head) - len(sentence) - len(question)
    if room < 0:
        raise ValueError(f"`--lengths` must be at least {length - room} for fact and question, got {length}.")
    text, cut = excerpt(haystack, room, rng, np.int64), int(rng.integers(room + 1))
    start = len(head) + cut
    return np.concatenate([head, text[:cut], sentence, text[cut:], question]), (start, start + len(sentence))

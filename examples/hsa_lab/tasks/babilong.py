"""
BABILong: bAbI stories told between the sentences of books, and a question about them at the end.

The benchmark is Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack",
2024, https://arxiv.org/abs/2406.10149, code at https://github.com/booydar/babilong; its stories are of bAbI v1.2
(Weston et al., 2015, https://arxiv.org/abs/1502.05698), files qaN_*_train.txt or .txt.gz. `chat_rows.stories` says
which of their stories are for evaluation.

As there: every question of a story is a sample, whose facts are the statements before it; the facts are put, in order,
at places drawn uniformly, with repetition, among the ends of the sentences of a run of background text; the answer is
right if it names the right word and no other of the task's answers, but for words of the question (`is_correct`).

Not as there, so that small models that were never tuned to follow instructions can take part:

- The prompt has no instructions. Examples, stories of the training split without background, replace the benchmark's
  two or three written ones, and the answer is the word alone, not a sentence:

      John went to the hallway. Mary moved to the office.
      Question: Where is John?
      Answer: hallway

      <background and facts>
      Question: Where is Mary?
      Answer:

- In chat form the prompt is the message of a user, which ends in `Answer in one word: Where is Mary?`; examples are
  turns before it, which the assistant has answered.
- Only the first line of what the model writes counts, as a base model goes on with another question.
- The length is that of the whole prompt, in tokens of the model, exactly; the benchmark's is that of background and
  facts.
- The text around the facts is any, and not PG-19. Documents follow each other without a token between them; text that
  is too short is repeated.

Chance is 1/6 for a room in qa1 to qa4, and in qa4 1/2 for one of the rooms of the story that the question does not
name; in qa5 1/4 for a person and 1/3 for a thing.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..chat_rows.chat import ChatFormat
from ..chat_rows.stories import Story
from ..tokens import encode, first_ids, ring_window


ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
# The possible answers of each task.
LABELS = {
    "qa1": ROOMS,
    "qa2": ROOMS,
    "qa3": ROOMS,
    "qa4": ROOMS,
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
}
CHAT_QUESTION = "\n\nAnswer in one word: {}"
SHORT_STORIES = 50  # examples are drawn from so many of the shortest stories

# How byte-level and SentencePiece vocabularies write whitespace at the beginning of a token, and closing quotes.
WHITESPACE = ("Ġ", "Ċ", "ĉ", "č", "▁", "<0x0A>")
CLOSING_QUOTES = ('"', "'", ")", "âĢĿ", "âĢĻ", "”", "’")
TITLES = {"Mr", "Mrs", "Ms", "Dr", "St"}
LEAD = 500  # tokens within which the beginning of a sentence is looked for


# -- prompts --


class Background:
    """A stream of tokens [N] of books, and where sentences end in it, by what its tokens look like."""

    def __init__(self, stream: np.ndarray, tokenizer):
        self.stream, self.end_of_text = stream, tokenizer.eos_token_id
        strings = [str(s) for s in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        self.ends = np.array([_ends_sentence(s) for s in strings])
        self.spaced = np.array([s.startswith(WHITESPACE) for s in strings])
        self.titles = np.array([s.lstrip("Ġ▁") in TITLES for s in strings])

    def sentence_ends(self, tokens: np.ndarray) -> np.ndarray:
        """Positions after a sentence: after . ! or ?, maybe quotes, before whitespace, and not after "Mr."."""
        ends = self.ends[tokens[:-1]] & self.spaced[tokens[1:]]
        ends[1:] &= ~self.titles[tokens[:-2]]
        return np.flatnonzero(ends) + 1

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """
        `count` tokens from the beginning of a sentence on, the last one cut off, and the positions in [0, count)
        between sentences, 0 among them.
        """
        start, size = int(rng.integers(len(self.stream))), count + LEAD
        tokens = ring_window(self.stream, start, size)
        while self.end_of_text is not None and (missing := size - np.sum(tokens != self.end_of_text)) > 0:
            if missing == size:
                raise ValueError("`--haystack` holds nothing but end-of-text tokens.")
            tokens = ring_window(self.stream, start, len(tokens) + int(missing))
        if self.end_of_text is not None:
            tokens = tokens[tokens != self.end_of_text]
        ends = self.sentence_ends(tokens)
        first = int(ends[0]) if len(ends) and ends[0] <= LEAD else 0
        inside = ends[(ends > first) & (ends < first + count)] - first
        return tokens[first : first + count], np.concatenate([[0], inside])


def _ends_sentence(token: str) -> bool:
    while token.endswith(CLOSING_QUOTES):
        token = token.removesuffix(next(quote for quote in CLOSING_QUOTES if token.endswith(quote)))
    return token.endswith((".", "!", "?"))


class Prompt(NamedTuple):
    """`tokens` int64 [length]; `facts`: (start, end) of each fact among them."""

    tokens: np.ndarray
    facts: list[tuple[int, int]]


class Prompts:
    """Prompts of one task. `shots`: stories that come first as examples. `chat`: for prompts in chat form."""

    def __init__(self, background: Background, tokenizer, shots: Sequence[Story], chat: ChatFormat | None = None):
        self.background, self.chat = background, chat
        self.encode = functools.cache(functools.partial(encode, tokenizer))
        if chat is None:
            text = "".join(f"{' '.join(s.facts)}\nQuestion: {s.question}\nAnswer: {s.answer}\n\n" for s in shots)
            self.head = first_ids(tokenizer) + (encode(tokenizer, text) if text else [])
        else:
            self.head = chat.start.tolist()
            for shot in shots:
                asked = encode(tokenizer, " ".join(shot.facts) + CHAT_QUESTION.format(shot.question))
                answer = encode(tokenizer, shot.answer)
                self.head += [*asked, *chat.reply.tolist(), *answer, *chat.end.tolist(), *chat.next.tolist()]

    def parts(self, story: Story) -> tuple[list[list[int]], list[int]]:
        """The tokens of the facts, and of the question."""
        facts = [self.encode(f" {fact}") for fact in story.facts]
        if self.chat is None:
            return facts, self.encode(f"\nQuestion: {story.question}\nAnswer:")
        return facts, self.encode(CHAT_QUESTION.format(story.question)) + self.chat.reply.tolist()

    def least(self, story: Story) -> int:
        """Tokens of a prompt without any background."""
        facts, question = self.parts(story)
        return len(self.head) + sum(map(len, facts)) + len(question)

    def make(self, story: Story, length: int, rng: np.random.Generator) -> Prompt:
        """
        Raises: ValueError for a length that is too small for the story.
        """
        count = length - self.least(story)
        if count < 0:
            raise ValueError(f"The story takes {self.least(story)} tokens: `--lengths` {length} is too short for it.")
        facts, question = self.parts(story)
        background, places = self.background.draw(rng, count)
        chosen = np.sort(rng.choice(places, len(facts)))
        pieces, spans, at = [self.head], [], len(self.head)
        # The text before each fact, and the fact.
        for text, fact in zip(np.split(background, chosen), facts):
            pieces += [text, fact]
            at += len(text) + len(fact)
            spans.append((at - len(fact), at))
        pieces += [background[chosen[-1] if len(chosen) else 0 :], question]
        return Prompt(np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces]), spans)


def choose_shots(stories: Sequence[Story], count: int, rng: np.random.Generator) -> list[Story]:
    """`count` of the shortest stories, with different answers as far as there are."""
    shortest = sorted(stories, key=lambda story: len(story.facts))[: max(SHORT_STORIES, count)]
    left, chosen = [shortest[i] for i in rng.permutation(len(shortest))], []
    while left and len(chosen) < count:
        used = [story.answer for story in chosen]
        chosen.append(min(left, key=lambda story: used.count(story.answer)))
        left.remove(chosen[-1])
    return chosen


# -- answers --


def is_correct(output: str, story: Story, labels: Sequence[str]) -> bool:
    """
    The benchmark's rule (babilong/metrics.py of its repository): of the first sentence of the output, the right answer
    is in it and no other label, but for labels that the question names, which are never the answer. Case does not
    matter. Here the first sentence also ends with its line.
    """
    sentence = output.strip().partition("\n")[0].partition(".")[0].lower()
    named = {label for label in map(str.lower, labels) if label in sentence and label not in story.question.lower()}
    return named == {story.answer.lower()}

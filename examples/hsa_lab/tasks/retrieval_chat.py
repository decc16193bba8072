"""
The tasks of the papers on HSA (`retrieval.py`) as questions of a chat.

    tasks = ChatRetrieval(RetrievalTasks(tokenizer, pool_seed=1), ChatFormat(tokenizer), "test")
    for question in tasks.make_all("mq_niah", np.random.default_rng(0), corpus, 4096, most=3):
        score = question.score(answer)

The haystack with the needles is the message of a user, which ends in the question of the paper as a sentence of its
own. The answer is generated, greedily, and right if it contains the exact value:

s_niah    the text of the 7 random tokens; with `digits` the number of so many digits that is the value instead
mq_niah   both of the two numbers; the 6 pairs of a text are asked for two by two, by up to 3 questions
vt        the last variable of the chain, which is what the papers score, and no variable of the other chain, which an
          answer that lists everything would name; a text has 2 chains and so up to 2 questions

The length counts all tokens: those around the message, the beginning of the assistant's turn, and those kept for the
answer. Numbers are of a split, by the rule of `chat_rows/splits.py`.
"""

import string
from dataclasses import dataclass

import numpy as np

from ..chat_rows.chat import ChatFormat
from ..chat_rows.splits import number_split
from ..tokens import encode, excerpt
from .retrieval import VALUE_IDS, RetrievalTasks, Strings
from .ruler import insert


# Tokens kept for an answer.
ANSWER_TOKENS = {"s_niah": 48, "mq_niah": 64, "vt": 64}
PAIRS, QUERIES = 6, 2  # of mq_niah
CHAINS, VARIABLES = 2, 3  # of vt


@dataclass
class ChatQuestion:
    """
    `tokens`: int64 [L], the prompt. `expected`: what the answer must contain, and `barred` what it must not.
    `needles`: where in `tokens` the needles asked for are. `depth`: of the first of them.
    """

    tokens: np.ndarray
    expected: list[str]
    barred: list[str]
    needles: list[tuple[int, int]]

    @property
    def depth(self) -> float:
        return self.needles[0][0] / len(self.tokens)

    def score(self, answer: str) -> float:
        return float(all(x in answer for x in self.expected) and not any(x in answer for x in self.barred))


class ChatRetrieval:
    """
    Args:
        tasks: for one tokenizer, with the pools of its names and numbers.
        chat: of the same tokenizer.
        split: of the numbers.
        digits: of the value of s_niah; 0: random tokens.
    """

    def __init__(self, tasks: RetrievalTasks, chat: ChatFormat, split: str, digits: int = 0):
        self.tasks, self.chat, self.split = tasks, chat, split
        tokenizer = tasks.tokenizer
        # Parts of characters and blanks are no text that an answer can be compared with.
        texts = tokenizer.batch_decode([[i] for i in tasks.value_ids.tolist()])
        self.value_ids = tasks.value_ids[[bool(text.strip()) and "\ufffd" not in text for text in texts]]
        self.digits = (
            Strings(tokenizer, string.digits, digits, "1", tasks.pool, tasks.pool_seed) if digits > 0 else None
        )

    def make_all(
        self, task: str, rng: np.random.Generator, corpus: np.ndarray, length: int, depth: float | None = None,
        most: int = 1,
    ) -> list[ChatQuestion]:  # fmt: skip
        """
        Up to `most` questions about one text. `depth`, from 0 to 1, places the needle of s_niah.

        Raises: ValueError if `length` is too small.
        """
        needles, asked = getattr(self, f"_{task}")(rng)
        asked = asked[:most]
        tails = [
            np.concatenate([encode(self.tasks.tokenizer, f"\n\n{question}"), self.chat.reply]).astype(np.int64)
            for question, *_ in asked
        ]
        room = length - len(self.chat.start) - max(map(len, tails)) - ANSWER_TOKENS[task] - sum(map(len, needles))
        if room < 0:
            raise ValueError(f"`--lengths`: {task} in chat form needs at least {length - room} tokens, not {length}.")
        order = rng.permutation(len(needles))
        places = np.sort(rng.integers(room + 1, size=len(needles)))
        if depth is not None and len(needles) == 1:
            places = np.array([round(depth * room)])
        body, spans = insert(excerpt(corpus, room, rng, np.int64), places, [needles[i] for i in order])
        at = {i: (start + len(self.chat.start), end + len(self.chat.start)) for i, (start, end) in zip(order, spans)}
        return [
            ChatQuestion(
                np.concatenate([self.chat.start, body, tail]).astype(np.int64), expected, barred,
                sorted(at[i] for i in of),
            )
            for tail, (_, of, expected, barred) in zip(tails, asked)
        ]  # fmt: skip

    # -- the tasks: needles, and questions with their needles, what is expected and what is barred --

    def _text(self, ids: np.ndarray) -> str:
        return self.tasks.tokenizer.decode(ids).strip()

    def _numbers(self, strings: Strings, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        """Different numbers of the split."""
        found: dict[str, np.ndarray] = {}
        while len(found) < count:
            (ids,) = strings.draw(rng, 1)
            if number_split(text := self._text(ids)) == self.split:
                found.setdefault(text, ids)
        return list(found.values())

    def _join(self, *parts: str | np.ndarray) -> np.ndarray:
        return np.concatenate([self.tasks.pieces[part] if isinstance(part, str) else part for part in parts])

    def _s_niah(self, rng: np.random.Generator):
        if self.digits is None:
            value = self.value_ids[rng.integers(len(self.value_ids), size=VALUE_IDS)]
        else:
            (value,) = self._numbers(self.digits, rng, 1)
        question = "What is the special magic value for long contexts mentioned in the text?"
        return [self._join("key", value, "bar")], [(question, [0], [self._text(value)], [])]

    def _mq_niah(self, rng: np.random.Generator):
        names, numbers = self.tasks.names.draw(rng, PAIRS), self._numbers(self.tasks.numbers, rng, PAIRS)
        needles = [self._join("number_for", name, "is", number, "bar") for name, number in zip(names, numbers)]
        asked = []
        for i in range(0, PAIRS, QUERIES):
            of = list(range(i, i + QUERIES))
            keys = " and ".join(self._text(names[j]) for j in of)
            question = f"What are all the special magic numbers for {keys} mentioned in the text?"
            asked.append((question, of, [self._text(numbers[j]) for j in of], []))
        return needles, asked

    def _vt(self, rng: np.random.Generator):
        names = self.tasks.names.draw(rng, CHAINS * VARIABLES)
        numbers = self._numbers(self.tasks.vt_numbers, rng, CHAINS)
        needles, asked = [], []
        for chain, number in enumerate(numbers):
            of = list(range(chain * VARIABLES, (chain + 1) * VARIABLES))
            for i in of:
                value = ("equals", number) if i == of[0] else ("equals_var", names[i - 1])
                needles.append(self._join("var", names[i], *value, "bar"))
            others = [self._text(name) for i, name in enumerate(names) if i not in of]
            question = f"Which variables are assigned the value {self._text(number)}?"
            asked.append((question, of, [self._text(names[of[-1]])], others))
        return needles, asked

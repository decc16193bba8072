"""
The tasks of RULER (arXiv 2404.06654; public benchmark NVIDIA/RULER) as prompts of token ids, and its score.

    tasks = RulerTasks(tokenizer, words, haystack)
    prompt = tasks.make("niah_single_2", np.random.default_rng(0), length=4096)
    string_match_all(answer, prompt.outputs)

`length` counts the prompt and the tokens kept for the answer, as there. The templates below, which define the tasks,
and the settings of the 11 tasks that need no downloaded question set are RULER's. What differs: the haystack called
"essay" is any text (there: essays that may not be passed on), and needles go to random ends of its sentences; common
words are repeated less where a tokenizer needs so many tokens that RULER's list would not fit. The parts of a prompt
are encoded one by one and joined, so that prompts of millions of tokens are made in a moment.

In chat form, as in RULER's own templates of chat models, the prompt is the message of a user, and the beginning of the
answer ("The special magic number for ... is") stands at the beginning of the assistant's turn; here without the space
that ends that of vt, which no word of a chat begins after. With a `split`, words, numbers and UUIDs are those of the
split, by the rule of `chat_rows/splits.py`, and none that is trained on.
"""

import math
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..chat_rows.chat import ChatFormat
from ..chat_rows.splits import number_split, split_of
from ..chat_rows.tables import words as words_of_rows
from ..tokens import encode, excerpt, first_ids


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n"
)
# Questions, and the beginnings of their answers.
NIAH_QUESTION = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
NIAH_ANSWER = "The special magic {kind} for {query} mentioned in the provided text are"
VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_QUESTION = "\nQuestion: Find all variables that are assigned the value {query} in the text above."
VT_ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
CWE_ANSWER = "Answer: The top 10 words that appear most often in the list are:"
FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words."
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
FWE_ANSWER = "Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class Niah:
    """A needle task: its haystack, the kinds of keys and values, and how many keys, values a key and queries."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", keys=4, queries=4),
}
TASKS = (*NIAH, "vt", "cwe", "fwe")
# Tokens kept for the answer.
ANSWER_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50}
NEEDS_HAYSTACK = {name for name, task in NIAH.items() if task.haystack == "essay"}
NEEDS_WORDS = {name for name, task in NIAH.items() if task.key == "words"} | {"cwe"}

VT_HOPS = 4
VT_EXAMPLE_TOKENS = 500
COMMON_WORDS = 10
FWE_LETTERS = 6


@dataclass
class Prompt:
    """
    `tokens`: int64 [L]. `outputs`: the strings that the answer must contain. `answer_tokens`: how many may be
    generated. `values`: [(start, end), ...], where in `tokens` the needles asked for are.
    """

    tokens: np.ndarray
    outputs: list[str]
    answer_tokens: int
    values: list[tuple[int, int]] = field(default_factory=list)

    @property
    def depth(self) -> float | None:
        return self.values[0][0] / len(self.tokens) if self.values else None


def string_match_all(answer: str, outputs: Sequence[str]) -> float:
    """RULER's score: the share of the expected strings that are in the answer, in whatever case."""
    answer = answer.lower()
    return sum(output.lower() in answer for output in outputs) / len(outputs)


def words_of_split(words: dict[str, list[str]], split: str) -> dict[str, list[str]]:
    """The words of a split, by `split_of`, without those that rows of `chat_rows` have in other splits."""
    others = {
        w.lower() for pool in words_of_rows().values() for of, found in pool.items() if of != split for w in found
    }
    return {
        kind: [word for word in listed if split_of(f"word {word}") == split and word.lower() not in others]
        for kind, listed in words.items()
    }


class RulerTasks:
    """
    Generators of the tasks for one tokenizer.

    Args:
        tokenizer: of Transformers.
        words: lists "nouns", "adjectives" and "verbs" (as in wonderwords.json); needed by the tasks of `NEEDS_WORDS`.
        haystack: token ids [N] of a text; needed by the tasks of `NEEDS_HAYSTACK`.
        chat: for prompts in chat form.
        split: of words, numbers and UUIDs; None: any.
    """

    def __init__(
        self,
        tokenizer,
        words: dict[str, list[str]] | None = None,
        haystack: np.ndarray | None = None,
        chat: ChatFormat | None = None,
        split: str | None = None,
    ):
        words = words if words is None or split is None else words_of_split(words, split)
        self.tokenizer, self.words, self.haystack, self.chat, self.split = tokenizer, words, haystack, chat, split
        self.start = first_ids(tokenizer) if chat is None else chat.start
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.ends_sentence = np.array([text.rstrip().endswith((".", "!", "?")) for text in texts])
        if words is not None:
            if missing := {"nouns", "adjectives", "verbs"} - words.keys():
                raise ValueError(f"`words` lacks {', '.join(sorted(missing))}.")
            self.all_words = sorted({word for kind in ("nouns", "adjectives", "verbs") for word in words[kind]})
        self._sizes = {}  # of the lists of common words, by length: they take a search

    def encode(self, text: str) -> np.ndarray:
        return np.array(encode(self.tokenizer, text), dtype=np.int64)

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(row, dtype=np.int64) for row in encode(self.tokenizer, texts)] if texts else []

    def ask(self, question: str, answer: str) -> np.ndarray:
        """The end of a prompt: a question and the beginning of its answer, which in chat form is the assistant's."""
        if self.chat is None:
            return self.encode(f"{question} {answer}")
        return np.concatenate([self.encode(question), self.chat.reply, self.encode(answer.rstrip())]).astype(np.int64)

    def make(self, task: str, rng: np.random.Generator, length: int, depth: float | None = None) -> Prompt:
        """The first of `make_all`."""
        return self.make_all(task, rng, length, depth)[0]

    def make_all(
        self, task: str, rng: np.random.Generator, length: int, depth: float | None = None, most: int = 1
    ) -> list[Prompt]:
        """
        Up to `most` prompts of `task` about one text, with room for an answer in `length` tokens: as many as it has
        needles to ask for, which is one but for `niah_multikey_*`. `depth`, from 0 to 1, places the needle of a task
        with one.

        Raises: ValueError if `length` is too small, the words are too few, or something the task needs is missing.
        """
        if task not in TASKS:
            raise ValueError(f"There is no task {task!r}: take one of {', '.join(TASKS)}.")
        if task in NEEDS_WORDS and self.words is None:
            raise ValueError(f"{task} needs word lists: pass `--words`.")
        if task in NEEDS_HAYSTACK and self.haystack is None:
            raise ValueError(f"{task} needs a text to hide things in: pass `--haystack`.")
        budget = length - ANSWER_TOKENS[task]
        if task in NIAH:
            return self._niah(task, NIAH[task], rng, budget, depth, most)
        return [getattr(self, f"_{task}")(rng, budget, length)]

    # -- needles --

    def _of_split(self, draw: Callable[[], str]) -> str:
        while number_split(text := draw()) != (self.split or number_split(text)):
            pass
        return text

    def _random(self, kind: str, rng: np.random.Generator) -> str:
        if kind == "numbers":
            return self._of_split(lambda: str(rng.integers(10**6, 10**7)))
        if kind == "words":
            adjectives, nouns = self.words["adjectives"], self.words["nouns"]
            return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"
        return self._of_split(lambda: str(uuid.UUID(bytes=rng.bytes(16), version=4)))

    def _niah(self, name: str, task: Niah, rng, budget: int, depth: float | None, most: int) -> list[Prompt]:
        if task.haystack == "needle":  # of which all may be asked for
            task = replace(task, keys=max(task.keys, most))
        keys = []
        while len(keys) < task.keys:
            if (key := self._random(task.key, rng)) not in keys:
                keys.append(key)
        values = [[self._random(task.value, rng) for _ in range(task.values)] for _ in keys]
        pairs = [(key, value) for key, of_key in zip(keys, values) for value in of_key]
        asked = [[keys[i] for i in rng.choice(task.keys, task.queries, replace=False)]]
        asked += [[key] for key in keys if task.queries == 1 and [key] != asked[0]][: most - 1]
        outputs = [[value for key in of for value in values[keys.index(key)]] for of in asked]

        head, kind, one = NIAH_HEAD, task.value, len(outputs[0]) == 1
        if one:
            head, kind = head.replace("Some", "A", 1).replace("are", "is", 1), kind.removesuffix("s")
        head = np.concatenate([self.start, self.encode(head.format(kind=kind))]).astype(np.int64)
        tails = [self._niah_tail(kind, of, one) for of in asked]

        pattern = " {}" if task.haystack == "essay" else "{}\n"
        texts = [NEEDLE.format(kind=task.value, key=key, value=value) for key, value in pairs]
        needles = self.encode_all([pattern.format(text) for text in texts])
        room = budget - len(head) - max(map(len, tails)) - sum(map(len, needles))
        body, cuts = self._body(name, task, rng, room)
        order = rng.permutation(len(needles))
        if depth is not None and len(needles) == 1:
            places = np.array([cuts[np.abs(cuts - depth * len(body)).argmin()]])
        else:
            places = np.sort(rng.choice(cuts, len(needles), replace=len(cuts) < len(needles)))
        tokens, spans = insert(body, places, [needles[i] for i in order])
        spans = [(pairs[i][0], (start + len(head), end + len(head))) for i, (start, end) in zip(order, spans)]
        return [
            Prompt(
                np.concatenate([head, tokens, tail]), found, ANSWER_TOKENS[name], [s for key, s in spans if key in of]
            )
            for tail, found, of in zip(tails, outputs, asked)
        ]

    def _niah_tail(self, kind: str, asked: list[str], one: bool) -> np.ndarray:
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        question, answer = NIAH_QUESTION, NIAH_ANSWER
        if one:
            question, answer = question.replace("are all", "is"), answer.removesuffix("are") + "is"
        return self.ask(question.format(kind=kind, query=query), answer.format(kind=kind, query=query))

    def _body(self, name: str, task: Niah, rng, room: int) -> tuple[np.ndarray, np.ndarray]:
        """The haystack, at most `room` tokens, and where needles may go: before it, between sentences, after it."""
        if room < 1:
            raise ValueError(f"{name} needs at least {1 - room} more tokens: pass larger `--lengths`.")
        if task.haystack == "essay":
            body = excerpt(self.haystack, room, rng, np.int64)
            return body, np.concatenate([[0], np.flatnonzero(self.ends_sentence[body]) + 1, [room]])
        if task.haystack == "noise":
            unit = self.encode(NOISE + "\n")
            count = room // len(unit)
            return np.tile(unit, count), np.arange(count + 1) * len(unit)
        units, size = [], 0
        while True:
            texts = [
                NEEDLE.format(kind=task.value, key=self._random(task.key, rng), value=self._random(task.value, rng))
                for _ in range(min(1000, 1 + room // 10))
            ]
            for unit in self.encode_all([f"{text}\n" for text in texts]):
                if size + len(unit) > room:
                    return np.concatenate([*units, np.zeros(0, np.int64)]), np.cumsum([0, *map(len, units)])
                units.append(unit)
                size += len(unit)

    # -- the other tasks --

    def _chain(self, rng, letters: int) -> tuple[list[str], str]:
        """Names of the variables of a chain and their value."""
        names = []
        while len(names) <= VT_HOPS:
            name = "".join(rng.choice(list(string.ascii_uppercase), letters))
            if name not in names:
                names.append(name)
        return names, self._of_split(lambda: str(rng.integers(10_000, 100_000)))

    def _vt_part(
        self, rng, budget: int, letters: int, ask: Callable
    ) -> tuple[np.ndarray, list[str], list[tuple[int, int]]]:
        names, value = self._chain(rng, letters)
        assigned = [f" VAR {names[0]} = {value}", *(f" VAR {b} = VAR {a}" for a, b in zip(names, names[1:]))]
        needles = self.encode_all(assigned)
        head, unit = self.encode(VT_HEAD), self.encode(f" {NOISE}\n")
        tail = ask(VT_QUESTION.format(query=value), VT_ANSWER.format(query=value, count=VT_HOPS + 1))
        count = (budget - len(head) - len(tail) - sum(map(len, needles))) // len(unit)
        if count < 0:
            raise ValueError(f"vt needs at least {-count * len(unit)} more tokens: pass larger `--lengths`.")
        places = np.sort(rng.integers(count + 1, size=len(needles))) * len(unit)
        body, spans = insert(np.tile(unit, count), places, needles)
        spans = [(start + len(head), end + len(head)) for start, end in spans]
        return np.concatenate([head, body, tail]), names, spans

    def _vt(self, rng, budget: int, length: int) -> Prompt:
        """One chain with four hops, after a small one that is answered, with names of three letters."""
        example, names, _ = self._vt_part(rng, min(VT_EXAMPLE_TOKENS, budget // 2), 3, self._in_text)
        answered = np.concatenate([self.start, example, self.encode(" ".join(names) + "\n\n")]).astype(np.int64)
        part, names, spans = self._vt_part(rng, budget - len(answered), 5, self.ask)
        values = [(start + len(answered), end + len(answered)) for start, end in spans]
        return Prompt(np.concatenate([answered, part]), names, ANSWER_TOKENS["vt"], values)

    def _in_text(self, question: str, answer: str) -> np.ndarray:
        """A question that the prompt itself answers, as an example."""
        return self.encode(f"{question} {answer}")

    def _distinct(self, rng, count: int) -> list[str]:
        """`count` different words; where there are not so many, pairs of them (RULER takes another list there)."""
        if count <= len(self.all_words):
            return [self.all_words[i] for i in rng.choice(len(self.all_words), count, replace=False)]
        first, second = self.words["adjectives"], self.words["nouns"]
        chosen = rng.choice(len(first) * len(second), count, replace=False)
        return [f"{first[i // len(second)]}-{second[i % len(second)]}" for i in chosen]

    def _word_list(
        self, rng, distinct: int, common: int, uncommon: int, ask: Callable
    ) -> tuple[np.ndarray, list[str]]:
        """`distinct` words, 10 of them `common` times and the rest `uncommon` times; and those 10."""
        words = self._distinct(rng, distinct)
        listed = words[:COMMON_WORDS] * common + words[COMMON_WORDS:] * uncommon
        entries = " ".join(f"{i + 1}. {listed[j]}" for i, j in enumerate(rng.permutation(len(listed))))
        tail = ask(CWE_QUESTION, CWE_ANSWER)
        return np.concatenate([self.encode(CWE_HEAD + entries), tail]), words[:COMMON_WORDS]

    def _cwe(self, rng, budget: int, length: int) -> Prompt:
        """
        Common words, after a small list that is answered. Fewer repetitions below 4096 tokens, as in RULER, and where
        the list would not fit otherwise.
        """
        for example_of, *repeats in ([((40, 10, 3), 30, 3)] if length >= 4096 else []) + [((20, 3, 1), 6, 1)]:
            if len(self.all_words) <= example_of[0]:
                raise ValueError(f"cwe needs more than {example_of[0]} words: pass others by `--words`.")
            example, words = self._word_list(rng, *example_of, self._in_text)
            answer = self.encode(" " + " ".join(f"{i + 1}. {word}" for i, word in enumerate(words)) + "\n")
            head = np.concatenate([self.start, example, answer]).astype(np.int64)
            room = budget - len(head)
            distinct = self._distinct_words(length, room, *repeats)
            while distinct > COMMON_WORDS + (COMMON_WORDS if repeats[0] == 30 else 0):
                part, words = self._word_list(rng, distinct, *repeats, self.ask)
                if len(part) <= room:
                    return Prompt(np.concatenate([head, part]), words, ANSWER_TOKENS["cwe"])
                distinct -= max(1, distinct // 100)
        raise ValueError(f"cwe does not fit into {length} tokens: pass larger `--lengths`, or other `--tasks`.")

    def _distinct_words(self, length: int, room: int, common: int, uncommon: int) -> int:
        """About how many distinct words a list of `room` tokens holds. Searched for once a length."""

        def size(count: int) -> int:
            return len(self._word_list(np.random.default_rng(count), count, common, uncommon, self.ask)[0])

        if (length, common) not in self._sizes:
            low, high = 0, len(self.all_words) + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if size(middle) <= room else (low, middle)
            if low == len(self.all_words):
                # Of pairs: nearly as many as in proportion. A search would take long in so long lists.
                pairs = len(self.words["adjectives"]) * len(self.words["nouns"])
                for _ in range(2 if pairs > low else 0):
                    tried = min(low + 1, pairs)
                    low = min(pairs, int(0.99 * tried * room / size(tried)))
                if low == max(pairs, len(self.all_words)):
                    raise ValueError(f"cwe at {length} tokens needs more than the {low} words or pairs of `--words`.")
            self._sizes[length, common] = low
        return self._sizes[length, common]

    def _fwe(self, rng, budget: int, length: int) -> Prompt:
        """Coded words with Zipf frequencies (exponent 2). The most frequent is noise, the next three are asked for."""
        kinds = length // 50
        if kinds < 4:
            raise ValueError(f"fwe needs at least 200 tokens, got {length}: pass larger `--lengths`.")
        rows = np.unique(rng.integers(26, size=(2 * kinds, FWE_LETTERS)), axis=0)
        rows = rows[rng.permutation(len(rows))[:kinds]]
        words = ["...", *("".join(row) for row in np.array(list(string.ascii_lowercase))[rows[1:]])]
        coded = self.encode_all([f" {word}" for word in words])
        sizes = np.array([len(ids) for ids in coded])
        head = np.concatenate([self.start, self.encode(FWE_HEAD)]).astype(np.int64)
        tail = self.ask(FWE_QUESTION, FWE_ANSWER)
        room = budget - len(head) - len(tail)
        share = np.arange(1, kinds + 1) ** -2.0 / (math.pi**2 / 6)
        low, high = 0, max(2 * room, 1)
        while high - low > 1:
            middle = (low + high) // 2
            fits = ((middle * share).astype(np.int64) * sizes).sum() <= room
            low, high = (middle, high) if fits else (low, middle)
        counts = (low * share).astype(np.int64)
        if counts[3] == 0:
            raise ValueError(f"fwe does not fit into {length} tokens: pass larger `--lengths`.")
        drawn = rng.permutation(np.repeat(np.arange(kinds), counts))
        body = np.concatenate([coded[i] for i in drawn])
        return Prompt(np.concatenate([head, body, tail]), words[1:4], ANSWER_TOKENS["fwe"])


def insert(body: np.ndarray, places: np.ndarray, needles: list[np.ndarray]):
    """Puts `needles` into `body` before its tokens number `places` (sorted). Returns the tokens and the spans."""
    parts, spans, done, shift = [], [], 0, 0
    for place, needle in zip(places.tolist(), needles):
        parts += [body[done:place], needle]
        spans.append((place + shift, place + shift + len(needle)))
        done, shift = place, shift + len(needle)
    return np.concatenate([*parts, body[done:]]), spans

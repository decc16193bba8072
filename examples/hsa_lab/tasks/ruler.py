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
"""

import math
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..tokens import encode, excerpt, first_ids


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH_HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n"
)
NIAH_TAIL = (
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)
VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_TAIL = (
    "\nQuestion: Find all variables that are assigned the value {query} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {query}, they are: "
)
CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
CWE_TAIL = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:"
)
FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words."
)
FWE_TAIL = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)


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


class RulerTasks:
    """
    Generators of the tasks for one tokenizer.

    Args:
        tokenizer: of Transformers.
        words: lists "nouns", "adjectives" and "verbs" (as in wonderwords.json); needed by the tasks of `NEEDS_WORDS`.
        haystack: token ids [N] of a text; needed by the tasks of `NEEDS_HAYSTACK`.
    """

    def __init__(self, tokenizer, words: dict[str, list[str]] | None = None, haystack: np.ndarray | None = None):
        self.tokenizer, self.words, self.haystack = tokenizer, words, haystack
        self.start = first_ids(tokenizer)
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

    def make(self, task: str, rng: np.random.Generator, length: int, depth: float | None = None) -> Prompt:
        """
        A prompt of `task` with room for its answer in `length` tokens. `depth`, from 0 to 1, places the needle of a
        task with one.

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
            return self._niah(task, NIAH[task], rng, budget, depth)
        return getattr(self, f"_{task}")(rng, budget, length)

    # -- needles --

    def _random(self, kind: str, rng: np.random.Generator) -> str:
        if kind == "numbers":
            return str(rng.integers(10**6, 10**7))
        if kind == "words":
            adjectives, nouns = self.words["adjectives"], self.words["nouns"]
            return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))

    def _niah(self, name: str, task: Niah, rng, budget: int, depth: float | None) -> Prompt:
        keys = []
        while len(keys) < task.keys:
            if (key := self._random(task.key, rng)) not in keys:
                keys.append(key)
        values = [[self._random(task.value, rng) for _ in range(task.values)] for _ in keys]
        pairs = [(key, value) for key, of_key in zip(keys, values) for value in of_key]
        asked = [keys[i] for i in rng.choice(task.keys, task.queries, replace=False)]
        outputs = [value for key in asked for value in values[keys.index(key)]]

        head, tail, kind = NIAH_HEAD, NIAH_TAIL, task.value
        if len(outputs) == 1:
            head = head.replace("Some", "A", 1).replace("are", "is", 1)
            tail = tail.replace("are all", "is").removesuffix("are") + "is"
            kind = kind.removesuffix("s")
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        head = np.concatenate([self.start, self.encode(head.format(kind=kind))]).astype(np.int64)
        tail = self.encode(tail.format(kind=kind, query=query))

        pattern = " {}" if task.haystack == "essay" else "{}\n"
        texts = [NEEDLE.format(kind=task.value, key=key, value=value) for key, value in pairs]
        needles = self.encode_all([pattern.format(text) for text in texts])
        room = budget - len(head) - len(tail) - sum(map(len, needles))
        body, cuts = self._body(name, task, rng, room)
        order = rng.permutation(len(needles))
        if depth is not None and len(needles) == 1:
            places = np.array([cuts[np.abs(cuts - depth * len(body)).argmin()]])
        else:
            places = np.sort(rng.choice(cuts, len(needles), replace=len(cuts) < len(needles)))
        tokens, spans = _insert(body, places, [needles[i] for i in order])
        wanted = [
            (start + len(head), end + len(head)) for i, (start, end) in zip(order, spans) if pairs[i][0] in asked
        ]
        return Prompt(np.concatenate([head, tokens, tail]), outputs, ANSWER_TOKENS[name], wanted)

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
        return names, str(rng.integers(10_000, 100_000))

    def _vt_part(self, rng, budget: int, letters: int) -> tuple[np.ndarray, list[str], list[tuple[int, int]]]:
        names, value = self._chain(rng, letters)
        assigned = [f" VAR {names[0]} = {value}", *(f" VAR {b} = VAR {a}" for a, b in zip(names, names[1:]))]
        needles = self.encode_all(assigned)
        head, unit = self.encode(VT_HEAD), self.encode(f" {NOISE}\n")
        tail = self.encode(VT_TAIL.format(query=value, count=VT_HOPS + 1))
        count = (budget - len(head) - len(tail) - sum(map(len, needles))) // len(unit)
        if count < 0:
            raise ValueError(f"vt needs at least {-count * len(unit)} more tokens: pass larger `--lengths`.")
        places = np.sort(rng.integers(count + 1, size=len(needles))) * len(unit)
        body, spans = _insert(np.tile(unit, count), places, needles)
        spans = [(start + len(head), end + len(head)) for start, end in spans]
        return np.concatenate([head, body, tail]), names, spans

    def _vt(self, rng, budget: int, length: int) -> Prompt:
        """One chain with four hops, after a small one that is answered, with names of three letters."""
        example, names, _ = self._vt_part(rng, min(VT_EXAMPLE_TOKENS, budget // 2), 3)
        answered = np.concatenate([self.start, example, self.encode(" ".join(names) + "\n\n")]).astype(np.int64)
        part, names, spans = self._vt_part(rng, budget - len(answered), 5)
        values = [(start + len(answered), end + len(answered)) for start, end in spans]
        return Prompt(np.concatenate([answered, part]), names, ANSWER_TOKENS["vt"], values)

    def _word_list(self, rng, distinct: int, common: int, uncommon: int) -> tuple[np.ndarray, list[str]]:
        """`distinct` words, 10 of them `common` times and the rest `uncommon` times; and those 10."""
        words = [self.all_words[i] for i in rng.choice(len(self.all_words), distinct, replace=False)]
        listed = words[:COMMON_WORDS] * common + words[COMMON_WORDS:] * uncommon
        entries = " ".join(f"{i + 1}. {listed[j]}" for i, j in enumerate(rng.permutation(len(listed))))
        return self.encode(CWE_HEAD + entries + CWE_TAIL), words[:COMMON_WORDS]

    def _cwe(self, rng, budget: int, length: int) -> Prompt:
        """
        Common words, after a small list that is answered. Fewer repetitions below 4096 tokens, as in RULER, and where
        the list would not fit otherwise.
        """
        for example_of, *repeats in ([((40, 10, 3), 30, 3)] if length >= 4096 else []) + [((20, 3, 1), 6, 1)]:
            if len(self.all_words) <= example_of[0]:
                raise ValueError(f"cwe needs more than {example_of[0]} words: pass others by `--words`.")
            example, words = self._word_list(rng, *example_of)
            answer = self.encode(" " + " ".join(f"{i + 1}. {word}" for i, word in enumerate(words)) + "\n")
            head = np.concatenate([self.start, example, answer]).astype(np.int64)
            room = budget - len(head)
            distinct = self._distinct_words(length, room, *repeats)
            while distinct > COMMON_WORDS + (COMMON_WORDS if repeats[0] == 30 else 0):
                part, words = self._word_list(rng, distinct, *repeats)
                if len(part) <= room:
                    return Prompt(np.concatenate([head, part]), words, ANSWER_TOKENS["cwe"])
                distinct -= max(1, distinct // 100)
        raise ValueError(f"cwe does not fit into {length} tokens: pass larger `--lengths`, or other `--tasks`.")

    def _distinct_words(self, length: int, room: int, common: int, uncommon: int) -> int:
        """About how many distinct words a list of `room` tokens holds. Searched for once a length."""
        if (length, common) not in self._sizes:
            low, high = 0, len(self.all_words) + 1
            while high - low > 1:
                middle = (low + high) // 2
                size = len(self._word_list(np.random.default_rng(middle), middle, common, uncommon)[0])
                low, high = (middle, high) if size <= room else (low, middle)
            if low == len(self.all_words):
                raise ValueError(f"cwe at {length} tokens needs more than the {low} words of `--words`.")
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
        tail = self.encode(FWE_TAIL)
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


def _insert(body: np.ndarray, places: np.ndarray, needles: list[np.ndarray]):
    """Puts `needles` into `body` before its tokens number `places` (sorted). Returns the tokens and the spans."""
    parts, spans, done, shift = [], [], 0, 0
    for place, needle in zip(places.tolist(), needles):
        parts += [body[done:place], needle]
        spans.append((place + shift, place + shift + len(needle)))
        done, shift = place, shift + len(needle)
    return np.concatenate([*parts, body[done:]]), spans

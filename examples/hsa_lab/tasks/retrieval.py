"""
Retrieval tasks of the papers on HSA (arXiv 2504.16795, 2510.17196) as token ids, to train and to evaluate on.

    tasks = RetrievalTasks(tokenizer)
    sample = tasks.s_niah(np.random.default_rng(0), corpus, length=4096)   # or .mq_niah, .vt, .dense
    sample.tokens, sample.answer_mask                                      # [4096] each

The haystack is text of a language model's corpus: `corpus` [N], token ids in memory or mapped, read at a random offset
(and from its start again, should it end), or at several: `parts`. Hidden in it are needles; a question and its answer
end the sequence. The answer is scored by teacher forcing: every token under `answer_mask` must be the likeliest after
those before it.

s_niah   One needle, whose value is 7 random token ids:
             | One of the special magic values for long contexts is: <ids> |
             What is the special magic value for long contexts mentioned in the text? Answer: <ids>
mq_niah  6 needles, from a name (5 capital letters) to a number (6 digits), and 2 of them asked for:
             | One of the special magic numbers for ABCDE is 123456 |
             What are all the special magic numbers for ABCDE and FGHIJ mentioned in the text? Answer: 123456 654321
vt       6 assignments in any order, 2 chains of 3 variables. The question is about one chain, and only the last of its
         variables is scored, the others being given:
             | VAR ABCDE = 12345 |   | VAR FGHIJ = VAR ABCDE |   | VAR KLMNO = VAR FGHIJ |
             Which variables are assigned the value 12345? Answer: ABCDE, FGHIJ, KLMNO
dense    For training: many needles and questions of the above kinds along one sequence, each question at a distance
         from its needles between two bounds, so that a curriculum can put needles just beyond the window first. Also
         facts in plain English, with words from lists and from the vocabulary of the tokenizer:
             The locker number of Mabel the cooper is 75738.   What is the locker number of Mabel the cooper? 75738.

The pieces of a template are encoded one by one and joined, so that their tokens are the same in every sample. Nothing
but `rng` decides what a sample is. Needs no PyTorch; objects can be sent to the workers of a data loader.
"""

import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..tokens import encode, excerpt
from .chronicles import KINDS_OF_SECRET, NAMES, TRADES


NAME_LETTERS = 5
VALUE_IDS = 7  # tokens of the value in `s_niah`
MQ_DIGITS = 6
VT_DIGITS = 5
FACT_KINDS = {"fact": "number", "word": "word", "uuid": "uuid"}  # and what their values are called
KINDS = ("number", "ids", "chain", *FACT_KINDS)

# Facts in plain English: sentences, and questions that go with any of them; the value is the answer.
FACT_SENTENCES = (
    "The {what} of {name} the {trade} is {value}.",
    "{name} the {trade} has the {what} {value}.",
    "The {what} {value} belongs to {name} the {trade}.",
    "The {what} that {name} the {trade} was given is {value}.",
)
FACT_QUESTIONS = (
    "What is the {what} of {name} the {trade}?",
    "Which {what} does {name} the {trade} have?",
    "Which {what} belongs to {name} the {trade}?",
    "Question: What is the {what} of {name} the {trade}? Answer:",
    "Question: What is the {what} of {name} the {trade}?\nAnswer:",
)
# The wording of RULER (arXiv 2404.06654), of every fifth fact.
RULER_SENTENCE = "One of the special magic {kind}s for {trade}-{what} is: {value}."
RULER_QUESTION = (
    "What is the special magic {kind} for {trade}-{what} mentioned in the provided text? The special magic {kind} for "
    "{trade}-{what} mentioned in the provided text is"
)
FACT_RULER = 0.2
FACT_BREAKS = (" ", " ", "\n", "\n\n")  # before a question, equally likely
FACT_DIGITS = (4, 5, 6, 7)

# How often `dense` tries to find room for an item before it goes on with the next.
TRIES = 30


@dataclass
class Item:
    """Needles, one question about them and its answer, as token ids, not yet anywhere."""

    needles: list[np.ndarray]
    values: list[tuple[int, int]]  # where in each needle the tokens are that answers copy
    question: np.ndarray
    answer: np.ndarray
    scored: np.ndarray  # bool, of `answer`
    asked: list[int]  # the needles that scored tokens are copied from


@dataclass
class Sample:
    """
    A sequence [L] with questions in it.

    `tokens`: uint16 or int32 [L]. `answer_mask`: bool [L], the tokens to be predicted. `needles` and `values`: int64
    [n, 2], first token and one beyond the last of each needle and of what answers copy from it. `asked`: int64 [n],
    the answer (row of `answers`) that the needle is asked for by, -1 for needles that are only there to distract.
    `answers`: int64 [q, 2], the tokens of each answer.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray
    needles: np.ndarray
    values: np.ndarray
    asked: np.ndarray
    answers: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    @property
    def wanted(self) -> list[tuple[int, int]]:
        """Where the values are that the scored answers copy."""
        return [tuple(span) for span in self.values[self.asked >= 0].tolist()]

    @property
    def distances(self) -> np.ndarray:
        """int64, of each needle that is asked for: tokens between its end and the start of the answer."""
        asked = self.asked >= 0
        return self.answers[self.asked[asked], 0] - self.needles[asked, 1]

    @property
    def depth(self) -> float:
        """Where the first needle that is asked for is, from 0 (start) to 1 (end of the sequence)."""
        return float(self.needles[self.asked >= 0][0, 0]) / len(self.tokens)


class Strings:
    """Random strings of a fixed number of characters, with a space before them, as token ids."""

    def __init__(self, tokenizer, alphabet: str, characters: int, first: str, pool: int, seed: int):
        rng = np.random.default_rng([seed, characters, len(alphabet)])
        rows = np.stack([rng.integers(len(alphabet), size=pool) for _ in range(characters)], axis=1)
        rows[:, 0] = rng.integers(alphabet.index(first), len(alphabet), size=pool)
        rows = np.unique(rows, axis=0)
        rows = rows[rng.permutation(len(rows))]
        self.low, self.size, self.characters = alphabet.index(first), len(alphabet), characters
        # Where every character is a token of its own, whatever its neighbours, strings need no list.
        space, *single = encode(tokenizer, [" ", *(f" {c}" for c in alphabet)])
        self.space = np.array(space)
        self.lookup = np.array([ids[-1] for ids in single])
        probe = encode(tokenizer, " " + alphabet)
        self.pool = None
        if probe != [*space, *self.lookup.tolist()] or len(set(self.lookup.tolist())) < len(alphabet):
            words = np.array(list(alphabet))[rows]
            self.pool = [np.array(ids) for ids in encode(tokenizer, [" " + "".join(word) for word in words])]

    def draw(self, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        """`count` different ones."""
        if self.pool is not None:
            if count > len(self.pool):
                raise ValueError(f"{count} needles need a larger `pool` than {len(self.pool)}.")
            return [self.pool[i] for i in rng.choice(len(self.pool), count, replace=False)]
        while True:
            rows = rng.integers(self.size, size=(count, self.characters))
            rows[:, 0] = rng.integers(self.low, self.size, size=count)
            if count == 1 or len({row.tobytes() for row in rows}) == count:
                return [np.concatenate([self.space, row]) for row in self.lookup[rows]]


def _words(vocabulary: list[str], rng: np.random.Generator, count: int) -> tuple[list[str], list[str]]:
    """
    Words of one token, of at least three letters, from the texts of a vocabulary; and up to `count` made up of the
    texts of two or three tokens, like the rarer words of a language.
    """
    ascii_words = [text for text in vocabulary if text.strip().isascii() and text.strip().isalpha()]
    whole = [text[1:] for text in ascii_words if text[0] == " " and len(text) > 3]
    starts = [text[1:] for text in ascii_words if text[0] == " "]
    ends = [text for text in ascii_words if text[0] != " " and text.islower() and len(text) > 1]
    if not starts or not ends:
        return whole, []
    starts, ends = np.array(starts), np.array(ends)
    made = [str(rng.choice(starts)) + "".join(rng.choice(ends, size)) for size in rng.integers(1, 3, size=count)]
    return whole, [word for word in made if word.islower() or word.istitle()]


class _Facts:
    """
    Facts in plain English and their values, as token ids. There are about `pool` facts of kind "fact" and a quarter as
    many of each other, no two of a kind about the same thing. Their words are from the lists of `chronicles.py`, from
    the vocabulary, or made up of its tokens. Values are drawn anew each time.
    """

    def __init__(self, tokenizer, pool: int, seed: int):
        def encode_all(texts: list[str]) -> list[np.ndarray]:
            return [np.array(ids, np.int64) for ids in encode(tokenizer, texts)]

        rng = np.random.default_rng([seed, pool, 1])
        vocabulary = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        sources = _words(vocabulary, rng, pool)
        sizes = {kind: pool if kind == "fact" else pool // 4 for kind in FACT_KINDS}
        self.facts = {
            kind: list(zip(*map(encode_all, self._make(rng, sources, name, sizes[kind]))))
            for kind, name in FACT_KINDS.items()
        }
        uuids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(sizes["uuid"])]
        texts = {"word": [word for words in sources for word in words if word.islower()] or TRADES, "uuid": uuids}
        self.values = {kind: encode_all([f" {text}" for text in texts[kind]]) for kind in texts}
        self.numbers = [Strings(tokenizer, string.digits, n, "1", pool, seed) for n in FACT_DIGITS]

    @staticmethod
    def _make(rng: np.random.Generator, sources, name: str, pool: int) -> list[list[str]]:
        """What stands before the values, what stands after them, and the questions. `name`: of the kind of value."""

        def slot(listed, wanted) -> list[list[str]]:
            return [words for words in (listed, *(list(filter(wanted, words)) for words in sources)) if words]

        slots = {
            "what": slot(KINDS_OF_SECRET, str.islower),
            "name": slot(NAMES, str.istitle),
            "trade": slot(TRADES, str.islower),
        }
        facts = {}
        for _ in range(pool):
            words = {key: lists[rng.integers(len(lists))] for key, lists in slots.items()}
            words = {key: among[rng.integers(len(among))] for key, among in words.items()}
            sentence, question = RULER_SENTENCE, RULER_QUESTION
            if rng.random() >= FACT_RULER:
                sentence = FACT_SENTENCES[rng.integers(len(FACT_SENTENCES))]
                question = FACT_QUESTIONS[rng.integers(len(FACT_QUESTIONS))]
            question = FACT_BREAKS[rng.integers(len(FACT_BREAKS))] + question
            parts = (*f" {sentence}".split(" {value}"), question)
            facts[tuple(words.values())] = [part.format(kind=name, **words) for part in parts]
        return list(map(list, zip(*facts.values())))

    def draw(self, rng: np.random.Generator, kind: str, count: int) -> list[tuple[np.ndarray, ...]]:
        """`count` different facts of a kind: what is before the value, the value, what is after it, the question."""
        facts = self.facts[kind]
        if count > len(facts):
            raise ValueError(f"{count} facts need a larger `pool` than {len(facts)}.")
        chosen = [facts[i] for i in rng.choice(len(facts), count, replace=False)]
        return [(before, self._value(rng, kind), after, question) for before, after, question in chosen]

    def _value(self, rng: np.random.Generator, kind: str) -> np.ndarray:
        if kind == "fact":
            return self.numbers[rng.integers(len(self.numbers))].draw(rng, 1)[0]
        return self.values[kind][rng.integers(len(self.values[kind]))]


class RetrievalTasks:
    """
    Generators of the tasks above for one tokenizer.

    Args:
        tokenizer: of Transformers.
        value_ids: the range (low, high) that the random ids of `s_niah` are from; all ids by default. Special tokens
            are never drawn.
        pool: names and numbers are drawn from lists of so many (only where a letter or digit is not always a token),
            facts of a quarter.
        pool_seed: of those lists. With different ones, training and evaluation share names only by chance.
    """

    def __init__(self, tokenizer, value_ids: tuple[int, int] | None = None, pool: int = 20_000, pool_seed: int = 0):
        self.tokenizer, self.pool, self.pool_seed = tokenizer, pool, pool_seed
        self._facts: _Facts | None = None
        low, high = value_ids or (0, len(tokenizer))
        if not 0 <= low < high <= len(tokenizer):
            raise ValueError(f"`value_ids` must be a range in [0, {len(tokenizer)}], got {value_ids}.")
        self.value_ids = np.setdiff1d(np.arange(low, high), tokenizer.all_special_ids)
        if len(self.value_ids) < 2:
            raise ValueError(f"`value_ids` {value_ids} leaves fewer than two ids that are not special.")
        self.dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        self.names = Strings(tokenizer, string.ascii_uppercase, NAME_LETTERS, "A", pool, pool_seed)
        self.numbers = Strings(tokenizer, string.digits, MQ_DIGITS, "1", pool, pool_seed)
        self.vt_numbers = Strings(tokenizer, string.digits, VT_DIGITS, "1", pool, pool_seed)
        pieces = {
            "bar": " |",
            "key": " | One of the special magic values for long contexts is:",
            "ask_key": " What is the special magic value for long contexts mentioned in the text? Answer:",
            "number_for": " | One of the special magic numbers for",
            "ids_for": " | One of the special magic values for",
            "is": " is",
            "is:": " is:",
            "ask_numbers": " What are all the special magic numbers for",
            "ask_number": " What is the special magic number for",
            "ask_ids": " What is the special magic value for",
            "and": " and",
            "in_text": " mentioned in the text? Answer:",
            "var": " | VAR",
            "equals": " =",
            "equals_var": " = VAR",
            "ask_var": " Which variables are assigned the value",
            "answer": "? Answer:",
            "comma": ",",
            "period": ".",
        }
        self.pieces = {name: np.array(encode(tokenizer, text), dtype=np.int64) for name, text in pieces.items()}

    def make_facts(self) -> _Facts:
        """Those of `dense`, made once, which takes a second or more: ask for them before starting workers."""
        if self._facts is None:
            self._facts = _Facts(self.tokenizer, self.pool // 4, self.pool_seed)
        return self._facts

    # -- the tasks of the papers; the haystack of each is made of `parts` excerpts --

    def s_niah(
        self,
        rng: np.random.Generator,
        corpus: np.ndarray,
        length: int,
        depth: float | None = None,
        max_distance: int | None = None,
        parts: int = 1,
    ) -> Sample:
        """
        One needle, at `depth` from 0 (start of the haystack) to 1 (its end); anywhere by default, or anywhere where
        its end is at most `max_distance` tokens before the start of the answer. The question is between the two.
        """
        value = rng.choice(self.value_ids, VALUE_IDS)
        joined = self._join(("key", value, "bar"), 1)
        item = self._item([joined], ("ask_key",), value, [0])
        if max_distance is None:
            return self._at_the_end(rng, corpus, length, item, parts, depth)
        if depth is not None:
            raise ValueError(f"`depth` {depth} and `max_distance` {max_distance} both say where the needle is.")
        between = len(item.question)
        if max_distance < between:
            raise ValueError(f"`max_distance` must be at least {between}, for the question, got {max_distance}.")
        return self._at_the_end(rng, corpus, length, item, parts, most_after=max_distance - between)

    def mq_niah(
        self,
        rng: np.random.Generator,
        corpus: np.ndarray,
        length: int,
        pairs: int = 6,
        queries: int = 2,
        parts: int = 1,
    ) -> Sample:
        """`pairs` needles at random places, of which `queries` are asked for."""
        if not 1 <= queries <= pairs:
            raise ValueError(f"`queries` must be from 1 to `pairs` ({pairs}), got {queries}.")
        item = self._number_item(self.names.draw(rng, pairs), self.numbers.draw(rng, pairs), queries)
        return self._at_the_end(rng, corpus, length, item, parts)

    def vt(
        self,
        rng: np.random.Generator,
        corpus: np.ndarray,
        length: int,
        chains: int = 2,
        variables: int = 3,
        score: str = "last",
        parts: int = 1,
    ) -> Sample:
        """
        `chains` chains of `variables` assignments at random places, in any order. `score`: "last", the last variable
        of the chain that is asked for, as the papers do; or "all" of its variables, which is more to learn from.
        """
        if chains < 1 or variables < 1 or score not in ("last", "all"):
            raise ValueError(
                f"`chains` and `variables` must be at least 1 and `score` 'last' or 'all', got {chains}, {variables}, "
                f"{score!r}."
            )
        names, numbers = self.names.draw(rng, chains * variables), self.vt_numbers.draw(rng, chains)
        return self._at_the_end(rng, corpus, length, self._chain_item(names, numbers, score), parts)

    def dense(
        self,
        rng: np.random.Generator,
        corpus: np.ndarray,
        length: int,
        items: int = 16,
        min_distance: int = 0,
        max_distance: int | None = None,
        kinds: Sequence[str] = KINDS,
        parts: int = 1,
    ) -> Sample:
        """
        Up to `items` questions along the sequence (fewer where no room is left), each with needles of its own. The
        distance of an answer from its needles, in tokens from the end of a needle to the start of the answer, is in
        [`min_distance`, `max_distance`], uniformly; a question always comes after its needles.

        Args:
            kinds: what an item may be, drawn at random: "number" (name -> 6 digits), "ids" (name -> 7 random token
                ids), "chain" (3 assignments in any order, all variables asked for), and in plain English "fact" (a
                number of 4 to 7 digits), "word" (of the vocabulary, or made up of pieces of it) and "uuid".

        Raises:
            ValueError: if the sequence is too short for an item, or the bounds leave no distance.
        """
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"`kinds` must be of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}.")
        if min_distance < 0 or (max_distance is not None and max_distance < min_distance):
            raise ValueError(f"`min_distance` {min_distance} and `max_distance` {max_distance} leave no distance.")
        made = self._make_items(rng, items, kinds)
        tokens = excerpt(corpus, length, rng, self.dtype, parts)
        taken = bytearray(length)
        placed = []
        for item in made:
            starts = _place(rng, item, length, min_distance, max_distance, taken)
            if starts is not None:
                placed.append((item, starts))
        if not placed:
            raise ValueError(
                f"No question has room in {length} tokens at distances from {min_distance} to {max_distance}: make "
                "`length` larger, or the distances smaller."
            )
        return self._write(tokens, placed)

    def make(self, task: str, rng: np.random.Generator, corpus: np.ndarray, length: int, **options) -> Sample:
        """The task of that name: s_niah, mq_niah, vt or dense."""
        if task not in ("s_niah", "mq_niah", "vt", "dense"):
            raise ValueError(f"There is no task {task!r}: take s_niah, mq_niah, vt or dense.")
        return getattr(self, task)(rng, corpus, length, **options)

    # -- items --

    def _join(self, parts, value: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Pieces (by name) and ids in a row, and where part number `value` is in them."""
        arrays = [self.pieces[part] if isinstance(part, str) else part for part in parts]
        start = sum(map(len, arrays[:value]))
        return np.concatenate(arrays), (start, start + len(arrays[value]))

    def _item(self, joined, question, answer, asked: list[int], scored: np.ndarray | None = None) -> Item:
        question, _ = self._join(question, 0)
        needles, values = ([x[i] for x in joined] for i in (0, 1))
        return Item(needles, values, question, answer, np.ones(len(answer), bool) if scored is None else scored, asked)

    def _ids_item(self, name: np.ndarray, value: np.ndarray) -> Item:
        joined = [self._join(("ids_for", name, "is:", value, "bar"), 3)]
        return self._item(joined, ("ask_ids", name, "in_text"), value, [0])

    def _fact_item(self, before: np.ndarray, value: np.ndarray, after: np.ndarray, question: np.ndarray) -> Item:
        answer = np.concatenate([value, self.pieces["period"]])
        scored = np.arange(len(answer)) < len(value)
        return self._item([self._join((before, value, after), 1)], (question,), answer, [0], scored)

    def _number_item(self, names: list[np.ndarray], numbers: list[np.ndarray], queries: int) -> Item:
        """A needle a name and number; the first `queries` are asked for. Needles are placed in random order."""
        joined = [self._join(("number_for", name, "is", number, "bar"), 3) for name, number in zip(names, numbers)]
        question = ["ask_numbers" if queries > 1 else "ask_number", names[0]]
        for name in names[1:queries]:
            question += ["and", name]
        return self._item(joined, (*question, "in_text"), np.concatenate(numbers[:queries]), list(range(queries)))

    def _chain_item(self, names: list[np.ndarray], numbers: list[np.ndarray], score: str) -> Item:
        """As many chains as numbers, with equal shares of the names; the first is asked for."""
        variables = len(names) // len(numbers)
        joined = []
        for i, name in enumerate(names):
            of = ("equals", numbers[i // variables]) if i % variables == 0 else ("equals_var", names[i - 1])
            joined.append(self._join(("var", name, *of, "bar"), 1))
        parts = [names[0]]
        for name in names[1:variables]:
            parts += [self.pieces["comma"], name]
        answer = np.concatenate(parts)
        scored = np.ones(len(answer), bool)
        if score == "last":
            scored[: len(answer) - len(parts[-1])] = False
        asked = list(range(variables)) if score == "all" else [variables - 1]
        return self._item(joined, ("ask_var", numbers[0], "answer"), answer, asked, scored)

    def _make_items(self, rng, count: int, kinds: Sequence[str]) -> list[Item]:
        """`count` items of random kinds, no name or number being in two."""
        chosen = [kinds[i] for i in rng.integers(len(kinds), size=count).tolist()]
        uses = {"chain": 3, **dict.fromkeys(FACT_KINDS, 0)}
        names = iter(self.names.draw(rng, sum(uses.get(kind, 1) for kind in chosen)))
        numbers = iter(self.numbers.draw(rng, count))
        vt_numbers = iter(self.vt_numbers.draw(rng, count))
        ids = iter(self.value_ids[rng.integers(len(self.value_ids), size=(count, VALUE_IDS))])
        facts = {
            kind: iter(self.make_facts().draw(rng, kind, chosen.count(kind))) for kind in FACT_KINDS if kind in chosen
        }
        items = []
        for kind in chosen:
            if kind in FACT_KINDS:
                items.append(self._fact_item(*next(facts[kind])))
            elif kind == "chain":
                items.append(self._chain_item([next(names) for _ in range(3)], [next(vt_numbers)], "all"))
            elif kind == "number":
                items.append(self._number_item([next(names)], [next(numbers)], 1))
            else:
                items.append(self._ids_item(next(names), next(ids)))
        return items

    # -- sequences --

    def _at_the_end(
        self,
        rng,
        corpus,
        length: int,
        item: Item,
        parts: int,
        depth: float | None = None,
        most_after: int | None = None,
    ) -> Sample:
        """
        The needles at random places of the haystack (or the only one at `depth`), at most `most_after` tokens before
        its end; the question after it.
        """
        tail = len(item.question) + len(item.answer)
        room = length - tail - sum(map(len, item.needles))
        if room < 0:
            raise ValueError(f"`length` must be at least {length - room} for needles and question, got {length}.")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"`depth` must be from 0 to 1, got {depth}.")
        if depth is None:
            first = 0 if most_after is None else max(0, room - most_after)
            cuts = rng.integers(first, room + 1, size=len(item.needles))
        else:
            cuts = np.array([round(depth * room)])
        order = rng.permutation(len(cuts))
        starts, shift = np.empty(len(cuts), np.int64), 0
        for cut, i in zip(np.sort(cuts).tolist(), order.tolist()):
            starts[i] = cut + shift
            shift += len(item.needles[i])
        haystack = excerpt(corpus, room, rng, self.dtype, parts)
        tokens = np.empty(length, self.dtype)
        done, source = 0, 0
        for i in order.tolist():
            start, size = int(starts[i]), int(starts[i]) - done
            tokens[done:start] = haystack[source : source + size]
            source, done = source + size, start + len(item.needles[i])
        tokens[done : length - tail] = haystack[source:]
        return self._write(tokens, [(item, [*starts.tolist(), length - tail])])

    def _write(self, tokens: np.ndarray, placed: list[tuple[Item, list[int]]]) -> Sample:
        """Puts items at their starts (of every needle and of the question) into `tokens`."""
        mask = np.zeros(len(tokens), dtype=bool)
        needles, values, asked, answers = [], [], [], []
        for number, (item, (*starts, question)) in enumerate(placed):
            for i, (start, needle, (a, b)) in enumerate(zip(starts, item.needles, item.values)):
                tokens[start : start + len(needle)] = needle
                needles.append((start, start + len(needle)))
                values.append((start + a, start + b))
                asked.append(number if i in item.asked else -1)
            answer = question + len(item.question)
            tokens[question:answer] = item.question
            tokens[answer : answer + len(item.answer)] = item.answer
            mask[answer : answer + len(item.answer)] = item.scored
            answers.append((answer, answer + len(item.answer)))
        return Sample(tokens, mask, *(np.array(x, np.int64) for x in (needles, values, asked, answers)))


def _place(rng, item: Item, length: int, low: int, high: int | None, taken: bytearray) -> list[int] | None:
    """
    Random starts of the needles and the question of `item` where `taken` [length] is 0, and then is 1. None where a
    few draws found no room.
    """
    ask, size = len(item.question), len(item.answer)
    low = max(low, ask)  # a needle ends before its question starts
    first = low + max(map(len, item.needles))
    last = length - size
    if first > last or (high is not None and high < low):
        return None
    for draws in rng.random((TRIES, 1 + len(item.needles))).tolist():
        answer = first + int(draws[0] * (last - first + 1))
        spans = [(answer - ask, answer + size)]
        for needle, draw in zip(item.needles, draws[1:]):
            furthest = answer - len(needle)
            furthest = furthest if high is None else min(high, furthest)
            end = answer - low - int(draw * (furthest - low + 1))
            spans.append((end - len(needle), end))
        if any(taken.find(1, start, end) >= 0 for start, end in spans):
            continue
        ordered = sorted(spans)
        if all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:])):
            for start, end in spans:
                taken[start:end] = b"\1" * (end - start)
            return [start for start, _ in (*spans[1:], spans[0])]
    return None

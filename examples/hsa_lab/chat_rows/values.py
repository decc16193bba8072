"""
Values and names: numbers, dates, names, codes and words of one split.

    source = Source("train", random.Random(0))
    source.value("money 10 99")     # "$48.20"
    source.name("{Adj} {Noun}")     # "Quiet Heron"

Numbers and codes belong to a split by their digits and letters (`splits.number_split`), words by their place in their
pool.
"""

import random
import re
from functools import cache

from .splits import check_split, number_split, place_split
from .tables import words


MONTHS = words()["month"]["train"]
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DOMAINS = "com org net eu io info".split()
TRIES = 2000
# To train on, this share of the words of open pools is made up, so that they are read and not known: names and bare
# words of syllables, others with a word more or another one at their end.
INVENTED = 0.5
NAMES = {"first", "last", "placestem", "companyhead", "city", "country", "noun", "adj"}
PHRASES = {
    "colour", "material", "profession", "hobby", "food", "language", "subject", "instrument", "animal", "topic",
    "cause", "gift", "spot", "goal", "object",
}  # fmt: skip
ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
INNER = "b d f g k l m n p r s t v z ld lm mb nd ng nt rd rk rn sk st th br dr tr".split()
VOWELS = "a e i o u a e i o u ai ee ea ie oo ou".split()
CODAS = ["", *"ck d ft l ll m n nd ng nt p r rd rk rn s sh st t th x".split()]
ENDINGS = "a e i o y en er ia in io is on or us".split()


class Source:
    """Draws values and names of `split` with `rng`."""

    def __init__(self, split: str, rng: random.Random):
        self.split, self.rng = check_split(split), rng
        self.pools = {pool: members[split] for pool, members in words().items()}

    def word(self, pool: str) -> str:
        member = self.rng.choice(self.pools[pool])
        if self.split != "train" or pool not in NAMES | PHRASES or self.rng.random() > INVENTED:
            return member
        if pool in PHRASES:
            return self.varied(member)
        word = self._invented()
        return word if pool in ("noun", "adj") else word.capitalize()

    def varied(self, phrase: str) -> str:
        """The phrase with a word more after its article, or, of several words, with another one at the end."""
        article, _, rest = phrase.partition(" ")
        if article not in ("a", "an", "the"):
            article, rest = "", phrase
        words = rest.split(" ")
        if len(words) > 1 and self.rng.random() < 0.4:
            words[-1] = self._invented()
        else:
            more = self._invented() if self.rng.random() < 0.5 else self.rng.choice(self.pools["adj"])
            words.insert(0, more)
        if article in ("a", "an"):
            article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join(filter(None, [article, *words]))

    def _invented(self) -> str:
        """A word of two or three syllables that no pool has."""
        choice = self.rng.choice
        while True:
            word = choice(ONSETS) + choice(VOWELS)
            for _ in range(choice((0, 1, 1, 2))):
                word += choice(INNER) + choice(VOWELS)
            word += choice(CODAS) if self.rng.random() < 0.5 else choice(INNER) + choice(ENDINGS)
            if len(word) > 3 and word not in _known():
                return word

    def value(self, specification: str) -> str:
        """A value for the `value` of an attribute, like "int 10 99 kg" or "pool colour"."""
        kind, *arguments = _parts(specification)
        return getattr(self, "_" + kind)(*arguments)

    def name(self, pattern: str) -> str:
        """A name by a pattern of entities.txt. One with digits is of the split as a number too."""
        parts = re.split(r"\{(\w+)\}", pattern)
        if len(parts) == 1:
            return pattern
        numbered = any(re.fullmatch(r"d\d|A", part) for part in parts[1::2])
        for _ in range(TRIES):
            drawn = [self._part(part) if i % 2 else part for i, part in enumerate(parts)]
            name, words = "".join(drawn), [word for word in drawn[1::2] if len(word) > 1]
            if len(set(words)) == len(words) and (not numbered or number_split(name) == self.split):
                return name
        raise ValueError(f"No name by {pattern!r} is in the split {self.split!r}.")

    def _part(self, part: str) -> str:
        if part == "A":
            return self.rng.choice(LETTERS)
        if part[0] == "d" and part[1:].isdigit():
            digits = int(part[1:])
            return str(self.rng.randrange(10 ** (digits - 1), 10**digits))
        if part in ("Noun", "Adj"):
            return self.word(part.lower()).capitalize()
        if part == "Nouns":
            return _plural(self.word("noun").capitalize())
        return self._place() if part == "place" else self.word(part)

    def _kept(self, draw) -> str:
        """What `draw` draws, again until it is of this split."""
        for _ in range(TRIES):
            if number_split(text := draw()) == self.split:
                return text
        raise ValueError(f"Nothing that {draw} draws is in the split {self.split!r}.")

    # -- kinds of value --

    def _pool(self, pool: str) -> str:
        return self.word(pool)

    def _word(self, *members: str) -> str:
        if not members:
            return self.rng.choice([self.word("noun"), self.word("adj") + " " + self.word("noun")])
        return self.rng.choice(_members(members, self.split))

    def _int(self, low: str, high: str, *unit: str) -> str:
        number = self._number(int(low), int(high))
        style = self.rng.random()
        text = f"{number:,}" if number >= 10_000 and style < 0.3 and unit else str(number)
        return self._with_unit(text, unit)

    def _number(self, low: int, high: int) -> int:
        """Uniform between the bounds, or, where they lie far apart, of uniform size."""
        for _ in range(TRIES):
            most = high
            if high > 50 * low and self.rng.random() < 0.5:
                most = min(high, low * 10 ** self.rng.randrange(1, len(str(high // low)) + 1))
            if number_split(str(number := self.rng.randint(low, most))) == self.split:
                return number
        raise ValueError(f"No number from {low} to {high} is in the split {self.split!r}.")

    @staticmethod
    def _with_unit(text: str, unit: tuple[str, ...]) -> str:
        if not unit:
            return text
        return text + ("" if unit == ("%",) else " ") + " ".join(unit)

    def _float(self, low: str, high: str, digits: str, *unit: str) -> str:
        text = self._kept(lambda: f"{self.rng.uniform(int(low), int(high)):.{digits}f}")
        return self._with_unit(text, unit)

    def _money(self, low: str, high: str) -> str:
        low, high = int(low), int(high)
        if high < 1000:
            cents = (0, 50, 99, *range(100))
            text = self._kept(lambda: f"{self.rng.randint(low, high)}.{self.rng.choice(cents):02d}")
        else:
            number = self._number(low, high)
            text = f"{number:,}" if self.rng.random() < 0.7 else str(number)
        style = self.rng.randrange(6)
        return (f"${text}", f"€{text}", f"£{text}", f"{text} euros", f"{text} dollars", f"EUR {text}")[style]

    def _year(self, low: str, high: str) -> str:
        return str(self._number(int(low), int(high)))

    def _date(self) -> str:
        def draw() -> str:
            year, month, day = self.rng.randint(1985, 2032), self.rng.randint(1, 12), self.rng.randint(1, 28)
            return f"{year}-{month:02d}-{day:02d}"

        # The split is that of the day, however it is written.
        year, month, day = self._kept(draw).split("-")
        name, plain = MONTHS[int(month) - 1], str(int(day))
        style = self.rng.randrange(4)
        return (
            f"{plain} {name} {year}",
            f"{name} {plain}, {year}",
            f"{year}-{month}-{day}",
            f"{plain} {name} {year}",
        )[style]

    def _time(self) -> str:
        minutes = (*range(60), *range(0, 60, 5), *range(0, 60, 15))
        clock = self._kept(lambda: f"{self.rng.randint(1, 23)}:{self.rng.choice(minutes):02d}")
        hour, minute = clock.split(":")
        if self.rng.random() < 0.3:
            return f"{(int(hour) - 1) % 12 + 1}:{minute} {'am' if int(hour) < 12 else 'pm'}"
        return f"{hour}:{minute}"

    def _clock(self) -> str:
        draw = self.rng.randint
        return self._kept(lambda: f"{draw(1, 5)}:{draw(0, 59):02d}:{draw(0, 59):02d}")

    def _name(self) -> str:
        return f"{self.word('first')} {self.word('last')}"

    def _place(self) -> str:
        return self.word("placestem") + self.word("placesuffix")

    def _city(self) -> str:
        return self.word("city")

    def _company(self) -> str:
        return f"{self.word(self.rng.choice(('companyhead', 'last')))} {self.word('companytail')}"

    def _ship(self) -> str:
        return f"{self.word('adj').capitalize()} {self.word('noun').capitalize()}"

    def _title(self) -> str:
        noun, adjective = self.word("noun").capitalize(), self.word("adj").capitalize()
        return self.rng.choice((f"The {adjective} {noun}", f"{noun} and {adjective} Days", f"Under the {noun}"))

    def _task(self) -> str:
        return f"to {self.word('verb')} {self.word('object')}"

    def _complaint(self) -> str:
        return f"that {self.word('object')} {self.word('trouble')}"

    def _topic(self) -> str:
        return self.word("topic")

    def _cause(self) -> str:
        return self.word("cause")

    def _spot(self) -> str:
        return self.word("spot")

    def _goal(self) -> str:
        return self.word("goal")

    def _code(self, pattern: str) -> str:
        def draw() -> str:
            letters = {"9": "123456789", "A": LETTERS}
            return "".join(self.rng.choice(letters[c]) if c in letters else c for c in pattern)

        return self._kept(draw)

    def _email(self) -> str:
        box = self.rng.choice((self.word("noun"), self.word("adj") + "." + self.word("noun")))
        return f"{box}{self._number(1, 999)}@{self.word('noun')}.{self.rng.choice(DOMAINS)}"

    def _url(self) -> str:
        return f"www.{self.word('adj')}-{self.word('noun')}.{self.rng.choice(DOMAINS)}/{self.word('noun')}"

    def _ip(self) -> str:
        return self._kept(lambda: ".".join(str(self.rng.randint(1, 254)) for _ in range(4)))

    def _version(self) -> str:
        return self._kept(lambda: f"{self.rng.randrange(1, 20)}.{self.rng.randrange(30)}.{self.rng.randrange(40)}")

    def _hex(self, digits: str) -> str:
        return self._kept(lambda: f"{self.rng.getrandbits(4 * int(digits)):0{int(digits)}x}")

    def _password(self) -> str:
        first, second = self.word("noun"), self.word("adj")
        return self.rng.choice(
            (f"{second}-{first}-{self._number(2, 99)}", f"{first.capitalize()}{self._number(10, 9999)}!")
        )

    def _phone(self) -> str:
        return self._kept(lambda: f"0{self.rng.randrange(10, 999)} {self.rng.randrange(100000, 9999999)}")

    def _isbn(self) -> str:
        draw = self.rng.randrange
        return self._kept(lambda: f"978-{draw(10)}-{draw(100, 1000)}-{draw(10000, 100000)}-{draw(10)}")

    def _score(self) -> str:
        return self._kept(lambda: f"{self.rng.randrange(100)}-{self.rng.randrange(100)}")


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeou" else noun + "s"


@cache
def _known() -> frozenset[str]:
    """All words of all pools, in small letters."""
    members = (member for splits in words().values() for found in splits.values() for member in found)
    return frozenset(word for member in members for word in member.lower().split())


@cache
def _parts(specification: str) -> tuple[str, ...]:
    kind, _, rest = specification.partition(" ")
    if kind == "word" and rest:
        return (kind, *(re.split(r",(?![a-z]+\])", rest)))
    return (kind, *rest.split())


@cache
def _members(members: tuple[str, ...], split: str) -> tuple[str, ...]:
    return tuple(member for i, member in enumerate(members) if place_split(i) == split)

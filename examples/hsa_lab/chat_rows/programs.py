"""
Made-up source files, and questions about their constants, defaults, exceptions and what their functions do.

    plan = program_plan(rng, 8, 4096, "train")
"""

import random
import re

from .families import SHORT_ANSWERS, conversation
from .rows import Plan, Turn
from .splits import check_split
from .tables import wordings
from .values import Source


NOUNS = (
    "file token user order image report cache session record message invoice backup sensor upload job event ticket "
    "customer archive feed mirror batch query photo thumbnail payment shipment webhook snapshot catalogue worker "
    "device reading map route tile track song video frame lesson exam answer page link comment vote rule filter "
    "plugin theme font icon layout form field label address contact calendar reminder alarm meter pump valve door lock"
).split()
VERBS = {
    "read": "reads", "load": "loads", "send": "sends", "parse": "parses", "fetch": "fetches", "merge": "merges",
    "sync": "synchronises", "export": "exports", "upload": "uploads", "check": "checks", "build": "builds",
    "rename": "renames", "compress": "compresses", "encrypt": "encrypts", "sort": "sorts", "count": "counts",
    "copy": "copies", "move": "moves", "resize": "resizes", "publish": "publishes", "validate": "validates",
    "convert": "converts", "download": "downloads", "print": "prints", "store": "stores", "archive": "archives",
}  # fmt: skip
PLACES = "backups cache data exports images inbox logs models outbox photos queue reports spool tmp uploads".split()
WHEN = (
    "the {n} is missing", "the {n} is empty", "the {n} is locked", "the {n} is too large", "there is no {n}",
    "a {n} has no name", "the quota of the {n} is used up", "the server answers with status {c}", "a {n} occurs twice",
    "the {n} has the wrong format", "nobody owns the {n}", "the checksum of the {n} is wrong",
)  # fmt: skip
EXCEPTIONS = ("Missing", "Error", "Locked", "Broken", "Refused", "Exceeded", "Mismatch")
STATUS = (401, 403, 404, 409, 413, 423, 429, 500, 503, 507)
# Constants: name, its value, and questions.
CONSTANTS = (
    ("MAX_{N}S", "int 2 9000", ("How many {n}s are allowed at most?", "What is the maximum number of {n}s?")),
    ("MIN_{N}S", "int 2 900", ("How many {n}s are needed at least?", "What is the minimum number of {n}s?")),
    ("{N}_TIMEOUT", "int 2 900", ("After how many seconds does a {n} time out?", "What is the timeout of a {n}?")),
    ("{N}_RETRIES", "int 2 99", ("How often is a {n} tried again?", "How many retries does a {n} get?")),
    ("{N}_URL", "url", ("What is the address of the {n} server?", "Which URL is used for {n}s?")),
    ("{N}_FOLDER", "path", ("Where are the {n}s stored?", "In which folder are the {n}s?")),
    ("{N}_LOG", "path", ("Where is the log of the {n}s?", "Which file are {n}s logged to?")),
    ("{N}_BYTES", "int 256 900000", ("How many bytes does a {n} have?", "How large is a {n} in bytes?")),
    ("{N}_DAYS", "int 2 400", ("For how many days is a {n} kept?", "How old may a {n} become, in days?")),
    ("{N}_PORT", "int 1024 65535", ("Which port do {n}s use?", "On what port does the {n} server listen?")),
    (
        "{N}_INTERVAL",
        "int 2 9000",
        ("How many seconds lie between two {n}s?", "At what interval are {n}s made?"),
    ),
    ("DEFAULT_{N}", "word", ("Which {n} is taken by default?", "What is the default {n}?")),
    ("{N}_VERSION", "version", ("Which version of the {n} format is used?", "What version do {n}s have?")),
    ("{N}_OWNER", "email", ("Whom do I write to about {n}s?", "Which mail address is given for {n}s?")),
    ("{N}_BATCH", "int 2 5000", ("How many {n}s are processed at a time?", "How large is a batch of {n}s?")),
    ("{N}_SECRET", "hex 8", ("What is the secret of the {n}s?", "Which secret do {n}s have?")),
)
GENERAL = ("What is {name} set to?", "What is the value of {name}?", "Which value does {name} have?", "{name}?")
PARAMETERS = (
    ("timeout", "int 2 900"), ("days", "int 2 400"), ("retries", "int 2 99"), ("limit", "int 5 9000"),
    ("width", "int 16 4096"), ("quality", "int 5 99"), ("depth", "int 2 60"), ("level", "int 2 20"),
    ("folder", "path"), ("prefix", "word"), ("encoding", "word ascii,big5,cp1252,latin-1,utf-16,utf-8,koi8-r,cp437"),
    ("seed", "int 100 99999"), ("delay", "int 2 600"), ("workers", "int 2 64"),
)  # fmt: skip
TOKENS = 95  # of a function or a class with its constants and a question, about


class _File:
    """One source file that is being written: blocks of lines, and what can be asked about each."""

    def __init__(self, source: Source, rng: random.Random, number: int):
        self.source, self.rng, self.number = source, rng, number
        self.pieces: list[tuple[str, list]] = []
        self.asked: list[tuple[tuple[str, ...], str, str, tuple]] = []  # questions, short answer, sentence, key
        self.used: set[str] = set()

    def value(self, specification: str) -> str:
        if specification == "path":
            top, place = self.rng.choice(("var", "srv", "opt", "home")), self.rng.choice(PLACES)
            return f"/{top}/{self.source.word('noun')}/{place}"
        return self.source.value(specification)

    def new(self, draw) -> str | None:
        """A name that is not used yet."""
        for _ in range(20):
            if (name := draw()) not in self.used:
                self.used.add(name)
                return name
        return None

    def add(self, text: str) -> tuple[int, int]:
        key = (self.number, len(self.pieces))
        self.pieces.append((text, [key]))
        return key

    def ask(self, questions: tuple[str, ...], answer: str, sentence: str, key: tuple) -> None:
        self.asked.append((questions, answer, sentence, key))

    def constant(self) -> None:
        pattern, specification, questions = self.rng.choice(CONSTANTS)
        noun = self.rng.choice(NOUNS)
        name = pattern.replace("{N}", noun.upper())
        if name in self.used:
            return
        self.used.add(name)
        value = self.value(specification)
        shown = value if value.isdigit() else f'"{value}"'
        key = self.add(f"\n{name} = {shown}")
        own = tuple(_plain(question.replace("{n}", noun)) for question in questions)
        general = tuple(question.replace("{name}", name) for question in GENERAL)
        self.ask(own, value, f"It is {value}, as {name} says.", key)
        self.ask(general, value, f"{name} is {value}.", key)

    def exception(self) -> None:
        noun = self.rng.choice(NOUNS)
        name = self.new(lambda: noun.capitalize() + self.rng.choice(EXCEPTIONS))
        when = _plain(self.rng.choice(WHEN).format(n=noun, c=self.rng.choice(STATUS)))
        if name is None or when in self.used:
            return
        self.used.add(when)
        key = self.add(f'\n\n\nclass {name}(Exception):\n    """Raised when {when}."""')
        sentence = f"{name} is raised when {when}."
        self.ask((f"Which exception is raised when {when}?", f"What is raised when {when}?"), name, sentence, key)
        self.ask((f"When is {name} raised?", f"What does {name} mean?"), f"when {when}", sentence, key)

    def function(self) -> None:
        verb, noun = self.rng.choice(list(VERBS)), self.rng.choice(NOUNS)
        name = f"{verb}_{noun}" if self.rng.random() < 0.7 else f"{verb}_{noun}s"
        if name in self.used:
            return
        self.used.add(name)
        parameters = [(p, self.value(s)) for p, s in self.rng.sample(PARAMETERS, self.rng.randrange(1, 3))]
        header = ", ".join([noun, *(f"{p}={v}" if v.isdigit() else f'{p}="{v}"' for p, v in parameters)])
        does, seconds = f"{VERBS[verb]} {self.object(noun)}", self.source.value("int 2 90")
        waits = self.rng.random() < 0.3
        doc = does[0].upper() + does[1:] + "." + (f" Waits {seconds} seconds between two attempts." if waits else "")
        body = f"    for attempt in range({self.rng.randrange(2, 9)}):\n        {noun}.{verb}()\n" if waits else ""
        returned = f"    return {self.rng.choice(NOUNS)}_of({noun})"
        key = self.add(f'\n\n\ndef {name}({header}):\n    """{doc}"""\n{body}{returned}')
        asked = f"What does the function {name} do?", f"What is {name} for?", f"Describe {name}."
        self.ask(asked, f"It {does}.", f"It {does}.", key)
        asked = f"Which function {does}?", f"What is the name of the function that {does}?"
        self.ask(asked, name, f"{name} {does}.", key)
        for parameter, value in parameters:
            asked = (
                f"What is the default {parameter} of {name}?", f"What is the default value of {parameter} in {name}?",
                f"If I call {name} without {parameter}, what is it?",
            )  # fmt: skip
            self.ask(asked, value, f"The default {parameter} of {name} is {value}.", key)
        if waits:
            asked = (
                f"How many seconds does {name} wait between attempts?",
                f"How long does {name} wait before it tries again?",
            )
            self.ask(asked, seconds, f"{name} waits {seconds} seconds between attempts.", key)

    def object(self, noun: str) -> str:
        days, word = self.source.value("int 2 400"), self.source.word("noun")
        place = self.rng.choice(PLACES)
        return _plain(self.rng.choice((
            f"all {noun}s that are older than {days} days", f"every {noun} of the {word} project", f"one {noun}",
            f"the {noun}s in the folder {place}", f"the last {days} {noun}s", f"a {noun} that was left over",
            f"the {noun}s of the {word} server",
        )))  # fmt: skip


def program_plan(rng: random.Random, questions: int, length: int, split: str = "train") -> Plan:
    """One to three source files in a long text, and questions about them."""
    source, short, files = Source(check_split(split), rng), rng.random() < SHORT_ANSWERS, []
    size = max(2, min(int(length * rng.uniform(0.3, 0.7)) // TOKENS, questions))
    for number in range(rng.choice((1, 1, 2, 3)) if size >= 6 else 1):
        file = _File(source, rng, number)
        kind, module = rng.choice(("Tools", "Helpers", "Settings", "Jobs")), rng.choice(("os", "json", "time"))
        file.add(f'\n\n"""{kind} for {rng.choice(NOUNS)}s."""\n\nimport {module}\n')
        for _ in range(size // 3 + 1):
            file.constant()
        for _ in range(size // 2 + 1):
            rng.choices((file.function, file.exception, file.constant), (5, 2, 1))[0]()
        files.append(file)
    asked = [(*found, file) for file in files for found in file.asked]
    # What two files answer in two ways cannot be asked.
    owners: dict[str, set[str]] = {}
    for of, answer, _, _, _ in asked:
        for question in of:
            owners.setdefault(question, set()).add(answer)
    turns = []
    for of, answer, sentence, key, _ in rng.sample(asked, min(len(asked), questions)):
        clear = [question for question in of if len(owners[question]) == 1]
        if clear:
            parts = [(answer, True)] if short else _marked(sentence, answer)
            turns.append(Turn(rng.choice(clear), parts, [key], "program"))
    missing = _File(source, rng, -1)
    missing.used = set().union(*(file.used for file in files))
    for _ in range(max(1, len(turns) // 8)):
        rng.choice((missing.constant, missing.function, missing.exception))()
    for of, _, _, _ in rng.sample(missing.asked, min(len(missing.asked), max(1, len(turns) // 8))):
        question = rng.choice(of)
        if question not in owners:
            group = "refusal short" if short else "refusal qa"
            turns.append(Turn(question, [(rng.choice(wordings(group)), False)], [], "missing"))
    rng.shuffle(turns)
    return Plan("program", [file.pieces for file in files], turns[:questions], "books", **conversation(rng, short))


def _plain(text: str) -> str:
    """With "an" before vowels."""
    return re.sub(r"\b([Aa]) (?=[aeio]|up)", r"\1n ", text)


def _marked(sentence: str, answer: str) -> list[tuple[str, bool]]:
    before, found, after = sentence.partition(answer)
    return [part for part in ((before, False), (found, True), (after, False)) if part[0]]

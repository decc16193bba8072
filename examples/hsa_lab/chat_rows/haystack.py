"""
Long texts that things are hidden in: books, source code and reference documents, as streams of tokens.

    save_stream("out/books.npy", read_books(["../shared/data/books"], "train"), tokenizer)
    haystack = Haystack("out/books.npy", tokenizer)
    tokens, cuts = haystack.excerpt(900, rng)       # uint16 [900], and where a sentence may be put in

Books belong to a split by their author (`splits.author_split`), files by their name.
"""

import csv
import glob
import gzip
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .splits import author_split, check_split, split_of


TEXTS_AT_ONCE = 64
SHORT = 1000  # characters; files with fewer are left out
PIECE = 200_000  # characters that are tokenised at a time, at the least
CLOSING = ('"', "'", ")", "âĢĿ", "âĢĻ", "”", "’")  # of byte-level vocabularies too
SPACED = ("Ġ", "Ċ", "ĉ", "č", "▁", " ", "\n")


def read_books(folders: Iterable[str | Path], split: str) -> Iterator[str]:
    """
    The books of a split from folders with files *.jsonl.gz, whose lines have "id" and "text", and an index.tsv that
    names the "author" of each "id".

    Raises: ValueError for a book that the index does not have.
    """
    check_split(split)
    for folder in map(Path, folders):
        with open(folder / "index.tsv", encoding="utf-8", newline="") as file:
            authors = {row["id"]: row["author"] for row in csv.DictReader(file, delimiter="\t")}
        for path in sorted(folder.glob("*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for book in map(json.loads, lines):
                    if book["id"] not in authors:
                        raise ValueError(f"{folder / 'index.tsv'} has no author for {book['id']}.")
                    if author_split(authors[book["id"]]) == split:
                        yield book["text"].replace("\r\n", "\n")


def read_files(patterns: Iterable[str], split: str, most: int = 200_000) -> Iterator[str]:
    """The files of a split, like "/usr/lib/python3/**/*.py", of each at most `most` characters, and no short ones."""
    check_split(split)
    for pattern in patterns:
        for name in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isfile(name) and split_of("file " + os.path.basename(name)) == split:
                text = Path(name).read_text(encoding="utf-8", errors="ignore")[:most]
                if len(text) > SHORT:
                    yield text


def save_stream(path: str | Path, texts: Iterable[str], tokenizer) -> int:
    """Writes the tokens of all texts, one after another, as uint16 to `path` (.npy). Returns how many."""
    if len(tokenizer) > 2**16:
        raise ValueError(f"A vocabulary of {len(tokenizer)} tokens does not fit into 16 bits.")
    arrays = []
    for pieces in _batches(_pieces(texts)):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        arrays += [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
    stream = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.save(path, stream)
    return len(stream)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces that end at a line end."""
    for text in texts:
        text, start = text.strip() + "\n\n", 0
        while start < len(text):
            end = text.find("\n", start + PIECE)
            end = len(text) if end < 0 else end + 1
            yield text[start:end]
            start = end


def _batches(pieces: Iterator[str]) -> Iterator[list[str]]:
    batch = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == TEXTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


class Haystack:
    """
    A stream of tokens, and where something may be put in: after a sentence, or before a line of code that is not
    indented.

    Args:
        stream: uint16 [N], or the .npy file of one, which is read as needed.
        tokenizer: whose tokens they are.
        code: whether it is source code.

    Raises: ValueError for a stream without any such place.
    """

    def __init__(self, stream: np.ndarray | str | Path, tokenizer, code: bool = False):
        self.stream = stream if isinstance(stream, np.ndarray) else np.load(stream, mmap_mode="r")
        self.code = code
        strings = [str(s) for s in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        spaced = np.array([s.startswith(SPACED) for s in strings])
        if code:
            ends = np.array([s.endswith(("Ċ", "\n")) for s in strings])
            places = ends[self.stream[:-1]] & ~spaced[self.stream[1:]]
        else:
            ends = np.array([_ends_sentence(s) for s in strings])
            titles = np.array([s.lstrip("Ġ▁ ") in ("Mr", "Mrs", "Ms", "Dr", "St") for s in strings])
            places = ends[self.stream[:-1]] & spaced[self.stream[1:]]
            places[1:] &= ~titles[self.stream[:-2]]
        self.cuts = np.flatnonzero(places) + 1
        if not len(self.cuts):
            raise ValueError("The haystack has no place to put anything in: give more text.")

    def excerpt(self, count: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """
        `count` tokens [count] from such a place on, and the places inside, from 0 to `count`. Text that is too short
        is repeated.
        """
        last = int(np.searchsorted(self.cuts, len(self.stream) - count, side="right"))
        if last:
            first = int(self.cuts[rng.randrange(last)])
            tokens = np.asarray(self.stream[first : first + count])
            low, high = np.searchsorted(self.cuts, (first, first + count))
            return tokens, self.cuts[low:high] - first
        first = int(self.cuts[rng.randrange(len(self.cuts))])
        order = (first + np.arange(count)) % len(self.stream)
        size = len(self.stream)
        rounds = range(count // size + 2)
        cuts = np.concatenate([self.cuts - first + size * i for i in rounds])
        return np.asarray(self.stream)[order], cuts[(cuts >= 0) & (cuts < count)]


def _ends_sentence(token: str) -> bool:
    while token.endswith(CLOSING):
        token = token.removesuffix(next(mark for mark in CLOSING if token.endswith(mark)))
    return token.endswith((".", "!", "?"))

"""
What is trained on, what choices are made on and what is tested on: one rule for words, wordings, kinds of fact,
numbers, passages and authors.

    split_of("word heron")        # "train"

A thing belongs to a split by a checksum of its name, so that nothing has to be stored, and adding things moves none.
The names begin with what the thing is ("number", "wording", "attribute", "type", "passage", "author"). In short lists,
of words or of general wordings, the place decides (`place_split`), so that every split has some: add to their ends.
Stories of bAbI are the other exception: the last tenth of a file is for tests (`stories.py`).
"""

import re
import unicodedata
import zlib


SPLITS = ("train", "validation", "test")
# Of 100: the first 85 are trained on, the next 5 are for choices, the last 10 for the test at the end.
TRAIN, VALIDATION = 85, 90


def split_of(name: str) -> str:
    """The split of what is called `name`: "train" (85 %), "validation" (5 %) or "test" (10 %)."""
    bucket = zlib.crc32(name.encode()) * 2654435761 % 2**32 * 100 >> 32
    return "train" if bucket < TRAIN else "validation" if bucket < VALIDATION else "test"


def place_split(place: int) -> str:
    """The split of a member of a short list, by its place: of eight, one is validation's and one the test's."""
    return {3: "validation", 5: "test"}.get(place % 8, "train")


def check_split(split: str) -> str:
    """`split` itself. Raises: ValueError if there is none of that name."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    return split


def number_split(text: str) -> str:
    """The split of a number or a code, by its digits and letters alone: "1,250" and "1250" are the same."""
    return split_of("number " + re.sub(r"[^0-9A-Za-z]", "", text).lower())


def passage_split(text: str) -> str:
    """The split of a passage of a question: by its first 100 letters and digits, in whatever case and spacing."""
    return split_of("passage " + re.sub(r"[\W_]+", "", text.lower())[:100])


def author_split(author: str) -> str:
    """
    The split of all the works of an author: by the last name, without accents, as sources write the others in many
    ways ("G.K. Chesterton", "G. K. Chesterton"). People of one name share a split.
    """
    plain = unicodedata.normalize("NFKD", re.sub(r"\(.*?\)", "", author)).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z]+", plain.lower().replace("'", ""))
    return split_of("author " + (words[-1] if words else ""))

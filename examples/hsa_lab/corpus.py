"""
A tokenizer trained on text files, and the text as streams of tokens, to train on and to evaluate with.

Files are .txt (one document) or .jsonl and .jsonl.gz (one document a line, under "text"). The output folder then holds

    tokenizer.json, ...            the tokenizer: `AutoTokenizer.from_pretrained(output_dir)`
    train.npy, validation.npy      uint16 [tokens]: the documents in the order of the files, each ended by the
                                   end-of-text token; `np.load(..., mmap_mode="r")` reads no more than what is used
    index.json                     documents, tokens, characters, hashes and versions

The tokenizer is a byte-level BPE with single digits, trained on the training files alone. Its special tokens are
<|endoftext|>, which ends every document and so also begins the next (bos and eos), and <|pad|>.

The text is read in pieces, twice (for the tokenizer, and to encode it), so that memory holds one document of a .jsonl
file at a time and little else. `tokenizers` works on all cores; `RAYON_NUM_THREADS` says how many.
"""

import gzip
import hashlib
import io
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast


# A byte-level BPE learns little more from the rest of a large corpus.
TOKENIZER_CHARACTERS = 10_000_000
PIECE_CHARACTERS = 50_000  # at least, of a piece of a document that is encoded on its own
BATCH_PIECES = 64  # encoded at a time, shared among the cores


def check_files(files: list[str]) -> None:
    """Raises: ValueError for files of another kind, FileNotFoundError for missing ones."""
    if unknown := [file for file in files if not file.endswith((".txt", ".jsonl", ".jsonl.gz"))]:
        raise ValueError(f"Text files must end in .txt, .jsonl or .jsonl.gz, got {', '.join(unknown)}.")
    if missing := [file for file in files if not Path(file).is_file()]:
        raise FileNotFoundError(f"There is no file {', '.join(missing)}: `--train_files` and `--validation_files`.")


def open_documents(files: Iterable[str]) -> Iterator[TextIO]:
    """Every document as an open text file: a .txt file is one, a .jsonl or .jsonl.gz file has one a line."""
    for name in files:
        opener = gzip.open if name.endswith(".gz") else open
        with opener(name, "rt", encoding="utf-8", newline="\n") as file:
            if name.endswith(".txt"):
                yield file
                continue
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f'Line {number} of {name} has no string "text": rename the field that has it.')
                yield io.StringIO(row["text"])


def cut_document(document: TextIO, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """
    Pieces of a document, of at least `size` characters but for the last, that are encoded to what the whole is.

    They are cut before a line end that no whitespace and no digit follows. The pre-tokenizer always cuts there: of the
    whitespace between two words it keeps all but the last character together, and digits it takes out first.
    """
    lines, length = [], 0
    for line in document:
        if length >= size and lines[-1].endswith("\n") and not line[0].isspace() and not line[0].isnumeric():
            yield "".join(lines)[:-1]
            lines, length = ["\n"], 1
        lines.append(line)
        length += len(line)
    if lines:
        yield "".join(lines)


def train_tokenizer(
    documents: Iterable[Mapping[str, str]],
    vocab_size: int,
    characters: int = TOKENIZER_CHARACTERS,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE: any text can be encoded. Digits stay single, so that a number can be copied token by token.

    Args:
        documents: with their text under "text". The first `characters` of all of it are used.
        vocab_size: number of tokens. The 256 bytes and the 2 special tokens are always among them.
    """

    def pieces(size: int = 100_000):
        left = characters
        for row in documents:
            for start in range(0, min(len(row["text"]), left), size):
                yield row["text"][start : start + size]
            left -= len(row["text"])
            if left <= 0:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(pieces(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


class TokenFile:
    """
    A growing .npy file of uint16 tokens.

    Its header is written twice, first with a length of 0: NumPy leaves room in it for the digits of the real one.
    """

    def __init__(self, path: Path):
        self.file = path.open("wb")
        self.tokens = 0
        self._write_header()

    def _write_header(self) -> None:
        self.file.seek(0)
        header = {"descr": "<u2", "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, tokens: list[int]) -> None:
        self.file.write(np.array(tokens, dtype="<u2").tobytes())
        self.tokens += len(tokens)

    def close(self) -> None:
        self._write_header()
        self.file.close()


def write_tokens(files: list[str], tokenizer: PreTrainedTokenizerFast, path: Path) -> dict[str, int]:
    """
    Encodes the documents of `files` into `path`, each followed by the end-of-text token. Empty ones are left out.

    Returns: numbers of documents, tokens (end-of-text tokens included), characters and UTF-8 bytes.
    """
    counts = {"documents": 0, "tokens": 0, "characters": 0, "bytes": 0}
    output = TokenFile(path)
    batch: list[tuple[str, bool]] = []  # pieces, and whether they end their document

    def flush():
        # Without progress of its own, and in parallel over the pieces.
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([p for p, _ in batch], add_special_tokens=False)
        for encoding, (piece, ends) in zip(encoded, batch):
            output.append(encoding.ids + [tokenizer.eos_token_id] * ends)
            counts["documents"] += ends
            counts["characters"] += len(piece)
            counts["bytes"] += len(piece.encode())
            bar.update(len(piece))
        batch.clear()

    with tqdm(desc=path.name, unit="character", unit_scale=True) as bar:
        for document in open_documents(files):
            previous = None
            for piece in cut_document(document):
                if previous is not None:
                    batch.append((previous, False))
                if len(batch) >= BATCH_PIECES:
                    flush()
                previous = piece
            if previous is not None:
                batch.append((previous, True))
        flush()
    output.close()
    return {**counts, "tokens": output.tokens}


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def prepare(
    train_files: list[str],
    output: Path,
    validation_files: Sequence[str] = (),
    vocab_size: int = 8192,
    tokenizer_characters: int = 100_000_000,
) -> dict:
    """
    Writes everything into `output`. The tokenizer is trained on the first `tokenizer_characters` of `train_files`.

    Returns: what index.json says.
    """
    if not 258 <= vocab_size <= 2**16:
        raise ValueError(f"`--vocab_size` must be from 258 (256 bytes, 2 special tokens) to 65536: {vocab_size}.")
    files = {"train": train_files, "validation": list(validation_files)}
    check_files([name for names in files.values() for name in names])
    if twice := set(train_files) & set(validation_files):
        raise ValueError(f"`--train_files` and `--validation_files` share {', '.join(sorted(twice))}.")
    output.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    pieces = ({"text": piece} for document in open_documents(train_files) for piece in cut_document(document))
    tokenizer = train_tokenizer(pieces, vocab_size, tokenizer_characters, show_progress=True)
    tokenizer.save_pretrained(output)
    index = {
        "tokenizer": {
            "tokens": len(tokenizer),
            "end_of_text": tokenizer.eos_token_id,
            "sha256": sha256(output / "tokenizer.json"),
            "seconds": round(time.perf_counter() - start, 1),
        },
        "splits": {},
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (np, tokenizers, transformers)},
        },
    }
    for split, names in files.items():
        path = output / f"{split}.npy"
        path.unlink(missing_ok=True)
        if names:
            start = time.perf_counter()
            counts = write_tokens(names, tokenizer, path)
            index["splits"][split] = {
                "file": path.name,
                **counts,
                "sha256": sha256(path),
                "seconds": round(time.perf_counter() - start, 1),
                "sources": {Path(name).name: sha256(name) for name in names},
            }
    (output / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index

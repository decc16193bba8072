"""Streams of token ids: encoding texts, reading haystacks, cutting windows and excerpts out of them. No PyTorch."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .corpus import cut_document, open_documents


def encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> list:
    """Token ids of a text, or of each of several, without special tokens; quiet about long texts."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins a text with: its bos token, or nothing."""
    ids = tokenizer("a")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []


def read_haystack(files: Sequence[Path], tokenizer, most: int | None = None) -> np.ndarray:
    """
    One stream of token ids [N], uint16 or int32: all documents in a row, with the end-of-text token after each. .npy
    files hold such ids and are mapped, not read. Stops after about `most` tokens.
    """
    mapped = [np.load(file, mmap_mode="r") for file in files if file.suffix == ".npy"]
    if mapped:
        if len(mapped) < len(files) or any(x.ndim != 1 or x.dtype.kind not in "ui" for x in mapped):
            raise ValueError("`--haystack`: .npy files hold one row of token ids each, and do not mix with texts.")
        return mapped[0] if len(mapped) == 1 else np.concatenate(mapped)
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts, size = [], 0
    for document in open_documents(str(file) for file in files):
        for piece in cut_document(document):
            parts.append(np.array(encode(tokenizer, piece), dtype=kind))
            size += len(parts[-1])
            if most is not None and size >= most:
                return np.concatenate(parts)
        parts.append(np.array(end, dtype=kind))
    if not size:
        raise ValueError(f"`--haystack`: there is no text in {', '.join(map(str, files))}.")
    return np.concatenate(parts)


def sample_rng(seed: int, task: str, length: int, index: int) -> np.random.Generator:
    """The random numbers of one sample: the same whatever else is evaluated, and in whatever order."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), length, index])


def excerpt(corpus: np.ndarray, length: int, rng: np.random.Generator, dtype=None, parts: int = 1) -> np.ndarray:
    """
    `length` tokens of `corpus` [N] from a random offset on, going on at its start after its end. With `parts`, so many
    excerpts one after another, of random lengths that are at least `length // (4 * parts)`.

    Raises: ValueError for an empty corpus, or where `parts` is not from 1 to `length`.
    """
    if len(corpus) == 0:
        raise ValueError("The haystack holds no tokens.")
    dtype = corpus.dtype if dtype is None else dtype
    if not isinstance(parts, int) or not 1 <= parts <= max(length, 1):
        raise ValueError(f"`parts` must be an integer from 1 to the {length} tokens of the haystack, got {parts!r}.")
    if parts > 1:
        least = max(1, length // (4 * parts))
        rest = length - parts * least
        cuts = np.sort(rng.integers(rest + 1, size=parts - 1))
        sizes = least + np.diff(cuts, prepend=0, append=rest)
        return np.concatenate([excerpt(corpus, size, rng, dtype) for size in sizes.tolist()])
    start = int(rng.integers(len(corpus)))
    first = corpus[start : start + length]
    if len(first) == length:
        return np.array(first, dtype=dtype)
    return np.resize(np.concatenate([corpus[start:], corpus[:start]]), length).astype(dtype)


def ring_window(stream: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` tokens of `stream` [N] from `start` on, going on at the beginning after the end; int64 [count]."""
    if len(stream) == 0:
        raise ValueError("`--haystack` holds no tokens.")
    parts, start = [stream[:0]], start % len(stream)
    while count > 0:
        parts.append(stream[start : start + count])
        count -= len(parts[-1])
        start = 0
    return np.concatenate(parts).astype(np.int64)


def document_bounds(stream: np.ndarray, end_of_text: int | None) -> np.ndarray:
    """Document i is `stream[bounds[i] : bounds[i + 1]]`, its end-of-text token included. int64 [documents + 1]."""
    ends = np.flatnonzero(stream == end_of_text) + 1 if end_of_text is not None else np.empty(0, dtype=np.int64)
    return np.unique(np.concatenate([[0], ends, [len(stream)]]))


def encode_chats(tokenizer, chats: list[list[dict[str, str]]]):
    """
    Conversations that the model is to continue, as tensors [B, L], padded on the left. (`apply_chat_template` hands
    `padding_side` to the template, and pads on the side of the tokenizer.)
    """
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")

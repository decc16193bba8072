"""Text to train on with `Trainer`: documents from files, the Hub or the chronicles, cut into blocks of tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from ..corpus import train_tokenizer
from ..tasks.chronicles import make_documents


logger = logging.get_logger("train")

SYNTHETIC_DOCUMENT = 5_000  # characters


@dataclass
class DataArguments:
    """Text to train on, and how it is cut."""

    _argument_group_name: ClassVar[str] = "text"

    train_files: list[str] = field(default_factory=list, metadata={"help": ".txt, .jsonl or .jsonl.gz files"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "as `train_files`"})
    dataset_name: str | None = field(default=None, metadata={"help": "a data set of the Hub, or a folder"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    text_column: str = field(default="text", metadata={"help": "where the text is"})
    synthetic_characters: int = field(default=2_000_000, metadata={"help": "text to generate if none is given"})
    validation_fraction: float = field(default=0.02, metadata={"help": "held out where there is no validation text"})
    tokenizer: str | None = field(default=None, metadata={"help": "tokenizer folder or Hub id"})
    vocab_size: int = field(default=1024, metadata={"help": "of the tokenizer, if it is trained"})
    block_size: int = field(default=256, metadata={"help": "tokens of a training example"})


def load_text(args: DataArguments, seed: int) -> DatasetDict:
    """Documents in a column "text", in a split "train" and maybe "validation"."""
    if args.train_files and args.dataset_name:
        raise ValueError("Give `--train_files` or `--dataset_name`, not both.")
    if args.train_files:
        files = {"train": args.train_files, "validation": args.validation_files}
        return DatasetDict({split: load_files(names, args.text_column) for split, names in files.items() if names})
    if args.dataset_name:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"`{args.dataset_name}` has no split 'train', only {', '.join(splits)}.")
        names = [split for split in ("train", "validation") if split in splits]
        return DatasetDict({split: only_text(splits[split], args.text_column) for split in names})
    logger.warning("No text given: training on made-up chronicles.")
    count = max(1, args.synthetic_characters // SYNTHETIC_DOCUMENT)
    documents = make_documents(seed, SYNTHETIC_DOCUMENT, count, facts=4, questions=True)
    return DatasetDict({"train": Dataset.from_dict({"text": [document.text for document in documents]})})


def load_files(files: list[str], text_column: str) -> Dataset:
    """A .txt file is one document; a .jsonl or .jsonl.gz file has one a line."""
    plain = [file for file in files if file.endswith(".txt")]
    lines = [file for file in files if file.endswith((".jsonl", ".jsonl.gz"))]
    if unknown := sorted(set(files) - set(plain) - set(lines)):
        raise ValueError(f"Text files must end in .txt, .jsonl or .jsonl.gz, got {', '.join(unknown)}.")
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"`--train_files`, `--validation_files`: there is no file {', '.join(missing)}.")
    parts = []
    try:
        if plain:
            parts.append(load_dataset("text", data_files=plain, sample_by="document", split="train"))
        if lines:
            parts.append(only_text(load_dataset("json", data_files=lines, split="train"), text_column))
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(f"`--train_files`, `--validation_files`: cannot read {', '.join(files)}: {reason}") from error
    return concatenate_datasets(parts)


def only_text(dataset: Dataset, column: str) -> Dataset:
    if column not in dataset.column_names:
        raise ValueError(f"There is no column {column!r}, only {', '.join(dataset.column_names)}: `--text_column`.")
    dataset = dataset.select_columns(column)
    return dataset if column == "text" else dataset.rename_column(column, "text")


def make_tokenizer(data: DataArguments, model: str | None, texts: Dataset) -> PreTrainedTokenizerFast:
    if data.tokenizer or model:
        return AutoTokenizer.from_pretrained(data.tokenizer or model)
    return train_tokenizer(texts, data.vocab_size)


def make_blocks(texts: Dataset, tokenizer: PreTrainedTokenizerFast, block_size: int) -> Dataset:
    """Documents, each ended by the end-of-text token, joined and cut into blocks of `block_size` tokens."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(rows):
        encoded = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [ids + end for ids in encoded["input_ids"]]}

    def cut(rows):
        tokens = np.concatenate(rows["input_ids"])
        return {"input_ids": tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)}

    # Few rows at a time, as a row may be a whole book.
    tokens = texts.map(encode, batched=True, batch_size=16, remove_columns=texts.column_names, desc="Tokenising")
    blocks = tokens.with_format("numpy").map(cut, batched=True, batch_size=1000, desc="Cutting blocks")
    if len(blocks) == 0:
        raise ValueError(f"The text is shorter than one block of {block_size} tokens: lower `--block_size`.")
    return blocks.with_format("torch")


def make_splits(data: DataArguments, texts: DatasetDict, tokenizer: PreTrainedTokenizerFast) -> DatasetDict:
    """Blocks to train on, and others to evaluate on."""
    train = make_blocks(texts["train"], tokenizer, data.block_size)
    if "validation" in texts:
        return DatasetDict(train=train, validation=make_blocks(texts["validation"], tokenizer, data.block_size))
    held_out = max(1, round(len(train) * data.validation_fraction))
    if held_out >= len(train):
        raise ValueError("There is only one block of text, and none to validate on: give more text.")
    first = len(train) - held_out
    return DatasetDict(train=train.select(range(first)), validation=train.select(range(first, len(train))))


def stack_blocks(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Blocks are full: no padding, and every token is a label. The model shifts the labels itself."""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}

"""
Train a small HSA language model with `Trainer`, on any text.

    python examples/train.py --output_dir out/chronicle
    python examples/train.py --output_dir out/books --train_files books/*.jsonl.gz --block_size 1024
    torchrun --nproc_per_node 2 examples/train.py --output_dir out/chronicle --use_cpu

Text comes from files (`--train_files`: .txt, or .jsonl, .jsonl.gz with one document a line under "text"), from the Hub
(`--dataset_name`), or, if neither is given, from the generator of `synthetic_text.py`. The tokenizer is given
(`--tokenizer`) or trained on the text. The model is new, with the sizes given by flags, or continued (`--model`).

`--output_dir` then holds the model, its tokenizer, the losses (loss_history.json, loss_curve.png) and checkpoints. All
flags of `TrainingArguments` work: `--bf16`, `--gradient_checkpointing`, `--max_steps`,
`--resume_from_checkpoint last`, ...
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from prepare_corpus import train_tokenizer
from synthetic_text import make_documents
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM


logger = logging.get_logger("train")

DESCRIPTION = __doc__.strip().splitlines()[0]

SYNTHETIC_DOCUMENT = 5_000  # characters


@dataclass
class ModelArguments:
    """A model to continue, or the configuration of a new one. See `HSAConfig` for what the fields mean."""

    model: str | None = field(default=None, metadata={"help": "model folder or Hub id to continue from"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    hidden_size: int = 128
    intermediate_size: int = 384
    num_lower_layers: int = 2
    num_upper_layers: int = 2
    num_upper_groups: int = 1
    num_encoder_layers: int = 1
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    hsa_num_key_value_heads: int = 1
    num_retrieval_heads: int = 1
    retrieval_dim: int = 64
    sliding_window: int = 64
    chunk_size: int = 16
    chunk_topk: int = 4
    chunk_weighting: str = field(default="softmax", metadata={"help": "softmax, stick_breaking or joint"})
    chunk_landmark: str = field(default="cls", metadata={"help": "cls or mean"})
    hsa_residual: str = field(default="bypass", metadata={"help": "bypass or standard"})


@dataclass
class DataArguments:
    train_files: list[str] = field(default_factory=list, metadata={"help": ".txt, .jsonl or .jsonl.gz files"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "as `train_files`"})
    dataset_name: str | None = field(default=None, metadata={"help": "a data set of the Hub, or a folder"})
    dataset_config_name: str | None = None
    text_column: str = "text"
    synthetic_characters: int = field(default=2_000_000, metadata={"help": "text to generate if none is given"})
    validation_fraction: float = field(default=0.02, metadata={"help": "held out where there is no validation text"})
    tokenizer: str | None = field(default=None, metadata={"help": "tokenizer folder or Hub id"})
    vocab_size: int = field(default=1024, metadata={"help": "of the tokenizer, if it is trained"})
    block_size: int = field(default=256, metadata={"help": "tokens of a training example"})


@dataclass
class ExampleTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for a first run of about a minute on two CPU cores."""

    output_dir: str = "out/train"
    max_steps: int = 200
    per_device_train_batch_size: int = 8
    learning_rate: float = 3e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    weight_decay: float = 0.1
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float = 50
    save_steps: float = 100
    save_total_limit: int = 2
    dataloader_pin_memory: bool = torch.cuda.is_available()


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
    logger.warning("No text given: training on text generated by synthetic_text.py.")
    count = max(1, args.synthetic_characters // SYNTHETIC_DOCUMENT)
    documents = make_documents(seed, SYNTHETIC_DOCUMENT, count, facts=4, questions=True)
    return DatasetDict({"train": Dataset.from_dict({"text": [document.text for document in documents]})})


def load_files(files: list[str], text_column: str) -> Dataset:
    """A .txt file is one document; a .jsonl or .jsonl.gz file has one a line."""
    plain = [file for file in files if file.endswith(".txt")]
    lines = [file for file in files if file.endswith((".jsonl", ".jsonl.gz"))]
    if unknown := sorted(set(files) - set(plain) - set(lines)):
        raise ValueError(f"Text files must end in .txt, .jsonl or .jsonl.gz, got {', '.join(unknown)}.")
    parts = []
    if plain:
        parts.append(load_dataset("text", data_files=plain, sample_by="document", split="train"))
    if lines:
        parts.append(only_text(load_dataset("json", data_files=lines, split="train"), text_column))
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


def make_model(args: ModelArguments, tokenizer: PreTrainedTokenizerFast, block_size: int) -> torch.nn.Module:
    if args.model:
        # Weights are trained in fp32; `--bf16` computes in bf16.
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, attn_implementation=args.attn_implementation
        )
    else:
        fields = {k: v for k, v in vars(args).items() if k not in ("model", "attn_implementation")}
        config = HSAConfig(
            **fields,
            vocab_size=len(tokenizer),
            max_position_embeddings=block_size,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = HSAForCausalLM._from_config(config, attn_implementation=args.attn_implementation)
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, but the model only {config.vocab_size}.")
    if block_size <= max(config.sliding_window, config.chunk_size * config.chunk_topk):
        logger.warning(
            f"Blocks of {block_size} tokens teach little about retrieval: the window sees {config.sliding_window} "
            f"tokens, and {config.chunk_topk} chunks of {config.chunk_size} are retrieved. Raise `--block_size`."
        )
    return model


def stack_blocks(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Blocks are full: no padding, and every token is a label. The model shifts the labels itself."""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: a folder, or with "last" the newest one of `output_dir`."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if checkpoint is None:
        raise ValueError(f"`--resume_from_checkpoint last`: there is no checkpoint in {args.output_dir}.")
    return checkpoint


def save_losses(log_history: list[dict], folder: Path) -> None:
    """Writes loss_history.json, {"train": {step: loss}, "eval": {step: loss}}, and loss_curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = {
        "train": {row["step"]: row["loss"] for row in log_history if "loss" in row},
        "eval": {row["step"]: row["eval_loss"] for row in log_history if "eval_loss" in row},
    }
    (folder / "loss_history.json").write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(history["train"].keys(), history["train"].values(), label="training")
    axes.plot(history["eval"].keys(), history["eval"].values(), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss_curve.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, ExampleTrainingArguments), description=DESCRIPTION)
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    checkpoint = find_checkpoint(args)

    # One process prepares the data, and the others find it in the cache of `datasets`.
    with args.main_process_first(desc="preparing the data"):
        texts = load_text(data_args, args.seed)
        tokenizer = make_tokenizer(data_args, checkpoint or model_args.model, texts["train"])
        blocks = make_splits(data_args, texts, tokenizer)
    model = make_model(model_args, tokenizer, data_args.block_size)
    logger.warning(
        f"{model.num_parameters() / 1e6:.2f}M parameters, {len(blocks['train'])} blocks of {data_args.block_size} "
        f"tokens to train on, {len(blocks['validation'])} to evaluate on."
    )

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=stack_blocks,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    # `Trainer` turns the cache off for training, and whoever loads the model wants it.
    model.config.use_cache = True
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_losses(trainer.state.log_history, Path(args.output_dir))
        print(f"Model, tokenizer and losses are in {args.output_dir}.")
    # Or a process that ends while another still talks to it can abort.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()

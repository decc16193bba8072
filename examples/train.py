"""
Train a small HSA language model with `Trainer`, on any text.

    python examples/train.py --output_dir out/chronicle
    python examples/train.py --output_dir out/books --train_files books/*.jsonl.gz --block_size 1024
    torchrun --nproc_per_node 2 examples/train.py --output_dir out/chronicle --use_cpu

Text comes from files (`--train_files`: .txt, or .jsonl, .jsonl.gz with one document a line under "text"), from the Hub
(`--dataset_name`), or, if neither is given, from made-up chronicles. The tokenizer is given
(`--tokenizer`) or trained on the text. The model is new, with the sizes given by flags, or continued (`--model`).

`--output_dir` then holds the model, its tokenizer, the losses (loss_history.json, loss_curve.png) and checkpoints.
"""

import hsa_lab  # isort: skip  # noqa: F401  # Ctrl-C is quiet from here on

import argparse
import inspect
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from configuration_hsa import HSAConfig
from hsa_lab.commands import HelpFormatter, run
from hsa_lab.plots import draw_curves
from hsa_lab.results import provenance, write_json
from hsa_lab.training.text import DataArguments, load_text, make_splits, make_tokenizer, stack_blocks
from modeling_hsa import HSAForCausalLM


logger = logging.get_logger("train")

LABELS = {"training": "train", "validation": "eval"}


def _flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """A model to continue, or the configuration of a new one. See `HSAConfig` for what the fields mean."""

    _argument_group_name: ClassVar[str] = "model, to continue or new"

    model: str | None = _flag(None, "model folder or Hub id to continue from, whose sizes are then kept")
    attn_implementation: str = _flag("sdpa", "sdpa, eager, flash_attention_2, ...")
    hidden_size: int = _flag(128, "width of the stream")
    intermediate_size: int = _flag(384, "width of the MLPs")
    num_lower_layers: int = _flag(2, "window layers below the chunk encoder")
    num_upper_layers: int = _flag(2, "window layers above it, shared out over the groups")
    num_upper_groups: int = _flag(1, "groups above it, each with one HSA layer more")
    num_encoder_layers: int = _flag(1, "layers of the chunk encoder")
    num_attention_heads: int = _flag(4, "query heads")
    num_key_value_heads: int = _flag(2, "key/value heads of the window")
    hsa_num_key_value_heads: int = _flag(1, "key/value heads of the chunk memory")
    num_retrieval_heads: int = _flag(1, "heads that retrieve chunks of their own")
    retrieval_dim: int = _flag(64, "size of a landmark and of a retrieval query")
    sliding_window: int = _flag(64, "tokens that each layer sees")
    chunk_size: int = _flag(16, "tokens of a chunk")
    chunk_topk: int = _flag(4, "chunks that each token retrieves")
    chunk_weighting: str = _flag("softmax", "softmax, stick_breaking or joint")
    chunk_landmark: str = _flag("cls", "cls or mean")
    hsa_residual: str = _flag("bypass", "bypass or standard")


@dataclass
class ExampleTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for a first run of about a minute on two CPU cores."""

    _argument_group_name: ClassVar[str] = "training, the usual flags of TrainingArguments; all others work too"

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


# The flags of `TrainingArguments` that `--help` lists, with what they are where Transformers says more than a line.
USUAL = {
    "output_dir": "folder for the model, its tokenizer, losses and checkpoints",
    "resume_from_checkpoint": "a checkpoint, or last: the newest in --output_dir",
    "max_steps": "batches; -1: by --num_train_epochs",
    "num_train_epochs": "times that all text is read, with --max_steps -1",
    "per_device_train_batch_size": "rows of a batch and device",
    "gradient_accumulation_steps": "batches that a step adds up",
    "learning_rate": "the highest",
    "lr_scheduler_type": "constant, linear, cosine, ...",
    "warmup_steps": "steps, or a share of them if below 1",
    "weight_decay": "of matrices",
    "bf16": "compute in bf16",
    "gradient_checkpointing": "less memory, more time",
    "eval_steps": "steps between evaluations",
    "save_steps": "steps between checkpoints",
    "logging_steps": "steps between lines of the log",
    "seed": "of weights, order and made-up text",
    "use_cpu": "also where there is a GPU",
}


def make_parser() -> HfArgumentParser:
    """All flags of `TrainingArguments` are taken, and the usual ones listed."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ExampleTrainingArguments),
        description=inspect.cleandoc(__doc__),
        formatter_class=HelpFormatter,
        usage="%(prog)s --output_dir PATH [--train_files FILE ...] [--FLAG VALUE ...]",
    )
    of_training = {field.name for field in fields(TrainingArguments)}
    for action in parser._actions:
        if action.dest in of_training:
            action.help = USUAL.get(action.dest, argparse.SUPPRESS)
    return parser


def find_checkpoint(args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from: a folder, or with "last" (or "True", as in `Trainer.train`) the newest one of
    `output_dir`. Raises: ValueError if there is none, or if `output_dir` holds a run that is not to be resumed.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted in (None, "False", "false"):
        refuse_run(folder)
        return None
    if wanted not in ("last", "True", "true"):
        if not Path(wanted).is_dir():
            raise ValueError(f"`--resume_from_checkpoint`: there is no folder {wanted}. Give one, or `last`.")
        return wanted
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:
        raise ValueError(f"`--resume_from_checkpoint {wanted}`: there is no checkpoint in {folder}.")
    return checkpoint


def refuse_run(folder: Path) -> None:
    if folder.is_dir() and (get_last_checkpoint(folder) or (folder / "config.json").exists()):
        raise ValueError(
            f"`--output_dir`: {folder} holds a run. Go on with `--resume_from_checkpoint last`, or take another."
        )


def save_losses(log_history: list[dict], folder: Path) -> None:
    """Writes loss_history.json, with the losses {step: loss} of "train" and "eval", and loss_curve.png."""
    history = {
        "train": {row["step"]: row["loss"] for row in log_history if "loss" in row},
        "eval": {row["step"]: row["eval_loss"] for row in log_history if "eval_loss" in row},
    }
    write_json(folder / "loss_history.json", history | provenance())
    curves = {label: (list(history[name]), list(history[name].values())) for label, name in LABELS.items()}
    draw_curves(curves, folder / "loss_curve.png", "loss", "step", "nats per token")


def main() -> None:
    model_args, data_args, args = make_parser().parse_args_into_dataclasses()
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
    run(main)

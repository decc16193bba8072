"""
Train a small HSA language model with `Trainer`, on any text.

    python examples/train.py --output_dir out/chronicle
    python examples/train.py --output_dir out/books --train_files books/*.jsonl.gz --block_size 1024
    torchrun --nproc_per_node 2 examples/train.py --output_dir out/chronicle --use_cpu

Text comes from files (`--train_files`: .txt, or .jsonl, .jsonl.gz with one document a line under "text"), from the Hub
(`--dataset_name`), or, if neither is given, from made-up chronicles. The tokenizer is given
(`--tokenizer`) or trained on the text. The model is new, with the sizes given by flags, or continued (`--model`).

`--output_dir` then holds the model, its tokenizer, the losses (loss_history.json, loss_curve.png) and checkpoints. All
flags of `TrainingArguments` work: `--bf16`, `--gradient_checkpointing`, `--max_steps`,
`--resume_from_checkpoint last`, ...
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

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
from hsa_lab.commands import run
from hsa_lab.plots import draw_curves
from hsa_lab.results import provenance, write_json
from hsa_lab.training.text import DataArguments, load_text, make_splits, make_tokenizer, stack_blocks
from modeling_hsa import HSAForCausalLM


logger = logging.get_logger("train")

LABELS = {"training": "train", "validation": "eval"}


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


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: a folder, or with "last" the newest one of `output_dir`."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if checkpoint is None:
        raise ValueError(f"`--resume_from_checkpoint last`: there is no checkpoint in {args.output_dir}.")
    return checkpoint


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
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ExampleTrainingArguments), description=__doc__.strip().splitlines()[0]
    )
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
    run(main)

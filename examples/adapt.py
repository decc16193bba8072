"""
Turn a pretrained chat model into an HSA model with a long memory: sample chats from it, train.

    python examples/adapt.py chats --base out/smollm2 --output out/chats.jsonl
    python -m hsa_lab.chat_rows.prepare streams ...          # in the folder examples
    python examples/adapt.py train --recipe examples/recipes/adaptation/smollm2_135m.json --base out/smollm2 \\
        --streams out/streams --chats out/chats.jsonl --output out/hsa-smollm2

What came of it is measured by `evaluate.py`.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsa_lab.adaptation import chats
from hsa_lab.adaptation import run as training
from hsa_lab.commands import add_commands, add_device_flag, at_least, find_device, make_parser, run


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    docs = {"chats": chats.__doc__, "train": training.__doc__}
    commands = add_commands(parser, docs)
    add = commands["chats"].add_argument
    add("--base", required=True, help="chat model, folder or Hub id")
    add("--tokenizer", help="folder or Hub id, if it is not with the model")
    add("--output", type=Path, required=True, help="JSON lines")
    add("--count", type=at_least(1), default=6000, help="conversations")
    add("--rows", type=at_least(1), default=1024, help="sampled at once")
    add("--prompt_tokens", type=at_least(1), default=96, help="of the longest prompt")
    add("--answer_tokens", type=at_least(1), default=384, help="where longer answers are cut off")
    add("--max_seconds", type=float, default=1e9, help="end after so many seconds, with fewer conversations")
    add("--seed", type=int, default=0)

    add = commands["train"].add_argument
    add("--recipe", type=Path, required=True, help="JSON file")
    add("--base", required=True, help="the model to convert, a folder or Hub id")
    add("--output", type=Path, required=True, help="folder for the model and all else")
    add("--streams", type=Path, required=True, help="folder of `hsa_lab.chat_rows.prepare streams`")
    add("--qa", help="train.jsonl.gz with passages and questions")
    add("--tokenizer", help="folder or Hub id, if it is not with the model")
    add("--babi", help="folder with en-10k and en")
    add("--chats", help="JSON lines that `chats` wrote")
    add("--adapter", type=Path, help="begin with the adapter that another run ended with (OUTPUT/adapter)")
    add("--resume", action="store_true", help="go on with the run in --output, if there is one")
    add("--max_seconds", type=float, default=1e9, help="stop and save after so many seconds")
    add("--scale", type=float, default=1.0, help="multiplies the tokens of all stages, also of a run that goes on")
    add("--seed", type=int, default=0, help="of the new weights and the batches")
    add("--mixed_precision", choices=("auto", "no", "bf16"), default="auto", help="auto: bf16 on CUDA")
    add("--gradient_accumulation_steps", type=at_least(1), default=1, help="micro-batches of a process in a batch")
    add("--logits_at_once", type=at_least(1), default=4096, help="tokens whose logits are in memory")
    add("--workers", type=at_least(0), default=2, help="processes that make batches")
    add("--save_minutes", type=float, default=5, help="between checkpoints, beside that at the end")
    add("--log_every", type=at_least(1), default=25, help="batches")
    add("--compile", action="store_true", help="compile each kind of layer, which takes up to a minute a stage")
    for command in commands.values():
        add_device_flag(command)
    return parser.parse_args(words)


def sample(arguments: argparse.Namespace) -> None:
    device = find_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).to(device).eval()
    sampled = chats.sample_chats(
        model, tokenizer, arguments.count, arguments.rows, arguments.prompt_tokens, arguments.answer_tokens,
        arguments.seed, arguments.max_seconds,
    )  # fmt: skip
    print(f"{arguments.output}: {chats.write_chats(sampled, arguments.output)} conversations")


def main(words: list[str] | None = None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are forked
    arguments = parse_arguments(words)
    if arguments.command == "chats":
        sample(arguments)
    else:
        training.Run(arguments).run()


if __name__ == "__main__":
    run(main)

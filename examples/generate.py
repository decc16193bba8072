"""
Continue a prompt, of any length, with a model folder or a model of the Hub.

    python examples/generate.py --model out/chronicle --prompt_file chronicle.txt --prompt "What is the password of"
    python examples/generate.py --model out/chronicle --prompt "On May 3," --show_retrieval

The prompt is what `--prompt_file` holds followed by `--prompt`; for a model with a chat template it is a message,
which the model answers (`--chat no`: continues). HSA models read it in segments, so that little memory
beyond the cache is needed whatever its length, while a bar counts its tokens; the answer is printed as it comes.
`--show_retrieval` then prints the passages that the model looked up.
"""

import hsa_lab  # isort: skip  # noqa: F401  # Ctrl-C is quiet from here on

import argparse
from pathlib import Path

import torch
from transformers import set_seed
from transformers.utils import logging

from hsa_lab.asking import WholeCharacters
from hsa_lab.chat_rows.chat import ChatFormat
from hsa_lab.commands import add_model_flags, at_least, make_parser, run
from hsa_lab.models import load
from hsa_lab.reading import PromptBar, RetrievalRecorder
from hsa_lab.tokens import encode_chats


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--prompt_file", type=Path, help="file with text that comes before `--prompt`")
    parser.add_argument(
        "--chat", choices=("auto", "yes", "no"), default="auto",
        help="whether the prompt is a message of a chat; auto: where the tokenizer has a chat template",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=at_least(1), default=64, help="of the answer")
    parser.add_argument("--do_sample", action="store_true", help="draw tokens at random; else take the likeliest")
    parser.add_argument("--temperature", type=float, default=1.0, help="of `--do_sample`")
    parser.add_argument("--top_k", type=int, default=50, help="of `--do_sample`, 0 for all")
    parser.add_argument("--top_p", type=float, default=1.0, help="of `--do_sample`")
    parser.add_argument("--seed", type=int, default=0, help="of `--do_sample`")
    parser.add_argument("--prefill_chunk_size", type=at_least(1), help="tokens of the prompt read at a time")
    parser.add_argument("--show_retrieval", action="store_true", help="print the passages that were retrieved")
    arguments = parser.parse_args()
    if not arguments.prompt and arguments.prompt_file is None:
        parser.error("give a `--prompt`, a `--prompt_file`, or both")
    return arguments


def print_retrieval(recorder: RetrievalRecorder, config, tokenizer, tokens: torch.Tensor) -> None:
    """`tokens` [L]: prompt and answer. What was recorded: from the last token of the prompt on."""
    layers = [index for index, is_hsa in enumerate(config.hsa_layers) if is_hsa]
    groups = {"the last token of the prompt": slice(0, 1), "the generated tokens, on average": slice(1, None)}
    for name, steps in groups.items():
        if recorder.chunks[:, steps].shape[1] == 0:
            continue
        print(f"\nRetrieved by {name}:")
        for i, layer in enumerate(layers):
            print(f"  layer {layer}")
            chunks = recorder.weights(i, steps)
            for chunk, weight in list(chunks.items())[: config.chunk_topk]:
                start, end = chunk * config.chunk_size, (chunk + 1) * config.chunk_size
                passage = " ".join(tokenizer.decode(tokens[start:end]).split())
                print(f"    {weight:5.2f}  tokens {start:,}-{end - 1:,}: {passage}")
            if not chunks:
                print("    nothing: there is no complete chunk before it")


def main() -> None:
    arguments = parse_arguments()
    set_seed(arguments.seed)
    model, tokenizer = load(arguments, hsa_only=arguments.show_retrieval)
    text = "" if arguments.prompt_file is None else arguments.prompt_file.read_text(encoding="utf-8")
    text += arguments.prompt
    if not text:
        raise ValueError("the prompt is empty")
    options = {"do_sample": arguments.do_sample}
    if arguments.chat == "yes" or (arguments.chat == "auto" and tokenizer.chat_template):
        options["eos_token_id"] = int(ChatFormat(tokenizer).end[0])
        inputs = encode_chats(tokenizer, [[{"role": "user", "content": text}]]).to(model.device)
    else:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False, verbose=False).to(model.device)
    length = inputs["input_ids"].shape[1]

    if arguments.do_sample:
        options |= {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    if arguments.prefill_chunk_size is not None:
        options["prefill_chunk_size"] = arguments.prefill_chunk_size
    recorder = RetrievalRecorder(model.base_model if arguments.show_retrieval else None, length - 1)
    logging.disable_progress_bar()  # HSA models have a bar of their own for prompts; this one is for any model
    with PromptBar(model, length), recorder:
        tokens = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            streamer=WholeCharacters(tokenizer),
            **options,
        )
    if arguments.show_retrieval:
        print_retrieval(recorder, model.config, tokenizer, tokens[0])


if __name__ == "__main__":
    run(main)

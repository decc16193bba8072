"""
Make an HSA model of a pretrained Llama, Mistral, Qwen2 or Qwen3, to be trained further.

    python examples/convert.py HuggingFaceTB/SmolLM2-135M-Instruct --output out/hsa-smollm2
    python examples/convert.py models/smollm2.gguf --output out/hsa-smollm2 --sliding_window 256 --placement 15 20 25

The model, its tokenizer with the chat template, and its generation config are saved to the output folder. The new
layers change nothing before they are trained: see docs/conversion.md.
"""

import hsa_lab  # isort: skip  # noqa: F401  # Ctrl-C is quiet from here on

import argparse
import os
import time
from pathlib import Path

from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from configuration_hsa import HSAConfig
from hsa_lab.commands import make_parser, run, setting
from modeling_hsa import HSAForCausalLM, convert_to_hsa, new_parameters


# Fields of HSAConfig that have a flag of their own, and what it says.
FLAGS = {
    "chunk_size": "tokens of a chunk",
    "chunk_topk": "chunks that each token retrieves",
    "retrieval_dim": "size of a landmark and of a retrieval query",
    "num_encoder_layers": "layers of the chunk encoder",
}
FOLLOWING_FLAGS = {
    "hsa_num_key_value_heads": ("key/value heads of the chunk memory", "as the model"),
    "hsa_intermediate_size": ("width of the MLP of inserted HSA layers", "as the model"),
    "encoder_intermediate_size": ("width of the MLP of the chunk encoder", "as the model"),
}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub id, or a GGUF file (needs `pip install gguf`)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--gguf", metavar="FILE", help="name of a GGUF file in MODEL")
    parser.add_argument(
        "--mode",
        choices=("insert", "replace"),
        default="insert",
        help="insert HSA layers, or make layers of the model such",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hsa_layers", type=int, help="how many HSA layers, evenly spaced over the upper half (3)")
    where.add_argument(
        "--placement", type=int, nargs="+",
        help="instead: the layers, counted from 0, before which HSA layers are inserted, or which are replaced",
    )  # fmt: skip
    parser.add_argument("--sliding_window", type=int, default=512, help="tokens that each layer sees")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} ({getattr(HSAConfig, name)})")
    for name, (text, default) in FOLLOWING_FLAGS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} ({default})")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", type=setting, action="append", default=[],
        help="another field of HSAConfig, such as chunk_weighting=stick_breaking; may be repeated",
    )  # fmt: skip
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (as saved; of GGUF files: float32)")
    parser.add_argument("--seed", type=int, default=0, help="of the retrieval projections")
    return parser.parse_args()


def describe(model: HSAForCausalLM, mode: str) -> str:
    config, new = model.config, set(new_parameters(model))
    hsa = [str(index) for index, kind in enumerate(config.layer_types) if kind == "hsa"]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    made = "inserted" if mode == "insert" else "made of layers of the model"
    return (
        f"{config.num_hidden_layers} layers, which see the last {config.sliding_window} tokens. HSA layers, {made}: "
        f"{', '.join(hsa)}. They retrieve {config.chunk_topk} chunks of {config.chunk_size} tokens.\n"
        f"{sum(sizes.values()) / 1e6:.1f}M parameters, of which {sum(sizes[name] for name in new) / 1e6:.1f}M in "
        f"{len(new)} tensors are new: {', '.join(new_parameters(model, modules=True))}.\n"
        "What is new changes nothing yet: train it."
    )


def main() -> None:
    args = parse_arguments()
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output: {args.output} is not an empty folder")
    fields = {name: getattr(args, name) for name in (*FLAGS, *FOLLOWING_FLAGS) if getattr(args, name) is not None}
    name, gguf_file = args.model, args.gguf
    if gguf_file is None and name.endswith(".gguf"):
        name, gguf_file = os.path.split(os.path.abspath(name))
    source = {"gguf_file": gguf_file} if gguf_file else {}
    logging.set_verbosity_error()
    set_seed(args.seed)
    start = time.perf_counter()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model = convert_to_hsa(
            name, mode=args.mode, placement=args.placement or args.hsa_layers, sliding_window=args.sliding_window,
            dtype=args.dtype, **source, **fields, **dict(args.set),
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"cannot load {args.model}: {error}") from None
    except TypeError as error:  # a field that is not one of HSAConfig
        raise ValueError(str(error)) from error
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.model} -> {args.output} in {time.perf_counter() - start:.0f} s\n{describe(model, args.mode)}")


if __name__ == "__main__":
    run(main)

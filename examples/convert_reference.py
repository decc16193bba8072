"""
Convert a checkpoint of the authors' public code (`DRTForCausalLM`) into a model folder.

    python examples/convert_reference.py FILE.safetensors --output DIR

What such a file holds, and what of its configuration can be converted, is in `hsa_lab/reference.py`.
"""

from pathlib import Path

from hsa_lab.commands import make_parser, run
from hsa_lab.reference import convert


def main(words: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of the authors' code, .safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder for the converted model")
    arguments = parser.parse_args(words)
    model = convert(arguments.file)
    model.save_pretrained(arguments.output)
    print(f"{model.num_parameters():,} parameters written to {arguments.output}")


if __name__ == "__main__":
    run(main)

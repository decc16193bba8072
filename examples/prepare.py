"""
Texts to train on: a corpus as streams of tokens with its tokenizer, and made-up chronicles.

    python examples/prepare.py chronicle --characters 200000 --seed 1 --facts 8 --output chronicle.txt
    python examples/prepare.py corpus --train_files books/train-*.jsonl.gz --vocab_size 8192 --output corpus \\
        --validation_files books/validation.jsonl.gz
"""

import argparse
import sys
from pathlib import Path

from hsa_lab import corpus
from hsa_lab.commands import add_commands, make_parser, run
from hsa_lab.results import write_json
from hsa_lab.tasks import chronicles


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    commands = add_commands(parser, {"corpus": corpus.__doc__, "chronicle": chronicles.__doc__})
    add = commands["corpus"].add_argument
    add("--train_files", nargs="+", required=True, help=".txt, .jsonl or .jsonl.gz files")
    add("--validation_files", nargs="+", default=[], help="as `--train_files`")
    add("--output", type=Path, required=True, help="folder for the tokenizer and the tokens")
    add("--vocab_size", type=int, default=8192, help="of the tokenizer, special tokens included")
    add(
        "--tokenizer_characters", type=int, default=100_000_000,
        help="train the tokenizer on the first so many characters",
    )  # fmt: skip
    add = commands["chronicle"].add_argument
    add("--characters", type=int, default=20_000, help="length of the text")
    add("--seed", type=int, default=0, help="decides everything that is random")
    add("--facts", type=int, default=4, help="facts hidden in the text")
    add("--questions", action="store_true", help="ask and answer all facts at the end")
    add("--output", type=Path, help="file to write the text to, instead of printing it")
    add("--facts_output", type=Path, help="JSON file for facts, questions, answers and offsets")
    return parser.parse_args()


def prepare_corpus(train_files, output, validation_files, vocab_size, tokenizer_characters) -> None:
    index = corpus.prepare(train_files, output, validation_files, vocab_size, tokenizer_characters)
    print(f"{index['tokenizer']['tokens']} tokens in the vocabulary, {index['tokenizer']['seconds']} s")
    for split, of in index["splits"].items():
        print(
            f"{split}: {of['documents']} documents, {of['tokens']:,} tokens, "
            f"{of['characters'] / of['tokens']:.3f} characters per token, {of['seconds']} s"
        )


def write_chronicle(characters, seed, facts, questions, output, facts_output) -> None:
    document = chronicles.make_document(seed, characters, facts, questions)
    if facts_output:
        write_json(facts_output, [fact._asdict() for fact in document.facts])
    if output is None:
        sys.stdout.write(document.text)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(document.text, encoding="utf-8")
    print(f"{output}: {len(document.text):,} characters, {len(document.facts)} facts")
    for fact in document.facts:
        print(f"  at {fact.start:,}: {fact.sentence}")


def main() -> None:
    arguments = vars(parse_arguments())
    {"corpus": prepare_corpus, "chronicle": write_chronicle}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    run(main)

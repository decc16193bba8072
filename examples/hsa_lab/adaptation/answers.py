"""
Measure what an adapted model is worth, beside its base: greedy answers to questions about long texts, the divergence
from the base in chats, the perplexity of books.
"""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modeling_hsa  # noqa: F401  # registers HSA models with the Auto classes

from ..chat_rows.chat import ChatFormat
from ..chat_rows.evaluation import Sample, make_questions
from ..chat_rows.haystack import Haystack
from ..chat_rows.qa import read_passages
from ..commands import find_device
from ..results import provenance, wilson, write_json
from ..tokens import encode_chats


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer, samples: Sequence[Sample], most_tokens: int, batch_tokens: int
) -> list[str]:
    """Greedy answers of at most `most_tokens` tokens, as many prompts at once as have `batch_tokens` tokens."""
    end, answers = int(ChatFormat(tokenizer).end[0]), []
    size = max(1, batch_tokens // max(len(sample.tokens) for sample in samples))
    for first in range(0, len(samples), size):
        prompts = [torch.from_numpy(sample.tokens) for sample in samples[first : first + size]]
        length = max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), length, dtype=torch.int64) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
        tokens = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=most_tokens, do_sample=False,
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        for row in tokens[:, length:].tolist():
            answers.append(tokenizer.decode(row[: row.index(end)] if end in row else row).strip())
    return answers


def _hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.base_model(ids, use_cache=False).last_hidden_state


@torch.inference_mode()
def chat_divergence(model, base, tokenizer, chats: list[dict], rows: int = 16) -> dict[str, float]:
    """KL of the base from the model on the base's own answers, nats a token, and how often both say the same token."""
    chat, total, same, count = ChatFormat(tokenizer), 0.0, 0, 0
    encode = lambda text: np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)  # noqa: E731
    for first in range(0, len(chats), rows):
        made = []
        for turn in chats[first : first + rows]:
            head = np.concatenate([chat.start, encode(turn["prompt"]), chat.reply]).astype(np.int64)
            made.append((len(head), np.concatenate([head, encode(turn["answer"]), chat.end]).astype(np.int64)))
        length = max(len(ids) for _, ids in made)
        batch = torch.zeros(len(made), length, dtype=torch.int64)  # filled up on the right, which nothing before sees
        for row, (_, ids) in enumerate(made):
            batch[row, : len(ids)] = torch.from_numpy(ids)
        batch = batch.to(model.device)
        ours, theirs = _hidden(model, batch), _hidden(base, batch)
        for row, (start, ids) in enumerate(made):
            part = slice(start - 1, len(ids) - 1)
            log_p = model.lm_head(ours[row, part]).float().log_softmax(-1)
            log_t = base.lm_head(theirs[row, part]).float().log_softmax(-1)
            total += (log_t.exp() * (log_t - log_p)).sum().item()
            same += (log_p.argmax(-1) == log_t.argmax(-1)).sum().item()
            count += len(log_p)
    return {"kl": total / count, "same": same / count, "tokens": count, "chats": len(chats)}


@torch.inference_mode()
def perplexity(model: PreTrainedModel, stream: np.ndarray, length: int, windows: int, last: int) -> float:
    """Of the last `last` tokens of windows of `length` tokens, evenly spaced over a stream."""
    losses = []
    for start in np.linspace(0, len(stream) - length, windows).astype(int):
        ids = torch.from_numpy(stream[start : start + length].astype(np.int64)).to(model.device)
        logits = model.lm_head(_hidden(model, ids[None])[0, -last - 1 : -1]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[-last:]).item())
    return float(np.exp(np.mean(losses)))


@torch.inference_mode()
def say(model: PreTrainedModel, tokenizer, prompts: Sequence[str], most_tokens: int = 96) -> list[str]:
    """Greedy answers to prompts without any text."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = encode_chats(tokenizer, turns).to(model.device)
    end = int(ChatFormat(tokenizer).end[0])
    tokens = model.generate(**inputs, max_new_tokens=most_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)[
        :, inputs["input_ids"].shape[1] :
    ].tolist()
    return [tokenizer.decode(row[: row.index(end)] if end in row else row).strip() for row in tokens]


def make_samples(arguments: Namespace, tokenizer, haystack: Haystack, kind: str, length: int) -> list[Sample]:
    """The questions of a cell, the same for every model. Fewer where the texts are long."""
    passages = read_passages(arguments.qa, arguments.split) if kind == "qa" else ()
    count = min(arguments.questions, max(arguments.least, arguments.most_read // length))
    return list(make_questions(kind, tokenizer, haystack, length, count, arguments.split, arguments.seed, passages))


def evaluate(arguments: Namespace) -> None:
    """Evaluates `arguments.model` and `arguments.base`, prints a table, and writes all with every answer as JSON."""
    device = find_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.model)
    names = {"model": arguments.model, **({"base": arguments.base} if arguments.base else {})}
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval() for name, path in names.items()
    }
    stream = Path(arguments.streams) / f"books-{arguments.split}.npy"
    haystack = Haystack(stream, tokenizer)
    content: dict = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, **provenance(), "cells": []}
    if arguments.chats and "base" in models:
        lines = Path(arguments.chats).read_text(encoding="utf-8").splitlines()[: arguments.most_chats]
        chats = [json.loads(line) for line in lines]
        content["chat"] = chat_divergence(models["model"], models["base"], tokenizer, chats)
        print("chat", content["chat"], flush=True)
        prompts = [chat["prompt"] for chat in chats[:12]]
        said = {name: say(model, tokenizer, prompts) for name, model in models.items()}
        content["said"] = [
            {"prompt": prompt, **{n: s[i] for n, s in said.items()}} for i, prompt in enumerate(prompts)
        ]
    for name, model in models.items():
        content[f"perplexity {name}"] = {
            length: perplexity(model, haystack.stream, length, arguments.windows, min(1024, length // 2))
            for length in arguments.perplexity_lengths
            if name == "model" or length <= arguments.base_length
        }
        print("perplexity", name, content[f"perplexity {name}"], flush=True)
    cells = [(kind, length) for length in arguments.lengths for kind in arguments.kinds]
    for kind, length in tqdm(cells, mininterval=10):
        samples = make_samples(arguments, tokenizer, haystack, kind, length)
        for name, model in models.items():
            if name == "base" and length > arguments.base_length:
                continue
            start = time.time()
            answers = answer(model, tokenizer, samples, arguments.answer_tokens, arguments.batch_tokens)
            scores = [sample.score(given) for sample, given in zip(samples, answers)]
            cell = {
                "model": name, "kind": kind, "length": length, "score": sum(scores) / len(scores),
                "interval": wilson(sum(scores), len(scores)), "questions": len(scores),
                "seconds": round(time.time() - start, 1),
                "answers": [
                    {"question": s.question, "expected": s.expected, "answer": given, "score": score}
                    for s, given, score in zip(samples, answers, scores)
                ],
            }  # fmt: skip
            content["cells"].append(cell)
            low, high = cell["interval"]
            print(
                f"{name:6} {kind:24} {length:7,} {100 * cell['score']:6.1f} % [{100 * low:.0f}, {100 * high:.0f}] "
                f"{len(scores):4} questions {cell['seconds']:6.1f} s", flush=True,
            )  # fmt: skip
        write_json(arguments.output, content)
    print(table(content["cells"]))


def table(cells: list[dict]) -> str:
    """A line a model and kind, a column a length, in per cent."""
    lengths = sorted({cell["length"] for cell in cells})
    found = {(cell["model"], cell["kind"], cell["length"]): f"{100 * cell['score']:.1f}" for cell in cells}
    lines = [f"{'':34}" + "".join(f"{length:>9,}" for length in lengths)]
    for model, kind in dict.fromkeys((cell["model"], cell["kind"]) for cell in cells):
        lines.append(f"{model:7} {kind:26}" + "".join(f"{found.get((model, kind, n), '-'):>9}" for n in lengths))
    return "\n".join(lines)

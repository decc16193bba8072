"""
Sample conversations from a chat model: first what a user might ask, from the bare beginning of a user's turn on, then
the answer. Nothing is asked twice.

What it says itself is the best text to keep it as it is, and free of licences.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..chat_rows.chat import ChatFormat
from ..tokens import encode_chats


def sample_chats(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, rows: int, most_prompt: int,
    most_answer: int, seed: int, seconds: float = float("inf"),
) -> Iterator[dict[str, str]]:  # fmt: skip
    """
    `count` conversations {"prompt", "answer"}, of at most so many tokens, `rows` sampled at once with temperature 1
    from the likeliest tokens of 95 %. Answers that are longer are cut off. Ends early after `seconds`.
    """
    chat, seen, start = ChatFormat(tokenizer), set(), time.time()
    end = int(chat.end[0])
    set_seed(seed)
    while len(seen) < count and time.time() - start < seconds:
        begin = torch.from_numpy(chat.start.astype("int64")).expand(rows, -1)
        prompts = _cut(_sample(model, begin, most_prompt, end), end)
        # A question that goes on for ever is no question.
        texts = [tokenizer.decode(ids).strip() for ids in prompts if ids and len(ids) < most_prompt]
        texts = [text for text in dict.fromkeys(texts) if text and text not in seen][: count - len(seen)]
        if not texts:
            continue
        turns = [[{"role": "user", "content": text}] for text in texts]
        inputs = encode_chats(tokenizer, turns)
        answers = _cut(_sample(model, inputs["input_ids"], most_answer, end, inputs["attention_mask"]), end)
        for text, answer in zip(texts, answers):
            if said := tokenizer.decode(answer).strip():
                seen.add(text)
                yield {"prompt": text, "answer": said}


@torch.inference_mode()
def _sample(model, prompt: torch.Tensor, most: int, end: int, mask: torch.Tensor | None = None) -> list[list[int]]:
    mask = torch.ones_like(prompt) if mask is None else mask
    tokens = model.generate(
        prompt.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=most, do_sample=True,
        temperature=1.0, top_p=0.95, top_k=0, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return tokens[:, prompt.shape[1] :].tolist()


def _cut(rows: list[list[int]], end: int) -> list[list[int]]:
    return [row[: row.index(end)] if end in row else row for row in rows]


def write_chats(chats: Iterator[dict[str, str]], file: Path) -> int:
    """Writes conversations as they come, one a line. Returns how many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(file, "w", encoding="utf-8") as lines:
        for chat in chats:
            lines.write(json.dumps(chat) + "\n")
            lines.flush()
            count += 1
    return count

"""
Does a converted model still talk like the one it was made of? In chats without any long text.

    python examples/evaluate.py chat --model out/hsa-smollm2/model --base out/smollm2 --chats out/unseen_chats.jsonl \\
        --output out/chat

The divergence (KL) of the model from its base on the base's own answers, in nats a token, and how often the likeliest
token of both is the same, over conversations that were not trained on (`adapt.py chats` with another seed makes some);
and the greedy answers of both to some of the prompts, side by side. The interval is over conversations. Results:
chat.json.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat_rows.chat import ChatFormat
from ..commands import add_model_flags, at_least, existing_file
from ..models import load
from ..results import Results, ratio
from ..tokens import encode, encode_chats


@torch.inference_mode()
def chat_divergence(model, base, tokenizer, chats: Sequence[dict], rows: int = 16) -> list[dict]:
    """
    For each of `chats`, {"prompt", "answer"}: the sum of the divergences of `model` from `base` over the tokens of the
    answer and its end, of how many the likeliest is the same, and how many there are.
    """
    chat, found = ChatFormat(tokenizer), []
    for first in range(0, len(chats), rows):
        made = []
        for turn in chats[first : first + rows]:
            head = [*chat.start.tolist(), *encode(tokenizer, turn["prompt"]), *chat.reply.tolist()]
            answer = [*encode(tokenizer, turn["answer"]), *chat.end.tolist()]
            made.append((len(head), torch.tensor(head + answer)))
        # Filled up on the right, which nothing before sees.
        batch = torch.nn.utils.rnn.pad_sequence([ids for _, ids in made], batch_first=True).to(model.device)
        ours, theirs = (x.base_model(batch, use_cache=False).last_hidden_state for x in (model, base))
        for row, (start, ids) in enumerate(made):
            part = slice(start - 1, len(ids) - 1)
            log_p = model.lm_head(ours[row, part]).float().log_softmax(-1)
            log_t = base.lm_head(theirs[row, part]).float().log_softmax(-1)
            found.append(
                {
                    "kl": (log_t.exp() * (log_t - log_p)).sum().item(),
                    "same": (log_p.argmax(-1) == log_t.argmax(-1)).sum().item(),
                    "tokens": len(log_p),
                }
            )
    return found


@torch.inference_mode()
def say(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], most: int) -> list[str]:
    """Greedy answers of up to `most` tokens to prompts without any text."""
    inputs = encode_chats(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts]).to(model.device)
    end, length = int(ChatFormat(tokenizer).end[0]), inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False, eos_token_id=end, pad_token_id=end)
    rows = tokens[:, length:].tolist()
    return [tokenizer.decode(row[: row.index(end)] if end in row else row).strip() for row in rows]


class Chat:
    """A model and its base, in chats."""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        add_model_flags(parser)
        group = parser.add_argument_group("evaluation")
        group.add_argument("--output", type=Path, required=True, help="folder for the results")
        group.add_argument("--base", required=True, help="the model that it was converted from, folder or Hub id")
        group.add_argument(
            "--chats", type=existing_file, required=True, help="JSON lines with prompt and answer, of the base"
        )
        group.add_argument("--samples", type=at_least(1), default=300, help="conversations, the first of the file")
        group.add_argument("--prompts", type=at_least(0), default=20, help="that both answer, side by side")
        group.add_argument("--answer_tokens", type=at_least(1), default=96, help="of the longest of these answers")

    @classmethod
    def check(cls, arguments: Namespace) -> None:
        """Nothing that the flags do not say themselves."""

    def __init__(self, arguments: Namespace, model, tokenizer):
        self.arguments, self.model, self.tokenizer = arguments, model, tokenizer
        self.base, _ = load(Namespace(**{**vars(arguments), "model": arguments.base, "config": []}))
        lines = arguments.chats.read_text(encoding="utf-8").splitlines()[: arguments.samples]
        self.chats = [json.loads(line) for line in lines]
        if not self.chats or any(not {"prompt", "answer"} <= chat.keys() for chat in self.chats):
            raise ValueError("`--chats`: needs a `prompt` and an `answer` in every line")
        self.results = Results("chat", arguments, model)

    def run(self) -> None:
        prompts = [chat["prompt"] for chat in self.chats[: self.arguments.prompts]]
        if prompts:
            ours, theirs = (
                say(x, self.tokenizer, prompts, self.arguments.answer_tokens) for x in (self.model, self.base)
            )
            self.results.content["said"] = [
                {"prompt": prompt, "model": a, "base": b} for prompt, a, b in zip(prompts, ours, theirs)
            ]
            for prompt, a, b in zip(prompts, ours, theirs):
                print(f"> {prompt}\nmodel: {a}\nbase:  {b}\n")
        records = chat_divergence(self.model, self.base, self.tokenizer, self.chats)
        tokens = [record["tokens"] for record in records]
        kl = ratio([record["kl"] for record in records], tokens)
        row = {"samples": len(records), "tokens": int(np.sum(tokens)), "kl": kl}
        row["same"] = sum(record["same"] for record in records) / row["tokens"]
        self.results.add("chat", 0, row, records)
        spread = "" if kl["low"] is None else f" [{kl['low']:.4f}, {kl['high']:.4f}]"
        print(
            f"{kl['mean']:.4f}{spread} nats a token from the base, {100 * row['same']:.1f} % the same likeliest token"
        )
        print(f"Results are in {self.arguments.output}.")

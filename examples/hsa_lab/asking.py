"""
Questions in plain words about a document that was read once, and whether an answer can be trusted.

    asker = Asker(model, tokenizer)
    document = asker.encode(text)
    cache = asker.reader.read(document)
    reply = asker.ask(document, cache, "How much is the rent?", 48)
    print(reply.text if reply.is_found else "not found")

Models whose tokenizer has a chat template are asked in it; others continue the text.
"""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .chat_rows.chat import ChatFormat
from .chat_rows.evaluation import is_refusal
from .reading import RetrievalRecorder, make_reader
from .tokens import encode


CUT = "\ufffd"  # what stands for a character of which a token has only a part
LEAST_CONFIDENCE = 0.24  # as `evaluate.py found` chose it
ANSWER_TOKENS = {True: 48, False: 16}  # of the longest answer: in a chat, else


class WholeCharacters(TextStreamer):
    """Prints what is generated word by word, without the part of a character that the last token may leave."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text.rstrip(CUT) if stream_end else text, stream_end)


class AnswerStreamer(WholeCharacters):
    """Prints an answer without the spaces around it, the `ending` that it may have, and the end of the line."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ending: str):
        super().__init__(tokenizer)
        self.ending, self.is_begun = ending, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.is_begun else text.lstrip()
        if stream_end:
            text = text.rstrip(CUT).rstrip().removesuffix(self.ending)
        self.is_begun = self.is_begun or bool(text)
        print(text, end="", flush=True)


class _Likelihood(LogitsProcessor):
    """Keeps the probability of the likeliest token at every step, which greedy search takes."""

    def __init__(self):
        self.kept: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.kept.append(scores[0].float().softmax(-1).max().item())
        return scores


@dataclass
class Reply:
    """
    An answer: its text, its tokens with the probability of each, and the record of what they retrieved.

    `is_chat`: whether it is of a chat model, which may say that the document does not tell.
    """

    text: str
    tokens: list[int]
    probabilities: list[float]
    recorder: RetrievalRecorder
    is_chat: bool

    @property
    def confidence(self) -> float:
        """The probability of the least likely token of the answer."""
        return min(self.probabilities, default=0.0)

    @property
    def says_not_found(self) -> bool:
        """Whether a chat model says that the document does not tell. "No, ..." and "Yes, ..." are answers."""
        return self.is_chat and is_refusal(self.text) and not self.text.lower().startswith(("no,", "yes,"))

    @property
    def why_not_found(self) -> str | None:
        """What speaks for that the document does not tell; None where the answer is believed."""
        if self.says_not_found:
            return "the model says so"
        if self.is_chat and self.confidence < LEAST_CONFIDENCE:
            return f"a token of the answer has a probability of {self.confidence:.3f}, less than {LEAST_CONFIDENCE}"
        return None


class Asker:
    """
    Asks a model about documents, each read once.

    Args:
        model: of any family whose cache can be forked.
        tokenizer: with a chat template for a chat model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer, self.reader = model, tokenizer, make_reader(model)
        self.chat = ChatFormat(tokenizer) if tokenizer.chat_template else None
        self.most = ANSWER_TOKENS[self.chat is not None]

    @property
    def ending(self) -> str:
        """What an answer ends with that is no part of it."""
        return "." if self.chat is None else ""

    @property
    def start(self) -> int:
        """How many tokens stand before the text of a document."""
        return 0 if self.chat is None else len(self.chat.start)

    def encode(self, text: str) -> torch.Tensor:
        """The tokens that `ask` takes for a document: int64 [1, L], on the device of the model."""
        before = [] if self.chat is None else self.chat.start.tolist()
        return torch.tensor([before + encode(self.tokenizer, text)], device=self.model.device)

    def ask(self, document: torch.Tensor, cache, question: str, most: int | None = None, streamer=None) -> Reply:
        """
        The answer to a question about `document` [1, L], which `cache` holds and goes on holding.

        Args:
            most: tokens of the answer; None for what suits the model.
            streamer: is given the tokens as they come.
        """
        if self.chat is None:
            ids, options = encode(self.tokenizer, f" {question}"), {"stop_strings": [".", "\n"]}
            options["tokenizer"] = self.tokenizer
        else:
            ids = encode(self.tokenizer, f"\n\n{question}") + self.chat.reply.tolist()
            options = {"eos_token_id": int(self.chat.end[0])}
        likelihood = _Likelihood()
        prompt = torch.cat([document, torch.tensor([ids], device=document.device)], dim=1)
        tokens, recorder = self.reader.generate(
            prompt, most or self.most, cache=self.reader.fork(cache), logits_processor=[likelihood],
            streamer=streamer, **options,
        )  # fmt: skip
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip(CUT).strip().removesuffix(self.ending)
        return Reply(text, tokens, likelihood.kept, recorder, self.chat is not None)

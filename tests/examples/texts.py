"""Texts, tokenizers and word lists of the tests of tasks and evaluations."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hsa_lab.corpus import train_tokenizer
from hsa_lab.tasks.chronicles import make_document, make_documents
from hsa_lab.tasks.ruler import RulerTasks
from hsa_lab.tokens import encode


VOCABULARY = 500
TEXT = "\n".join(document.text for document in make_documents(5, 4000, 20, 1))
WORDS = {
    "nouns": ["river", "lamp", "engine", "window", "carpet", "violin", "meadow", "harbor"],
    "adjectives": ["green", "quiet", "early", "narrow", "gentle", "hollow", "amber", "brisk"],
    "verbs": ["walk", "carry", "listen", "gather", "wander", "borrow", "mend", "fold", "whisper", "climb"],
}


def other_tokenizer() -> PreTrainedTokenizerFast:
    """One that joins digits, as many do: numbers have different numbers of tokens. It has no end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT, " ".join(str(i * 7919) for i in range(1000))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with single digits and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([make_document(0, 30_000, 20, True).text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    """An untrained model with the special tokens of `chat_tokenizer`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TOKENIZERS = {"single digits": train_tokenizer([{"text": TEXT}], VOCABULARY), "joined digits": other_tokenizer()}
TOKENIZER = TOKENIZERS["single digits"]


def make_ruler() -> RulerTasks:
    words = {
        kind: [*of_kind, *(f"{word}s{i}" for word in of_kind for i in "abcdefgh")] for kind, of_kind in WORDS.items()
    }
    return RulerTasks(TOKENIZER, words, np.array(encode(TOKENIZER, TEXT), dtype=np.uint16))

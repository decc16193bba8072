"""Texts, tokenizers and word lists of the tests of tasks and evaluations."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hsa_lab.corpus import train_tokenizer
from hsa_lab.tasks.chronicles import make_documents
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


TOKENIZERS = {"single digits": train_tokenizer([{"text": TEXT}], VOCABULARY), "joined digits": other_tokenizer()}
TOKENIZER = TOKENIZERS["single digits"]


def make_ruler() -> RulerTasks:
    words = {
        kind: [*of_kind, *(f"{word}s{i}" for word in of_kind for i in "abcdefgh")] for kind, of_kind in WORDS.items()
    }
    return RulerTasks(TOKENIZER, words, np.array(encode(TOKENIZER, TEXT), dtype=np.uint16))

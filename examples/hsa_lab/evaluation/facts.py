"""
Facts in plain English: which wordings of a fact does a model answer about?

    python examples/evaluate.py facts --model hub_card/hsa-books-10m --haystack books/validation.jsonl.gz \\
        --output out/facts --lengths 4096 --samples 40

One fact in a long text and a question about it, as `hsa_lab/tasks/facts.py` says. Greedy answers; one is right if it
contains the value. Results: facts.json. HSA models: also the recall of the chunks that hold the fact.
"""

from functools import partial

from ..tasks.facts import TASKS, make_fact, make_prompt
from ..tasks.ruler import string_match_all
from ..tokens import encode, sample_rng
from .harness import Evaluation, Question


class Facts(Evaluation):
    name, tasks = "facts", TASKS

    def question(self, task: str, length: int, seed: int, index: int) -> Question:
        rng = sample_rng(seed, task, length, index)
        sentence, question, value = make_fact(task, rng)
        tokens, needle = make_prompt((sentence, question, value), rng, self.tokenizer, self.haystack, length)
        most = len(encode(self.tokenizer, f" {value}")) + 2
        record = {"fact": sentence, "question": question, "expected": value}
        return Question(tokens, most, partial(string_match_all, outputs=[value]), [needle], record)

"""
Facts in plain English, in a text that the model continues: which wordings of a fact does it answer about?

    python examples/evaluate.py wordings --model hub_card/hsa-books-10m --haystack books/validation.jsonl.gz \\
        --output out/wordings --lengths 4096 --samples 40

One fact in a long text and a question about it, as `hsa_lab/tasks/facts.py` says. Greedy answers; one is right if it
contains the value. Results: wordings.json. HSA models: also the recall of the chunks that hold the fact.

For models that were trained on such wordings. `facts` asks chat models about facts of many more kinds.
"""

from functools import partial

from ..tasks.facts import TASKS, make_fact, make_prompt
from ..tasks.ruler import string_match_all
from ..tokens import encode, sample_rng
from .harness import Evaluation, Question


class Wordings(Evaluation):
    name, tasks = "wordings", TASKS

    def question(self, task: str, length: int, seed: int, index: int) -> Question:
        rng = sample_rng(seed, task, length, index)
        sentence, question, value = make_fact(task, rng)
        tokens, needle = make_prompt((sentence, question, value), rng, self.tokenizer, self.haystack, length)
        most = len(encode(self.tokenizer, f" {value}")) + 2
        record = {"fact": sentence, "question": question, "expected": value}
        return Question(tokens, most, partial(string_match_all, outputs=[value]), [needle], record)

"""
Questions in plain words about long texts, to chat models: made-up facts and documents, and passages with questions.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from ..chat_rows.evaluation import KINDS, Sample, is_refusal, make_texts
from ..chat_rows.haystack import Haystack
from ..chat_rows.qa import Passage, read_passages
from ..commands import at_least, existing_file
from .harness import Evaluation, Question


class Questions(Evaluation):
    """What the evaluations of chat models share: the questions of `chat_rows/evaluation.py`."""

    lengths, forms = (1024, 4096, 8192), ("chat",)
    passages: tuple[Passage, ...] = ()

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--answer_tokens", type=at_least(1), default=48, help="of the longest answer")

    def prepare(self) -> None:
        self.books = Haystack(self.haystack, self.tokenizer)
        self.cell: tuple[str, int] | None = None
        self.made: dict[int, tuple[Iterator[list[Sample]], list[list[Sample]]]] = {}  # of the cell, by seed

    def questions(self, task: str, length: int, seed: int, index: int, most: int) -> list[Question]:
        if self.cell != (task, length, most):
            self.cell, self.made = (task, length, most), {}
        if seed not in self.made:
            texts = make_texts(
                self.kind(task), self.tokenizer, self.books, length or None, most, self.arguments.split, seed,
                self.passages,
            )  # fmt: skip
            self.made[seed] = texts, []
        texts, made = self.made[seed]
        while len(made) <= index:
            made.append(next(texts))
        return [
            Question(
                sample.tokens, self.arguments.answer_tokens, sample.score, sample.evidence,
                {"kind": sample.kind, "question": sample.question, "expected": sample.expected},
            )
            for sample in made[index]
        ]  # fmt: skip

    def row(self, task: str, length: int) -> tuple[dict, list[dict]]:
        """Also the share of the answers that say that the text does not tell, as only those of `missing` should."""
        row, records = super().row(task, length)
        return row | {"refused": sum(is_refusal(record["answer"]) for record in records) / len(records)}, records

    def kind(self, task: str) -> str:
        """The kind of `KINDS` that a task has questions of."""
        return task


class Facts(Questions):
    """
    Made-up facts hidden in books, asked for in plain words, in a chat.

        python examples/evaluate.py facts --model out/hsa-smollm2/model --base out/smollm2 \\
            --haystack out/streams/books-test.npy --lengths 1024 4096 --samples 50 --seeds 0 1 2 --output out/facts

    Of things, kinds of fact and wordings that are not trained on (`facts`), of kinds that are (`facts, trained kinds`,
    ...), in made-up documents (`documents`), and of what the text does not tell (`missing`), where an answer is right
    that says so (`refused` of a row is the share of such answers). Others are right if they contain the value as whole
    words. As `hsa_lab/chat_rows/evaluation.py` says; the haystack has to be of books of the same `--split`. Greedy
    answers, which are all in facts.json.
    """

    name, tasks = "facts", tuple(kind for kind in KINDS if kind != "qa")

    @classmethod
    def check(cls, arguments: Namespace) -> None:
        # Wordings that were trained on are measured if they are asked for.
        untrained = [kind for kind in cls.tasks if KINDS[kind] is None or KINDS[kind][1] == "own"]
        arguments.tasks = arguments.tasks or untrained
        super().check(arguments)


class Passages(Questions):
    """
    Passages hidden in books, and questions about them, in a chat: F1 of the answers.

        python examples/evaluate.py qa --model out/hsa-smollm2/model --base out/smollm2 --qa qa/train.jsonl.gz \\
            --haystack out/streams/books-test.npy --lengths 4096 65536 --samples 50 --seeds 0 1 2 --output out/qa

    `alone` is the passage with its question and nothing else, which is asked first; then the same questions, with the
    passage anywhere in a text of each length. `accuracy` is the mean F1 of the words, as for SQuAD. The passages are
    those of `--split`, by the rule of `hsa_lab/chat_rows/qa.py`. Greedy answers, which are all in qa.json.
    """

    name, tasks = "qa", ("alone", "qa")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--qa", type=existing_file, required=True, help="train.jsonl.gz with passages and questions"
        )

    def prepare(self) -> None:
        super().prepare()
        self.passages = read_passages(self.arguments.qa, self.arguments.split)

    def kind(self, task: str) -> str:
        return "qa"

    def cells(self) -> list[tuple[str, int]]:
        alone = [("alone", 0)] if "alone" in self.arguments.tasks else []
        return alone + [("qa", length) for length in self.arguments.lengths if "qa" in self.arguments.tasks]

"""
BABILong: bAbI stories told between the sentences of books, and a question about them at the end.

    python examples/evaluate.py babilong --model out/books --babi babi --haystack books/validation.jsonl.gz \\
        --output out/books/babilong --lengths 1024 4096 16384 --samples 100 --shots 2

How it is like the benchmark (arXiv 2406.10149) and unlike it is in `hsa_lab/tasks/babilong.py`. `--babi` is a folder
with files qaN_*_train.txt or .txt.gz of bAbI v1.2, or one with such folders en-10k and en. Of every file the last
tenth of the stories is asked about (`--split test`), or the tenth before it (validation); solved examples are from the
others, and so is what `hsa_lab/chat_rows` trains on. The same stories are asked at every length that they fit;
`stories` of a row says how many do.

Results: babilong.json, babilong.png (tasks x lengths). Rows of HSA models also have the recall of the chunks that hold
the supporting facts, by the tokens that answer.
"""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from ..chat_rows.stories import find_file, read_stories
from ..commands import at_least
from ..plots import heat_map
from ..results import short
from ..tasks.babilong import LABELS, Background, Prompts, choose_shots, is_correct
from ..tokens import sample_rng
from .harness import Evaluation, Question


class Babilong(Evaluation):
    name, tasks, lengths = "babilong", tuple(LABELS), tuple(2**i for i in range(10, 15))
    forms = ("text", "chat")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--babi", type=Path, required=True, help="folder with qaN_*_train.txt or .txt.gz")
        parser.add_argument(
            "--shots", type=at_least(0), help="solved examples that come first (default: 2, in a chat 0)"
        )
        parser.add_argument("--max_new_tokens", type=at_least(1), default=20, help="of an answer")

    @classmethod
    def check(cls, arguments: Namespace) -> None:
        super().check(arguments)
        arguments.lengths = sorted(set(arguments.lengths))
        for task in arguments.tasks:
            find_file(arguments.babi, task)

    def prepare(self) -> None:
        """For every task: the prompts and the order of the stories of each seed."""
        background, self.prompts, self.orders = Background(self.haystack, self.tokenizer), {}, {}
        if self.arguments.shots is None:
            self.arguments.shots = 2 if self.chat is None else 0
        for task in self.arguments.tasks:
            asked, examples = (
                read_stories(self.arguments.babi, task, split) for split in (self.arguments.split, "train")
            )
            for seed in self.arguments.seeds:
                rng = sample_rng(seed, task, 0, 0)
                shots = choose_shots(examples, self.arguments.shots, rng)
                self.prompts[task, seed] = Prompts(background, self.tokenizer, shots, self.chat)
                self.orders[task, seed] = [asked[i] for i in rng.permutation(len(asked))]
        longest = max(self.arguments.lengths)
        if not any(self.fitting(task, longest, seed) for task, seed in self.orders):
            raise ValueError("`--lengths`: no story fits into any of them, give longer ones or lower `--shots`")

    def fitting(self, task: str, length: int, seed: int) -> list:
        """The stories that have room in a prompt."""
        return [x for x in self.orders[task, seed] if self.prompts[task, seed].least(x) <= length]

    def try_out(self, task: str, length: int) -> None:
        """Lengths that no story fits into are left out."""

    def evaluate(self, task: str, length: int) -> None:
        self.stories = {seed: self.fitting(task, length, seed) for seed in self.arguments.seeds}
        if all(self.stories.values()):
            super().evaluate(task, length)
        else:
            print(f"{task} {short(length)}: no story fits. Leave out that length, or lower `--shots`.")

    def row(self, task: str, length: int) -> tuple[dict, list[dict]]:
        row, records = super().row(task, length)
        of = len(self.orders[task, self.arguments.seeds[0]])
        return row | {"stories": min(map(len, self.stories.values())), "of_stories": of}, records

    def question(self, task: str, length: int, seed: int, index: int) -> Question:
        story = self.stories[seed][index % len(self.stories[seed])]
        prompt = self.prompts[task, seed].make(story, length, sample_rng(seed, task, length, index))
        needles = [prompt.facts[i] for i in story.support]
        score = partial(is_correct, story=story, labels=LABELS[task])
        return Question(prompt.tokens, self.arguments.max_new_tokens, score, needles, {"expected": story.answer})

    def draw(self) -> None:
        """Accuracy in percent, tasks x lengths, as the benchmark shows it."""
        rows = [row for row in self.results.rows if "accuracy" in row]
        cells = {(row["task"], short(row["length"])): row["accuracy"] for row in rows}
        heat_map(cells, self.arguments.output / "babilong.png", "BABILong", "task")

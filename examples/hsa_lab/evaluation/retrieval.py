"""
Retrieval from long contexts, by length: the tasks of the papers on HSA, and those of RULER; as texts that the model
continues, or as chats.
"""

import importlib.resources
import importlib.util
import json
from argparse import ArgumentParser, Namespace
from functools import partial

import numpy as np
import torch

from ..commands import at_least, existing_file
from ..tasks import ruler
from ..tasks.retrieval import RetrievalTasks, Sample
from ..tasks.retrieval_chat import ANSWER_TOKENS, ChatRetrieval
from ..tasks.ruler import RulerTasks, string_match_all
from ..tokens import first_ids, sample_rng
from .harness import Evaluation, Question, labelled


ONE_NEEDLE = ("s_niah", "niah_single_1", "niah_single_2", "niah_single_3")
# Names and numbers of the evaluation come from other lists than those of training, which are number 0.
POOL_SEED = 1


class Retrieval(Evaluation):
    """What both protocols share: needles on a grid of depths."""

    lengths, forms = (4096, 8192, 16384, 32768), ("text", "chat")
    # A shorter haystack than the longest prompt is repeated; of a much longer one the rest is not needed.
    haystack_tokens = 1 << 22

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--depths", type=at_least(0), default=0, help="depths of the grid of needles; 0: random depths"
        )
        parser.add_argument("--no_retrieval", action="store_true", help="leave out what HSA layers retrieved")

    @classmethod
    def check(cls, arguments: Namespace) -> None:
        super().check(arguments)
        if arguments.depths == 1:
            raise ValueError("`--depths` must be 0 or at least 2, got 1")

    def depth(self, task: str, index: int) -> float | None:
        """The depth of sample number `index` on the grid; None for a random one."""
        depths = self.arguments.depths
        return None if depths == 0 or task not in ONE_NEEDLE else (index % depths) / (depths - 1)

    def recall(self, chunks, needles, tokens) -> dict:
        return {} if self.arguments.no_retrieval else super().recall(chunks, needles, tokens)


class Paper(Retrieval):
    """
    The tasks of the papers on HSA (arXiv 2510.17196): s_niah, mq_niah and vt, by teacher forcing or in a chat.

        python examples/evaluate.py paper --model out/hsa --haystack books.jsonl.gz --output out/paper \\
            --lengths 4096 1048576

    As `hsa_lab/tasks/retrieval.py` says, in one pass; a sample counts if every scored token is the likeliest. In chat
    form, as `hsa_lab/tasks/retrieval_chat.py` says: a question in plain words ends the message of the user, and the
    answer is generated; a sample counts if the exact value is in it. Not comparable with RULER, whose vt has another
    definition.

    Writes paper.json with Wilson 95 % intervals and compact records, and a map of depth x length for the task with one
    needle (`--depths` puts it on a grid).

    Of HSA models also: `recall`, the share of the chunks with the values asked for that at least one HSA layer
    retrieved at a token whose successor is scored; `recall_by_layer`; `accuracy_if_retrieved`, of the `retrieved`
    samples with a recall of 1. (A value inside the sliding window can be copied without being retrieved.)
    """

    name, tasks = "paper", ("s_niah", "mq_niah", "vt")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--batch_size", type=at_least(1), default=1, help="samples that are forced at a time")
        parser.add_argument(
            "--digits", type=at_least(0), default=0,
            help="of the value of s_niah in a chat, as in arXiv 2607.02980 (8); 0: 7 random tokens",
        )  # fmt: skip

    def prepare(self) -> None:
        if self.chat is None and self.arguments.digits:
            raise ValueError("`--digits` is for chats: leave it out, or pass `--chat yes`")
        self.generator = RetrievalTasks(self.tokenizer, pool_seed=POOL_SEED)
        if self.chat is not None:
            self.asker = ChatRetrieval(self.generator, self.chat, self.arguments.split, self.arguments.digits)

    def questions(self, task: str, length: int, seed: int, index: int, most: int) -> list[Question]:
        rng, depth = sample_rng(seed, task, length, index), self.depth(task, index)
        found = []
        for asked in self.asker.make_all(task, rng, self.haystack, length, depth, most):
            record = {"expected": asked.expected}
            if task in ONE_NEEDLE:
                record["depth"] = asked.depth if depth is None else depth
            found.append(Question(asked.tokens, ANSWER_TOKENS[task], asked.score, asked.needles, record))
        return found

    def sample(self, task: str, length: int, seed: int, index: int) -> tuple[Sample, float]:
        """The sample and its depth: on the grid, or where it happens to be."""
        depth = self.depth(task, index)
        options = {} if depth is None else {"depth": depth}
        sample = self.generator.make(task, sample_rng(seed, task, length, index), self.haystack, length, **options)
        start = first_ids(self.tokenizer)
        if start and sample.needles[:, 0].min() > 0:
            sample.tokens[0] = start[0]  # of models whose tokenizer starts every text with it
        return sample, sample.depth if depth is None else depth

    def try_out(self, task: str, length: int) -> None:
        if self.chat is not None:
            super().try_out(task, length)
        else:
            self.sample(task, length, self.arguments.seeds[0], 0)

    def records(self, task: str, length: int) -> list[dict]:
        return super().records(task, length) if self.chat is not None else self.force(task, length)

    def force(self, task: str, length: int) -> list[dict]:
        """By teacher forcing: whether every scored token is the likeliest."""
        records = []
        for pairs in self.batches(task, length, self.arguments.batch_size):
            samples, depths = zip(*(self.sample(task, length, *pair) for pair in pairs))
            tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64))
            masks = torch.from_numpy(np.stack([sample.answer_mask for sample in samples]))
            count = length - int(masks.any(0).nonzero()[0])
            right, chunks = self.reader.score_last(tokens.to(self.model.device), count)
            for row, ((seed, index), sample, depth) in enumerate(zip(pairs, samples, depths)):
                scored = masks[row, -count:]
                record = {"seed": seed, "index": index, "score": float(right[row, scored].all())}
                if task in ONE_NEEDLE:
                    record["depth"] = depth
                records.append(record | self.recall(None if chunks is None else chunks[row], sample.wanted, scored))
        return records


class Ruler(Retrieval):
    """
    Tasks of RULER (arXiv 2404.06654): greedy answers, the share of the expected strings that they contain.

        python examples/evaluate.py ruler --model out/hsa --haystack books.jsonl.gz --output out/ruler

    Needs RULER's words, which come with the package `wonderwords` (`pip install wonderwords`), or others by `--words`.

    As `hsa_lab/tasks/ruler.py` says, in either form; in a chat, words, numbers and UUIDs are those of `--split`, and
    none that rows of training are made of. Writes ruler.json, with the `average` of the tasks at each length; the rest
    is as with `paper`.
    """

    name, tasks, needs_haystack = "ruler", ruler.TASKS, False

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--words", type=existing_file, help="JSON of lists 'nouns', 'adjectives' and 'verbs' instead of RULER's"
        )

    @classmethod
    def check(cls, arguments: Namespace) -> None:
        super().check(arguments)
        needing = [task for task in arguments.tasks if task in ruler.NEEDS_HAYSTACK]
        if needing and not arguments.haystack:
            raise ValueError(f"`--haystack` is needed by {', '.join(needing)}: pass it, or choose other `--tasks`")
        needing = [task for task in arguments.tasks if task in ruler.NEEDS_WORDS]
        if needing and not arguments.words and not importlib.util.find_spec("wonderwords"):
            raise ValueError(f"the words of {', '.join(needing)} are missing: `pip install wonderwords`, or --words")

    def prepare(self) -> None:
        split = None if self.chat is None else self.arguments.split
        self.generator = RulerTasks(self.tokenizer, self.words(), self.haystack, self.chat, split)

    def words(self) -> dict[str, list[str]] | None:
        """Lists "nouns", "adjectives" and "verbs": of `--words`, or RULER's; None where there are none."""
        if self.arguments.words:
            return json.loads(self.arguments.words.read_text(encoding="utf-8"))
        if not importlib.util.find_spec("wonderwords"):
            return None
        lists = importlib.resources.files("wonderwords") / "assets"
        read = {kind: (lists / f"{kind}list.txt").read_text().splitlines() for kind in ("noun", "adjective", "verb")}
        return {f"{kind}s": [word.strip() for word in words if word.strip()] for kind, words in read.items()}

    def questions(self, task: str, length: int, seed: int, index: int, most: int) -> list[Question]:
        rng, depth = sample_rng(seed, task, length, index), self.depth(task, index)
        found = []
        for prompt in self.generator.make_all(task, rng, length, depth, most):
            record = {"expected": prompt.outputs}
            if task in ONE_NEEDLE:
                record["depth"] = prompt.depth if depth is None else depth
            score = partial(string_match_all, outputs=prompt.outputs)
            found.append(Question(prompt.tokens, prompt.answer_tokens, score, prompt.values, record))
        return found

    def draw(self) -> None:
        """Also the average of the tasks, by length, which is printed and written."""
        super().draw()
        averages = {}
        for name in self.readers:
            labels = [labelled(task, name) for task in self.arguments.tasks]
            for length in self.arguments.lengths:
                found = [
                    row["accuracy"] for row in self.results.rows
                    if row["length"] == length and row["task"] in labels and "accuracy" in row
                ]  # fmt: skip
                if len(found) == len(labels):
                    averages[labelled(str(length), name)] = sum(found) / len(found)
        self.results.content["average"] = averages
        self.results.write()
        print("average of the tasks:", ", ".join(f"{key}: {100 * value:.1f}" for key, value in averages.items()))

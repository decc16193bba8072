"""
Retrieval from long contexts, by length: the tasks of the papers on HSA, or those of RULER, with any causal LM.

    python examples/eval_ruler.py --model out/hsa --haystack books.jsonl.gz --output out/ruler --lengths 4096 1048576
    python examples/eval_ruler.py --model out/hsa --haystack books.jsonl.gz --output out/ruler --protocol ruler \\
        --words wonderwords.json

`--protocol paper`: s_niah, mq_niah and vt of `retrieval_tasks.py` (arXiv 2510.17196), one pass of teacher forcing; a
sample counts if every scored token is the likeliest. `--protocol ruler`: tasks of RULER (arXiv 2404.06654,
`ruler_tasks.py`), greedy answers, the share of the expected strings that they contain. The two are not comparable.

Writes paper.json or ruler.json with hardware, versions, Wilson 95 % intervals and compact records, and a heat map of
depth x length for every task with one needle (`--depths` puts the needles on a grid); prints a table.

Of HSA models also: `recall`, the share of the chunks with the values asked for that at least one HSA layer retrieved
at a token whose successor is scored (paper) or generated (ruler); `recall_by_layer`; `accuracy_if_retrieved`, of the
`retrieved` samples with a recall of 1. (A value inside the sliding window can be copied without being retrieved.)
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import numpy as np
import ruler_tasks
import torch
from evaluation import (
    Clock,
    Results,
    batches,
    generate,
    heat_map,
    load,
    make_parser,
    parse,
    read_haystack,
    retrieval_recall,
    sample_rng,
    score_last,
)
from retrieval_tasks import RetrievalTasks
from ruler_tasks import RulerTasks, string_match_all


PAPER_TASKS = ("s_niah", "mq_niah", "vt")
PROTOCOLS = {"paper": PAPER_TASKS, "ruler": ruler_tasks.TASKS}
ONE_NEEDLE = ("s_niah", "niah_single_1", "niah_single_2", "niah_single_3")
# Names and numbers of the evaluation come from other lists than those of training, which are number 0.
POOL_SEED = 1
# A shorter haystack than the longest prompt is repeated; of a much longer one the rest is not needed.
HAYSTACK_TOKENS = 1 << 22
DEPTH_BINS = 10


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, (*PAPER_TASKS, *ruler_tasks.TASKS), [4096, 8192, 16384, 32768], haystack=False)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="paper")
    parser.add_argument("--words", type=Path, help="JSON of lists 'nouns', 'adjectives', 'verbs', for RULER's tasks")
    parser.add_argument("--depths", type=int, default=0, help="depths of the grid of needles; 0: random depths")
    parser.add_argument("--no_retrieval", action="store_true", help="leave out what HSA layers retrieved")
    parser.set_defaults(tasks=None)
    arguments = parse(parser, words)
    allowed = PROTOCOLS[arguments.protocol]
    arguments.tasks = arguments.tasks or [task for task in allowed if task != "cwe" or arguments.words]
    if wrong := [task for task in arguments.tasks if task not in allowed]:
        parser.error(
            f"`--tasks`: {', '.join(wrong)} is not in `--protocol {arguments.protocol}`, which has "
            f"{', '.join(allowed)} (vt is in both, with different definitions)"
        )
    for flag, needing in (
        ("haystack", {*PAPER_TASKS} if arguments.protocol == "paper" else ruler_tasks.NEEDS_HAYSTACK),
        ("words", ruler_tasks.NEEDS_WORDS),
    ):
        if not getattr(arguments, flag) and (tasks := [task for task in arguments.tasks if task in needing]):
            parser.error(f"`--{flag}` is needed by {', '.join(tasks)}: pass it, or choose other `--tasks`")
    if arguments.words is not None and not arguments.words.is_file():
        parser.error(f"`--words`: there is no file {arguments.words}")
    if arguments.depths < 0 or arguments.depths == 1:
        parser.error(f"`--depths` must be 0 or at least 2, got {arguments.depths}")
    return arguments


def depth_of(arguments: argparse.Namespace, task: str, index: int) -> float | None:
    """The depth of sample number `index` on the grid; None for a random one."""
    if arguments.depths == 0 or task not in ONE_NEEDLE:
        return None
    return (index % arguments.depths) / (arguments.depths - 1)


class PaperProtocol:
    """Teacher forcing on `retrieval_tasks`."""

    def __init__(self, arguments: argparse.Namespace, model, tokenizer, haystack: np.ndarray):
        self.arguments, self.model, self.haystack = arguments, model, haystack
        self.tasks = RetrievalTasks(tokenizer, pool_seed=POOL_SEED)
        first = tokenizer("a")["input_ids"][:1]
        self.start = first[0] if first == [tokenizer.bos_token_id] else None

    def sample(self, task: str, length: int, seed: int, index: int):
        """The sample and its depth: on the grid, or where it happens to be."""
        depth = depth_of(self.arguments, task, index)
        options = {} if depth is None else {"depth": depth}
        sample = self.tasks.make(task, sample_rng(seed, task, length, index), self.haystack, length, **options)
        if self.start is not None and sample.needles[:, 0].min() > 0:
            sample.tokens[0] = self.start  # of models whose tokenizer starts every text with it
        return sample, sample.depth if depth is None else depth

    def records(self, task: str, length: int) -> list[dict]:
        arguments, records = self.arguments, []
        for pairs in batches(arguments, task, length):
            samples, depths = zip(*(self.sample(task, length, *pair) for pair in pairs))
            tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64))
            masks = torch.from_numpy(np.stack([sample.answer_mask for sample in samples]))
            count = length - int(masks.any(0).nonzero()[0])
            right, chunks = score_last(
                self.model, tokens.to(self.model.device), count, arguments.segment, arguments.offload
            )
            for row, ((seed, index), sample, depth) in enumerate(zip(pairs, samples, depths)):
                scored = masks[row, -count:]
                hits = right[row, scored]
                record = {
                    "seed": seed,
                    "index": index,
                    "score": float(hits.all()),
                    "tokens": float(hits.float().mean()),
                }
                if task in ONE_NEEDLE:
                    record["depth"] = depth
                if chunks is not None and not arguments.no_retrieval:
                    chunk_size = self.model.config.chunk_size
                    record["recall"] = retrieval_recall(chunks[row, scored], sample.wanted, chunk_size)
                records.append(record)
        return records


class RulerProtocol:
    """Greedy answers to `ruler_tasks`."""

    def __init__(self, arguments: argparse.Namespace, model, tokenizer, haystack: np.ndarray | None):
        self.arguments, self.model, self.tokenizer = arguments, model, tokenizer
        words = None if arguments.words is None else json.loads(arguments.words.read_text(encoding="utf-8"))
        self.tasks = RulerTasks(tokenizer, words, haystack)

    def sample(self, task: str, length: int, seed: int, index: int):
        """The prompt and its depth: on the grid, or where it happens to be."""
        depth = depth_of(self.arguments, task, index)
        prompt = self.tasks.make(task, sample_rng(seed, task, length, index), length, depth)
        return prompt, prompt.depth if depth is None else depth

    def records(self, task: str, length: int) -> list[dict]:
        arguments, records = self.arguments, []
        for ((seed, index),) in batches(arguments, task, length, size=1):
            prompt, depth = self.sample(task, length, seed, index)
            ids = torch.from_numpy(prompt.tokens)[None].to(self.model.device)
            new, chunks = generate(self.model, ids, prompt.answer_tokens, arguments.segment, arguments.offload)
            answer = self.tokenizer.decode(new, skip_special_tokens=True).strip()
            record = {"seed": seed, "index": index, "score": string_match_all(answer, prompt.outputs)}
            if task in ONE_NEEDLE:
                record["depth"] = depth
            if chunks is not None and prompt.values and not arguments.no_retrieval:
                record["recall"] = retrieval_recall(chunks[0], prompt.values, self.model.config.chunk_size)
            records.append(record | {"answer": answer[:200], "expected": prompt.outputs})
        return records


def evaluate_cell(protocol, results: Results, task: str, length: int) -> None:
    """One task at one length. Where memory does not suffice, the row says so, and the other rows are measured."""
    clock, on_gpu = Clock(), protocol.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        records = protocol.records(task, length)
    except torch.OutOfMemoryError:
        results.fail(task, length, "out of memory")
    else:
        peak = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)} if on_gpu else {}
        results.add(task, length, records, clock.seconds, **peak)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def depth_cells(rows: list[dict], on_grid: bool) -> dict[tuple[float, int], float]:
    """Accuracy by (depth, length) of the rows of one task; random depths are put into bins."""
    scores = {}
    for row in rows:
        for depth, score in zip(row["records"].get("depth", []), row["records"]["score"]):
            if not on_grid:
                depth = (min(int(depth * DEPTH_BINS), DEPTH_BINS - 1) + 0.5) / DEPTH_BINS
            scores.setdefault((round(depth, 4), row["length"]), []).append(score)
    return {cell: sum(values) / len(values) for cell, values in scores.items()}


def draw_heat_maps(arguments: argparse.Namespace, results: Results) -> None:
    for task in arguments.tasks:
        rows = [row for row in results.rows if row["task"] == task and "records" in row]
        if task in ONE_NEEDLE and rows:
            cells = depth_cells(rows, arguments.depths > 0)
            heat_map(cells, arguments.output / f"{arguments.protocol}_{task}.png", f"{task}: accuracy")


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    model, tokenizer = load(arguments)
    haystack = None
    if arguments.haystack:
        haystack = read_haystack(arguments.haystack, tokenizer, max(2 * max(arguments.lengths), HAYSTACK_TOKENS))
    make = PaperProtocol if arguments.protocol == "paper" else RulerProtocol
    cells = [(task, length) for length in arguments.lengths for task in arguments.tasks]
    try:
        protocol = make(arguments, model, tokenizer, haystack)
        for task, length in cells:  # what does not fit should not show after hours
            protocol.sample(task, length, arguments.seeds[0], 0)
    except ValueError as error:
        sys.exit(f"eval_ruler.py: {error}")
    results = Results(arguments.protocol, arguments, model)
    for task, length in cells:
        evaluate_cell(protocol, results, task, length)
    print(results.table())
    draw_heat_maps(arguments, results)


if __name__ == "__main__":
    main()

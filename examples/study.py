"""
The study: which parts of chunk-based sparse attention make it extrapolate (docs/study.md).

    python examples/prepare.py corpus --train_files books/train-*.jsonl.gz --vocab_size 4096 --output out/corpus \\
        --validation_files books/validation.jsonl.gz
    python examples/study.py a --corpus out/corpus --seeds 0 1 2
    python examples/study.py report
    python examples/study.py e --toy

A table (`hsa_lab/study/cells.py`) is a list of cells: models that are trained on the same rows and tried in the same
way. Every run, of a cell with a seed, writes a JSON file with its hardware, versions and commit into --output; those
that are there are not made again. A run that was stopped (--minutes, or the interrupt key) goes on where it was, from
the checkpoint in its folder. To use several processes, give each its share of the runs: --shard 0/4 to 3/4.

`report` writes the tables and plots of all results into the page --page.
"""

import sys
import time
from argparse import Namespace
from pathlib import Path

from hsa_lab.commands import add_device_flag, at_least, make_parser, run
from hsa_lab.study.cells import SCALES, TABLES
from hsa_lab.study.models import MODELS, missing
from hsa_lab.study.report import read_results, write_report
from hsa_lab.study.run import OUTPUT, Job, Settings, run_job
from hsa_lab.study.toy import make_toy_corpus


def parse_arguments(words: list[str] | None) -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "table", choices=[*TABLES, "report"], help="; ".join(f"{k}: {v.title}" for k, v in TABLES.items())
    )
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0], help="of weights, rows and samples")
    parser.add_argument("--cells", nargs="+", help="only these; by default all of the table")
    parser.add_argument(
        "--scale", choices=[name for name in SCALES if name != "toy"], default="10M", help="parameters"
    )
    parser.add_argument("--toy", action="store_true", help="tiny models on made-up text: shows that every part runs")
    parser.add_argument("--corpus", type=Path, help="folder that `prepare.py corpus` wrote; not needed for a toy")
    parser.add_argument("--output", type=Path, default=Path("out/study"), help="folder of the results")
    parser.add_argument("--page", type=Path, default=Path("docs/study.md"), help="that `report` writes tables into")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run that takes longer, and stop training then"
    )
    parser.add_argument("--shard", default="0/1", help="I/N: only every Nth of the runs, from number I on")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that make batches")
    parser.add_argument(
        "--keep_models", action="store_true", help="keep the trained models in the folders of the runs"
    )
    parser.add_argument("--list", action="store_true", help="say what is left to do, and do nothing")
    add_device_flag(parser)
    arguments = parser.parse_args(words)
    index, _, count = arguments.shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"`--shard` must be I/N with I below N, got {arguments.shard!r}.")
    arguments.shard = int(index), int(count)
    if arguments.table != "report" and not (arguments.toy or arguments.list) and arguments.corpus is None:
        raise ValueError("`--corpus` is needed: a folder that `prepare.py corpus` wrote, with validation files.")
    return arguments


def find_jobs(arguments: Namespace) -> list[Job]:
    """All runs of the table that can be made here, the cells of a seed after each other."""
    cells = TABLES[arguments.table].cells
    if unknown := set(arguments.cells or ()) - cells.keys():
        raise ValueError(f"`--cells`: table {arguments.table} has no {sorted(unknown)}, but {list(cells)}.")
    scale, names = "toy" if arguments.toy else arguments.scale, []
    for name in arguments.cells or cells:
        if reason := missing(MODELS[cells[name].model]):
            print(f"{name} is left out: {reason}.")
        else:
            names.append(name)
    return [Job(arguments.table, name, seed, scale) for seed in arguments.seeds for name in names]


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    if arguments.table == "report":
        write_report(arguments.output, arguments.page)
        return
    jobs = find_jobs(arguments)
    done = [job for job in jobs if job.file(arguments.output).exists()]
    index, count = arguments.shard
    left = [job for job in jobs[index::count] if job not in done]
    print(f"Table {arguments.table}: {TABLES[arguments.table].title}. {len(done)} of {len(jobs)} runs are there.")
    earlier = read_results(arguments.output, arguments.table, "toy" if arguments.toy else arguments.scale)
    work(left, arguments, [sum(result["seconds"].values()) for result in earlier])


def work(left: list[Job], arguments: Namespace, seconds: list[float]) -> None:
    """
    Makes the runs that are left, or only names them. `seconds`: that earlier ones took. Ends with an error, after all
    others, where one failed; with the exit status 3 where time is up.
    """
    deadline, failed = time.time() + 60 * arguments.minutes, []
    corpus = make_toy_corpus(arguments.output) if arguments.toy and not arguments.list else arguments.corpus
    settings = Settings(corpus, arguments.output, arguments.device, arguments.workers, deadline, arguments.keep_models)
    for number, job in enumerate(left):
        about = f", about {sum(seconds) / len(seconds) * (len(left) - number) / 60:.1f} minutes" if seconds else ""
        print(f"{len(left) - number} left{about}. {job.name}, seed {job.seed}", flush=True)
        if arguments.list:
            continue
        try:
            is_late = time.time() + max(seconds, default=0.0) > deadline
            result = None if is_late else run_job(job, settings)
        except Exception as error:  # of one model, which should not cost the others their time
            failed.append(job.name)
            print(f"  failed: {error}. {job.folder(arguments.output) / OUTPUT} says where.", flush=True)
            continue
        if result is None:
            print("Time is up. The same command goes on.")
            sys.exit(3)
        seconds.append(sum(result["seconds"].values()))
        speed = result["training"]["log"][-1]["tokens_per_s"]
        print("  {training:.0f} s of training, {tests:.0f} s of tests".format(**result["seconds"]), end="")
        print(f", {speed / 1e6:.2f}M tokens/s at the end, {result['training']['parameters']:,} parameters", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {', '.join(failed)}.")
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    run(main)

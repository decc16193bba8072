"""One run of the study: a cell with a seed, trained, tried, and written down as JSON."""

import contextlib
import json
import shutil
import time
import traceback
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from ..evaluation.perplexity import Perplexity
from ..evaluation.retrieval import Paper
from ..models import load
from ..results import provenance, write_json
from ..training.run import Run
from .cells import SCALES, TABLES, Cell, Scale, Table, make_stages
from .models import MODELS, make_fields


OUTPUT = "output.txt"  # of training and evaluations, in the folder of a run
SEGMENT = 65536  # tokens read at a time
BATCH = 4 * SEGMENT  # tokens of samples that are scored at a time
LAST = 255  # tokens at the end of a window whose loss is measured: of the shortest one, all that have a context


@dataclass(frozen=True)
class Job:
    """A cell of a table with a seed."""

    table_name: str
    name: str
    seed: int
    scale_name: str  # of the command

    @property
    def table(self) -> Table:
        return TABLES[self.table_name]

    @property
    def cell(self) -> Cell:
        return self.table.cells[self.name]

    @property
    def scale(self) -> Scale:
        # The toy is of all cells, also of those that name a scale.
        return SCALES[self.scale_name if self.scale_name == "toy" else self.cell.scale or self.scale_name]

    def fields(self) -> dict:
        """Of the configuration of its model, but for the vocabulary, which is that of the corpus."""
        model = MODELS[self.cell.model]
        fields = make_fields(model, self.scale.base, self.cell.fields, self.scale.is_sized)
        fields.pop("vocab_size")
        return fields

    def recipe(self) -> dict:
        fields = self.fields()
        optimizer = {
            "name": "muon", "learning_rate": self.scale.learning_rate, "weight_decay": 0.01, "answer_weight": 4.0,
            "warmup_tokens": sum(self.scale.tokens) // 12,
        }  # fmt: skip
        stages = make_stages(self.cell, self.scale, fields.get("chunk_size", 64))
        return {"model": fields, "optimizer": optimizer, "stages": stages}

    def folder(self, folder: Path) -> Path:
        """What it works in, in the folder of all results."""
        return self.file(folder).with_suffix("")

    def file(self, folder: Path) -> Path:
        """Where its results are, in the folder of all results."""
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in self.name)
        return folder / f"{self.table_name}-{self.scale_name}" / f"{name}-seed{self.seed}.json"


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        corpus: folder that `prepare.py corpus` wrote, with texts to train and to validate on.
        output: folder of all results.
        device, workers: as for `pretrain.py`.
        deadline: the time at which training stops, to go on in another call.
        keeps_models: whether trained models stay in the folder.
    """

    corpus: Path
    output: Path
    device: str = "auto"
    workers: int = 2
    deadline: float = float("inf")
    keeps_models: bool = False


def run_job(job: Job, settings: Settings) -> dict | None:
    """
    Trains and tries the cell, and writes its results. What was trained in an earlier call is not trained again.

    Returns: the results, or None where time was up.
    """
    folder = job.folder(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", job.recipe())
    start = time.time()
    with open(folder / OUTPUT, "a") as output, contextlib.redirect_stdout(output):
        with contextlib.redirect_stderr(output):  # of progress bars
            try:
                training = train(job, settings, folder)
                if training is None:
                    return None
                trained = time.time()
                names = job.cell.all_tests()
                tests = {name: try_out(job, settings, folder, name, changes) for name, changes in names.items()}
            except Exception:
                traceback.print_exc()
                raise
    results = {
        **provenance(),
        "table": job.table_name,
        "cell": job.name,
        "seed": job.seed,
        "scale": job.scale_name,
        "recipe": job.recipe(),
        "training": training,
        "tests": tests,
        "seconds": {"training": trained - start, "tests": time.time() - trained},
    }
    write_json(job.file(settings.output), results)
    if not settings.keeps_models:
        shutil.rmtree(folder)
    return results


def train(job: Job, settings: Settings, folder: Path) -> dict | None:
    """Returns: how it went, or None where time was up."""
    arguments = Namespace(
        recipe=folder / "recipe.json", corpus=settings.corpus, output=folder / "model", resume=True,
        minutes=(settings.deadline - time.time()) / 60, seed=job.seed, device=settings.device, mixed_precision="auto",
        gradient_accumulation_steps=1, attn_implementation=None, workers=settings.workers,
        log_every=job.scale.log_every, save_minutes=float("inf"), max_shard_size="5GB", compile=False,
    )  # fmt: skip
    run = Run(arguments)
    parameters = run.model.num_parameters()
    if run.state["tokens"] == 0:
        for name, deviation in job.cell.deviations.items():
            torch.nn.init.normal_(run.model.get_parameter(name), std=deviation)
    run.run()
    if run.state["stage"] < len(run.recipe["stages"]):
        return None
    log = [json.loads(line) for line in (folder / "model" / "log.jsonl").read_text().splitlines()]
    found = {"parameters": parameters, "tokens": run.state["tokens"], "seconds": round(run.state["seconds"], 1)}
    found["emergence"] = {str(share): emergence(log, share) for share in (0.5, 0.9)}
    return found | {"log": log}


def emergence(log: list[dict], share: float) -> int | None:
    """Tokens after which so many of the answers beyond the window were right, in the stages that log them."""
    return next((entry["tokens"] for entry in log if entry.get("far", {}).get("accuracy", 0.0) >= share), None)


def try_out(job: Job, settings: Settings, folder: Path, name: str, changes: dict) -> dict:
    """The rows of the evaluations, without their records."""
    dtype = "float32" if settings.device == "cpu" or not torch.cuda.is_available() else "bfloat16"
    arguments = Namespace(
        model=str(folder / "model"), device=settings.device, dtype=dtype, attn_implementation=None,
        config=list(changes.items()), trust_remote_code=False, output=folder / f"tests {name}".strip(),
        seeds=[job.seed], haystack=[settings.corpus / "validation.npy"], segment=SEGMENT, offload=False,
        no_retrieval=False, depths=0, base=None, base_length=0, chat="no", batch_tokens=0, most_read=None,
        questions_of_text=1, split="test", digits=0,
    )  # fmt: skip
    model, tokenizer = load(arguments)
    rows = {"retrieval": [], "text": []}
    trained_on = job.scale.lengths[2]
    for multiple in () if job.cell.text_only else job.scale.multiples or job.table.multiples:
        if multiple > MODELS[job.cell.model].longest:
            continue
        length, samples = multiple * trained_on, job.scale.samples[multiple]
        batch = {"lengths": [length], "samples": samples, "batch_size": max(1, min(samples, BATCH // length))}
        rows["retrieval"] += evaluate(Paper, Namespace(**vars(arguments) | batch, tasks=None), model, tokenizer)
    lengths = [n for n in job.scale.text_lengths if n <= trained_on * MODELS[job.cell.model].longest]
    batch = {
        "lengths": lengths,
        "samples": job.scale.windows,
        "batch_size": max(1, BATCH // max(lengths)),
        "last": LAST,
    }
    rows["text"] = evaluate(Perplexity, Namespace(**vars(arguments) | batch, tasks=["last"]), model, tokenizer)
    return rows


def evaluate(kind: type, arguments: Namespace, model, tokenizer) -> list[dict]:
    """The rows, which are all that is kept: whatever is in the folder for results is of an evaluation before."""
    shutil.rmtree(arguments.output, ignore_errors=True)
    kind.check(arguments)
    evaluation = kind(arguments, model, tokenizer)
    evaluation.run()
    return [{key: value for key, value in row.items() if key != "records"} for row in evaluation.results.rows]

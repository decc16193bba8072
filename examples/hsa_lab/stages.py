"""A run of training in stages, on one process or several, that can be stopped and resumed at any batch."""

import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import Accelerator

from .commands import find_device
from .results import provenance, write_json


class StagedRun:
    """
    What runs have in common: the accelerator, and `state`, where the run stands. What a stage does and what is saved
    is up to the kind of run.

    Args:
        arguments: `output`, `seed`, `device`, `mixed_precision`, `gradient_accumulation_steps` and `save_minutes`.
        recipe: with `stages`.
    """

    def __init__(self, arguments: Namespace, recipe: dict):
        self.arguments, self.folder, self.recipe = arguments, arguments.output, recipe
        device, precision = find_device(arguments.device), arguments.mixed_precision
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" else "no"
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        )
        self.state = {
            "seed": arguments.seed,
            "micro_batches": arguments.gradient_accumulation_steps * self.accelerator.num_processes,
            "stage": 0,
            "batch": 0,
            "tokens": 0,
            "seconds": 0.0,
        }
        self.interrupted, self.saved_at, self.saved = False, time.time(), 0

    def stage(self, number: int, deadline: float) -> bool:
        """Trains one stage, from the batch where it stands; False if time ran out."""
        raise NotImplementedError

    def save(self) -> None:
        """Writes the model and what it takes to go on."""
        raise NotImplementedError

    def find_checkpoint(self) -> Path | None:
        """
        The newest whole checkpoint of the run in the folder.

        Raises: ValueError if there is one and the run is not to go on with it.
        """
        whole = [file.parent for file in self.folder.glob("checkpoint-*/state.json")]
        found = max(whole, key=_number, default=None)
        if found and not self.arguments.resume:
            raise ValueError(f"`--output`: {self.folder} holds a run. Go on with `--resume`, or take another folder.")
        return found

    def load_checkpoint(self, checkpoint: Path) -> None:
        self.accelerator.load_state(str(checkpoint))
        self.saved = _number(checkpoint)

    def save_checkpoint(self) -> None:
        """
        All that it takes to go on, in a folder checkpoint-<number>. An older one goes when the new one is whole, which
        state.json says.
        """
        self.saved += 1
        new = self.folder / f"checkpoint-{self.saved}"
        self.accelerator.save_state(str(new))
        if self.accelerator.is_main_process:
            write_json(new / "state.json", self.state | provenance())
            for old in self.folder.glob("checkpoint-*"):
                if old != new:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def run_stages(self, seconds: float) -> bool:
        """Trains the stages that are left, for about so many seconds, and saves. Returns whether none is left."""
        deadline, stages = time.time() + seconds, self.recipe["stages"]
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            while self.state["stage"] < len(stages) and self.stage(self.state["stage"], deadline):
                self.state |= {"stage": self.state["stage"] + 1, "batch": 0}
        finally:
            signal.signal(signal.SIGINT, before)
        self.save()
        return self.state["stage"] == len(stages)

    def _interrupt(self, *_) -> None:
        """The first interrupt ends the run after its batch, the second at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def should_stop(self, deadline: float) -> bool:
        """Whether time is up or the interrupt key was pressed, on any of the processes."""
        stop = self.interrupted or time.time() > deadline
        if self.accelerator.num_processes > 1:
            stop = self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device)).item() > 0
        return stop

    def save_in_time(self) -> None:
        """Saves if `save_minutes` have passed, so that a run that is killed can go on. The main process decides."""
        due = time.time() - self.saved_at > 60 * self.arguments.save_minutes
        if self.accelerator.num_processes > 1:
            decided = torch.tensor(float(due and self.accelerator.is_main_process), device=self.accelerator.device)
            due = self.accelerator.reduce(decided).item() > 0
        if due:
            self.save()
            self.saved_at = time.time()

    def micro_batch_rows(self, stage: dict) -> int:
        """Rows of a micro-batch. Raises: ValueError where the batch of the recipe cannot be shared out evenly."""
        rows = max(1, stage["batch_tokens"] // stage["length"])
        if rows % self.state["micro_batches"]:
            raise ValueError(
                f"Stage {stage['name']!r} has batches of {rows} rows, which processes times "
                f"`--gradient_accumulation_steps`, {self.state['micro_batches']}, must divide."
            )
        return rows // self.state["micro_batches"]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])

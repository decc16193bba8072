"""A run of training in stages, on one process or several, that can be stopped and resumed at any batch."""

import signal
import time
from argparse import Namespace

import torch
from accelerate import Accelerator

from .commands import find_device


class StagedRun:
    """
    What runs have in common: the accelerator, and `state`, where the run stands. What a stage does and what is saved
    is up to the kind of run.

    Args:
        arguments: `output`, `seed`, `device`, `mixed_precision` and `gradient_accumulation_steps`.
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
        self.interrupted = False

    def stage(self, number: int, deadline: float) -> bool:
        """Trains one stage, from the batch where it stands; False if time ran out."""
        raise NotImplementedError

    def save(self) -> None:
        """Writes the model and what it takes to go on."""
        raise NotImplementedError

    def run_stages(self, seconds: float) -> bool:
        """Trains the stages that are left, for about so many seconds, and saves. Returns whether none is left."""
        deadline, stages = time.time() + seconds, self.recipe["stages"]
        before = signal.signal(signal.SIGINT, self._interrupt)
        while self.state["stage"] < len(stages) and self.stage(self.state["stage"], deadline):
            self.state |= {"stage": self.state["stage"] + 1, "batch": 0}
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

    def micro_batch_rows(self, stage: dict) -> int:
        """Rows of a micro-batch. Raises: ValueError where the batch of the recipe cannot be shared out evenly."""
        rows = max(1, stage["batch_tokens"] // stage["length"])
        if rows % self.state["micro_batches"]:
            raise ValueError(
                f"Stage {stage['name']!r} has batches of {rows} rows, which processes times "
                f"`--gradient_accumulation_steps`, {self.state['micro_batches']}, must divide."
            )
        return rows // self.state["micro_batches"]

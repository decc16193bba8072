"""A run of adaptation, on one process or several, that can be stopped and resumed at any batch."""

import itertools
import json
import shutil
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from modeling_hsa import HSAForCausalLM, convert_to_hsa

from ..chat_rows.mixture import Materials
from ..results import provenance, write_json
from ..stages import StagedRun
from .batches import FAMILIES, Batch, Batches
from .losses import terms
from .low_rank import add_low_rank, freeze_base, load_adapter, merged_weights, save_adapter
from .recipe import CHANGEABLE, rate_at, read_recipe
from .student import Outcome, Student, Teacher, compile_layers, make_optimizers


class Meters:
    """Sums on the device, read only when they are logged. `reduce`: makes the sum of a tensor over the processes."""

    def __init__(self, layers: int, device: torch.device, reduce=lambda x: x):
        self.reduce = reduce
        self.answers = torch.zeros(len(FAMILIES), 4, device=device)  # tokens right, tokens; answers right, answers
        self.tokens = torch.zeros(3, 2, device=device)  # sum and count: text, divergence on text, divergence in chats
        self.retrieval = torch.zeros(2, layers, device=device)  # recall, weight
        self.batches = 0

    @torch.no_grad()
    def add(self, batch: Batch, outcome: Outcome) -> None:
        turns = len(batch.families)
        label, right = batch.asked.label, outcome.asked.right.float()
        of_turns = torch.zeros(turns + 3, 2, device=right.device)
        of_turns.index_add_(0, label, torch.stack([right, torch.ones_like(right)], 1))
        of_turns = of_turns[:turns]
        whole = torch.stack([(of_turns[:, 0] == of_turns[:, 1]).float(), torch.ones_like(of_turns[:, 0])], 1)
        self.answers.index_add_(0, batch.families, torch.cat([of_turns, whole], 1))
        plain = batch.plain.label
        for place, (values, chosen) in enumerate(
            (
                (torch.cat([outcome.asked.entropy, outcome.plain.entropy]), torch.cat([label, plain]) == turns),
                (outcome.plain.divergence, plain == turns),
                (outcome.plain.divergence, plain == turns + 1),
            )
        ):
            self.tokens[place] += torch.stack([(values * chosen).sum(), chosen.sum()])
        self.retrieval += torch.stack([outcome.retrieval.recall, outcome.retrieval.weight])
        self.batches += 1

    def read(self) -> dict:
        """The means since the last time."""
        answers, tokens = self.reduce(self.answers).tolist(), self.reduce(self.tokens).tolist()
        batches = self.reduce(torch.tensor(float(self.batches), device=self.tokens.device)).item()
        retrieval = (self.reduce(self.retrieval) / max(batches, 1)).tolist()
        names = ("text_loss", "distill_text", "distill_chat")
        found = {name: total / count for name, (total, count) in zip(names, tokens) if count}
        for family, (right, of, whole, turns) in zip(FAMILIES, answers):
            if turns:
                found[family] = {"tokens": round(right / of, 4), "answers": round(whole / turns, 4)}
        total = [sum(column) for column in zip(*answers)]
        if total[3]:
            found["all"] = {"tokens": round(total[0] / total[1], 4), "answers": round(total[2] / total[3], 4)}
        found |= {"recall": retrieval[0], "weight": retrieval[1]}
        for sums in (self.answers, self.tokens, self.retrieval):
            sums.zero_()
        self.batches = 0
        return found


class Run(StagedRun):
    """A run of adaptation: the model, its teacher, its optimizers, and where it stands."""

    def __init__(self, arguments: Namespace):
        super().__init__(arguments, read_recipe(arguments.recipe))
        self.dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        checkpoint = self.find_checkpoint()
        if checkpoint:
            self._read_state(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.base)
        self.materials = Materials.load(
            self.tokenizer, arguments.streams, "train", arguments.qa, arguments.babi, arguments.chats
        )
        self.tokens = sum(self._batches_of(stage) * self._batch_tokens(stage) for stage in self.recipe["stages"])
        self._make()
        if checkpoint:
            self.load_checkpoint(checkpoint)
        elif self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "log.jsonl").unlink(missing_ok=True)
            write_json(self.folder / "recipe.json", self.recipe)

    def _read_state(self, checkpoint: Path) -> None:
        """Raises: ValueError where what decides the course of the run is another than it began with."""
        there = json.loads((checkpoint / "state.json").read_text())
        for name in ("seed", "micro_batches"):
            if there[name] != self.state[name]:
                raise ValueError(
                    f"The run in {self.folder} has `{name}` {there[name]}, not {self.state[name]}. Resume it as it "
                    "began, or take another --output."
                )
        if json.loads((self.folder / "recipe.json").read_text()) != self.recipe:
            raise ValueError(f"{self.arguments.recipe} is not the recipe that the run in {self.folder} began with.")
        self.state = {name: there[name] for name in self.state}

    def _make(self) -> None:
        """The model, which is in fp32 and computed in mixed precision, its teacher and its optimizers."""
        arguments, recipe, device = self.arguments, self.recipe, self.accelerator.device
        base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
        set_seed(arguments.seed)  # of what is new and has nothing to be copied from
        self.model: HSAForCausalLM = convert_to_hsa(base, **recipe["model"]).to(device).train()
        self.changeable = {field: getattr(self.model.config, field) for field in CHANGEABLE}
        if recipe["train"]["base"] != "all":
            freeze_base(self.model)
        if recipe["train"]["base"] == "lora":
            add_low_rank(self.model, recipe["train"]["rank"], recipe["train"]["alpha"])
        if arguments.adapter:
            if recipe["train"]["base"] != "lora":
                raise ValueError(f"`--adapter` needs a recipe whose `train.base` is 'lora': {arguments.recipe}.")
            load_adapter(self.model, arguments.adapter)
        self.teacher = None
        if recipe["losses"]["distill_text"] or recipe["losses"]["distill_chat"]:
            self.teacher = Teacher(base.to(device, self.dtype))
        fast_terms = terms
        if arguments.compile:
            fast_terms = compile_layers(self.model, self.teacher and self.teacher.base)
        student = Student(self.model, recipe["losses"]["retrieval"], arguments.logits_at_once, fast_terms)
        optimizers = make_optimizers(self.model, recipe["optimizer"])
        self.student, *self.optimizers = self.accelerator.prepare(student, *optimizers)

    def _batch_tokens(self, stage: dict) -> int:
        """Tokens of a batch, of all processes."""
        return self.micro_batch_rows(stage) * self.state["micro_batches"] * stage["length"]

    def _batches_of(self, stage: dict) -> int:
        return max(1, round(stage["tokens"] * self.arguments.scale / self._batch_tokens(stage)))

    # -- training --

    def batches(self, number: int) -> tuple[Batches, DataLoader]:
        """The micro-batches of this process in the rest of a stage, of which batch i has `micro_batches`."""
        micro, processes, stage = self.state["micro_batches"], self.accelerator.num_processes, self._stage(number)
        rows = self.micro_batch_rows(stage)
        data = Batches(
            self.materials, self.recipe, number, rows, self.arguments.seed, self.model.config.chunk_size,
            self.arguments.logits_at_once,
        )  # fmt: skip
        order = range(
            self.state["batch"] * micro + self.accelerator.process_index, self._batches_of(stage) * micro, processes
        )
        workers = self.arguments.workers
        options = {"prefetch_factor": 8, "multiprocessing_context": "fork"} if workers else {}
        pin = self.accelerator.device.type == "cuda"
        loader = DataLoader(data, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin, **options)
        return data, loader

    def _stage(self, number: int) -> dict:
        return self.recipe["stages"][number]

    def configure(self, number: int) -> None:
        """Gives the model the configuration of a stage: that of the recipe, but for what the stage changes."""
        for field, value in self.changeable.items():
            setattr(self.model.config, field, self._stage(number).get(field, value))

    def step(self, batches: list[Batch], taught: int, meters: Meters) -> None:
        for batch in batches:
            teacher, head = None, None
            if self.teacher is not None and taught:
                teacher, head = self.teacher(batch, taught), self.teacher.head
            with self.accelerator.accumulate(self.student):
                outcome = self.student(batch, teacher, head)
                self.accelerator.backward(outcome.loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained, 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            meters.add(batch, outcome)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def stage(self, number: int, deadline: float) -> bool:
        stage, state, device = self._stage(number), self.state, self.accelerator.device
        self.configure(number)
        meters = Meters(sum(self.model.config.hsa_layers), device, partial(self.accelerator.reduce, reduction="sum"))
        data, loader = self.batches(number)
        loader, per_batch = iter(loader), self._batch_tokens(stage)
        bar = tqdm(
            range(state["batch"], self._batches_of(stage)), desc=stage["name"], initial=state["batch"],
            total=self._batches_of(stage), mininterval=10, disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        clock, since = time.time(), 0
        for _ in bar:
            made = itertools.islice(loader, self.arguments.gradient_accumulation_steps)
            batches = [batch.to(device) for batch in made]
            factor = rate_at(self.recipe["optimizer"], (state["tokens"] + per_batch / 2) / self.tokens)
            for group in itertools.chain(*(optimizer.param_groups for optimizer in self.optimizers)):
                group["lr"] = group["peak"] * factor
            self.step(batches, data.taught, meters)
            state["batch"] += 1
            state["tokens"] += per_batch
            since += per_batch
            stop = self.should_stop(deadline)
            if state["batch"] % self.arguments.log_every == 0 or stop or state["batch"] == self._batches_of(stage):
                entry = self.log(stage, meters, factor, clock, since)
                bar.set_postfix_str(f"{entry.get('all', {}).get('answers', 0):.2f} {entry['tokens_per_second']:,}/s")
                state["seconds"] += time.time() - clock
                clock, since = time.time(), 0
                if not stop:
                    self.save_in_time()
            if stop:
                return False
        return True

    def log(self, stage: dict, meters: Meters, factor: float, clock: float, since: int) -> dict:
        found = meters.read()  # waits for the device, so that the time is that of what was done
        entry = {
            "stage": stage["name"], "batch": self.state["batch"], "tokens": self.state["tokens"],
            "learning_rate": factor, "tokens_per_second": round(since / (time.time() - clock)),
        } | found  # fmt: skip
        if self.accelerator.device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if self.accelerator.is_main_process:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        return entry

    def run(self) -> None:
        count = sum(parameter.numel() for parameter in self.trained)
        self.accelerator.print(
            f"{self.model.num_parameters() / 1e6:.1f}M parameters, {count / 1e6:.1f}M of them trained, on "
            f"{self.tokens / 1e6:.1f}M tokens; {provenance()}",
            flush=True,
        )
        done = "done" if self.run_stages(self.arguments.max_seconds) else "stopped: go on with --resume"
        self.accelerator.print(f"{self.state['tokens'] / 1e6:.1f}M tokens, {self.state['seconds']:.0f} s: {done}")
        self.accelerator.end_training()

    # -- saving --

    def save(self) -> None:
        """A checkpoint, the merged model and, with low-rank changes, the adapter."""
        if self.accelerator.is_main_process:
            self.export()
        self.configure(min(self.state["stage"], len(self.recipe["stages"]) - 1))
        self.save_checkpoint()

    def export(self) -> None:
        final, dtype = self.folder / "model", self.dtype
        shutil.rmtree(final, ignore_errors=True)
        self.configure(-1)
        merged = AutoModelForCausalLM.from_config(self.model.config, dtype=dtype)
        merged.load_state_dict(merged_weights(self.model, dtype))
        merged.generation_config = self.model.generation_config
        merged.save_pretrained(final)
        self.tokenizer.save_pretrained(final)
        if self.recipe["train"]["base"] == "lora":
            save_adapter(self.model, self.folder / "adapter", str(self.arguments.base), dtype)

"""A run of pretraining, on one process or several, that can be stopped and resumed at any batch."""

import itertools
import json
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import modeling_hsa  # noqa: F401  # registers HSA models with the Auto classes

from ..plots import draw_pretraining
from ..results import provenance
from ..stages import StagedRun
from ..tasks.retrieval import RetrievalTasks
from .batches import Batches
from .objective import Meters, measure_retrieval, retrieval_loss, token_losses, token_weights
from .recipe import make_config, read_recipe


# Fields of a configuration that stages or saving change.
NOT_OF_THE_RECIPE = {"_name_or_path", "chunk_topk", "architectures", "auto_map", "dtype", "transformers_version"}


def make_optimizers(model, settings: dict) -> list[torch.optim.Optimizer]:
    """`muon`: Muon for the matrices of the layers, AdamW for embeddings, norms and the CLS token. `adamw`: for all."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    embeddings.add(id(model.get_output_embeddings().weight))
    matrices, others = [], []
    for parameter in model.parameters():
        is_matrix = parameter.dim() == 2 and id(parameter) not in embeddings
        (matrices if is_matrix else others).append(parameter)
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    groups = [{"params": others, "weight_decay": 0.0}]
    if settings["name"] == "adamw":
        return [torch.optim.AdamW([*groups, {"params": matrices, "weight_decay": decay}], lr=rate, betas=(0.9, 0.95))]
    if settings["name"] != "muon":
        raise ValueError(f"`optimizer.name` must be 'muon' or 'adamw', got {settings['name']!r}.")
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))]


def learning_rate(recipe: dict, stage: dict, tokens: int, stage_tokens: int) -> float:
    """Linear warm-up, then constant; in a stage with `final_learning_rate`, linear to that share of it."""
    settings = recipe["optimizer"]
    rate = settings["learning_rate"] * min(1.0, (tokens + 1) / max(settings["warmup_tokens"], 1))
    done = min(1.0, stage_tokens / stage["most_tokens"])
    return rate * (1 - done * (1 - stage.get("final_learning_rate", 1.0)))


class Step:
    """
    One step of the optimizers on a batch of the recipe, that comes in micro-batches: so many on this process, as many
    on each other. The losses of tokens are weighed as in one batch. Those of retrieval are as in one batch over the
    processes, and the mean of micro-batches that follow each other.

    Args:
        accelerator: whose `gradient_accumulation_steps` are the micro-batches of this process.
        model: prepared by it, and maybe compiled.
        optimizers: prepared by it.
    """

    def __init__(self, accelerator: Accelerator, model, optimizers, answer_weight: float, chunk_size: int | None):
        self.accelerator, self.model, self.optimizers = accelerator, model, optimizers
        self.answer_weight, self.chunk_size = answer_weight, chunk_size
        self.mean = partial(accelerator.reduce, reduction="mean")

    def __call__(self, batches: list[tuple[torch.Tensor, ...]], retrieval_weight: float, meters: Meters) -> None:
        counted = sum(token_weights(answers, self.answer_weight).sum() for _, _, answers, _ in batches)
        counted = self.mean(counted) / len(batches)  # of a micro-batch: what follows is averaged over all of them
        # Models without HSA layers do not take it.
        options = {"output_retrieval": True} if retrieval_weight > 0 else {}
        for input_ids, task, answers, source in batches:
            with self.accelerator.accumulate(self.model):
                outputs = self.model(input_ids, use_cache=False, **options)
                losses, weights = token_losses(outputs.logits, input_ids, answers, self.answer_weight)
                loss = (losses * weights).sum() / counted
                if retrieval_weight > 0:
                    wanted = retrieval_loss(outputs.retrieval, source, self.chunk_size, self.mean)
                    loss = loss + retrieval_weight * wanted
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            predicted = outputs.logits[:, :-1].argmax(-1)
            meters.add(task, predicted, input_ids[:, 1:], answers[:, 1:], losses.detach())


class Run(StagedRun):
    """A run of pretraining: the model, its optimizers, and where it stands."""

    def __init__(self, arguments: Namespace):
        recipe = read_recipe(arguments.recipe)
        if not (arguments.corpus / "train.npy").exists():
            raise ValueError(f"`--corpus`: {arguments.corpus} has no train.npy. Make it with prepare.py.")
        super().__init__(arguments, recipe)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.corpus)
        self.tasks = RetrievalTasks(self.tokenizer)
        config = make_config(self.recipe["model"], self.tokenizer)
        self.has_retrieval = any(getattr(config, "hsa_layers", ()))
        checkpoint = self.find_checkpoint()
        if checkpoint:
            config = self._resume(config, checkpoint)
        self._make(config)
        if checkpoint:
            self.load_checkpoint(checkpoint)
        elif self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "log.jsonl").unlink(missing_ok=True)

    def _make(self, config: PreTrainedConfig) -> None:
        """The model and its optimizers. Weights are fp32; mixed precision computes in bf16."""
        arguments = self.arguments
        torch.manual_seed(arguments.seed)
        attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).train()
        optimizers = make_optimizers(self.model, self.recipe["optimizer"])
        trained, *self.optimizers = self.accelerator.prepare(self.model, *optimizers)
        if arguments.compile:
            trained = torch.compile(trained, dynamic=False)
        weight = self.recipe["optimizer"]["answer_weight"]
        self.step = Step(self.accelerator, trained, self.optimizers, weight, getattr(config, "chunk_size", None))

    def _resume(self, config: PreTrainedConfig, checkpoint: Path) -> PreTrainedConfig:
        """
        Takes over the state of the run in `--output`, whose configuration it returns. Raises: ValueError where what
        decides its course, the model of the recipe, the seed or the number of micro-batches, is another here.
        """
        there, saved = json.loads((checkpoint / "state.json").read_text()), AutoConfig.from_pretrained(self.folder)
        fixed = ("seed", "micro_batches")
        before = {name: there[name] for name in fixed} | saved.to_dict()
        here = {name: self.state[name] for name in fixed} | config.to_dict()
        for name in ("model_type", *sorted(here.keys() & before.keys() - NOT_OF_THE_RECIPE)):
            if here[name] != before[name]:
                raise ValueError(
                    f"{self.arguments.recipe}: the run has `{name}` {here[name]}, but that in {self.folder} has "
                    f"{before[name]}. Resume as it began, or take another --output."
                )
        self.state |= there
        return saved

    def save(self) -> None:
        """The model as Transformers saves it, the tokenizer and a checkpoint."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(self.folder, max_shard_size=self.arguments.max_shard_size)
            self.tokenizer.save_pretrained(self.folder)
            log = self.folder / "log.jsonl"
            if log.exists():
                draw_pretraining(
                    [json.loads(line) for line in log.read_text().splitlines()], log.with_name("training.png")
                )
        self.save_checkpoint()

    def log(self, stage: dict, meters: Meters, batch: tuple[torch.Tensor, ...], seconds: float, tokens: int) -> dict:
        entry = {"stage": stage["name"], "tokens": self.state["tokens"], "tokens_per_s": tokens / seconds}
        entry |= meters.read()
        if self.accelerator.is_main_process:
            if self.has_retrieval:
                entry |= measure_retrieval(self.model, batch, self.accelerator.autocast())
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        return entry

    def batches(self, number: int, rows: int, total: int) -> DataLoader:
        """The micro-batches of this process in the rest of a stage, of which batch i has `micro_batches`."""
        micro, processes = self.state["micro_batches"], self.accelerator.num_processes
        first = self.state["batch"] * micro + self.accelerator.process_index
        stage = self.recipe["stages"][number]
        data = Batches(self.arguments.corpus, self.tasks, stage, (self.arguments.seed, number), rows)
        order = range(first, total * micro, processes)
        pin = self.accelerator.device.type == "cuda"
        return DataLoader(data, batch_size=None, sampler=order, num_workers=self.arguments.workers, pin_memory=pin)

    def stage(self, number: int, deadline: float) -> bool:
        stage, state = self.recipe["stages"][number], self.state
        if self.has_retrieval:
            self.model.config.chunk_topk = stage.get("chunk_topk", self.recipe["model"].get("chunk_topk", 8))
        retrieval_weight = stage.get("retrieval_weight", 0.0) if self.has_retrieval else 0.0
        names = [task["name"] for task in stage["mixture"]]
        meters = self.meters(names, state.pop("meters", None))
        rows = self.micro_batch_rows(stage)
        per_batch = rows * state["micro_batches"] * stage["length"]
        total = -(-stage["most_tokens"] // per_batch)
        loader = iter(self.batches(number, rows, total))
        bar = tqdm(
            range(state["batch"], total), desc=stage["name"], initial=state["batch"], total=total, mininterval=10,
            disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        clock, since = time.time(), 0
        for _ in bar:
            made = itertools.islice(loader, self.arguments.gradient_accumulation_steps)
            batches = [[x.to(self.accelerator.device, non_blocking=True) for x in batch] for batch in made]
            rate = learning_rate(self.recipe, stage, state["tokens"], state["batch"] * per_batch)
            for group in itertools.chain(*(optimizer.param_groups for optimizer in self.optimizers)):
                group["lr"] = rate
            self.step(batches, retrieval_weight, meters)
            state["batch"] += 1
            state["tokens"] += per_batch
            since += per_batch
            if state["batch"] % self.arguments.log_every == 0:
                entry = self.log(stage, meters, batches[-1], time.time() - clock, since)
                state["seconds"] += time.time() - clock
                clock, since = time.time(), 0
                accuracies = [entry[name]["accuracy"] for name in names if name in entry]
                bar.set_postfix_str(" ".join(f"{x:.2f}" for x in (entry["text_loss"], *accuracies)))
                if is_mastered(stage, entry):
                    break
                self.save_in_time()
            if self.should_stop(deadline):
                state["seconds"] += time.time() - clock
                state["meters"] = meters.state()
                return False
        return True

    def meters(self, names: list[str], state: list | None) -> Meters:
        """What was summed before is kept by one process, as the sums are added up."""
        state = state if self.accelerator.is_main_process else None
        return Meters(names, self.accelerator.device, state, partial(self.accelerator.reduce, reduction="sum"))

    def run(self) -> None:
        self.accelerator.print(f"{self.model.num_parameters() / 1e6:.2f}M parameters; {provenance()}", flush=True)
        done = "done" if self.run_stages(60 * self.arguments.minutes) else "stopped: go on with --resume"
        self.accelerator.print(
            f"{self.state['tokens'] / 1e6:.1f}M tokens, {done}. Model, log and checkpoint are in {self.folder}."
        )
        self.accelerator.end_training()  # or a process that ends while another still talks to it can abort


def is_mastered(stage: dict, entry: dict) -> bool:
    """Whether every task but text has the accuracy that ends a stage."""
    names = [task["name"] for task in stage["mixture"] if task["task"] != "text"]
    return "accuracy" in stage and all(entry.get(name, {}).get("accuracy", 0.0) >= stage["accuracy"] for name in names)

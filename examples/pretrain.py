"""
Pretrain a small HSA model to retrieve: text with questions about earlier text mixed in, in stages that grow. Or
another model, to compare with.

    python examples/prepare_corpus.py --train_files books/train-*.jsonl.gz --vocab_size 4096 --output_dir out/corpus
    python examples/pretrain.py --recipe examples/recipes/books.json --corpus out/corpus --output out/books
    python examples/pretrain.py --recipe examples/recipes/books.json --corpus out/corpus --output out/books --resume

A recipe (JSON) names the model, the optimizer and the stages; with "like", it has the fields of that other recipe (a
path relative to its own) except those it has itself. The model's fields are those of its configuration: of HSA, or of
the "model_type" among them. A stage has a length, a mixture of tasks, and ends when its tasks are mastered or its
tokens are used up; its `chunk_topk` and `retrieval_weight` are for HSA models and others ignore them, so that the same
stages serve all. A task is "text" or of retrieval_tasks.py, and may have `options`. Batch i of a stage is made from
the seed, the stage and i alone, so a run that was stopped (`--minutes`, or the interrupt key) goes on as if it had not
been. `--output` then holds the model, its tokenizer, the optimizer, all in files of at most 16 MB, log.jsonl and
training.png. Of every HSA layer the log has the `recall` of the chunks that answers are copied from, and their mean
`weight` among the retrieved.
"""

import argparse
import itertools
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from measuring import hardware
from retrieval_tasks import FACT_KINDS, KINDS, RetrievalTasks, excerpt
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import modeling_hsa  # noqa: F401  # registers HSA models with the Auto classes


SHARD = "16MB"
SECTIONS = {
    "recipe": {"model", "optimizer", "stages"},
    "optimizer": {"name", "learning_rate", "weight_decay", "warmup_tokens", "answer_weight"},
    "stage": {"name", "length", "batch_tokens", "mixture", "most_tokens"},
    "task": {"name", "task", "share"},
}
# Fields of a configuration that stages or saving change.
NOT_OF_THE_RECIPE = {"_name_or_path", "chunk_topk", "architectures", "auto_map", "dtype", "transformers_version"}
OPTIONAL = {
    "stage": {"accuracy", "chunk_topk", "final_learning_rate", "retrieval_weight"},
    "task": {"options"},
}


def read_recipe(file: Path) -> dict:
    """Raises: ValueError for a field that is unknown or missing."""
    recipe = json.loads(file.read_text())
    if "like" in recipe:
        recipe = read_recipe(file.parent / recipe.pop("like")) | recipe
    stages = recipe.get("stages", [])
    sections = [("recipe", recipe), ("optimizer", recipe.get("optimizer", {}))]
    sections += [("stage", stage) for stage in stages]
    sections += [("task", task) for stage in stages for task in stage.get("mixture", [])]
    for name, fields in sections:
        unknown = fields.keys() - SECTIONS[name] - OPTIONAL.get(name, set())
        missing = SECTIONS[name] - fields.keys()
        if unknown or missing:
            problems = {"lacks": sorted(missing), "does not take": sorted(unknown)}
            text = " and ".join(f"{verb} {names}" for verb, names in problems.items() if names)
            label = f"{name} {fields['name']!r}" if "name" in fields else name
            raise ValueError(f"{file}: the {label} {text}.")
    if recipe["model"].get("chunk_weighting") == "joint" and any(stage.get("retrieval_weight") for stage in stages):
        raise ValueError(
            f"{file}: with `chunk_weighting` 'joint' chunks have no weight: no `retrieval_weight` either."
        )
    return recipe


def make_config(fields: dict, tokenizer) -> PreTrainedConfig:
    """
    The configuration of a recipe's "model", with the vocabulary and the special tokens of the tokenizer.

    Raises: ValueError for a field that such a model does not have.
    """
    fields = {"model_type": "hsa"} | fields
    if unknown := fields.keys() - AutoConfig.for_model(fields["model_type"]).to_dict():
        raise ValueError(f"A model of type {fields['model_type']!r} does not take {sorted(unknown)}.")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(**fields, **special, vocab_size=len(tokenizer))


# -- data -------------------------------------------------------------------------------------------------------------


class Batches(Dataset):
    """
    Batch i of a stage: input_ids int64 [B, L]; task int64 [B], which of the mixture a row is; answers bool [B, L], the
    tokens of answers; source int64 [B, L], the earlier position that such a token is copied from, -1 for others.
    """

    def __init__(self, corpus: Path, tasks: RetrievalTasks, stage: dict, seed: tuple[int, ...]):
        self.file, self.tasks, self.stage, self.seed = corpus / "train.npy", tasks, stage, seed
        self.tokens = None
        dense = [task.get("options", {}) for task in stage["mixture"] if task["task"] == "dense"]
        if any(FACT_KINDS.keys() & options.get("kinds", KINDS) for options in dense):
            _ = tasks.facts  # made here, once, and not by every worker

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        if self.tokens is None:  # every worker maps the file for itself
            self.tokens = np.load(self.file, mmap_mode="r")
        rng = np.random.default_rng((*self.seed, i))
        mixture = self.stage["mixture"]
        shares = np.array([task["share"] for task in mixture], dtype=float)
        rows = max(1, self.stage["batch_tokens"] // self.stage["length"])
        chosen = rng.choice(len(mixture), size=rows, p=shares / shares.sum())
        made = [self._row(mixture[task], rng) for task in chosen]
        ids, answers, source = (torch.from_numpy(np.stack(x)) for x in zip(*made))
        return ids, torch.from_numpy(chosen), answers, source

    def _row(self, task: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length, options = self.stage["length"], task.get("options", {})
        source = np.full(length, -1)
        if task["task"] == "text":
            return excerpt(self.tokens, length, rng, np.int64, **options), source >= 0, source
        sample = self.tasks.make(task["task"], rng, self.tokens, length, **options)
        for (start, end), answer in zip(sample.values.tolist(), sample.asked.tolist()):
            if answer >= 0:
                _mark_copy(sample.tokens, (start, end), sample.answers[answer].tolist(), source)
        return sample.tokens.astype(np.int64), sample.answer_mask, np.where(sample.answer_mask, source, -1)


def _mark_copy(tokens: np.ndarray, value: tuple[int, int], answer: tuple[int, int], source: np.ndarray) -> None:
    """Where the tokens of `value` stand in the answer, writes where each is copied from."""
    size = value[1] - value[0]
    for at in range(answer[0], answer[1] - size + 1):
        if (tokens[at : at + size] == tokens[value[0] : value[1]]).all() and (source[at : at + size] < 0).all():
            source[at : at + size] = np.arange(*value)
            return


# -- training ---------------------------------------------------------------------------------------------------------


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


class Meters:
    """Sums on the device, read only when they are logged. `state`: what `state()` of an earlier run gave."""

    def __init__(self, tasks: list[str], device, state: list | None = None):
        self.tasks = tasks
        sums, losses = state or ([[0.0] * 4] * len(tasks), [0.0] * 2)
        self.sums = torch.tensor(sums, device=device, dtype=torch.float64)
        self.losses = torch.tensor(losses, device=device, dtype=torch.float64)

    def state(self) -> list:
        return [self.sums.tolist(), self.losses.tolist()]

    @torch.no_grad()
    def add(self, task, predicted, targets, answers, per_token) -> None:
        right = predicted == targets
        row = torch.stack(
            [(right & answers).sum(1), answers.sum(1), (right | ~answers).all(1) & answers.any(1), answers.any(1)], 1
        )
        self.sums.index_add_(0, task, row.double())
        self.losses += torch.stack([(per_token * ~answers).sum(), (~answers).sum()]).double()

    def read(self) -> dict:
        """
        Loss of all tokens but answers, needles among them; for each task the accuracy by answer token and by row (all
        of its answers).
        """
        loss, count = self.losses.tolist()
        result = {"text_loss": loss / max(count, 1)}
        for name, (right, tokens, rows_right, rows) in zip(self.tasks, self.sums.tolist()):
            if tokens:
                result[name] = {"accuracy": right / tokens, "row_accuracy": rows_right / rows}
        self.sums.zero_(), self.losses.zero_()
        return result


def train_step(
    model, optimizers, batch, answer_weight: float, retrieval_weight: float, meters: Meters, autocast
) -> None:
    input_ids, task, answers, source = batch
    options = {"output_retrieval": True} if retrieval_weight > 0 else {}  # models without HSA layers do not take it
    with autocast:
        outputs = model(input_ids, use_cache=False, **options)
    logits, targets, answers = outputs.logits[:, :-1], input_ids[:, 1:], answers[:, 1:]
    per_token = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).view_as(targets)
    weights = torch.where(answers, answer_weight, 1.0)
    loss = (per_token * weights).sum() / weights.sum()
    if retrieval_weight > 0:
        loss = loss + retrieval_weight * retrieval_loss(outputs.retrieval, source, model.config.chunk_size)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    meters.add(task, logits.argmax(-1), targets, answers, per_token.detach())


def wanted_chunks(source: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """
    int64 [B, L]: for the token before each answer token, which predicts it, the chunk that `source` [B, L] (as of
    `Batches`) is in; -1 for others, and where that chunk is not complete then, so that nothing could retrieve it.
    """
    chunk = torch.where(source >= 0, source // chunk_size, -1).roll(-1, dims=1)
    position = torch.arange(source.shape[1], device=source.device)
    visible = ((chunk + 1) * chunk_size <= position) & (position < source.shape[1] - 1)
    return torch.where(visible, chunk, -1)


def found_weights(layer, chunk: torch.Tensor) -> torch.Tensor:
    """fp32 [B, L, retrieval heads]: how much `chunk` [B, L] counts among what was retrieved, 0 if it is not."""
    return torch.where(layer.indices == chunk[..., None, None], layer.weights, 0.0).sum(-1)


def retrieval_loss(retrieval, source: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """
    Mean over HSA layers of the mean, over retrieval heads and answer tokens whose chunk was retrieved, of -log of the
    weight of the chunk that the token is copied from. A chunk that was not retrieved is left out; a layer without any
    counts as 0.
    """
    chunk = wanted_chunks(source, chunk_size)
    losses = []
    for layer in retrieval:
        weight = found_weights(layer, chunk)
        found = (weight > 0) & (chunk[..., None] >= 0)
        losses.append(-(weight.clamp(min=1e-20).log() * found).sum() / found.sum().clamp(min=1))
    return torch.stack(losses).mean()


@torch.no_grad()
def measure_retrieval(model, batch, autocast) -> dict[str, list[float]]:
    """
    For every HSA layer, of the chunks that give answer tokens away: "recall", how often such a chunk is among those
    retrieved by any head, and "weight", how much it counts among them, 0 where it is not (the mean of the heads). No
    "weight" with `chunk_weighting="joint"`, which has none; neither where the batch has no such chunk.
    """
    input_ids, _, _, source = (x[:16] for x in batch)
    with autocast:
        retrieval = model(input_ids, use_cache=False, output_retrieval=True, logits_to_keep=1).retrieval
    chunk = wanted_chunks(source, model.config.chunk_size)
    wanted = chunk >= 0
    if not wanted.any():
        return {}
    found = [(layer.indices == chunk[..., None, None]).flatten(2).any(-1) for layer in retrieval]
    measures = {"recall": [x[wanted].double().mean().item() for x in found]}
    if model.config.chunk_weighting != "joint":
        measures["weight"] = [found_weights(layer, chunk)[wanted].mean().item() for layer in retrieval]
    return measures


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save(folder: Path, model, tokenizer, optimizers, state: dict) -> None:
    """
    The model as Transformers saves it, optimizer-*.safetensors, in files of at most 16 MB, and state.json. They take
    the places of older ones when all are written.
    """
    new = folder / "saving"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new, max_shard_size=SHARD)
    tokenizer.save_pretrained(new)
    tensors = {
        f"{number}.{index}.{name}": x if x.dim() else x[None]
        for number, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, x in values.items()
    }
    save_torch_state_dict(tensors, new, filename_pattern="optimizer{suffix}.safetensors", max_shard_size=SHARD)
    (new / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for file in new.iterdir():
        file.replace(folder / file.name)
    new.rmdir()


def load_optimizers(folder: Path, optimizers) -> None:
    states = [{} for _ in optimizers]
    for file in folder.glob("optimizer*.safetensors"):
        for key, x in load_file(file).items():
            number, index, name = key.split(".", 2)
            states[int(number)].setdefault(int(index), {})[name] = x[0] if name == "step" else x
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def plot(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    panels = ["loss of all tokens but answers", "accuracy by answer token"]
    if any("recall" in entry for entry in entries):  # not of models without HSA layers
        panels.append("chunk an answer is copied from")
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4))
    names = sorted({name for entry in entries for name, value in entry.items() if isinstance(value, dict)})
    x = [entry["tokens"] / 1e6 for entry in entries]
    axes[0].plot(x, [entry["text_loss"] for entry in entries])
    for name in names:
        kept = [(at, entry[name]["accuracy"]) for at, entry in zip(x, entries) if name in entry]
        axes[1].plot(*zip(*kept), label=name)
    for name, style in (("weight", "-"), ("recall", "--")):
        kept = [(at, entry[name]) for at, entry in zip(x, entries) if name in entry]
        for layer, values in enumerate(zip(*(values for _, values in kept))):
            label = f"{name}, HSA layer {layer}"
            axes[2].plot([at for at, _ in kept], values, style, color=f"C{layer}", label=label)
    for axis, title in zip(axes, panels):
        axis.set(title=title, xlabel="million tokens")
        for _, group in itertools.groupby(zip(x, entries), key=lambda pair: pair[1]["stage"]):
            axis.axvline(next(group)[0], color="0.85", zorder=0)
    for axis in axes[1:]:
        axis.set_ylim(0, 1.02)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "training.png", dpi=110)
    plt.close(figure)


# -- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """A training run: the model, its optimizer, and where it stands."""

    def __init__(self, arguments):
        self.arguments, self.folder = arguments, arguments.output
        self.recipe = read_recipe(arguments.recipe)
        if not (arguments.corpus / "train.npy").exists():
            raise ValueError(f"`--corpus`: {arguments.corpus} has no train.npy. Make it with prepare_corpus.py.")
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.corpus)
        self.tasks = RetrievalTasks(self.tokenizer)
        self.device = torch.device(arguments.device)
        self.state = {"seed": arguments.seed, "stage": 0, "batch": 0, "tokens": 0, "seconds": 0.0}
        self.interrupted = False
        torch.manual_seed(arguments.seed)
        config = make_config(self.recipe["model"], self.tokenizer)
        self.has_retrieval = config.model_type == "hsa"
        resumed = (self.folder / "state.json").exists()
        if resumed and not arguments.resume:
            raise ValueError(f"`--output`: {self.folder} holds a run. Go on with `--resume`, or take another folder.")
        attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
        if resumed:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **attention)
            self.state |= json.loads((self.folder / "state.json").read_text())
            self._check_same_run(config)
        else:
            self.model = AutoModelForCausalLM.from_config(config, **attention)
        self.model.to(self.device).train()
        self.trained = torch.compile(self.model, dynamic=False) if arguments.compile else self.model
        self.optimizers = make_optimizers(self.model, self.recipe["optimizer"])
        if resumed:
            load_optimizers(self.folder, self.optimizers)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            (self.folder / "log.jsonl").unlink(missing_ok=True)

    def _check_same_run(self, config: PreTrainedConfig) -> None:
        """Raises: ValueError where the model of the recipe or the seed is not that in `--output`."""
        here = {"seed": self.arguments.seed} | config.to_dict()
        there = {"seed": self.state["seed"]} | self.model.config.to_dict()
        for name in ("model_type", *sorted(here.keys() & there.keys() - NOT_OF_THE_RECIPE)):
            if here[name] != there[name]:
                raise ValueError(
                    f"{self.arguments.recipe}: the run has `{name}` {here[name]}, but that in {self.folder} has "
                    f"{there[name]}. Resume as it began, or take another --output."
                )

    def _interrupt(self, *_) -> None:
        """The first interrupt ends the run after its batch, the second at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def save(self) -> None:
        save(self.folder, self.model, self.tokenizer, self.optimizers, self.state)
        if (self.folder / "log.jsonl").exists():
            plot(self.folder)

    def log(self, stage: dict, meters: Meters, batch, seconds: float, tokens: int) -> dict:
        entry = {"stage": stage["name"], "tokens": self.state["tokens"], "tokens_per_s": tokens / seconds}
        entry |= meters.read()
        if self.has_retrieval:
            entry |= measure_retrieval(self.model, batch, self.autocast)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        return entry

    def stage(self, number: int, deadline: float) -> bool:
        """Trains one stage, from the batch where it stands; False if time ran out."""
        stage, state = self.recipe["stages"][number], self.state
        if self.has_retrieval:
            self.model.config.chunk_topk = stage.get("chunk_topk", self.recipe["model"].get("chunk_topk", 8))
        retrieval_weight = stage.get("retrieval_weight", 0.0) if self.has_retrieval else 0.0
        names = [task["name"] for task in stage["mixture"]]
        meters = Meters(names, self.device, state.pop("meters", None))
        batches = Batches(self.arguments.corpus, self.tasks, stage, (self.arguments.seed, number))
        per_batch = max(1, stage["batch_tokens"] // stage["length"]) * stage["length"]
        total = -(-stage["most_tokens"] // per_batch)
        order = range(state["batch"], total)
        workers = self.arguments.workers
        pin = self.device.type == "cuda"
        loader = DataLoader(batches, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin)
        bar = tqdm(loader, desc=stage["name"], initial=state["batch"], total=total, mininterval=10)
        clock, since = time.time(), 0
        for batch in bar:
            batch = [x.to(self.device, non_blocking=True) for x in batch]
            rate = learning_rate(self.recipe, stage, state["tokens"], state["batch"] * per_batch)
            for group in itertools.chain(*(optimizer.param_groups for optimizer in self.optimizers)):
                group["lr"] = rate
            weight = self.recipe["optimizer"]["answer_weight"]
            train_step(self.trained, self.optimizers, batch, weight, retrieval_weight, meters, self.autocast)
            state["batch"] += 1
            state["tokens"] += per_batch
            since += per_batch
            if state["batch"] % self.arguments.log_every == 0:
                entry = self.log(stage, meters, batch, time.time() - clock, since)
                state["seconds"] += time.time() - clock
                clock, since = time.time(), 0
                accuracies = [entry[name]["accuracy"] for name in names if name in entry]
                bar.set_postfix_str(" ".join(f"{x:.2f}" for x in (entry["text_loss"], *accuracies)))
                if "accuracy" in stage and all(
                    entry.get(task["name"], {}).get("accuracy", 0.0) >= stage["accuracy"]
                    for task in stage["mixture"]
                    if task["task"] != "text"
                ):
                    break
            if self.interrupted or time.time() > deadline:
                state["seconds"] += time.time() - clock
                state["meters"] = meters.state()
                return False
        return True

    def run(self) -> None:
        deadline = time.time() + 60 * self.arguments.minutes
        stages = self.recipe["stages"]
        print(f"{self.model.num_parameters() / 1e6:.2f}M parameters; {hardware()}", flush=True)
        before = signal.signal(signal.SIGINT, self._interrupt)
        while self.state["stage"] < len(stages) and self.stage(self.state["stage"], deadline):
            self.state |= {"stage": self.state["stage"] + 1, "batch": 0}
        signal.signal(signal.SIGINT, before)
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that prepare_corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, if there is one")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop and save after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attn_implementation", help="sdpa, flex_attention, ...; by default that of the model")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches")
    parser.add_argument("--log_every", type=int, default=50, help="batches")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with torch.compile, which takes its time at the start and in stages of another length or chunk_topk",
    )
    Run(parser.parse_args()).run()


if __name__ == "__main__":
    main()

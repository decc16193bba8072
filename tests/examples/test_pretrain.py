"""`pretrain.py`: its batches are what it says, and a run that was stopped goes on as if it had not been."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pretrain
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsa_lab.corpus import prepare
from hsa_lab.plots import draw_pretraining
from hsa_lab.tasks.chronicles import make_document
from hsa_lab.tasks.retrieval import RetrievalTasks
from hsa_lab.training import run as training
from hsa_lab.training.batches import Batches
from hsa_lab.training.objective import Meters, measure_retrieval, retrieval_loss
from hsa_lab.training.recipe import make_config, read_recipe
from tests import commands
from tests.commands import REPOSITORY, run_example
from tests.models import tiny_model


EXAMPLES = REPOSITORY / "examples"
RECIPES = sorted(file.name for file in (EXAMPLES / "recipes").glob("*.json"))

RECIPE = {
    "model": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_lower_layers": 1, "num_upper_layers": 1, "num_upper_groups": 1, "sliding_window": 64, "chunk_size": 16,
        "chunk_topk": 2, "retrieval_dim": 16,
    },
    "optimizer": {
        "name": "muon", "learning_rate": 0.01, "weight_decay": 0.01, "warmup_tokens": 2000, "answer_weight": 4.0,
    },
    "stages": [
        {
            "name": "near", "length": 256, "batch_tokens": 1024, "most_tokens": 4096,
            "mixture": [
                {"name": "near", "task": "dense", "share": 0.5, "options": {"items": 2, "max_distance": 120}},
                {"name": "text", "task": "text", "share": 0.5, "options": {"parts": 3}},
            ],
        },
        {
            "name": "far", "length": 512, "batch_tokens": 1024, "most_tokens": 3000, "chunk_topk": 4,
            "final_learning_rate": 0.1, "retrieval_weight": 0.5,
            "mixture": [
                {"name": "s_niah", "task": "s_niah", "share": 0.4},
                {"name": "vt", "task": "vt", "share": 0.6, "options": {"score": "all", "parts": 2}},
            ],
        },
    ],
}  # fmt: skip
BASELINE = {
    "like": "hsa.json",
    "model": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder as `prepare.py corpus` writes it, of the synthetic chronicle."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(make_document(0, 60_000, 4).text, encoding="utf-8")
    prepare([str(folder / "text.txt")], folder / "out", vocab_size=400)
    return folder / "out"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """A folder with the recipes hsa.json and qwen3.json."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "hsa.json").write_text(json.dumps(RECIPE))
    (folder / "qwen3.json").write_text(json.dumps(BASELINE))
    return folder


def run(recipe, corpus, output, *arguments) -> None:
    files = ["--recipe", str(recipe), "--corpus", str(corpus), "--output", str(output)]
    pretrain.main([*files, "--device", "cpu", "--workers", "0", "--log_every", "1", *arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> dict:
    (file,) = folder.glob("checkpoint-*/state.json")
    return json.loads(file.read_text())


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", RECIPE["stages"], ids=["near", "far"])
def test_answers_are_copies_of_what_stands_earlier(corpus, stage):
    tasks = RetrievalTasks(AutoTokenizer.from_pretrained(corpus))
    batches = Batches(corpus, tasks, stage, (0, 1), 1024 // stage["length"])
    copied = answered = 0
    for i in range(8):
        ids, task, answers, source = batches[i]
        assert ids.shape == answers.shape == source.shape == (1024 // stage["length"], stage["length"])
        row, column = (source >= 0).nonzero(as_tuple=True)
        assert (ids[row, column] == ids[row, source[row, column]]).all()
        assert (source[row, column] < column).all() and answers[row, column].all()
        text = [kind["task"] == "text" for kind in stage["mixture"]]
        assert not answers[torch.tensor(text)[task]].any()
        copied, answered = copied + len(row), answered + int(answers.sum())
        assert all(torch.equal(x, y) for x, y in zip(batches[i], (ids, task, answers, source)))
    assert 0.7 * answered < copied <= answered  # commas of chains are copied from nowhere


@pytest.mark.parametrize("parts", [1, 5])
def test_text_is_made_of_as_many_excerpts_as_asked_for(tmp_path, parts):
    np.save(tmp_path / "train.npy", np.arange(50_000, dtype=np.uint16))
    mixture = [{"name": "text", "task": "text", "share": 1, "options": {"parts": parts}}]
    ids, _, answers, source = Batches(tmp_path, None, {"length": 600, "mixture": mixture}, (0,), 10)[0]
    assert ((ids.diff(dim=1) != 1).sum(1) == parts - 1).all()
    assert len(set(ids[:, 0].tolist())) == 10 and not answers.any() and (source == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stops"), [("hsa", 8), ("qwen3", 2)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(recipes, corpus, tmp_path, name, stops):
    recipe = recipes / f"{name}.json"
    run(recipe, corpus, tmp_path / "once", "--log_every", "2")
    for _ in range(stops):  # every time one batch; after 8 times the run is over
        run(recipe, corpus, tmp_path / "often", "--log_every", "2", "--minutes", "0", "--resume")
    run(recipe, corpus, tmp_path / "often", "--log_every", "2", "--resume")
    states = [state(tmp_path / folder) for folder in ("once", "often")]
    assert states[0]["stage"] == states[1]["stage"] == 2 and states[0]["tokens"] == states[1]["tokens"] == 7168
    assert {"hardware", "commit"} <= states[0].keys()
    once, often = (weights(tmp_path / folder) for folder in ("once", "often"))
    torch.testing.assert_close(once, often, rtol=0, atol=0)
    for file in ("optimizer.bin", "optimizer_1.bin"):
        files = [next((tmp_path / folder).glob(f"checkpoint-*/{file}")) for folder in ("once", "often")]
        once, often = (torch.load(file)["state"] for file in files)
        torch.testing.assert_close(once, often, rtol=0, atol=0)

    entries, once = log(tmp_path / "often"), log(tmp_path / "once")
    assert [entry["stage"] for entry in entries] == ["near", "near", "far"]
    for entry in (*entries, *once):
        del entry["tokens_per_s"]
    assert entries == once
    assert {"accuracy", "row_accuracy"} == entries[-1]["vt"].keys()
    assert (tmp_path / "often" / "training.png").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "often"), AutoTokenizer.from_pretrained(corpus)
    assert model.config.model_type == name and model.config.vocab_size == len(tokenizer)
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, special) == getattr(tokenizer, special) is not None
        assert getattr(model.generation_config, special) == getattr(tokenizer, special)
    if name == "hsa":
        assert model.config.chunk_topk == 4
        pairs = zip(entries[-1]["weight"], entries[-1]["recall"], strict=True)
        assert all(0 < weight < recall <= 1 for weight, recall in pairs)
    else:
        assert not any({"recall", "weight"} & entry.keys() for entry in entries)


def test_retrieval_is_measured_where_answers_are_copied():
    """Position 50 predicts a token copied from chunk 1, 55 one of chunk 0; two heads retrieve two chunks each."""
    source = torch.full((1, 64), -1)
    source[0, 51], source[0, 56], source[0, 10] = 20, 3, 5  # that of 10 is in a chunk that is not complete
    indices = torch.tensor([2, 1]).expand(1, 64, 2, 2).clone()
    indices[0, 55] = torch.tensor([[2, 1], [1, 0]])
    weights = torch.tensor([0.9, 0.1]).expand(1, 64, 2, 2).clone()
    weights[0, 50, 1] = torch.tensor([0.4, 0.6])
    never = SimpleNamespace(indices=torch.full_like(indices, 3), weights=weights)
    retrieval = [SimpleNamespace(indices=indices, weights=weights), never]

    def model(input_ids, **options):
        return SimpleNamespace(retrieval=retrieval)

    model.config = SimpleNamespace(chunk_size=16, chunk_weighting="softmax")
    batch = (source, torch.zeros(1), source >= 0, source)
    autocast = torch.autocast("cpu", enabled=False)
    measures = measure_retrieval(model, batch, autocast)
    assert measures["recall"] == [1, 0]
    assert measures["weight"] == pytest.approx([(0.1 + 0.6 + 0 + 0.1) / 4, 0])
    assert measure_retrieval(model, [torch.full_like(source, -1)] * 4, autocast) == {}
    model.config.chunk_weighting = "joint"
    for layer in retrieval:
        layer.weights = None
    assert measure_retrieval(model, batch, autocast) == {"recall": [1, 0]}


def test_retrieval_loss_is_that_of_the_wanted_chunks():
    source = torch.full((1, 64), -1)
    source[0, 51], source[0, 56], source[0, 10] = 20, 3, 5  # the last one's chunk is not complete yet
    indices = torch.tensor([2, 1]).expand(1, 64, 2, 2).clone()
    indices[0, 55] = torch.tensor([[2, 1], [1, 0]])
    weights = torch.tensor([0.9, 0.1]).expand(1, 64, 2, 2).clone()
    weights[0, 50, 1] = torch.tensor([0.4, 0.6])
    weights.requires_grad_()
    layer = SimpleNamespace(indices=indices, weights=weights)
    never = SimpleNamespace(indices=torch.full_like(indices, 3), weights=weights)
    loss = retrieval_loss([layer, never], source, 16)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * math.log(0.1) + math.log(0.6)) / 3 / 2)  # nothing from the other layer
    assert weights.grad.nonzero().tolist() == [[0, 50, 0, 1], [0, 50, 1, 1], [0, 55, 1, 1]]
    zero = torch.zeros_like(weights, requires_grad=True)
    retrieval_loss([SimpleNamespace(indices=indices, weights=zero)], source, 16).backward()
    assert zero.grad.isfinite().all()


@pytest.mark.slow
def test_an_interrupt_ends_a_run_after_its_batch(monkeypatch, recipes, corpus, tmp_path):
    step = training.Step.__call__

    def interrupted_step(*arguments):
        signal.raise_signal(signal.SIGINT)
        step(*arguments)

    monkeypatch.setattr(training.Step, "__call__", interrupted_step)
    before = signal.getsignal(signal.SIGINT)
    run(recipes / "hsa.json", corpus, tmp_path / "interrupted")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(training.Step, "__call__", step)
    run(recipes / "hsa.json", corpus, tmp_path / "stopped", "--minutes", "0")
    assert [state(tmp_path / name)["batch"] for name in ("interrupted", "stopped")] == [1, 1]
    torch.testing.assert_close(weights(tmp_path / "interrupted"), weights(tmp_path / "stopped"), rtol=0, atol=0)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_passed_over(recipes, corpus, tmp_path):
    """A run that was killed while it saved goes on from the checkpoint before."""
    run(recipes / "hsa.json", corpus, tmp_path, "--minutes", "0")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    run(recipes / "hsa.json", corpus, tmp_path, "--minutes", "0", "--resume")
    assert state(tmp_path)["batch"] == 2 and [x.name for x in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def make_step(accelerator: Accelerator) -> tuple[training.Step, torch.nn.Module]:
    """A step of a tiny model, by an optimizer that shows the gradients as they are."""
    model = tiny_model(sliding_window=64).train()
    trained, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return training.Step(accelerator, trained, [optimizer], 4.0, model.config.chunk_size), model


def rows(count: int) -> list[torch.Tensor]:
    """A batch as of `Batches`: in each row as many answers, copied from chunks far before, as its number says."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(99, (count, 128), generator=generator)
    source = torch.full((count, 128), -1)
    for row in range(count):
        source[row, 100 : 104 + row] = torch.arange(5, 9 + row)
    return [input_ids, torch.zeros(count, dtype=torch.int64), source >= 0, source]


def train_on(accelerator: Accelerator, batches: list[list[torch.Tensor]], retrieval_weight: float = 0.5) -> dict:
    step, model = make_step(accelerator)
    meters = Meters(["x"], accelerator.device, None, lambda x: accelerator.reduce(x, reduction="sum"))
    for _ in range(2):
        step(batches, retrieval_weight, meters)
    return {name: x.detach() for name, x in model.named_parameters()} | {"loss": torch.tensor(meters.state()[1])}


def test_accumulated_micro_batches_weigh_tokens_as_one_batch():
    whole, parts = [rows(4)], list(zip(*(x.split(1) for x in rows(4))))
    once, often = (
        train_on(Accelerator(cpu=True, gradient_accumulation_steps=len(batches)), batches, 0.0)
        for batches in (whole, parts)
    )
    torch.testing.assert_close(once, often)


SHARE = """
import sys
import torch
from accelerate import Accelerator
from tests.examples.test_pretrain import rows, train_on

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
share = [x[accelerator.process_index :: 2] for x in rows(4)]
result = train_on(accelerator, [share])
if accelerator.is_main_process:
    torch.save(result, sys.argv[1])
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_double_batch(tmp_path):
    """The weights after two steps, with tokens and retrieval weighed over all rows, and what the meters say."""
    (tmp_path / "share.py").write_text(SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "share.py")]
    environment = commands.environment(tmp_path)
    environment["PYTHONPATH"] += f"{os.pathsep}{EXAMPLES}"
    run = subprocess.run([*command, str(tmp_path / "two.pt")], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    two, one = (
        torch.load(tmp_path / "two.pt"),
        train_on(Accelerator(cpu=True, gradient_accumulation_steps=1), [rows(4)]),
    )
    torch.testing.assert_close(two, one)


@pytest.mark.slow
def test_a_run_on_two_processes_is_that_with_two_micro_batches(recipes, corpus, tmp_path):
    """Also where it was stopped and resumed. (The stage without a loss of retrieval, whose mean differs.)"""
    run(recipes / "hsa.json", corpus, tmp_path / "one", "--gradient_accumulation_steps", "2")
    words = ("--device", "cpu", "--workers", "0", "--log_every", "1", "--resume")
    files = {"recipe": recipes / "hsa.json", "corpus": corpus, "output": tmp_path / "two"}
    for minutes in (0, 1e9):
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
        run_example("pretrain.py", tmp_path, *words, launcher=launcher, minutes=minutes, **files)
    one, two = ([entry for entry in log(tmp_path / name) if entry["stage"] == "near"] for name in ("one", "two"))
    assert len(one) == len(two) == 4 and state(tmp_path / "two")["tokens"] == 7168
    for a, b in zip(one, two):
        assert a["text_loss"] == pytest.approx(b["text_loss"], rel=1e-5) and a.get("near") == b.get("near")


@pytest.mark.parametrize(
    ("measures", "labels"),
    [
        ([{}, {}], None),
        ([{"recall": [1.0, 0.5]}, {}], ["share retrieved, HSA layer 1", "share retrieved, HSA layer 2"]),
        ([{}, {"recall": [1.0], "weight": [0.2]}], ["its weight, HSA layer 1", "share retrieved, HSA layer 1"]),
    ],
)
def test_what_was_measured_is_drawn(monkeypatch, tmp_path, measures, labels):
    entries = [
        {"stage": "near", "tokens": i, "text_loss": 2.0, "vt": {"accuracy": 0.5}} | x for i, x in enumerate(measures)
    ]
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw_pretraining(entries, tmp_path / "training.png")
    monkeypatch.undo()
    axes = [axis for axis in figures[0].axes if axis.axison]
    plt.close(figures[0])
    assert (tmp_path / "training.png").exists() and len(axes) == (3 if labels else 2)
    if labels:
        assert axes[2].get_legend_handles_labels()[1] == labels


@pytest.mark.slow
def test_a_compiled_run_trains_alike_and_saves_the_model_as_it_is(recipes, corpus, tmp_path):
    recipe = recipes / "qwen3.json"
    run(recipe, corpus, tmp_path / "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(recipe, corpus, tmp_path / "compiled", "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()
    # The loss of later batches tells whether the earlier ones were learned from.
    plain, compiled = ([entry["text_loss"] for entry in log(tmp_path / folder)] for folder in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3) and plain[-1] < 0.97 * plain[0]


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_takes_the_attention_asked_for(monkeypatch, recipes, corpus, tmp_path, resumed):
    used, step = [], training.Step.__call__

    def watched_step(self, *arguments):
        used.append(self.model.config._attn_implementation)
        return step(self, *arguments)

    monkeypatch.setattr(training.Step, "__call__", watched_step)
    words = ["--minutes", "0", "--resume"]
    if resumed:
        run(recipes / "qwen3.json", corpus, tmp_path / "out", *words)
    run(recipes / "qwen3.json", corpus, tmp_path / "out", *words, "--attn_implementation", "eager")
    assert used == ["sdpa"] * resumed + ["eager"]


@pytest.mark.slow
def test_weights_are_cut_into_files_of_the_size_asked_for(recipes, corpus, tmp_path):
    run(recipes / "hsa.json", corpus, tmp_path, "--minutes", "0", "--max_shard_size", "50KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 60_000
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.slow
def test_mixed_precision_keeps_weights_in_fp32(recipes, corpus, tmp_path):
    """In a process of its own, as the precision of `accelerate` is that of a process."""
    files = {"recipe": recipes / "hsa.json", "corpus": corpus, "output": tmp_path / "out"}
    run_example("pretrain.py", tmp_path, **files, device="cpu", workers=0, log_every=1, mixed_precision="bf16")
    run(recipes / "hsa.json", corpus, tmp_path / "fp32")
    assert all(x.dtype == torch.float32 for x in weights(tmp_path / "out").values())
    half, full = ([entry["text_loss"] for entry in log(tmp_path / name)] for name in ("out", "fp32"))
    assert half == pytest.approx(full, rel=0.02) and half != full


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("optimizer"), r"the recipe lacks \['optimizer'\]\."),
        (lambda r: r["stages"][1].pop("length"), r"the stage 'far' lacks \['length'\]"),
        (lambda r: r["stages"][0].update(steps=3), r"the stage 'near' .*does not take \['steps'\]"),
        (lambda r: r["stages"][0]["mixture"][1].update(parts=3), r"the task 'text' .*does not take \['parts'\]"),
        (lambda r: r["model"].update(chunk_weighting="joint"), "'joint' chunks have no weight"),
        (lambda r: r["model"].update(model_type="qwen3"), r"type 'qwen3' does not take \['chunk_size', 'chunk_topk'"),
        (lambda r: r["optimizer"].update(name="sgd"), "`optimizer.name` must be 'muon' or 'adamw', got 'sgd'"),
    ],
)
def test_recipes_that_say_nonsense_are_refused(corpus, tmp_path, change, message):
    recipe = json.loads(json.dumps(RECIPE))
    change(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "recipe.json", corpus, tmp_path / "out")


def test_a_recipe_has_the_fields_of_the_one_it_is_like(recipes, tmp_path):
    assert read_recipe(recipes / "qwen3.json") == RECIPE | {"model": BASELINE["model"]}
    (recipes / "deeper").mkdir()
    (recipes / "deeper" / "other.json").write_text(json.dumps({"like": "../qwen3.json", "stages": []}))
    assert read_recipe(recipes / "deeper" / "other.json") == RECIPE | {"model": BASELINE["model"], "stages": []}


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(recipes, corpus, tmp_path):
    recipe = recipes / "hsa.json"
    with pytest.raises(ValueError, match="`--corpus`: .* has no train.npy. Make it with prepare.py"):
        run(recipe, tmp_path, tmp_path / "out")
    run(recipe, corpus, tmp_path / "out", "--minutes", "0")
    other = json.loads(json.dumps(RECIPE))
    other["model"]["sliding_window"] = 32
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="`--output`: .* holds a run. Go on with `--resume`"):
        run(recipe, corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="the run has `seed` 7, but that in .* has 0"):
        run(recipe, corpus, tmp_path / "out", "--resume", "--seed", "7")
    with pytest.raises(ValueError, match="the run has `micro_batches` 2, but that in .* has 1"):
        run(recipe, corpus, tmp_path / "out", "--resume", "--gradient_accumulation_steps", "2")
    with pytest.raises(ValueError, match="'near' has batches of 4 rows, which processes times .*, 3, must divide"):
        run(recipe, corpus, tmp_path / "three", "--gradient_accumulation_steps", "3")
    with pytest.raises(ValueError, match="the run has `sliding_window` 32, but that in .* has 64"):
        run(tmp_path / "other.json", corpus, tmp_path / "out", "--resume")
    with pytest.raises(ValueError, match="the run has `model_type` qwen3, but that in .* has hsa"):
        run(recipes / "qwen3.json", corpus, tmp_path / "out", "--resume")
    run(recipes / "qwen3.json", corpus, tmp_path / "qwen3", "--minutes", "0")
    other = json.loads(json.dumps(BASELINE))
    other["model"]["rope_parameters"]["rope_theta"] = 500.0
    (recipes / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="the run has `rope_parameters` .*500.0.*, but that in .* has .*10000.0"):
        run(recipes / "other.json", corpus, tmp_path / "qwen3", "--resume")


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "toy.json"])
def test_the_recipes_of_the_repository_make_models_that_fit(corpus, name):
    """Weights in bf16 are at most 20 MB with a vocabulary of 4,096, and baselines have as many parameters as HSA."""

    def parameters(recipe: str) -> int:
        config = make_config(read_recipe(EXAMPLES / "recipes" / recipe)["model"], tokenizer)
        config.vocab_size = 4096
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()

    tokenizer = AutoTokenizer.from_pretrained(corpus)
    assert 2 * parameters(name) <= 20e6
    assert parameters(name) == pytest.approx(parameters("books.json"), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["books.json", "books_no_short_stages.json"])
def test_all_stages_of_the_recipes_make_batches(corpus, name):

    tokenizer = AutoTokenizer.from_pretrained(corpus)
    tasks = RetrievalTasks(tokenizer)
    for number, stage in enumerate(read_recipe(EXAMPLES / "recipes" / name)["stages"]):
        names = [task["name"] for task in stage["mixture"]]
        assert len(set(names)) == len(names) and sum(task["share"] for task in stage["mixture"]) == pytest.approx(1)
        for task in stage["mixture"]:
            batches = Batches(corpus, tasks, stage | {"mixture": [task]}, (0, number), 2)
            ids, _, _, _ = batches[0]
            assert ids.shape == (2, stage["length"]) and int(ids.max()) < len(tokenizer)


def test_baselines_differ_in_what_they_see_alone():
    hsa, window, full = (read_recipe(EXAMPLES / "recipes" / f"books{name}.json") for name in ("", "_window", "_full"))
    assert hsa["stages"] == window["stages"] == full["stages"] and hsa["optimizer"] == window["optimizer"]
    assert window["model"].pop("use_sliding_window") is True
    assert window["model"].pop("sliding_window") == hsa["model"]["sliding_window"]
    assert full["model"].pop("use_sliding_window") is False
    layers = window["model"]["num_hidden_layers"]
    assert window["model"].pop("layer_types") == ["sliding_attention"] * layers
    assert full["model"].pop("layer_types") == ["full_attention"] * layers
    assert window["model"] == full["model"]

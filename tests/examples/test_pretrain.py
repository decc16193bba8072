"""`examples/pretrain.py`: its batches are what it says, and a run that was stopped goes on as if it had not been."""

import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


EXAMPLES = Path(__file__).parents[2] / "examples"
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


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, examples) -> Path:
    """A folder as `prepare_corpus.py` writes it, of the synthetic chronicle."""
    import prepare_corpus
    import synthetic_text

    folder = tmp_path_factory.mktemp("corpus")
    text, out = str(folder / "text.txt"), str(folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["synthetic_text.py", "--characters", "60000", "--output", text])
        synthetic_text.main()
        patch.setattr(
            sys, "argv", ["prepare_corpus.py", "--train_files", text, "--vocab_size", "400", "--output_dir", out]
        )
        prepare_corpus.main()
    return Path(out)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """A folder with the recipes hsa.json and qwen3.json."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "hsa.json").write_text(json.dumps(RECIPE))
    (folder / "qwen3.json").write_text(json.dumps(BASELINE))
    return folder


def run(monkeypatch, recipe, corpus, output, *arguments) -> None:
    import pretrain

    monkeypatch.setattr(
        sys, "argv",
        ["pretrain.py", "--recipe", str(recipe), "--corpus", str(corpus), "--output", str(output), "--device", "cpu",
         "--workers", "0", "--log_every", "1", *arguments],
    )  # fmt: skip
    pretrain.main()


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", RECIPE["stages"], ids=["near", "far"])
def test_answers_are_copies_of_what_stands_earlier(corpus, stage):
    from pretrain import Batches
    from retrieval_tasks import RetrievalTasks

    tasks = RetrievalTasks(AutoTokenizer.from_pretrained(corpus))
    batches = Batches(corpus, tasks, stage, (0, 1))
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
    from pretrain import Batches

    np.save(tmp_path / "train.npy", np.arange(50_000, dtype=np.uint16))
    mixture = [{"name": "text", "task": "text", "share": 1, "options": {"parts": parts}}]
    ids, _, answers, source = Batches(tmp_path, None, {"length": 600, "batch_tokens": 6000, "mixture": mixture}, (0,))[
        0
    ]
    assert ((ids.diff(dim=1) != 1).sum(1) == parts - 1).all()
    assert len(set(ids[:, 0].tolist())) == 10 and not answers.any() and (source == -1).all()


@pytest.mark.parametrize(("name", "stops"), [("hsa", 8), ("qwen3", 2)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(monkeypatch, recipes, corpus, tmp_path, name, stops):
    recipe = recipes / f"{name}.json"
    run(monkeypatch, recipe, corpus, tmp_path / "once", "--log_every", "2")
    for _ in range(stops):  # every time one batch; after 8 times the run is over
        run(monkeypatch, recipe, corpus, tmp_path / "often", "--log_every", "2", "--minutes", "0", "--resume")
    run(monkeypatch, recipe, corpus, tmp_path / "often", "--log_every", "2", "--resume")
    states = [json.loads((tmp_path / folder / "state.json").read_text()) for folder in ("once", "often")]
    assert states[0]["stage"] == states[1]["stage"] == 2 and states[0]["tokens"] == states[1]["tokens"] == 7168
    for file in ("model.safetensors", "optimizer.safetensors"):
        once, often = (load_file(tmp_path / folder / file) for folder in ("once", "often"))
        assert once.keys() == often.keys()
        for key, x in once.items():
            assert torch.equal(x, often[key]), key

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
    from pretrain import measure_retrieval

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
    from pretrain import retrieval_loss

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
    import pretrain

    step = pretrain.train_step

    def interrupted_step(*arguments):
        signal.raise_signal(signal.SIGINT)
        step(*arguments)

    monkeypatch.setattr(pretrain, "train_step", interrupted_step)
    before = signal.getsignal(signal.SIGINT)
    run(monkeypatch, recipes / "hsa.json", corpus, tmp_path / "interrupted")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(pretrain, "train_step", step)
    run(monkeypatch, recipes / "hsa.json", corpus, tmp_path / "stopped", "--minutes", "0")
    states = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("interrupted", "stopped")]
    assert [state["batch"] for state in states] == [1, 1]
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("interrupted", "stopped")]
    assert all(torch.equal(x, models[1][name]) for name, x in models[0].items())


@pytest.mark.parametrize(
    ("measures", "labels"),
    [
        ([{}, {}], None),
        ([{"recall": [1.0, 0.5]}, {}], ["recall, HSA layer 0", "recall, HSA layer 1"]),
        ([{}, {"recall": [1.0], "weight": [0.2]}], ["weight, HSA layer 0", "recall, HSA layer 0"]),
    ],
)
def test_what_was_measured_is_drawn(monkeypatch, tmp_path, measures, labels):
    import matplotlib.pyplot as plt
    from pretrain import plot

    entries = [
        {"stage": "near", "tokens": i, "text_loss": 2.0, "vt": {"accuracy": 0.5}} | x for i, x in enumerate(measures)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot(tmp_path)
    monkeypatch.undo()
    axes = figures[0].axes
    plt.close(figures[0])
    assert (tmp_path / "training.png").exists() and len(axes) == (3 if labels else 2)
    if labels:
        assert axes[2].get_legend_handles_labels()[1] == labels


@pytest.mark.slow
def test_a_compiled_run_trains_alike_and_saves_the_model_as_it_is(monkeypatch, recipes, corpus, tmp_path):
    recipe = recipes / "qwen3.json"
    run(monkeypatch, recipe, corpus, tmp_path / "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(monkeypatch, recipe, corpus, tmp_path / "compiled", "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain, compiled = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    # The loss of later batches tells whether the earlier ones were learned from.
    plain, compiled = ([entry["text_loss"] for entry in log(tmp_path / folder)] for folder in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3) and plain[-1] < 0.97 * plain[0]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_takes_the_attention_asked_for(monkeypatch, recipes, corpus, tmp_path, resumed):
    import pretrain

    used = []
    step = pretrain.train_step
    monkeypatch.setattr(
        pretrain,
        "train_step",
        lambda model, *rest: used.append(model.config._attn_implementation) or step(model, *rest),
    )
    words = ["--minutes", "0", "--resume"]
    if resumed:
        run(monkeypatch, recipes / "qwen3.json", corpus, tmp_path / "out", *words)
    run(monkeypatch, recipes / "qwen3.json", corpus, tmp_path / "out", *words, "--attn_implementation", "eager")
    assert used == ["sdpa"] * resumed + ["eager"]


def test_checkpoints_are_cut_into_small_files(monkeypatch, tmp_path):
    import pretrain

    from tests.helpers import tiny_model

    monkeypatch.setattr(pretrain, "SHARD", "100KB")
    model = tiny_model(hidden_size=64, intermediate_size=128)
    optimizers = pretrain.make_optimizers(model, RECIPE["optimizer"])
    model(torch.arange(1, 60)[None], labels=torch.arange(1, 60)[None]).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    before = [optimizer.state_dict()["state"] for optimizer in optimizers]

    class NoTokenizer:
        def save_pretrained(self, folder):
            pass

    pretrain.save(tmp_path, model, NoTokenizer(), optimizers, {})
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 4 and max(file.stat().st_size for file in files) < 110_000
    again = pretrain.make_optimizers(model, RECIPE["optimizer"])
    pretrain.load_optimizers(tmp_path, again)
    for state, optimizer in zip(before, again):
        for index, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(x, state[index][name]) for name, x in values.items())


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
def test_recipes_that_say_nonsense_are_refused(monkeypatch, corpus, tmp_path, change, message):
    recipe = json.loads(json.dumps(RECIPE))
    change(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, tmp_path / "recipe.json", corpus, tmp_path / "out")


def test_a_recipe_has_the_fields_of_the_one_it_is_like(recipes, tmp_path):
    from pretrain import read_recipe

    assert read_recipe(recipes / "qwen3.json") == RECIPE | {"model": BASELINE["model"]}
    (recipes / "deeper").mkdir()
    (recipes / "deeper" / "other.json").write_text(json.dumps({"like": "../qwen3.json", "stages": []}))
    assert read_recipe(recipes / "deeper" / "other.json") == RECIPE | {"model": BASELINE["model"], "stages": []}


def test_what_does_not_belong_together_is_refused(monkeypatch, recipes, corpus, tmp_path):
    recipe = recipes / "hsa.json"
    with pytest.raises(ValueError, match="`--corpus`: .* has no train.npy. Make it with prepare_corpus.py"):
        run(monkeypatch, recipe, tmp_path, tmp_path / "out")
    run(monkeypatch, recipe, corpus, tmp_path / "out", "--minutes", "0")
    other = json.loads(json.dumps(RECIPE))
    other["model"]["sliding_window"] = 32
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="`--output`: .* holds a run. Go on with `--resume`"):
        run(monkeypatch, recipe, corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="the run has `seed` 7, but that in .* has 0"):
        run(monkeypatch, recipe, corpus, tmp_path / "out", "--resume", "--seed", "7")
    with pytest.raises(ValueError, match="the run has `sliding_window` 32, but that in .* has 64"):
        run(monkeypatch, tmp_path / "other.json", corpus, tmp_path / "out", "--resume")
    with pytest.raises(ValueError, match="the run has `model_type` qwen3, but that in .* has hsa"):
        run(monkeypatch, recipes / "qwen3.json", corpus, tmp_path / "out", "--resume")
    run(monkeypatch, recipes / "qwen3.json", corpus, tmp_path / "qwen3", "--minutes", "0")
    other = json.loads(json.dumps(BASELINE))
    other["model"]["rope_parameters"]["rope_theta"] = 500.0
    (recipes / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="the run has `rope_parameters` .*500.0.*, but that in .* has .*10000.0"):
        run(monkeypatch, recipes / "other.json", corpus, tmp_path / "qwen3", "--resume")


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_the_repository_make_models_that_fit(corpus, name):
    """Weights in bf16 are at most 20 MB with a vocabulary of 4,096, and baselines have as many parameters as HSA."""
    import pretrain

    def parameters(recipe: str) -> int:
        config = pretrain.make_config(pretrain.read_recipe(EXAMPLES / "recipes" / recipe)["model"], tokenizer)
        config.vocab_size = 4096
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()

    tokenizer = AutoTokenizer.from_pretrained(corpus)
    assert 2 * parameters(name) <= 20e6
    assert parameters(name) == pytest.approx(parameters("books.json"), rel=0.03)


@pytest.mark.parametrize("name", ["books.json", "books_no_short_stages.json"])
def test_all_stages_of_the_recipes_make_batches(corpus, name):
    import pretrain
    from retrieval_tasks import RetrievalTasks

    tokenizer = AutoTokenizer.from_pretrained(corpus)
    tasks = RetrievalTasks(tokenizer)
    for number, stage in enumerate(pretrain.read_recipe(EXAMPLES / "recipes" / name)["stages"]):
        names = [task["name"] for task in stage["mixture"]]
        assert len(set(names)) == len(names) and sum(task["share"] for task in stage["mixture"]) == pytest.approx(1)
        for task in stage["mixture"]:
            batches = pretrain.Batches(
                corpus, tasks, stage | {"batch_tokens": 2 * stage["length"], "mixture": [task]}, (0, number)
            )
            ids, _, _, _ = batches[0]
            assert ids.shape == (2, stage["length"]) and int(ids.max()) < len(tokenizer)


def test_baselines_differ_in_what_they_see_alone():
    from pretrain import read_recipe

    hsa, window, full = (read_recipe(EXAMPLES / "recipes" / f"books{name}.json") for name in ("", "_window", "_full"))
    assert hsa["stages"] == window["stages"] == full["stages"] and hsa["optimizer"] == window["optimizer"]
    assert window["model"].pop("use_sliding_window") is True
    assert window["model"].pop("sliding_window") == hsa["model"]["sliding_window"]
    assert full["model"].pop("use_sliding_window") is False
    layers = window["model"]["num_hidden_layers"]
    assert window["model"].pop("layer_types") == ["sliding_attention"] * layers
    assert full["model"].pop("layer_types") == ["full_attention"] * layers
    assert window["model"] == full["model"]

"""`examples/pretrain.py`: its batches are what it says, and a run that was stopped goes on as if it had not been."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


EXAMPLES = Path(__file__).parents[1] / "examples"

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
                {"name": "text", "task": "text", "share": 0.5},
            ],
        },
        {
            "name": "far", "length": 512, "batch_tokens": 1024, "most_tokens": 3000, "chunk_topk": 4,
            "final_learning_rate": 0.1, "retrieval_weight": 0.5,
            "mixture": [
                {"name": "s_niah", "task": "s_niah", "share": 0.4},
                {"name": "vt", "task": "vt", "share": 0.6, "options": {"score": "all"}},
            ],
        },
    ],
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
def recipe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.json"
    file.write_text(json.dumps(RECIPE))
    return file


def run(monkeypatch, recipe, corpus, output, *arguments) -> None:
    import pretrain

    monkeypatch.setattr(
        sys, "argv",
        ["pretrain.py", "--recipe", str(recipe), "--corpus", str(corpus), "--output", str(output), "--device", "cpu",
         "--workers", "0", "--log_every", "1", *arguments],
    )  # fmt: skip
    pretrain.main()


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


def test_a_stopped_run_goes_on_as_if_it_had_not_been(monkeypatch, recipe, corpus, tmp_path):
    run(monkeypatch, recipe, corpus, tmp_path / "once")
    for _ in range(9):  # every time one batch
        run(monkeypatch, recipe, corpus, tmp_path / "often", "--minutes", "0", "--resume")
    states = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("once", "often")]
    assert states[0]["stage"] == states[1]["stage"] == 2 and states[0]["tokens"] == states[1]["tokens"] == 7168
    for file in ("model.safetensors", "optimizer.safetensors"):
        once, often = (load_file(tmp_path / name / file) for name in ("once", "often"))
        assert once.keys() == often.keys()
        for name, x in once.items():
            assert torch.equal(x, often[name]), name

    entries = [json.loads(line) for line in (tmp_path / "often" / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in entries] == ["near"] * 4 + ["far"] * 3
    assert all(0 <= recall <= 1 for entry in entries for recall in entry["recall"])
    assert {"accuracy", "row_accuracy"} == entries[-1]["vt"].keys()
    assert (tmp_path / "often" / "training.png").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "often")
    assert model.config.chunk_topk == 4


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
        (lambda r: r.pop("optimizer"), r"the recipe '' lacks \['optimizer'\]"),
        (lambda r: r["stages"][1].pop("length"), r"the stage 'far' lacks \['length'\]"),
        (lambda r: r["stages"][0].update(steps=3), r"the stage 'near' .*does not take \['steps'\]"),
        (lambda r: r["optimizer"].update(name="sgd"), "`optimizer.name` must be 'muon' or 'adamw', got 'sgd'"),
    ],
)
def test_recipes_that_say_nonsense_are_refused(monkeypatch, corpus, tmp_path, change, message):
    recipe = json.loads(json.dumps(RECIPE))
    change(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, tmp_path / "recipe.json", corpus, tmp_path / "out")


def test_what_does_not_belong_together_is_refused(monkeypatch, recipe, corpus, tmp_path):
    with pytest.raises(ValueError, match="`--corpus`: .* has no train.npy. Make it with prepare_corpus.py"):
        run(monkeypatch, recipe, tmp_path, tmp_path / "out")
    run(monkeypatch, recipe, corpus, tmp_path / "out", "--minutes", "0")
    other = json.loads(json.dumps(RECIPE))
    other["model"]["sliding_window"] = 32
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="the model has `sliding_window` 32, but that in .* has 64"):
        run(monkeypatch, tmp_path / "other.json", corpus, tmp_path / "out", "--resume")


def test_the_recipe_of_the_repository_makes_a_model_that_fits(corpus):
    """Its weights in bf16 are at most 20 MB with a vocabulary of 4,096, and all of its stages make batches."""
    import pretrain
    from retrieval_tasks import RetrievalTasks

    from configuration_hsa import HSAConfig
    from modeling_hsa import HSAForCausalLM

    recipe = pretrain.read_recipe(EXAMPLES / "recipes" / "books.json")
    with torch.device("meta"):
        model = HSAForCausalLM(HSAConfig(**recipe["model"], vocab_size=4096))
    assert 2 * model.num_parameters() <= 20e6
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    tasks = RetrievalTasks(tokenizer)
    for number, stage in enumerate(recipe["stages"]):
        stage = dict(stage, batch_tokens=2 * stage["length"])
        ids, _, _, _ = pretrain.Batches(corpus, tasks, stage, (0, number))[0]
        assert ids.shape == (2, stage["length"]) and int(ids.max()) < len(tokenizer)

"""`study.py`: the tables as data, models of one size, and a toy of the whole from training to the page."""

import json
import math

import pytest
import study
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from configuration_hsa import HSAConfig
from hsa_lab.study import nsa, report
from hsa_lab.study.cells import SCALES, TABLES
from hsa_lab.study.models import MODELS, REFERENCE, TOLERANCE, count_parameters, make_fields, missing
from hsa_lab.study.run import Job, Settings, emergence, run_job
from hsa_lab.training.recipe import read_recipe
from modeling_hsa import window
from tests.commands import REPOSITORY
from tests.helpers import attend, attend_sequences, relative_error


OURS = [name for name, model in MODELS.items() if not model.is_nsa]
CELLS = [
    (table, name) for table, of in TABLES.items() for name, cell in of.cells.items() if not MODELS[cell.model].is_nsa
]


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table, name", CELLS)
def test_every_cell_is_as_large_as_the_reference_of_its_scale(table, name):
    job = Job(table, name, 0, "10M")
    parameters = count_parameters({**job.fields(), "vocab_size": 4096})
    assert abs(parameters / count_parameters(job.scale.base) - 1) <= TOLERANCE


def test_the_reference_is_what_the_study_says():
    assert make_fields(MODELS["hsa"], REFERENCE) == REFERENCE
    assert 9.5e6 < count_parameters(REFERENCE) < 9.7e6
    sizes = [count_parameters(SCALES[name].base) for name in ("2.5M", "40M")]
    assert 2.2e6 < sizes[0] < 3e6
    assert 34e6 < sizes[1] < 42e6


def test_a_size_that_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="No `state_size` gives"):
        make_fields(MODELS["mamba2"], {**REFERENCE, "intermediate_size": 8})


def test_models_are_of_the_layers_that_they_say():
    kinds = {name: set(HSAConfig(**make_fields(MODELS[name], REFERENCE)).layer_types) for name in OURS}
    assert kinds["ramba"] == {"linear_attention", "hsa"}
    assert kinds["full"] == kinds["nope"] == {"full_attention"}
    assert kinds["window"] == {"sliding_attention"}
    assert kinds["mamba2"] == {"linear_attention"}
    assert not HSAConfig(**make_fields(MODELS["nope"], REFERENCE)).full_attention_rope


def test_what_cannot_be_made_is_left_out_with_a_word(capsys, tmp_path):
    study.main(["e", "--list", "--cells", "nsa", "window", "--output", str(tmp_path)])
    assert ("nsa is left out: it needs" in capsys.readouterr().out) == (missing(MODELS["nsa"]) is not None)


def test_the_window_of_nsa_is_that_of_flash_attention(monkeypatch):
    query, key, value = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 1, 8), torch.randn(2, 9, 1, 8)
    monkeypatch.setattr(
        window, "_varlen_attn",
        lambda *tensors, scale, window_size: attend_sequences(*tensors, scale, False, (window_size[0], 0)),
    )  # fmt: skip
    output = nsa.window_attention(query, key, value, causal=True, window_size=(2, 0))
    for row in range(2):
        expected = attend(query[row], key[row], value[row], None, True, (2, 0))
        assert relative_error(output[row], expected) <= 1e-5


# -- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["10M", "toy"])
@pytest.mark.parametrize("table, name", CELLS)
def test_every_cell_has_a_recipe_and_tests_that_can_be_run(table, name, scale, tmp_path):
    job = Job(table, name, 0, scale)
    (tmp_path / "recipe.json").write_text(json.dumps(job.recipe()))
    recipe = read_recipe(tmp_path / "recipe.json")
    config = HSAConfig(**recipe["model"])
    for changes in job.cell.all_tests().values():
        AutoConfig.for_model("hsa", **{**recipe["model"], **changes})
    *short, long = recipe["stages"]
    assert sum(stage["most_tokens"] for stage in recipe["stages"]) == sum(job.scale.tokens)
    for stage in short:  # every chunk is retrieved, as far as the kernels go
        assert stage["chunk_topk"] == min(128, math.ceil(stage["length"] / config.chunk_size))
    assert "chunk_topk" not in long
    assert all(stage["batch_tokens"] % stage["length"] == 0 for stage in recipe["stages"])


def test_what_a_cell_changes_reaches_its_recipe():
    recipe = Job("c", "training length 8192", 0, "10M").recipe()
    assert [stage["length"] for stage in recipe["stages"]] == [512, 1024, 8192]
    recipe = Job("d", "softmax, no loss", 0, "10M").recipe()
    assert {stage["retrieval_weight"] for stage in recipe["stages"]} == {0.0}
    recipe = Job("e-text", "hsa", 0, "10M").recipe()
    assert {task["task"] for stage in recipe["stages"] for task in stage["mixture"]} == {"text"}
    assert Job("f", "full, 40M", 0, "10M").scale is SCALES["40M"]
    assert Job("f", "full, 40M", 0, "toy").scale is SCALES["toy"]
    assert list(Job("b", "K 8 in training", 0, "10M").cell.all_tests()) == [
        f"K {k} in the test" for k in (2, 4, 8, 16, 32, 64)
    ]


def test_emergence():
    log = [{"tokens": 10, "far": {"accuracy": 0.4}}, {"tokens": 20, "far": {"accuracy": 0.6}}, {"tokens": 30}]
    assert emergence(log, 0.5) == 20
    assert emergence(log, 0.9) is None


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of two cells of table e, one of them with two tests."""
    output = tmp_path_factory.mktemp("study")
    study.main(["e", "--toy", "--cells", "ramba", "full", *options(output)])
    return output


def options(output) -> list[str]:
    return ["--device", "cpu", "--workers", "0", "--output", str(output)]


def test_a_toy_leaves_results(toy):
    for name, tests in (("ramba", [""]), ("full", ["RoPE", "YaRN x4", "YaRN x16"])):
        result = json.loads((toy / "e-toy" / f"{name}-seed0.json").read_text())
        assert result["cell"] == name and result["hardware"]["torch"] and "commit" in result
        assert result["training"]["tokens"] == 2048 and len(result["training"]["log"]) == 3
        assert list(result["tests"]) == tests
        for test in result["tests"].values():
            assert [row["length"] for row in test["retrieval"]] == [512] * 3 + [2048] * 3
            assert all(("recall" in row) == (name == "ramba") for row in test["retrieval"])
            assert [row["length"] for row in test["text"]] == [64, 256]
            assert all(row["scored_tokens"] == min(255, row["length"] - 1) for row in test["text"])
    assert sorted(path.name for path in (toy / "e-toy").iterdir()) == ["full-seed0.json", "ramba-seed0.json"]


def test_what_is_there_is_not_run_again(toy, capsys):
    before = {file: file.stat().st_mtime_ns for file in (toy / "e-toy").glob("*.json")}
    study.main(["e", "--toy", "--cells", "ramba", "full", *options(toy)])
    assert "2 of 2 runs are there" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (toy / "e-toy").glob("*.json")} == before


def test_no_run_begins_that_would_take_too_long(toy, capsys):
    with pytest.raises(SystemExit):
        study.main(["e", "--toy", "--cells", "hsa", "--minutes", "0.001", *options(toy)])
    assert "1 left, about" in (printed := capsys.readouterr().out) and "Time is up" in printed


def test_training_that_was_stopped_goes_on(toy, tmp_path):
    job = Job("a", "0 layers, mean, standard", 0, "toy")
    settings = {"corpus": toy / "toy-corpus", "output": tmp_path, "device": "cpu", "workers": 0}
    assert run_job(job, Settings(**settings, deadline=0.0)) is None
    assert (job.folder(tmp_path) / "model" / "checkpoint-1").is_dir()
    result = run_job(job, Settings(**settings))
    assert [entry["tokens"] for entry in result["training"]["log"]] == [512, 1024, 2048]
    assert not job.folder(tmp_path).exists()


@pytest.mark.parametrize("deviation", [0.0, 1.0])
def test_the_deviation_of_a_cell_is_what_it_starts_with(deviation, toy, tmp_path):
    job = Job("a", f"CLS of deviation {deviation:g}", 0, "toy")
    settings = {"corpus": toy / "toy-corpus", "output": tmp_path, "device": "cpu", "workers": 0}
    assert run_job(job, Settings(**settings, deadline=0.0)) is None  # after one batch, whose learning rate is small
    weights = load_file(job.folder(tmp_path) / "model" / "model.safetensors")
    assert weights["model.chunk_encoder.cls_token"].std() == pytest.approx(deviation, abs=0.3)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    def fail(job, settings):
        if "mean" in job.name:
            raise RuntimeError("no luck")
        return {"seconds": {"training": 1, "tests": 1}, "training": {"log": [{"tokens_per_s": 1e6}], "parameters": 7}}

    monkeypatch.setattr(study, "run_job", fail)
    monkeypatch.setattr(study, "make_toy_corpus", lambda folder: folder)
    with pytest.raises(ValueError, match="1 runs failed: 1 layers, mean, bypass"):
        study.main(["a", "--toy", "--cells", "1 layers, mean, bypass", "1 layers, cls, bypass", *options(tmp_path)])
    printed = capsys.readouterr().out
    assert "failed: no luck" in printed and "1.00M tokens/s at the end, 7 parameters" in printed


def test_shards_share_the_runs(tmp_path, capsys):
    shares = []
    for shard in ("0/3", "1/3", "2/3"):
        study.main(["a", "--list", "--seeds", "0", "1", "--shard", shard, "--output", str(tmp_path)])
        shares.append({line.split(". ", 1)[1] for line in capsys.readouterr().out.splitlines() if " left" in line})
    assert sum(map(len, shares)) == len(set.union(*shares)) == 2 * len(TABLES["a"].cells)


@pytest.mark.parametrize(
    "words, message",
    [
        (["a", "--shard", "3/3"], "I below N"),
        (["a"], "`--corpus` is needed"),
        (["a", "--toy", "--cells", "hsa"], "table a has no"),
    ],
)
def test_wrong_arguments_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        study.main(words)


# -- the page ---------------------------------------------------------------------------------------------------------


def made_up(cell: str, seed: int, accuracy: float, loss: float) -> dict:
    rows = [
        {"task": task, "length": length, "samples": 10, "accuracy": accuracy, "low": 0.0, "high": 1.0, "recall": 0.5,
         "retrieved": 4, "accuracy_if_retrieved": 0.75}
        for length in (4096, 16384) for task in ("s_niah", "vt")
    ]  # fmt: skip
    text = [
        {
            "task": "last",
            "length": n,
            "loss": {"mean": loss, "low": loss, "high": loss},
            "bits_per_byte": {"mean": bits},
        }
        for n, bits in ((256, 2.0), (4096, 1.75))
    ]
    return {
        "cell": cell, "seed": seed, "hardware": {"cpu": "one", "torch": "2"}, "commit": "0123456789abcdef",
        "training": {"tokens": 60_000_000, "emergence": {"0.5": None, "0.9": 18_000_000 if seed else None}},
        "tests": {"": {"retrieval": rows, "text": text}},
    }  # fmt: skip


def test_tables_and_plots_come_into_their_place_on_the_page(tmp_path):
    folder = tmp_path / "results" / "a-10M"
    folder.mkdir(parents=True)
    for seed, accuracy, loss in ((0, 0.8, 3.0), (1, 1.0, 3.2)):
        (folder / f"{seed}.json").write_text(json.dumps(made_up("1 layers, cls, bypass", seed, accuracy, loss)))
    page = tmp_path / "study.md"
    page.write_text((REPOSITORY / "docs" / "study.md").read_text())
    for _ in range(2):  # the second time in place of the first
        report.write_report(tmp_path / "results", page)
        text = page.read_text()
        assert text.count("| 1 layers, cls, bypass (2) |") == 2
        assert text.count("<!-- table a -->") == text.count("<!-- end of table a -->") == 1
    # The interval over two seeds is wider than that of the samples.
    assert "| 90 [0, 100] | 90 [0, 100] | 50 / 50 | 75 / 75 | not, 18M |" in text
    assert f"| {math.exp(3.1):.1f} ±" in text and "| 0.250 |" in text
    assert "2 runs, seeds 0, 1, 60M tokens each; one, torch 2, commit 0123456789." in text
    assert (tmp_path / "study_a_10M.png").stat().st_size > 1000


def test_seeds_that_agree_have_the_interval_of_their_samples(tmp_path):
    lines = report.combine("a", [made_up("1 layers, cls, bypass", seed, 1.0, 3.0) for seed in (0, 1, 2)])
    row = lines["1 layers, cls, bypass"]["retrieval"][0]
    assert row["high"] == 1.0 and 0.9 < row["low"] < 1.0


def test_what_did_not_fit_into_memory_is_left_out():
    result = made_up("1 layers, cls, bypass", 0, 1.0, 3.0)
    test = result["tests"][""]
    test["retrieval"][2:] = [{"task": "vt", "length": 16384, "error": "out of memory"}]
    test["text"] = [{"task": "last", "length": 256, "error": "out of memory"}]
    lines = report.combine("a", [result])
    assert [row["length"] for row in lines["1 layers, cls, bypass"]["retrieval"]] == [4096]
    assert report.markdown(lines).splitlines()[-1] == "| 1 layers, cls, bypass (1) | – |"


def test_a_page_without_a_place_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="<!-- table a -->"):
        report.replace_part(page.read_text(), "a", "text")

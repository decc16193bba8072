"""The benchmarks, at the size of a toy on the CPU; what they say of where they were made."""

import json
import subprocess

import pytest
import torch

from hsa_lab import results
from hsa_lab.benchmarks import kernels
from tests.commands import run_example


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "models"])
def test_gpu_benchmarks(tmp_path, name):
    run_example("benchmark.py", tmp_path, name, "--toy", device="cpu", output=tmp_path / "results")
    results = json.loads((tmp_path / "results" / f"{name}.json").read_text(encoding="utf-8"))
    models = {"models", "prefill", "decode", "generate", "segments", "static"}
    parts = {"kernels": {"kernels", "selection", "window"}, "models": models}
    assert results.keys() == parts[name]
    for part, result in results.items():
        assert {"cpu", "torch", "transformers"} <= result["hardware"].keys()
        assert "commit" in result and result["rows"]
        assert part == "static" or not any("error" in row for row in result["rows"]), result["rows"]


def test_chunks_of_the_kernel_benchmark():
    """Distinct visible chunks, nearest first; of the second kind, most of a query's are also its predecessor's."""
    for pattern, agreement in (("random", (0.0, 0.3)), ("shared", (0.85, 0.95))):
        chunks = kernels.make_indices(pattern, 1, 4096, 2, 8)[0].transpose(0, 1)
        visible = torch.arange(4096) // kernels.CHUNK_SIZE
        assert chunks.shape == (2, 4096, 8) and (chunks < visible[:, None]).all()
        assert ((chunks >= 0).sum(-1) == visible.clamp(max=8)).all()
        assert ((chunks.diff(dim=-1) < 0) | (chunks[..., 1:] < 0)).all()
        late = chunks[:, 3000:]
        same = (late[:, 1:, :, None] == late[:, :-1, None]).any(-1).float().mean()
        assert agreement[0] <= same <= agreement[1]


@pytest.mark.slow
def test_cpu_benchmark(tmp_path):
    words = ["cpu", "--lengths", "256", "512", "--what", "training", "generation", "memory"]
    run = run_example("benchmark.py", tmp_path, *words, output=tmp_path)
    made = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert made["parameters"]["llama"] == pytest.approx(made["parameters"]["hsa"], rel=0.02)
    assert {"hardware", "commit"} <= made.keys() and run.stdout.count("\n") == len(made["measurements"]) + 2
    assert len(made["measurements"]) == 2 * 2 * 5 and (tmp_path / "benchmark.png").is_file()


def test_sessions_benchmark(tmp_path):
    run_example("benchmark.py", tmp_path, "sessions", "--toy", "--lengths", "500", output=tmp_path, device="cpu")
    made = json.loads((tmp_path / "sessions.json").read_text(encoding="utf-8"))
    assert [row["memory"] for row in made["rows"]] == ["device", "host", "disk"]
    assert all(row["same_answer"] and row["tokens"] == 500 for row in made["rows"])
    assert {"hardware", "commit"} <= made.keys()


@pytest.mark.slow
def test_recall_benchmark(tmp_path):
    words = ["recall", "--max_steps", "4", "--eval_steps", "2", "--batch_size", "4", "--hidden_size", "32"]
    run_example("benchmark.py", tmp_path, *words, output=tmp_path, memory_chunks=4, device="cpu")
    made = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [entry["factor"] for entry in made["by_length"]] == [1, 2, 4, 8, 16] and len(made["history"]) == 2
    assert {"hardware", "commit"} <= made.keys()
    assert all((tmp_path / name).is_file() for name in ("recall.png", "training.png", "model/config.json"))


def test_results_say_which_commit_they_are_of(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() is None

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "x", "--no-verify")
    assert results.commit() == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert results.commit() == git("rev-parse", "HEAD") + "-dirty"

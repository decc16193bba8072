"""Running the commands of `examples` as a user does, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]

# Arguments of examples/train.py for a model that a few steps cost nothing to train.
TINY_RUN = {
    "use_cpu": True,
    "max_steps": 20,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "block_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_lower_layers": 1,
    "num_upper_layers": 0,
    "retrieval_dim": 16,
    "sliding_window": 12,
    "chunk_topk": 2,
    "vocab_size": 300,
    "synthetic_characters": 20_000,
    "disable_tqdm": True,
}


def environment(cache: Path) -> dict[str, str]:
    """One thread, no network, no traces in the caches of the user, and a line for every update of a progress bar."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "huggingface"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TQDM_MININTERVAL": "0",
    }


def run_example(
    script: str, cache: Path, *words: str, launcher: tuple[str, ...] = (), folder: Path | None = None, **arguments
) -> subprocess.CompletedProcess[str]:
    """
    Runs `examples/<script>` in a process of its own, in `folder`, with `words` and then `arguments` as flags.

    Raises: AssertionError with the end of what the script printed, if it fails.
    """
    flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, str(REPOSITORY / "examples" / script), *words, *flags]
    run = subprocess.run(command, env=environment(cache), cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-3000:]
    return run


def train(output: Path, *words: str, launcher: tuple[str, ...] = (), **arguments) -> dict[str, dict[str, float]]:
    """Runs examples/train.py on a tiny model. Returns its loss history."""
    arguments = {**TINY_RUN, "output_dir": output, **arguments}
    run_example("train.py", output.parent, *words, launcher=launcher, **arguments)
    return json.loads((output / "loss_history.json").read_text(encoding="utf-8"))

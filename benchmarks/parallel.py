"""
Checks models that are spread over two GPUs against the same models on one, and writes what errors were seen:

    python benchmarks/parallel.py --output benchmarks/results/gpu/parallel.json

`device_map` (in every way to cut the model, and "auto") must change no bit. Tensor parallelism, DDP and FSDP2 run the
cases of tests/distributed/cases.py that are named there for GPUs, each compared in logits, every gradient, a step of
training, and generation; errors are relative to the norm. The models are tiny: this is no measure of speed.
`--device cpu` runs the same on the CPU (gloo, and disk in place of the second GPU). Exits with 1 if anything is wrong.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.distributed import device_maps  # noqa: E402
from tests.distributed.cases import ON_CPU, ON_GPUS  # noqa: E402
from tests.distributed.launch import problems, run_cases, untrained_entries  # noqa: E402
from tests.helpers import OTHER_ORDER  # noqa: E402
from tests.models import tiny_model  # noqa: E402


def commit() -> str | None:
    """That of the checkout, if it is one."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return run.stdout.strip() or None


def environment(device: str) -> dict[str, object]:
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device == "cuda":
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def run_device_maps(device: str) -> dict[str, dict]:
    """Per place where the model is cut: which answers are different, and the relative error of its gradients."""
    first, second = (0, 1) if device == "cuda" else ("cpu", "disk")
    model, results = tiny_model(), {}
    ids = torch.randint(1, model.config.vocab_size, (2, 150), device=first)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        whole = device_maps.load_split(folder, first)
        maps = {start: device_maps.split_map(model, start, first, second) for start in device_maps.starts(model)}
        if device == "cuda":
            maps["auto"] = "auto"
        for name, places in maps.items():
            split = device_maps.load_split(folder, places, offload_folder=Path(folder) / "offloaded")
            result = {
                "different": device_maps.different(whole, split, ids),
                "places": sorted({str(place) for place in split.hf_device_map.values()}),
            }
            if second != "disk":  # what is there cannot be trained
                result["gradient_error"] = device_maps.gradient_error(whole, split, ids)
            results[name] = result
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", default=commit(), help="where the code is no checkout of git")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, but PyTorch sees {torch.cuda.device_count()}. Use --device cpu.")

    start = time.perf_counter()
    maps = run_device_maps(args.device)
    names = [name for name in ON_GPUS if args.device == "cuda" or name in ON_CPU]
    cases = run_cases(names, device=args.device)
    wrong: dict[str, object] = problems(names, cases)
    wrong |= {
        f"device_map {name}": result
        for name, result in maps.items()
        if result["different"] or not result.get("gradient_error", 0.0) <= OTHER_ORDER
    }
    if args.device == "cuda" and len(maps["auto"]["places"]) < 2:
        wrong["device_map auto"] = "used one GPU only"
    if untrained := untrained_entries(cases):
        wrong["entries of the plan that no case trained"] = sorted(untrained)
    results = {
        "commit": args.commit,
        "environment": environment(args.device),
        "seconds": round(time.perf_counter() - start, 1),
        "wrong": wrong,
        "device_map": maps,
        "processes": {
            name: {key: value for key, value in result.items() if key != "trained" and value}
            for name, result in cases.items()
        },
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: results[key] for key in ("environment", "seconds", "wrong")}, indent=1))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

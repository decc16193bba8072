"""
A model whose modules lie in different places, in one process, against the same model on one device. Cuts it at each of
the modules that are named, or as `device_map="auto"` does:

    python -m tests.distributed.device_maps --output results.jsonl [--device cuda] [model.norm auto ...]

The second place is the second GPU, or with `--device cpu` the disk. A line of the file is a `case` that ended, its
`seconds`, the `places` of its modules, and `errors`: the relative error of its gradients and, of the answers that
should be the same to the bit, how many are not.
"""

import argparse
import faulthandler
import json
import tempfile
import time
from pathlib import Path

import torch

from modeling_hsa import HSAForCausalLM
from tests.helpers import relative_error
from tests.models import tiny_model


def starts(model: HSAForCausalLM) -> list[str]:
    """The modules of the decoder in the order in which they run."""
    names = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    names.insert(model.config.num_lower_layers, "model.chunk_encoder")
    return [*names, "model.norm"]


def split_map(model: HSAForCausalLM, start: str, first, second) -> dict[str, object]:
    """A `device_map`: what runs before the module `start` and the tied embeddings on `first`, the rest on `second`."""
    places, place = dict.fromkeys(("model.embed_tokens", "lm_head", "model.rotary_emb"), first), first
    for name in starts(model):
        place = second if name == start else place
        places[name] = place
    return places


def load_split(folder: Path, device_map, **arguments) -> HSAForCausalLM:
    return HSAForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map, **arguments)


@torch.no_grad()
def different(whole: HSAForCausalLM, split: HSAForCausalLM, ids: torch.Tensor) -> list[str]:
    """Which answers of the two to ids [B, L] differ in any bit: at once, in segments into a cache, generated."""

    def answers(model) -> dict[str, torch.Tensor]:
        generated = model.generate(
            ids, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return {
            "logits": model(ids, use_cache=False).logits,
            "logits in segments": read_segments(model, ids),
            "tokens of generate": generated.sequences,
            "logits of generate": torch.stack(generated.logits),
        }

    ours, theirs = answers(whole), answers(split)
    return [what for what, x in ours.items() if not torch.equal(theirs[what].to(x.device), x)]


def read_segments(model: HSAForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The logits of ids [B, L], read 50 tokens at a time."""
    logits, cache = [], None
    for segment in ids.split(50, dim=1):
        outputs = model(segment, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def gradient_error(whole: HSAForCausalLM, split: HSAForCausalLM, ids: torch.Tensor) -> float:
    """The relative error of all gradients of the loss on ids [B, L] together."""
    gradients = []
    for model in (split, whole):
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.eval()
        gradients.append(torch.cat([parameter.grad.cpu().flatten() for parameter in model.parameters()]))
    return relative_error(*gradients)


def compare(name: str, folder: Path, device: str) -> dict[str, object]:
    """The result for the model saved in `folder`, cut at the module `name`."""
    start = time.perf_counter()
    first, second = (0, 1) if device == "cuda" else ("cpu", "disk")
    whole = load_split(folder, first)
    places = name if name == "auto" else split_map(whole, name, first, second)
    split = load_split(folder, places, offload_folder=folder / "offloaded")
    used = sorted({str(place) for place in getattr(split, "hf_device_map", {}).values()})
    if len(used) < 2:
        raise AssertionError("All modules were put in one place.")
    ids = torch.randint(1, whole.config.vocab_size, (2, 150), device=first)
    errors = {"different answers": float(len(different(whole, split, ids)))}
    if second != "disk":  # what is there cannot be trained
        errors["gradients"] = gradient_error(whole, split, ids)
    return {"case": name, "seconds": round(time.perf_counter() - start, 1), "places": used, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="MODULE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a case may take, or the start")
    args = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        for name in args.cases:
            faulthandler.dump_traceback_later(args.limit, exit=True)
            result = compare(name, Path(folder), args.device)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

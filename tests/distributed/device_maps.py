"""A model whose modules lie in different places, in one process, against the same model on one device."""

from pathlib import Path

import torch

from modeling_hsa import HSAForCausalLM
from tests.helpers import relative_error


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

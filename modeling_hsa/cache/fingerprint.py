"""Which model a cache belongs to: a fingerprint of its weights, and the devices of its parts."""

import hashlib

import torch


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """
    The `HSAModel` in `model`, which may have a head, adapters, or be compiled.

    Raises: TypeError where there is none.
    """
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        if any(base.__name__ == "HSAModel" for base in type(module).__mro__):
            return module
    raise TypeError(f"`model` must be an HSA model, got {type(model).__name__}.")


def fingerprint(decoder: torch.nn.Module) -> str:
    """
    SHA-256 of names, dtypes, shapes and values of the weights of an `HSAModel`: equal wherever the weights are.

    Raises: ValueError where they are not in memory.
    """
    digest = hashlib.sha256()
    for name, x in sorted(decoder.named_parameters(), key=lambda item: item[0]):
        if x.is_meta:
            raise ValueError(
                f"The weights of the model are not in memory (`{name}` is on the meta device), so nobody can tell "
                "them from others. Save the session without `model`, which leaves out the check, or load the model "
                "without offloading."
            )
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def device_of_state(decoder: torch.nn.Module, name: str) -> torch.device:
    """Where an `HSAModel`, which may be spread over several devices, looks for the state `name` of a cache."""
    part = decoder
    if name.startswith("layers."):
        part = decoder.layers[int(name.split(".")[1])]
    elif name in ("hidden", "memory"):
        part = getattr(decoder, "chunk_encoder", decoder)
    return next(x.device for x in part.parameters())

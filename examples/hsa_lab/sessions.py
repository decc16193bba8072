"""Reading a document once: `read_or_load` keeps what was read in a folder, from where the next start goes on."""

from pathlib import Path

import torch

from .reading import HSAReader, PromptBar


def has_session(folder: Path | None) -> bool:
    return folder is not None and (folder / "session.json").is_file()


def read_or_load(reader: HSAReader, document: torch.Tensor | None, folder: Path | None):
    """
    The cache of a document, and its tokens: from the session in `folder` if there is one, else by reading it, and then
    they are kept there.

    Args:
        document: int64 [1, L] on the device of the model; None for that of the session.
        folder: None for no session.

    Raises: ValueError, FileNotFoundError: for a session of another model or document, or without tokens, and if there
        is neither a document nor a session.
    """
    model = reader.model
    if not has_session(folder):
        if document is None:
            raise ValueError(f"`--session`: there is none in {folder} yet, so it needs a `--document`")
        with PromptBar(model, document.shape[1]):
            cache = reader.read(document)
        if folder is not None:
            cache.save_pretrained(folder, model=model, token_ids=document)
        return cache, document
    cache = reader.cache_class.from_pretrained(folder, model.config, model=model)
    if cache.token_ids is None:
        raise ValueError(
            f"`--session`: the one in {folder} was saved without its tokens, so no passage could be shown"
        )
    kept = cache.token_ids.to(model.device, torch.int64)
    if document is not None and not torch.equal(document, kept):
        raise ValueError(
            f"`--session`: the one in {folder} is of another document, of {kept.shape[1]:,} tokens. Leave out the "
            "document to ask about that one, or name another folder"
        )
    return cache, kept

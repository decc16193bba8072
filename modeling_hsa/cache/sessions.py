"""
Sessions: a cache in a folder, that goes on in another process with the same numbers.

Chunk memory is written in pages, one a chunk, in files that are never written again; a later save adds files with the
chunks that are new. All else, whose size does not grow with the document, is one file, written anew. The header says
which file holds which pages, what a cache must agree on with the model, and a fingerprint of the weights.
"""

import copy
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from configuration_hsa import HSAConfig

from .fingerprint import decoder_of, device_of_state, fingerprint
from .page_format import FORMATS
from .rows import chunks_of_rows
from .session_files import DamagedSession, SessionFolder


# Fields of the configuration that what is in a cache depends on, beside those in which every cache has to agree.
CONFIG_FIELDS = (
    "intermediate_size", "num_attention_heads", "chunk_topk", "chunk_landmark", "chunk_weighting",
    "num_encoder_layers", "hsa_residual", "retrieval_distance_penalty", "landmark_norm", "qk_norm", "hsa_qk_norm",
    "hidden_act", "rms_norm_eps", "rope_parameters", "full_attention_rope",
)  # fmt: skip
# Bytes of chunk memory in a file.
SHARD_BYTES = 1 << 28


@dataclass(frozen=True, eq=False)
class Session:
    """The session that a cache was saved to or loaded from last."""

    folder: Path
    token: str  # of the save: whether somebody else has saved there since
    num_pages: int
    shards: tuple[dict, ...]
    weights: dict | None  # {"sha256", "dtype"} of the weights that it was computed with
    token_ids: torch.Tensor | None = field(default=None, repr=False)

    def __deepcopy__(self, memo):
        return self


class SessionPages:
    """The chunk memory of a session, as `StoredMemory.restore` takes it."""

    def __init__(self, folder: SessionFolder, header: dict):
        self.folder, self.shards, self.count = folder, header["shards"], header["pages"]
        self.dtype = None if header["dtype"] is None else getattr(torch, header["dtype"])

    @property
    def nbytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    def blocks(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of each file, [pages, ...], in the order of the pages."""
        for shard in self.shards:
            block = self.folder.tensors(shard)
            if any(len(x) != shard["pages"] for x in block.values()):
                raise DamagedSession(self.folder.path, f"{shard['file']} does not hold {shard['pages']} pages")
            yield block

    def gather(self, name: str, table: torch.Tensor, capacity: int, device: torch.device) -> torch.Tensor:
        """[B, capacity, ...] on the device, of which the first chunks are the pages of the table [B, chunks]."""
        gathered, first = None, 0
        for block in self.blocks():
            pages = block[name]
            if gathered is None:
                with torch.inference_mode(False):
                    shape = (len(table), capacity, *pages.shape[1:])
                    gathered = torch.zeros(shape, dtype=pages.dtype, device=device)
            row, chunk = ((table >= first) & (table < first + len(pages))).nonzero(as_tuple=True)
            page = table[row, chunk] - first
            if len(table) == 1 and len(page) and bool((page.diff() == 1).all() & (chunk.diff() == 1).all()):
                gathered[0, chunk[0] : chunk[-1] + 1] = pages[page[0] : page[-1] + 1].to(device)
            else:
                gathered[row.to(device), chunk.to(device)] = pages[page].to(device)
            first += len(pages)
        return gathered


# -- saving -----------------------------------------------------------------------------------------------------------


def save_session(cache, folder: str | os.PathLike, model=None, token_ids: torch.Tensor | None = None) -> None:
    """As `HSACache.save_pretrained`."""
    cache.settle()
    token_ids = _checked_token_ids(token_ids, cache)
    weights = None if cache.session is None else cache.session.weights
    if model is not None:
        cache.check_fits(model.config)
        decoder = decoder_of(model)
        cache.attach(decoder)
        weights = {"sha256": fingerprint(decoder), "dtype": str(next(decoder.parameters()).dtype)}
    files = SessionFolder(folder)
    with files.locked():
        before = _session_to_continue(cache, files)
        shards, saved, num_pages = _write_chunks(cache, files, before)
        numbers, tensors = _split_states(cache)
        if saved is not None:
            tensors["table"] = saved[:, : cache.memory.num_chunks].cpu()
        if token_ids is not None:
            tensors["token_ids"] = token_ids.cpu()
        session = Session(files.path, secrets.token_hex(8), num_pages, tuple(shards), weights, token_ids)
        state = files.write("state", len(shards), tensors)
        files.write_header(
            {
                "token": session.token,
                "config": _config_of(cache),
                "weights": weights,
                "columns": cache.get_seq_length(),
                "rows": cache.batch_size,
                "chunks": cache.memory.num_chunks,
                "pages": num_pages,
                "kv_dtype": cache.memory.kv_dtype,
                "dtype": _name_of(cache.memory.content_dtype),
                "shards": shards,
                "state": state,
                "states": numbers,
            }
        )
        cache.session, cache.memory.saved = session, saved
        files.remove_all_but({entry["file"] for entry in (*shards, state)})


def _checked_token_ids(token_ids, cache) -> torch.Tensor | None:
    if token_ids is None:
        return None
    shape = (max(cache.batch_size, 1), cache.get_seq_length())
    is_ids = isinstance(token_ids, torch.Tensor) and token_ids.dtype in (torch.int64, torch.int32)
    if not is_ids or cache.batch_size >= 0 and tuple(token_ids.shape) != shape:
        given = (
            f"{token_ids.dtype} {list(token_ids.shape)}" if isinstance(token_ids, torch.Tensor) else repr(token_ids)
        )
        raise ValueError(f"`token_ids` must be all tokens in the cache, int64 {list(shape)}, got {given}.")
    return token_ids.int() if token_ids.numel() and int(token_ids.max()) < 1 << 31 else token_ids


def _session_to_continue(cache, files: SessionFolder) -> Session | None:
    """The session of the cache that is in the folder. Raises: ValueError if the folder holds something else."""
    header = files.header()
    if header is None:
        files.check_empty()
        return None
    ours = cache.session
    if ours is None or ours.folder.resolve() != files.path.resolve():
        raise ValueError(
            f"{files.path} holds a session already. Continue it with `HSACache.from_pretrained`, or save into an "
            "empty folder."
        )
    if ours.token != header.get("token"):
        raise ValueError(
            f"Somebody else has saved the session in {files.path} since this cache was loaded from it or saved to it. "
            "Save into an empty folder."
        )
    return ours


def _write_chunks(cache, files: SessionFolder, before: Session | None):
    """Writes the chunks that are in no file yet. Returns all shards, the page of each chunk, and how many pages."""
    memory = cache.memory
    shards = [] if before is None else list(before.shards)
    page = 0 if before is None else before.num_pages
    if memory.batch_size is None:
        return shards, None, page
    counts = chunks_of_rows(cache.rows, memory.batch_size, cache.header["chunk_size"])
    saved = torch.full(memory.stored_landmarks.shape[:2], -1)
    if before is not None and memory.saved is not None:
        known = memory.saved[:, : memory.num_chunks].cpu()
        saved[:, : known.shape[1]] = known
    is_chunk = torch.arange(saved.shape[1]) < counts.cpu()[:, None]
    saved = saved.masked_fill(~is_chunk, -1)
    row, chunk = (is_chunk & (saved < 0)).nonzero(as_tuple=True)
    one = memory.read(row[:1], chunk[:1]) if len(row) else {}
    per_shard = max(1, SHARD_BYTES // max(1, sum(x.nbytes for x in one.values())))
    for rows, chunks in zip(row.split(per_shard), chunk.split(per_shard)):
        if len(rows) == 0:
            break
        shards.append({**files.write("chunks", len(shards), memory.read(rows, chunks)), "pages": len(rows)})
        saved[rows, chunks] = torch.arange(page, page + len(rows))
        page += len(rows)
    return shards, saved.to(memory.stored_landmarks.device), page


def _split_states(cache) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """What the states hold, but for the chunk memory: numbers by state and field, and tensors by both."""
    numbers, tensors = {}, {}
    for name, state in cache.states.items():
        if state is cache.memory:
            continue
        numbers[name] = {}
        for key, value in state.saved().items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}.{key}"] = value.detach().cpu().clone()
            else:
                numbers[name][key] = value
    return numbers, tensors


def _config_of(cache) -> dict:
    return {**cache.header, **cache.computed_with}


def config_fields(config: HSAConfig) -> dict:
    """`CONFIG_FIELDS` of a configuration, as json gives them back."""
    return {name: _plain(getattr(config, name, None)) for name in CONFIG_FIELDS}


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _name_of(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


# -- loading ----------------------------------------------------------------------------------------------------------


def load_session(cache_class, folder, config: HSAConfig, model, memory: str, device, verify: bool):
    """As `HSACache.from_pretrained`."""
    if model is not None:
        decoder_of(model)
    files = SessionFolder(folder)
    while True:
        header = files.header()
        if header is None:
            cut = "a save was cut short" if files.has_remains() else "it has no session.json"
            raise FileNotFoundError(f"There is no session in {files.path}: {cut}.")
        try:
            return _load(cache_class, files, header, config, model, memory, device, verify)
        except FileNotFoundError:
            if files.header() == header:  # else somebody saved it meanwhile, and removed what it replaced
                raise
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise DamagedSession(files.path, f"its parts do not fit together ({error!r})") from error


def _load(cache_class, files: SessionFolder, header: dict, config, model, memory: str, device, verify: bool):
    for entry in (*header["shards"], header["state"]):
        files.check(entry, verify)
    _check_config(files.path, header["config"], config, cache_class)
    if header["kv_dtype"] not in FORMATS or sum(x["pages"] for x in header["shards"]) != header["pages"]:
        raise DamagedSession(files.path, "its parts do not fit together")
    if device is None:
        device = "cpu" if model is None else device_of_state(decoder_of(model), "memory")
    device = torch.device(device)
    working = None
    if memory == "disk":
        working = files.path if os.access(files.path, os.W_OK) else tempfile.gettempdir()
    cache = cache_class(config, memory=memory, folder=working, kv_dtype=header["kv_dtype"])
    tensors = files.tensors(header["state"])
    table, token_ids = tensors.pop("table", None), tensors.pop("token_ids", None)
    if table is not None:
        _check_table(files.path, table, header)
        cache.memory.restore(SessionPages(files, header), table, header["chunks"], device)
    for name, state in cache.states.items():
        if state is not cache.memory:
            _restore_state(state, name, header["states"][name], tensors, device)
    if cache.batch_size != header["rows"] or cache.get_seq_length() != header["columns"]:
        raise DamagedSession(files.path, "its parts do not fit together")
    cache.session = Session(
        files.path, header["token"], header["pages"], tuple(copy.deepcopy(header["shards"])), header["weights"],
        token_ids,
    )  # fmt: skip
    cache.is_unattached = True
    if model is not None:
        cache.attach(decoder_of(model))
    return cache


def _check_config(folder: Path, theirs: dict, config: HSAConfig, cache_class) -> None:
    ours = {**cache_class.fields_of(config), **config_fields(config)}
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"The session in {folder} was made with a model with `{name}` {theirs[name]}, but this one has "
                f"{value}. Use that model, or read the document again into another folder."
            )


def _check_table(folder: Path, table: torch.Tensor, header: dict) -> None:
    fits = table.dtype == torch.int64 and tuple(table.shape) == (header["rows"], header["chunks"])
    if not fits or table.numel() and not (-1 <= int(table.min()) and int(table.max()) < header["pages"]):
        raise DamagedSession(folder, "its table of chunks does not fit its pages")


def _restore_state(state, name: str, numbers: dict, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    saved = dict(numbers)
    for key in state.saved():
        if (tensor := tensors.get(f"{name}.{key}")) is not None:
            with torch.inference_mode(False):
                saved[key] = tensor.to(device, copy=True)
    state.restore(saved)

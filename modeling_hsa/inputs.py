"""
Checks of what `forward` is given. What a model cannot take is refused with an error that names the argument and the
fix; no keyword is silently ignored.

The values of tensors are looked at on the CPU only, and not while compiling: elsewhere that would wait for the device.
"""

import difflib

import torch

from configuration_hsa import HSAConfig

from .cache.hsa_cache import HSACache
from .copies import check_cache_class


# Keywords that `HSAModel.forward` takes besides its arguments, and who gives them.
KEYWORDS = {
    "output_attentions": "the user, `generate`",
    "output_hidden_states": "the user, `generate`",
    "output_retrieval": "the user",
    "return_dict": "the user, pipelines",
    "tokenizer": "`generate`, which reads it itself, for `stop_strings`",
    "assistant_tokenizer": "`generate`, as above",
    "return_loss": "`Trainer`, for models without labels",
    "num_items_in_batch": "`Trainer`, by way of the heads",
    "is_causal": "the user; False is refused",
    "token_type_ids": "tokenizers with segments; anything but one segment is refused",
    "cu_seq_lens_q": "`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`",
    "cu_seq_lens_k": "`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`",
    "max_length_q": "`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`",
    "max_length_k": "`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`",
    "seq_idx": "`DataCollatorWithFlattening(return_seq_idx=True)`",
    "debug_io": "the model debugger of Transformers",
    "debug_io_dir": "the model debugger of Transformers",
    "prune_layers": "the model debugger of Transformers",
}
# Keywords of `HSAForCausalLM.forward` that its loss reads: from `Trainer` and collators of shifted labels.
LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels", "ignore_index")

_ARGUMENTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "inputs_embeds", "use_cache",
)  # fmt: skip
_HEAD_ARGUMENTS = ("labels", "logits_to_keep", "start_positions", "end_positions", *LOSS_KEYWORDS[1:])

# Angles of RoPE are computed in fp64, which holds every integer up to this one.
_LARGEST_POSITION = 2**53


def _can_look(*tensors: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling() and all(x.device.type == "cpu" for x in tensors)


def _check_is_tensor(name: str, x) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}.")


def _check_is_integer(name: str, x, what: str, dtypes: tuple = (torch.int64, torch.int32)) -> None:
    _check_is_tensor(name, x)
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"`{name}` must be {names}, got {x.dtype}. Pass {what}.")


def check_tokens(config: HSAConfig, embedding: torch.Tensor | None, input_ids, inputs_embeds) -> torch.Size:
    """
    Args:
        embedding: the weight of the token embedding.
        input_ids: int64 or int32 [B, L], or None.
        inputs_embeds: [B, L, hidden_size] in the dtype of `embedding`, or None.

    Returns: [B, L].
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    given, name, dims = (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
    _check_is_tensor(name, given)
    if given.dim() != dims or 0 in given.shape:
        raise ValueError(
            f"`{name}` must be [batch, tokens{', hidden_size' * (dims == 3)}] with at least one row and one token, "
            f"got {list(given.shape)}."
        )
    if inputs_embeds is None:
        _check_is_integer("input_ids", input_ids, "token ids")
        _check_range("input_ids", input_ids, config.vocab_size, "ids", " Does the tokenizer belong to this model?")
        return input_ids.shape
    if not inputs_embeds.is_floating_point() or inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"`inputs_embeds` must be floating point of the width `hidden_size` ({config.hidden_size}), got "
            f"{inputs_embeds.dtype} {list(inputs_embeds.shape)}."
        )
    # Sharded and quantised weights, which are of other classes, do not say what is computed in.
    if (
        type(embedding) is torch.nn.Parameter
        and inputs_embeds.dtype != embedding.dtype
        and not torch.is_autocast_enabled(inputs_embeds.device.type)
    ):
        raise ValueError(
            f"`inputs_embeds` is {inputs_embeds.dtype}, but the model is {embedding.dtype}. Pass "
            "`inputs_embeds.to(model.dtype)`."
        )
    return inputs_embeds.shape[:2]


def _check_range(name: str, x: torch.Tensor, end: int, what: str, hint: str = "", ignored: int | None = None) -> None:
    if not _can_look(x):
        return
    counted = x if ignored is None else x[x != ignored]
    if counted.numel() and (counted.min() < 0 or counted.max() >= end):
        raise ValueError(
            f"`{name}` must be in [0, {end}){'' if ignored is None else f' or {ignored}'}, got {what} from "
            f"{int(counted.min())} to {int(counted.max())}.{hint}"
        )


def check_cache(config: HSAConfig, cache, batch: int) -> None:
    """Raises `TypeError` or `ValueError` for a cache that is not for this model or not of this batch."""
    if cache is None:
        return
    check_cache_class(cache)
    if cache.batch_size not in (-1, batch):
        raise ValueError(f"`past_key_values` holds {cache.batch_size} rows but the tokens have {batch}.")
    cache.check_fits(config)


def check_mask(attention_mask) -> None:
    """Its shape is checked where it is read. Raises `ValueError` for what is no mask of ones and zeros."""
    if attention_mask is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.dtype == torch.bool:
        return
    if attention_mask.is_complex():
        raise ValueError(f"`attention_mask` must be boolean, integer or float, got {attention_mask.dtype}.")
    if attention_mask.numel() and _can_look(attention_mask) and not attention_mask.min() >= 0:  # false of NaN
        raise ValueError(
            f"`attention_mask` must be 0 for padding and 1 for tokens, got {attention_mask.min().item()}. Masks that "
            "are added to scores have no meaning for a model that selects chunks."
        )


def check_keywords(config: HSAConfig, kwargs: dict, shape: torch.Size) -> None:
    """
    Raises `TypeError` for a keyword that nobody reads and that is not None, with the closest name that is known, and
    `ValueError` for one that asks for what cannot be done. `shape`: [B, L].
    """
    for name, value in kwargs.items():
        if value is None or name in KEYWORDS:
            continue
        if name in _HEAD_ARGUMENTS:
            raise TypeError(f"`{name}` is an argument of models with a head for it, which HSAModel has not.")
        close = difflib.get_close_matches(name, (*KEYWORDS, *_ARGUMENTS, *_HEAD_ARGUMENTS), n=1)
        hint = f"Did you mean `{close[0]}`?" if close else "Leave it out."
        raise TypeError(f"`{name}` is not an argument of the forward of HSA models. {hint}")
    if kwargs.get("output_attentions") and config._attn_implementation != "eager":
        raise ValueError(
            f"`output_attentions=True` needs `attn_implementation='eager'`, but it is "
            f"{config._attn_implementation!r}. Call `model.set_attn_implementation('eager')` first."
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("`is_causal=False` cannot be: an HSA model retrieves from what came before. Leave it out.")
    segments = kwargs.get("token_type_ids")
    if segments is not None:
        _check_is_integer("token_type_ids", segments, "zeros, or leave it out")
        if segments.shape != shape or (_can_look(segments) and segments.any()):
            raise ValueError(
                f"`token_type_ids` must be zeros of the shape {list(shape)}: the model has no embedding of segments. "
                "Leave it out."
            )


def check_position_ids(position_ids, shape: torch.Size) -> None:
    """`shape`: [B, L] of the tokens."""
    if position_ids is None:
        return
    _check_is_tensor("position_ids", position_ids)
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise ValueError(f"`position_ids` must be integers, got {position_ids.dtype}.")
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, shape[0]) or position_ids.shape[1] != shape[1]:
        raise ValueError(f"`position_ids` must have the shape {list(shape)}, got {list(position_ids.shape)}.")
    if _can_look(position_ids) and position_ids.max() > _LARGEST_POSITION:
        raise ValueError(
            f"`position_ids` must be at most 2**53, beyond which RoPE cannot tell neighbours apart, got "
            f"{int(position_ids.max())}."
        )


def _document_starts(name: str, bounds, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """`cu_seq_lens_*` [documents + 1] or `seq_idx` [1 | B, L] -> bool [1 | B, L], where documents start."""
    batch, length = shape
    _check_is_integer(name, bounds, "what `DataCollatorWithFlattening` returns")
    if name == "seq_idx":
        if bounds.dim() != 2 or bounds.shape[0] not in (1, batch) or bounds.shape[1] != length:
            raise ValueError(f"`seq_idx` must have the shape {list(shape)}, got {list(bounds.shape)}.")
        bounds = bounds.to(device)
        return torch.nn.functional.pad(bounds[:, 1:] != bounds[:, :-1], (1, 0), value=True)
    if bounds.dim() != 1 or len(bounds) < 2 or batch != 1:
        raise ValueError(
            f"`{name}` must be the [documents + 1] bounds of documents in one row, got {list(bounds.shape)} for "
            f"{batch} rows."
        )
    if _can_look(bounds) and (bounds[0] != 0 or bounds[-1] != length or (bounds.diff() < 0).any()):
        raise ValueError(
            f"`{name}` must rise from 0 to the number of tokens, {length}, got {int(bounds[0])} to {int(bounds[-1])}."
        )
    starts = torch.zeros(length + 1, dtype=torch.bool, device=device)
    return starts.index_fill(0, bounds.to(device=device, dtype=torch.int64), True)[None, :length]


def read_positions(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: HSACache | None,
    shape: torch.Size,
    device: torch.device,
    kwargs: dict,
) -> torch.Tensor | None:
    """
    Position ids in which every document starts anew that `cu_seq_lens_q`, `cu_seq_lens_k` or `seq_idx` tells of.

    Args:
        position_ids: int64 [1 | B, L], or None.
        cache: of earlier tokens, or None.
        shape: [B, L].
        kwargs: the keywords of `forward`.

    Returns:
        `position_ids` where they are given, else those of the documents, or None where there are none.

    Raises:
        ValueError: for bounds of documents that are malformed, or that do not agree with each other or with
            `position_ids`.
    """
    check_position_ids(position_ids, shape)
    names = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if kwargs.get(name) is not None]
    starts = {name: _document_starts(name, kwargs[name], shape, device) for name in names}
    if not starts:
        return position_ids
    told_by = "position_ids"
    if position_ids is None:
        told_by = names[0]
        if attention_mask is not None or (cache is not None and cache.get_seq_length() > 0):
            raise ValueError(
                f"`{names[0]}` beside an `attention_mask` or cached tokens needs `position_ids`, which restart with "
                "every document."
            )
        slot = torch.arange(shape[1], device=device)[None]
        position_ids = slot - torch.where(starts[names[0]], slot, 0).cummax(dim=1).values
    if attention_mask is None and _can_look(position_ids):
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
        for name, one in starts.items():
            if (one[:, 1:] != restarts).any():
                raise ValueError(
                    f"`{name}` and `{told_by}` do not agree about where documents start. Leave out one of them."
                )
    return position_ids


def check_inputs(
    model, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs: dict
) -> torch.Tensor | None:
    """
    All checks of the arguments of `HSAModel.forward`.

    Returns:
        the position ids to work with: those given, those that other bounds of documents stand for, or None.

    Raises:
        ValueError: for what does not fit together or is out of range, with the name of the argument and the fix.
        TypeError: for what is of another type, and for keywords that nobody reads.
    """
    shape = check_tokens(model.config, getattr(model.embed_tokens, "weight", None), input_ids, inputs_embeds)
    check_cache(model.config, past_key_values, shape[0])
    check_mask(attention_mask)
    check_keywords(model.config, kwargs, shape)
    device = (input_ids if inputs_embeds is None else inputs_embeds).device
    return read_positions(position_ids, attention_mask, past_key_values, shape, device, kwargs)


def check_labels(name: str, labels, shape: torch.Size, vocab_size: int, ignore_index: int = -100) -> None:
    """`shape`: [B, L] of the tokens. Raises `TypeError` or `ValueError`."""
    if labels is None:
        return
    _check_is_integer(name, labels, "token ids, and -100 for what is not predicted", (torch.int64,))
    if labels.shape != shape:
        raise ValueError(f"`{name}` must have the shape of the tokens, {list(shape)}, got {list(labels.shape)}.")
    _check_range(name, labels, vocab_size, "labels", ignored=ignore_index)


def check_logits_to_keep(kept, length: int, has_labels: bool) -> None:
    """`kept`: a number of last tokens, 0 for all, or int64 [n] indices of tokens."""
    if isinstance(kept, torch.Tensor):
        _check_is_integer("logits_to_keep", kept, "indices of tokens")
        if kept.dim() != 1:
            raise ValueError(f"`logits_to_keep` must be a number or [n] indices, got a tensor {list(kept.shape)}.")
        _check_range("logits_to_keep", kept, length, "indices")
    elif not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
        raise ValueError(
            f"`logits_to_keep` must be an integer of at least 0, which stands for all, or a tensor of indices, got "
            f"{kept!r}."
        )
    if has_labels and (isinstance(kept, torch.Tensor) or 0 < kept < length):
        raise ValueError("`labels` need the logits of all tokens. Leave out `logits_to_keep`.")


def check_head_inputs(vocab_size: int, tokens, labels, logits_to_keep, loss_arguments: dict) -> None:
    """
    Checks of the arguments that `HSAForCausalLM.forward` has beyond those of the model, before the model runs and adds
    to a cache. `tokens`: `input_ids` or `inputs_embeds`, whose own checks are those of the model.
    """
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        return
    shifted, ignored = loss_arguments.get("shift_labels"), loss_arguments.get("ignore_index", -100)
    for name, value in (("labels", labels), ("shift_labels", shifted)):
        check_labels(name, value, tokens.shape[:2], vocab_size, ignored)
    check_logits_to_keep(logits_to_keep, tokens.shape[1], labels is not None or shifted is not None)

"""
The sliding window, through the attention interface of Transformers, without an L x L mask.

The keys a query sees lie at most W - 1 tokens back, so the queries are cut into blocks, each with the keys of its own
span and of the W - 1 tokens before, and the blocks become rows of the batch: the mask has L x (block + W - 1) entries.
Flash attention needs no mask at all and gets the window as an argument.
"""

import torch
from transformers.utils.generic import is_flash_attention_requested

from .layout import TokenLayout


_MIN_BLOCK = 64


def window_attention(attention, module, query, key, value, layout: TokenLayout, window: int, **kwargs):
    """
    Args:
        attention: the attention function of Transformers, `ALL_ATTENTION_FUNCTIONS` or eager.
        query: [B, Hq, L, D] in aligned order.
        key, value: [B, Hkv, N + L, D], right-aligned, the N last ones of earlier calls first.

    Returns:
        output [B, L, Hq, D], and the weights [B, Hq, L, N + L] or None.
    """
    if is_flash_attention_requested(module.config):
        return _flash(attention, module, query, key, value, layout, window, **kwargs)
    batch, _, length, _ = query.shape
    reach = layout.align(layout.reach(window).expand(batch if layout.order is not None else -1, -1)[..., None])[..., 0]
    block = max(_MIN_BLOCK, window // 2)
    if length <= 2 * block or kwargs.get("output_attentions"):
        mask = _window_mask(reach, key.shape[2] - length, key.shape[2])
        return attention(module, query, key, value, _as_mask(mask, module, query), **kwargs)

    num_blocks = -(-length // block)
    span = block + window - 1
    pad = torch.nn.functional.pad
    query = pad(query, (0, 0, 0, num_blocks * block - length))
    missing = window - 1 - (key.shape[2] - length)  # of the W - 1 tokens before the first query
    key, value = (pad(x, (0, 0, missing, num_blocks * block - length)) for x in (key, value))
    query = query.unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)  # [B * blocks, Hq, block, D]
    key, value = (x.unfold(2, span, block).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (key, value))

    mask = _window_mask(pad(reach, (0, num_blocks * block - length)).view(-1, block), window - 1, span)
    mask = mask.view(-1, num_blocks, *mask.shape[1:]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    output, _ = attention(module, query, key, value, _as_mask(mask, module, query), **kwargs)
    output = output.view(batch, num_blocks * block, *output.shape[2:])[:, :length]
    return output, None


def _window_mask(reach: torch.Tensor, offset: int, keys: int) -> torch.Tensor:
    """reach [n, Q] -> bool [n, 1, Q, keys]: query i, at key `offset + i`, sees that key and `reach` ones before it."""
    position = torch.arange(offset, offset + reach.shape[1], device=reach.device)
    back = position[:, None] - torch.arange(keys, device=reach.device)
    return ((back >= 0) & (back <= reach[..., None]))[:, None]


def _as_mask(mask: torch.Tensor, module, query: torch.Tensor):
    """The mask in the form the attention implementation takes: bool, additive for eager, a `BlockMask` for flex."""
    implementation = module.config._attn_implementation
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(
            ~mask, torch.finfo(query.dtype).min
        )
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        dense = mask[:, 0].expand(query.shape[0], -1, -1)  # one per row, even where all rows agree
        return create_block_mask(
            lambda b, h, q, k: dense[b, q, k],
            dense.shape[0],
            None,
            dense.shape[1],
            dense.shape[2],
            device=query.device,
        )
    return mask


def _flash(attention, module, query, key, value, layout: TokenLayout, window: int, **kwargs):
    """Flash attention takes padding as a [B, keys] mask, or documents as restarting positions of a single row."""
    batch, _, length, _ = query.shape
    mask = position_ids = None
    if layout.past is None and layout.real is None and key.shape[2] == length:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        position_ids = layout.position.expand(batch, -1).reshape(1, -1)
    elif layout.past is None:
        position = layout.align(layout.position.expand(batch, -1)[..., None])[..., 0]
        real = layout.is_real
        if bool(((position[:, 1:] <= position[:, :-1]) & real[:, :-1] & real[:, 1:]).any()):
            raise ValueError("Packed documents with padding or a cache need `attn_implementation='sdpa'` or 'eager'.")
        mask = layout.is_real
        if key.shape[2] > length or layout.order is not None:
            from_end = torch.arange(key.shape[2] - 1, -1, -1, device=query.device)
            mask = from_end <= torch.where(layout.is_real, position, -1).amax(1, keepdim=True)
    kwargs["position_ids"] = position_ids
    output, _ = attention(module, query, key, value, mask, sliding_window=window, **kwargs)
    return output.view(batch, length, *output.shape[2:]), None

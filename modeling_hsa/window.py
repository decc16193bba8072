"""
Causal attention to a sliding window or to the whole document, through the attention interface of Transformers, for a
window without an L x L mask.

The keys a query sees lie at most W - 1 tokens back, so the queries are cut into blocks, each with the keys of its own
span and of the W - 1 tokens before, and the blocks become rows of the batch: the mask has L x (block + W - 1) entries.
Flash attention needs no mask at all and gets the window as an argument: that of flash-attn where it was asked for, and
with `attn_implementation="sdpa"` on CUDA the one PyTorch ships, to which its own `scaled_dot_product_attention` gives
no window.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from .layout import TokenLayout, make_contiguous
from .precision import attention_dtype


_MIN_BLOCK = 64


def _load_varlen_attn():
    """PyTorch's `varlen_attn`, or None where it is missing or knows no window yet."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= parameters.keys():
        return None
    # Versions without the argument take fewer key/value heads as they are.
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn


_varlen_attn = _load_varlen_attn()


@dataclass
class Call:
    """
    What is to be attended to.

    Attributes:
        attention: the attention function of Transformers, `ALL_ATTENTION_FUNCTIONS` or eager.
        query: [B, Hq, L, D] in aligned order.
        key, value: [B, Hkv, N + L, D], right-aligned, the N last ones of earlier calls first.
        window: tokens that a token sees, itself included; None: all of its document.
        kwargs: of the attention function.
    """

    attention: Callable
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: TokenLayout
    window: int | None
    kwargs: dict

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        return self.key.shape[2]

    @property
    def block(self) -> int:
        """Queries to a block."""
        return max(_MIN_BLOCK, self.window // 2)

    @property
    def mask_key(self) -> tuple:
        # All layers of a call have as many keys, a number that as a key would keep compiled code from varying it.
        return self.window, self.query.dtype, self.module.config._attn_implementation


Output = tuple[torch.Tensor, torch.Tensor | None]


def window_attention(
    attention: Callable, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    layout: TokenLayout, window: int | None, **kwargs,
) -> Output:  # fmt: skip
    """
    See [`Call`] for the arguments.

    Returns:
        output [B, L, Hq, D], and the weights [B, Hq, L, N + L] or None.
    """
    call = Call(attention, module, query, key, value, layout, window, kwargs)
    return next(attend(call) for fits, attend in _STRATEGIES if fits(call))


def _sees_all_keys(call: Call) -> bool:
    one = call.length == 1 and call.layout.past is not None
    return one and (call.window is None or call.num_keys <= call.window)


def _attend_to_all(call: Call) -> Output:
    return call.attention(call.module, call.query, call.key, call.value, None, **call.kwargs)


def _without_unseen_keys(call: Call) -> Call:
    """
    Keys and values that no query of their row sees may be those of another document and hold NaN, which a mask does
    not stop: here they are zeros.
    """
    earlier = call.num_keys - call.length
    if call.layout.past is not None or not earlier:
        return call

    def find_unseen() -> torch.Tensor:
        if call.layout.is_step:
            return ~_ring_mask(call)[..., None]
        slot = torch.arange(earlier, call.num_keys, device=call.key.device)
        first = (slot - _aligned_reach(call)).amin(1)
        return (torch.arange(call.num_keys, device=first.device) < first[:, None])[:, None, :, None]

    unseen = call.layout.share(("unseen", call.window), find_unseen)
    return replace(call, key=call.key.masked_fill(unseen, 0), value=call.value.masked_fill(unseen, 0))


def _fits_one_mask(call: Call) -> bool:
    return call.window is None or call.length <= 2 * call.block or bool(call.kwargs.get("output_attentions"))


def _attend_with_one_mask(call: Call) -> Output:
    call = _without_unseen_keys(call)

    def make_mask() -> torch.Tensor:
        if call.layout.is_step:
            mask = _ring_mask(call)[:, :, None]
        else:
            mask = _window_mask(_aligned_reach(call), call.num_keys - call.length, call.num_keys)
        return _as_mask(mask, call.module, call.query)

    mask = call.layout.share(("all", *call.mask_key), make_mask)
    return call.attention(call.module, call.query, call.key, call.value, mask, **call.kwargs)


def _attend_in_blocks(call: Call) -> Output:
    """Blocks of queries as rows of a batch, each with the keys of its own span and of the W - 1 tokens before."""
    call = _without_unseen_keys(call)
    window, block, length = call.window, call.block, call.length
    # Compiled code has a block more, so that the tokens are never all there is: see `make_contiguous`.
    num_blocks = length // block + 1 if torch.compiler.is_compiling() else -(-length // block)
    span = block + window - 1
    pad = torch.nn.functional.pad
    query = pad(call.query, (0, 0, 0, num_blocks * block - length))
    missing = window - 1 - (call.num_keys - length)  # of the W - 1 tokens before the first query
    key, value = (pad(x, (0, 0, missing, num_blocks * block - length)) for x in (call.key, call.value))
    query = query.unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)  # [B * blocks, Hq, block, D]
    key, value = (x.unfold(2, span, block).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (key, value))
    batch = call.layout.batch

    def make_mask() -> torch.Tensor:
        reach = pad(_aligned_reach(call), (0, num_blocks * block - length)).view(-1, block)
        mask = _window_mask(reach, window - 1, span)
        mask = mask.view(-1, num_blocks, *mask.shape[1:]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        return _as_mask(mask, call.module, query)

    mask = call.layout.share(("blocks", *call.mask_key), make_mask)
    output, _ = call.attention(call.module, query, key, value, mask, **call.kwargs)
    output = output.view(batch, num_blocks * block, *output.shape[2:])[:, :length]
    return make_contiguous(output), None  # as tensor parallelism takes it for granted


def _aligned_reach(call: Call) -> torch.Tensor:
    """[n, L] in aligned order: how many tokens back each one sees."""
    layout = call.layout
    reach = layout.reach(call.window).expand(layout.batch if layout.order is not None else -1, -1)
    return layout.align(reach[..., None])[..., 0]


@torch.compiler.assume_constant_result
def _has_flash_kernels(device_index: int, head_dim: int) -> bool:
    """Whether PyTorch's flash attention runs there, forward and backward, and has not been switched off."""
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    capability = torch.cuda.get_device_capability(device_index)
    # The kernels exist from Ampere on, and their backward of wide heads needs the shared memory of these.
    fits = capability >= (8, 0) and (head_dim <= 192 or capability in ((8, 0), (9, 0), (10, 0)))
    return fits and torch.backends.cuda.flash_sdp_enabled()


def _takes_varlen(call: Call) -> bool:
    """Whether PyTorch's flash attention can do what is asked of `attn_implementation="sdpa"`."""
    head_dim = call.query.shape[-1]
    return (
        _varlen_attn is not None
        and call.length > 1
        and call.module.config._attn_implementation == "sdpa"
        and call.query.device.type == "cuda"
        and attention_dtype(call.query) in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and call.kwargs.get("dropout", 0.0) == 0.0
        and not call.kwargs.get("output_attentions")
        and _has_flash_kernels(call.query.device.index, head_dim)
        and _sequences(call) is not None
    )


def _sequences(call: Call) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    How the queries [B * L] and the keys [B * (N + L)] divide into sequences that attend to themselves.

    Returns: for each the int32 bounds, first the 0. None where only the values of tensors on the device would tell
    how many sequences there are.
    """
    return call.layout.share(("sequences",), lambda: _find_sequences(call))


def _find_sequences(call: Call) -> tuple[torch.Tensor, torch.Tensor] | None:
    layout, length, keys = call.layout, call.length, call.num_keys
    device = layout.device
    rows = torch.arange(layout.batch + 1, dtype=torch.int32, device=device)
    if layout.past is not None:
        return rows * length, rows * keys
    if not layout.one_document:
        bounds = call.kwargs.get("cu_seq_lens_q")  # `DataCollatorWithFlattening(return_flash_attn_kwargs=True)`
        if bounds is None or layout.batch > 1 or layout.real is not None or keys != length:
            return None
        return (bounds.to(device=device, dtype=torch.int32),) * 2

    # A row is three sequences: padding, tokens, padding. The tokens see those of earlier calls, padding only itself.
    real, slot = layout.is_real.expand(layout.batch, -1), torch.arange(length, device=device)
    end = torch.where(real, slot + 1, 0).amax(1)
    start = torch.where(real, slot, length).amin(1).minimum(end)
    tokens = layout.position.expand(layout.batch, -1).amax(1) + 1  # in the document, up to the last one
    key_end = end + (keys - length)
    key_start = (key_end - tokens).clamp(min=0)

    def bounds_of(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
        bounds = torch.stack([start, end, torch.full_like(end, size)], dim=1) + rows[:-1, None] * size
        return torch.cat([rows[:1], bounds.flatten().to(torch.int32)])

    return bounds_of(start, end, length), bounds_of(key_start, key_end, keys)


def _attend_with_varlen(call: Call) -> Output:
    """The causal window is aligned to the end of each sequence of keys."""
    dtype, batch = attention_dtype(call.query), call.layout.batch
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (call.query, call.key, call.value))
    window = -1 if call.window is None else call.window - 1
    output = _varlen_attn(
        query, key, value, *_sequences(call), call.length, call.num_keys,
        scale=call.kwargs["scaling"], window_size=(window, 0),
    )  # fmt: skip
    return output.unflatten(0, (batch, call.length)), None


def _window_mask(reach: torch.Tensor, offset: int, keys: int) -> torch.Tensor:
    """reach [n, Q] -> bool [n, 1, Q, keys]: query i, at key `offset + i`, sees that key and `reach` ones before it."""
    position = torch.arange(offset, offset + reach.shape[1], device=reach.device)
    back = position[:, None] - torch.arange(keys, device=reach.device)
    return ((back >= 0) & (back <= reach[..., None]))[:, None]


def _ring_mask(call: Call) -> torch.Tensor:
    """
    bool [n, 1, slots], for a step: which slots of a `TokenRing` its token sees. The one `back` tokens before it is in
    slot `-1 - (position - back) % slots`.
    """
    layout, slots = call.layout, call.num_keys
    back = (layout.position + 1 + torch.arange(slots, device=layout.device)) % slots
    return (back <= layout.reach(call.window))[:, None]


def _as_mask(mask: torch.Tensor, module: nn.Module, query: torch.Tensor):
    """The mask in the form the attention implementation takes: bool, additive for eager, a `BlockMask` for flex."""
    implementation = module.config._attn_implementation
    # A bool one of `sdpa` would be made additive in every layer, which counts where there is one token.
    if implementation == "eager" or implementation == "sdpa" and mask.shape[-2] == 1:
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


def _is_flash(call: Call) -> bool:
    return is_flash_attention_requested(call.module.config)


def _attend_with_flash(call: Call) -> Output:
    """Flash attention takes padding as a [B, keys] mask, or documents as restarting positions of a single row."""
    layout, batch, length, keys = call.layout, call.layout.batch, call.length, call.num_keys
    query, key, value = call.query, call.key, call.value
    mask = position_ids = None
    if layout.past is None and layout.real is None and keys == length:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        position_ids = layout.position.expand(batch, -1).reshape(1, -1)
    elif layout.past is None:
        if not layout.one_document:
            raise ValueError("Packed documents with padding or a cache need `attn_implementation='sdpa'` or 'eager'.")
        mask = layout.is_real
        if keys > length or layout.order is not None:
            position = layout.align(layout.position.expand(batch, -1)[..., None])[..., 0]
            from_end = torch.arange(keys - 1, -1, -1, device=query.device)
            mask = from_end <= torch.where(layout.is_real, position, -1).amax(1, keepdim=True)
    kwargs = {**call.kwargs, "position_ids": position_ids}
    output, _ = call.attention(call.module, query, key, value, mask, sliding_window=call.window, **kwargs)
    return output.view(batch, length, *output.shape[2:]), None


# The first that fits is taken.
_STRATEGIES: tuple[tuple[Callable[[Call], bool], Callable[[Call], Output]], ...] = (
    (_is_flash, _attend_with_flash),
    (_sees_all_keys, _attend_to_all),
    (_takes_varlen, _attend_with_varlen),
    (_fits_one_mask, _attend_with_one_mask),
    (lambda call: True, _attend_in_blocks),
)

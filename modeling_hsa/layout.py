"""
Where the tokens of a call stand: which document they belong to, how far into it they are, and so what they may see.

Padding is absent, not masked: positions count real tokens only, and the chunk grid of a row starts at its first real
token, so that a padded row equals the same row alone. A position id that does not increase starts a new document
(packed rows, as `DataCollatorWithFlattening` makes them); neither window nor retrieval crosses into an earlier one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch

from .counting import count_from


class RowState(NamedTuple):
    """The last token of each row; [B] tensors, or [1] where rows agree. An empty row has -1, 0, -1."""

    position: torch.Tensor  # in its document
    first_chunk: torch.Tensor  # index, in the chunk memory of the row, of the first chunk of that document
    position_id: torch.Tensor  # RoPE position


class Past(NamedTuple):
    """What a layout is told of the calls before."""

    # Columns of earlier calls, tokens and padding; unknown for a step.
    columns: int = 0
    # Tokens of every row, where all rows agree and nothing was padded or packed; else None, and `rows` tells.
    tokens: int | None = 0
    rows: RowState | None = None
    # One token per row is to be laid out without looking at a value: a step of a static cache.
    is_step: bool = False

    def row_state(self, device: torch.device) -> RowState:
        if self.rows is not None:
            return self.rows
        position = torch.full((1,), self.tokens - 1, device=device)
        return RowState(position, torch.zeros_like(position), position)


@dataclass
class TokenLayout:
    """
    Layout of the L tokens of a call; n is 1 where all rows agree, else B.

    "Aligned order" is the order of the tokens with the padding of each row moved to its left end.
    """

    # Rows of the call, B.
    batch: int
    # [n, L] RoPE positions.
    position_ids: torch.Tensor
    # [n, L] How many tokens of its document come before a token; 0 for padding.
    position: torch.Tensor
    # [n, L] A token sees chunk i of the memory iff first_chunk <= i < first_chunk + position // S.
    first_chunk: torch.Tensor
    # The last tokens of earlier calls.
    before: RowState
    # Tokens before this call, where all rows agree and nothing is padded or packed. The next four are then None.
    past: int | None = None
    # [B, L] The permutation to aligned order; None if nothing has to move.
    order: torch.Tensor | None = None
    # [B, L] in aligned order: whether a token is real; None if all are.
    real: torch.Tensor | None = None
    # [B, L] in aligned order: whether a token completes a chunk.
    chunk_end: torch.Tensor | None = None
    # [B] Chunks of earlier calls.
    num_chunks: torch.Tensor | None = None
    # Whether the tokens of a row are all of one document; False also where finding out would wait for the device.
    one_document: bool = True
    # One token per row, laid out without looking at a value.
    is_step: bool = False
    # What layers compute from the layout and share, such as masks, by a key of their own.
    shared: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.position.shape[1]

    @property
    def device(self) -> torch.device:
        return self.position.device

    @property
    def counts(self) -> torch.Tensor | None:
        """[B] real tokens of the call, None if all are."""
        return None if self.real is None else self.real.sum(1)

    @property
    def is_real(self) -> torch.Tensor:
        """[n, L] in aligned order: whether a token is real."""
        return torch.ones_like(self.position, dtype=torch.bool) if self.real is None else self.real

    @property
    def after(self) -> RowState:
        """The last tokens including this call, [B] each."""
        last = (x[:, -1] for x in self.aligned_rows())
        if self.real is None:
            return RowState(*last)
        return RowState(*(torch.where(self.real[:, -1], x, y) for x, y in zip(last, self.before)))

    def aligned_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`position`, `first_chunk` and `position_ids`, [B, L] in aligned order."""
        rows = (self.position, self.first_chunk, self.position_ids)
        return tuple(self.align(x.expand(self.batch, -1)[..., None])[..., 0] for x in rows)

    def to(self, device, non_blocking: bool = False) -> "TokenLayout":
        """The layout on another device, for models spread over several."""
        if self.device == torch.device(device):
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: x.to(device) for name, x in values.items() if isinstance(x, torch.Tensor)}
        return replace(self, **moved, before=RowState(*(x.to(device) for x in self.before)), shared={})

    def share(self, key: tuple, make: Callable):
        """
        `make()`, made once for all layers that ask for `key`. Compiled code makes it in every layer: compiled layer by
        layer, the first one would else be another function than the others, and in one graph the compiler finds it.
        """
        if torch.compiler.is_compiling():
            return make()
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def visible(self, chunk_size: int, stride: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """`(first, end)` [n, L] of the visible chunks; with a stride, of those its first token sees."""
        position = self.position - self.position % stride
        return self.first_chunk, self.first_chunk + position // chunk_size

    def reach(self, window: int | None) -> torch.Tensor:
        """[n, L]: how many tokens back the window of a token goes inside its document (None: all of it)."""
        return self.position if window is None else self.position.clamp(max=window - 1)

    def align(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ..., L, D] with the padding of each row moved to the left."""
        return x if self.order is None else _permute_tokens(x, self.order)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `align`."""
        return x if self.order is None else _permute_tokens(x, self.order.argsort(dim=-1))


def make_contiguous(x: torch.Tensor) -> torch.Tensor:
    """
    `x.contiguous()`. Compiled code copies: whether x is contiguous, as a slice is if it is all there is, would be a
    question about its lengths, and the code would hold for those with the same answer.
    """
    return x.clone(memory_format=torch.contiguous_format) if torch.compiler.is_compiling() else x.contiguous()


def _permute_tokens(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    order = order.view(order.shape[0], *[1] * (x.dim() - 3), order.shape[1], 1)
    return x.gather(-2, order.expand(x.shape))


def build_layout(
    batch: int,
    length: int,
    device: torch.device,
    *,
    chunk_size: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past: Past | None = None,
) -> TokenLayout:
    """
    Args:
        attention_mask: [B, past + L], nonzero for real tokens, or None for no padding.
        position_ids: int64 [1 | B, L], or None to count on from the calls before.
        past: where the rows stand after the calls before, or None without a cache.

    Raises:
        ValueError, TypeError: for a mask that is no tensor or does not have this shape.
    """
    is_cached, past = past is not None, past or Past()
    if past.is_step:
        return _step_layout(batch, position_ids, chunk_size, past.rows)
    real = _new_columns(attention_mask, batch, past.columns, length, device)
    right_aligned = contiguous = real is None
    if real is not None and not torch.compiler.is_compiling():  # compiled, rows count as padded in any way
        # The one place that looks at the values of the mask; on an accelerator this waits for them.
        starts = torch.nn.functional.pad(real.int(), (1, 0)).diff(dim=1) > 0
        blocks = starts.sum(1)
        facts = torch.stack([real.all(), (real[:, -1] & (blocks == 1)).all(), (blocks < 2).all()])
        full, right_aligned, contiguous = facts.tolist()
        real = None if full else real
    # With a mask or a cache the call waits for the device anyway. Packed training, which has neither, does not.
    look = (attention_mask is not None or is_cached) and not torch.compiler.is_compiling()
    if real is None and past.tokens is not None:
        expected = count_from(past.tokens, length, device)[None]
        if position_ids is None or look and bool((position_ids == expected).all()):
            return TokenLayout(
                batch=batch, position_ids=expected, position=expected, first_chunk=torch.zeros_like(expected),
                before=past.row_state(device), past=past.tokens,
            )  # fmt: skip

    layout = _general_layout(batch, length, device, chunk_size, real, position_ids, past, look)
    if real is not None and not right_aligned and (is_cached or not contiguous):
        order = real.int().argsort(dim=1, stable=True)
        layout = replace(layout, order=order, real=real.gather(1, order), chunk_end=layout.chunk_end.gather(1, order))
    return layout


def _new_columns(attention_mask, batch: int, columns: int, length: int, device: torch.device):
    """The columns of the mask, which may be elsewhere, that belong to this call, as bool [B, L] on `device`."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"`attention_mask` must be a tensor [batch, tokens], got {type(attention_mask).__name__}.")
    if attention_mask.dim() != 2 or attention_mask.shape != (batch, columns + length):
        raise ValueError(
            f"`attention_mask` must have the shape [{batch}, {columns + length}] (batch, cached + new tokens), got "
            f"{list(attention_mask.shape)}. Masks of other shapes have no meaning for a model that selects chunks."
        )
    return attention_mask[:, columns:].to(device) != 0


def _step_layout(batch: int, position_ids: torch.Tensor | None, chunk_size: int, before: RowState) -> TokenLayout:
    """One token per row after those of `before`, without a look at any value."""
    position, first_chunk, position_id = (x[:, None] for x in before)
    num_chunks = first_chunk + (position + 1) // chunk_size
    position = position + 1
    if position_ids is None:
        position_ids = position_id + 1
    else:
        position_ids = position_ids.expand_as(position)
        starts = position_ids <= position_id
        position = position.masked_fill(starts, 0)
        first_chunk = torch.where(starts, num_chunks, first_chunk)
    return TokenLayout(
        batch=batch, position_ids=position_ids, position=position, first_chunk=first_chunk, before=before,
        num_chunks=num_chunks[:, 0], is_step=True,
    )  # fmt: skip


def _general_layout(
    batch: int, length: int, device: torch.device, chunk_size: int, real: torch.Tensor | None,
    position_ids: torch.Tensor | None, past: Past, look: bool,
) -> TokenLayout:  # fmt: skip
    """
    The layout by counting, for rows that are padded, packed or continued at different lengths. `look`: whether to find
    out from given position ids if documents start inside a row.
    """
    state = RowState(*(x.expand(batch) for x in past.row_state(device)))
    is_padded = real is not None
    if not is_padded:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
    slot = torch.arange(length, device=device)[None]

    def before(x: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """x [B, L] one token earlier, the first being `fill` [B]."""
        return torch.cat([fill[:, None], x[:, :-1]], dim=1)

    starts = torch.zeros_like(real)
    if position_ids is not None:
        position_ids = position_ids.expand(batch, -1)
        last_real = torch.where(real, slot, -1).cummax(1).values
        last_id = torch.where(
            last_real < 0, state.position_id[:, None], position_ids.gather(1, last_real.clamp(min=0))
        )
        starts = real & (position_ids <= before(last_id, state.position_id))

    tokens = real.cumsum(1) - 1
    one_document = position_ids is None or length == 1 or (look and not bool((starts & (tokens > 0)).any()))
    tokens_at_start = torch.where(starts, tokens, -1).cummax(1).values
    position = torch.where(tokens_at_start >= 0, tokens - tokens_at_start, state.position[:, None] + 1 + tokens)

    chunk_end = real & (position % chunk_size == chunk_size - 1)
    num_chunks = state.first_chunk + (state.position + 1) // chunk_size
    chunks = num_chunks[:, None] + chunk_end.cumsum(1)
    chunks_at_start = torch.where(starts, before(chunks, num_chunks), -1).cummax(1).values
    first_chunk = torch.where(chunks_at_start >= 0, chunks_at_start, state.first_chunk[:, None])

    position = position.masked_fill(~real, 0)
    if position_ids is None:
        position_ids = (state.position_id[:, None] + 1 + tokens).masked_fill(~real, 0)
    real = real if is_padded else None
    return TokenLayout(
        batch=batch, position_ids=position_ids, position=position, first_chunk=first_chunk, before=state, real=real,
        chunk_end=chunk_end, num_chunks=num_chunks, one_document=one_document,
    )  # fmt: skip


def cut_chunks(hidden_states: torch.Tensor, layout: TokenLayout, chunk_size: int) -> torch.Tensor:
    """
    The chunks that a call completes.

    Args:
        hidden_states: [B, N + L, D], the L tokens of the call in aligned order, after the N last ones of earlier
        calls.

    Returns:
        [B, n, S, D]. Where rows complete different numbers of chunks, those beyond the number of a row are arbitrary.
    """
    batch, total, dim = hidden_states.shape
    length = layout.length
    if layout.is_step:  # of the last S tokens, whether they are a chunk or not
        return hidden_states[:, None, -chunk_size:]
    if layout.past is not None:
        rest = layout.past % chunk_size
        n = (rest + length) // chunk_size
        start = total - length - rest
        if torch.compiler.is_compiling():  # so that the chunks are never all there is: see `make_contiguous`
            hidden_states = torch.nn.functional.pad(hidden_states, (0, 0, 0, chunk_size))
        return make_contiguous(hidden_states[:, start : start + n * chunk_size]).unflatten(1, (n, chunk_size))
    ends = layout.chunk_end
    # Without earlier tokens a bound is known; with them the device is asked, as few calls complete a chunk.
    n = length // chunk_size if total == length else int(ends.sum(1).max())
    rank = torch.where(ends, ends.cumsum(1) - 1, n)
    slot = torch.arange(length, device=ends.device).expand_as(ends)
    last = torch.full((batch, n + 1), chunk_size - 1, device=ends.device).scatter(1, rank, slot + total - length)[
        :, :n
    ]
    tokens = last[..., None] + torch.arange(1 - chunk_size, 1, device=ends.device)
    tokens = tokens.clamp(min=0).flatten(1)[..., None].expand(-1, -1, dim)
    return hidden_states.gather(1, tokens).unflatten(1, (n, chunk_size))

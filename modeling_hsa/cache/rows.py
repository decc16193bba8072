"""Where the rows of a cache stand: how far into which document, and so where their next tokens belong."""

import torch

from ..layout import Past, RowState, TokenLayout
from .history import TokenHistory
from .ring import fixed_zeros, replace_fixed
from .state import State


class Rows(State):
    """
    Counts the tokens of all rows while they agree and nothing is padded or packed, and once they differ keeps a record
    of each row's last tokens. What a row has seen follows from its last token, which is what makes `crop` simple.
    """

    fields = ("num_columns", "tokens")

    def __init__(self, keep: int):
        # Once rows differ: (position, first_chunk, position_id) of the last tokens, and which of the last columns were
        # tokens.
        self.last_tokens = TokenHistory(keep)
        self.last_columns = TokenHistory(keep)
        self.reset()

    def parts(self) -> dict[str, State]:
        return {"rows.tokens": self.last_tokens, "rows.columns": self.last_columns, "rows": self}

    def reset(self) -> None:
        self.num_columns = 0  # tokens and padding of all calls
        self.tokens: int | None = 0  # of every row, None once rows differ

    def past(self) -> Past:
        """For the layout of the next call."""
        if self.tokens is not None:
            return Past(self.num_columns, self.tokens)
        return Past(self.num_columns, None, RowState(*self.last_tokens.tokens[:, -1].unbind(-1)))

    def commit(self, layout: TokenLayout) -> None:
        batch, length = layout.batch, layout.length
        if layout.past is None and self.tokens is not None:
            self._start_record(batch, layout.device)
        self.num_columns += length
        if layout.past is not None:
            self.tokens = layout.past + length
            return
        self.last_tokens.append(torch.stack(layout.aligned_rows(), dim=-1), layout)
        columns = layout.is_real.expand(batch, -1).long()[..., None]
        self.last_columns.extend(layout.restore(columns))

    def advance(self, start: int, steps: int) -> None:
        """After the first `start` columns, `steps` calls of one token per row went through, within documents."""
        self.num_columns = start + steps
        if self.tokens is not None:
            self.tokens += steps
            return
        last = self.last_tokens.tokens[:, -1:]
        number = torch.arange(1, steps + 1, device=last.device)[:, None]
        self.last_tokens.extend(last + number * torch.tensor([1, 0, 1], device=last.device))
        self.last_columns.extend(self.last_columns.tokens.new_ones(len(last), steps, 1))

    def _start_record(self, batch: int, device: torch.device) -> None:
        """Writes down where the rows have stood so far, as they differ from now on."""
        history = self.last_tokens
        keep = self.tokens + 1 if history.recording else history.keep
        position = torch.arange(max(-1, self.tokens - keep), self.tokens, device=device)
        tokens = torch.stack([position, torch.zeros_like(position), position], dim=-1)
        history.extend(tokens.expand(batch, -1, -1))
        self.last_columns.extend(tokens.new_ones(batch, min(self.num_columns, keep), 1))
        self.tokens = None

    def tokens_of(self, columns: int) -> int | torch.Tensor | None:
        """How many tokens the last `columns` columns hold, [B] where rows differ. None if it is no longer known."""
        if self.tokens is not None:
            return columns
        if columns > self.last_columns.size:
            return None
        return self.last_columns.tokens[:, self.last_columns.size - columns :, 0].sum(1)

    def can_crop(self, tokens: int | torch.Tensor) -> bool:
        """Whether it is known where each row stood before its last `tokens` tokens, also before its first one."""
        if self.tokens is not None:
            return True
        left = self.last_tokens.added - self.last_tokens.dropped - tokens
        return not bool(torch.as_tensor(left < 1).any())

    def crop(self, columns: int, tokens: int | torch.Tensor, most: int) -> None:
        self.last_tokens.crop(tokens, most)
        self.last_columns.crop(columns, columns)
        self.num_columns -= columns
        if self.tokens is not None:
            self.tokens -= columns

    def most_chunks(self, chunk_size: int) -> int:
        """The number of complete chunks of the row that has most."""
        if self.tokens is not None:
            return self.tokens // chunk_size
        return _most_chunks(self.last_tokens.tokens[:, -1], chunk_size)


class StaticRows(State):
    """Where the rows of a static cache stand, known to the device alone: its steps look at no value."""

    fields = ("state", "count")

    def __init__(self):
        self.state: torch.Tensor | None = None  # [B, 3] the `RowState` of each row
        self.count: torch.Tensor | None = None  # [1] columns of all calls

    def parts(self) -> dict[str, State]:
        return {"rows": self}

    @property
    def num_columns(self) -> int:
        """Waits for the device."""
        return 0 if self.count is None else int(self.count)

    def past(self, is_step: bool) -> Past:
        if is_step:
            return Past(rows=RowState(*self.state.unbind(-1)), tokens=None, is_step=True)
        if self.state is None:
            return Past()
        columns = self.num_columns
        agreed = torch.tensor([columns - 1, 0, columns - 1], device=self.state.device)
        if bool((self.state == agreed).all()):
            return Past(columns, columns)
        return Past(columns, None, RowState(*self.state.unbind(-1)))

    def commit(self, layout: TokenLayout) -> None:
        if self.state is None:
            zeros = torch.zeros(0, dtype=torch.int64, device=layout.device)
            self.state, self.count = fixed_zeros(zeros, layout.batch, 3), fixed_zeros(zeros, 1)
        self.state.copy_(torch.stack(layout.after, dim=-1))
        self.count.add_(layout.length)

    def most_chunks(self, chunk_size: int) -> int:
        return 0 if self.state is None else _most_chunks(self.state, chunk_size)

    def apply(self, function) -> None:
        if self.state is not None:
            self.state = replace_fixed(self.state, function)

    def reset(self) -> None:
        if self.state is not None:
            self.state.copy_(torch.tensor([-1, 0, -1], device=self.state.device))
            self.count.zero_()


def chunks_of_rows(rows: Rows, batch: int, chunk_size: int) -> torch.Tensor:
    """How many complete chunks each row has, int64 [B]."""
    if rows.tokens is not None:
        return torch.full((batch,), rows.tokens // chunk_size)
    return _chunks(rows.last_tokens.tokens[:, -1], chunk_size)


def _chunks(rows: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """rows [B, 3] as `RowState` -> the number of complete chunks of each row, [B]."""
    position, first_chunk, _ = rows.unbind(-1)
    return first_chunk + (position + 1) // chunk_size


def _most_chunks(rows: torch.Tensor, chunk_size: int) -> int:
    return int(_chunks(rows, chunk_size).max())

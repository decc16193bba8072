"""Rows of tokens, padding and documents as strings, and reading them in segments."""

import copy

import torch

from modeling_hsa import HSACache, HSAForCausalLM

from .helpers import relative_error


# Lengths around the borders of the chunks (16 tokens) and of the blocks of the window attention (64 tokens).
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 100, 129)


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids of the tiny model; never 0, so that 0 can be the padding token."""
    return torch.randint(1, 99, shape)


def read(model, ids, sizes, cache=None, attention_mask=None, position_ids=None) -> tuple[torch.Tensor, HSACache]:
    """
    Reads `ids` [B, L] in segments of `sizes` tokens each, the last size repeating as often as needed.

    Args:
        attention_mask: [B, cached + L].
        position_ids: [1 | B, L].

    Returns: the logits [B, L, vocab_size] and the cache.
    """
    logits, start, sizes = [], 0, list(sizes)
    past = 0 if cache is None else cache.get_seq_length()
    while start < ids.shape[1]:
        end = min(start + sizes[0], ids.shape[1])
        sizes = sizes[1:] or sizes
        outputs = model(
            ids[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, : past + end],
            position_ids=None if position_ids is None else position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = outputs.past_key_values
        logits.append(outputs.logits)
        start = end
    return torch.cat(logits, dim=1), cache


class Rows:
    """
    A batch given as one string per row, in which every character is a column: `x` a token, `|` a token that starts a
    new document (packing), `.` padding. Tokens are random, and so is what padding holds.

    Attributes: ids, attention_mask and position_ids, int64 [B, L].
    """

    def __init__(self, *rows: str):
        length = max(map(len, rows), default=0)
        if any(len(row) != length for row in rows):
            raise ValueError(f"Rows must have one length, got {[len(row) for row in rows]}.")
        self.strings = rows
        self.ids = random_ids(len(rows), length)
        self.attention_mask = torch.tensor([[int(column != ".") for column in row] for row in rows])
        self.position_ids = torch.randint(0, 1000, (len(rows), length))
        self._expected: dict[HSAForCausalLM, torch.Tensor] = {}
        self.documents: list[tuple[int, list[int]]] = []  # row and columns of each document
        for i, row in enumerate(rows):
            document: list[int] = []
            for column, kind in enumerate(row):
                if kind == ".":
                    continue
                if kind == "|" or not document:
                    document = []
                    self.documents.append((i, document))
                self.position_ids[i, column] = len(document)
                document.append(column)

    @property
    def is_packed(self) -> bool:
        rows = [row for row, _ in self.documents]
        return len(set(rows)) < len(rows)

    def inputs(self) -> dict[str, torch.Tensor]:
        """`attention_mask` where there is padding and `position_ids` where there is packing."""
        inputs = {}
        if not self.attention_mask.all():
            inputs["attention_mask"] = self.attention_mask
        if self.is_packed:
            inputs["position_ids"] = self.position_ids
        return inputs

    def extended(self, *columns: str) -> "Rows":
        """The batch with more columns."""
        extended = Rows(*(a + b for a, b in zip(self.strings or [""] * len(columns), columns)))
        length = self.ids.shape[1]
        if length:
            extended.ids[:, :length], extended.position_ids[:, :length] = self.ids, self.position_ids
        return extended

    def shortened(self, columns: int) -> "Rows":
        """The batch without its last columns."""
        shortened = Rows(*(row[: len(row) - columns] for row in self.strings))
        shortened.ids, shortened.position_ids = self.ids[:, :-columns], self.position_ids[:, :-columns]
        return shortened

    def select(self, order: list[int]) -> "Rows":
        """The batch with the rows `order` of this one."""
        selected = copy.copy(self)
        selected.ids, selected.attention_mask, selected.position_ids = (
            x[order] for x in (self.ids, self.attention_mask, self.position_ids)
        )
        selected.documents = [(i, columns) for i, row in enumerate(order) for r, columns in self.documents if r == row]
        selected.strings = tuple(self.strings[i] for i in order)
        selected._expected = {}
        return selected

    @torch.no_grad()
    def expected(self, model) -> torch.Tensor:
        """The logits [B, L, vocab_size] that every document has alone, without a cache; 0 for padding."""
        if model not in self._expected:
            expected = torch.zeros(*self.ids.shape, model.config.vocab_size)
            for row, columns in self.documents:
                expected[row, columns] = model(self.ids[row : row + 1, columns], use_cache=False).logits[0]
            self._expected[model] = expected
        return self._expected[model]

    def error(self, model, logits: torch.Tensor, start: int = 0) -> float:
        """
        The largest relative error of a document in `logits` [B, n, vocab_size], of the n columns from `start` on,
        to the same document alone.
        """
        expected = self.expected(model)
        errors = [0.0]
        for row, columns in self.documents:
            read = [column for column in columns if start <= column < start + logits.shape[1]]
            if read:
                actual = logits[row, [column - start for column in read]].detach()
                errors.append(relative_error(actual, expected[row, read]))
        return max(errors)

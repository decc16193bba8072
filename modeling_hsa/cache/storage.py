"""In what a cache keeps tokens: histories that grow and can go back, or rings of fixed size for compiled steps."""

from .history import TokenHistory
from .ring import TokenRing


class GrowingStorage:
    """`slack`: how many tokens back `crop` is to be exact."""

    def __init__(self, slack: int):
        self.slack = slack

    def tokens(self, needed: int | None, ordered: bool = False) -> TokenHistory:
        """Room for the last `needed` tokens of each row (None: for all)."""
        return TokenHistory(None if needed is None else needed + self.slack)


class FixedStorage:
    """`max_length`: the most tokens of a row."""

    def __init__(self, max_length: int):
        self.max_length = max_length

    def tokens(self, needed: int | None, ordered: bool = False) -> TokenRing:
        """Room for the last `needed` tokens of each row (None: for all); `ordered`: steps get them in their order."""
        if needed is None or needed > self.max_length and not ordered:
            needed = self.max_length
        return TokenRing(needed, ordered)

"""`TokenHistory`: the last tokens of each row, in storage that grows."""

import torch

from .state import State, writable


class TokenHistory(State):
    """
    The last tokens of each row, `[B, ..., tokens, D]`, in preallocated storage through which they slide. Rows are
    right-aligned: the last token of every row is at the end, and a shorter row starts with meaningless entries.

    At least `keep` tokens are kept (None, or while recording: all of them), which bounds how far `crop` can go back.
    """

    fields = ("buffer", "start", "end", "added", "dropped")

    def __init__(self, keep: int | None):
        self.keep = keep
        self.recording = False
        self.reset()

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> torch.Tensor:
        return self.buffer[..., self.start : self.end, :]

    def saved(self) -> dict:
        tokens = None if self.buffer is None else self.tokens
        return {**self.state_dict(), "buffer": tokens, "start": 0, "end": self.size, "recording": self.recording}

    def restore(self, saved: dict) -> None:
        self.load_state_dict(saved)
        self.recording = saved["recording"]

    def append(self, new: torch.Tensor, layout) -> torch.Tensor:
        """
        Adds the tokens of a call, `new` [B, ..., L, D] in the aligned order of its [`TokenLayout`]. Returns everything
        that was stored and the new tokens, right-aligned.
        """
        return self.extend(new, layout.counts)

    def extend(self, new: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """As `append`, where the last `counts[b]` tokens of row b are real (None: all)."""
        length = new.shape[-2]
        self.added = self.added + (length if counts is None else counts)
        with_grad = torch.is_grad_enabled() and new.requires_grad
        is_long = self.keep is not None and length > self.keep
        if self.size == 0 or counts is not None or is_long or with_grad or self.buffer.dtype != new.dtype:
            stream = new
            if self.size:
                stream = torch.cat([self.tokens.to(new.dtype), new], dim=-2)
                if counts is not None:
                    stream = close_gaps(stream, length, counts)
            self._store(stream.detach())
            self._note_dropped()
            return stream
        if self.end + length > self.buffer.shape[-2]:
            self._store(self.tokens, room=length)
        self.buffer = writable(self.buffer)
        self.buffer[..., self.end : self.end + length, :] = new
        self.end += length
        self._note_dropped()
        return self.tokens

    def put(self, stream: torch.Tensor, added: int) -> None:
        """Makes `stream` the content, of which the last `added` tokens of each row are new."""
        self.added = self.added + added
        self._store(stream)
        self._note_dropped()

    def _store(self, stream: torch.Tensor, room: int = 64) -> None:
        """Makes the end of `stream` the content, with room for as much again and `room` more tokens."""
        keep_all = self.recording or self.keep is None
        size = stream.shape[-2] if keep_all else min(stream.shape[-2], self.keep)
        kept = stream[..., stream.shape[-2] - size :, :]
        self.buffer = kept.new_empty(*kept.shape[:-2], 2 * size + max(room, 64), kept.shape[-1])
        self.buffer[..., :size, :] = kept
        self.start, self.end = 0, size

    def _note_dropped(self) -> None:
        least = self.added - self.size
        self.dropped = max(self.dropped, least) if isinstance(least, int) else least.clamp(min=self.dropped)

    def can_crop(self, tokens: int | torch.Tensor, needed: int | None) -> bool:
        """Whether without its last `tokens` tokens every row has its `needed` last ones (None: all it ever had)."""
        enough = self.dropped == 0
        if needed is not None:
            enough = enough | (self._added_without(tokens) - self.dropped >= needed)
        return bool(torch.as_tensor(enough).all())

    def crop(self, tokens: int | torch.Tensor, most: int) -> None:
        """Forgets the last `tokens` tokens, of each row or [B] row by row, in which case `most` is their maximum."""
        if self.buffer is None:
            return
        self.added = self._added_without(tokens)
        if isinstance(tokens, int):
            self.end -= tokens
            return
        # The rows move to the right by what they forget. What is then left in all of them is shorter by the maximum.
        stored = self.tokens
        end = torch.arange(most, stored.shape[-2], device=stored.device)
        self._store(gather_tokens(stored, end - tokens.to(stored.device)[:, None]))
        self._note_dropped()

    def _added_without(self, tokens: int | torch.Tensor) -> int | torch.Tensor:
        both = isinstance(tokens, torch.Tensor) and isinstance(self.added, torch.Tensor)
        return self.added - (tokens.to(self.added.device) if both else tokens)

    def record(self) -> None:
        """Keep everything from now on until the next `crop`."""
        self.recording = True

    def shrink(self) -> None:
        """While recording: forgets what is far beyond what `crop` needs."""
        if self.recording and self.keep is not None and self.size > 2 * self.keep:
            self.recording = False
            self._store(self.tokens)
            self._note_dropped()
            self.recording = True

    def reset(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.start = self.end = 0
        # Tokens that came and were not cropped, and how many of them are no longer stored; [B] once rows differ.
        self.added: int | torch.Tensor = 0
        self.dropped: int | torch.Tensor = 0


def gather_tokens(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """x [B, ..., N, D], source [B, M] -> [B, ..., M, D]."""
    index = source.view(source.shape[0], *[1] * (x.dim() - 3), source.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], source.shape[1], x.shape[-1]))


def close_gaps(stream: torch.Tensor, length: int, counts: torch.Tensor) -> torch.Tensor:
    """
    stream [B, ..., N + L, D], N old tokens and L new ones, of which the last `counts[b]` of row b are real: moves the
    old tokens over the padding of their row, right-aligned.
    """
    total = stream.shape[-2]
    from_end = torch.arange(total - 1, -1, -1, device=stream.device)
    counts = counts.to(stream.device)[:, None]
    source = torch.where(from_end < counts, total - 1 - from_end, total - length - 1 - (from_end - counts))
    return gather_tokens(stream, source.clamp(min=0))

"""`TokenRing`: the last tokens of each row, in storage that never moves."""

import torch

from .history import close_gaps, gather_tokens
from .state import State


def fixed(buffer: torch.Tensor) -> torch.Tensor:
    """Tells CUDA graphs that the tensor stays where it is, so that they write into it rather than into a copy."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer)
    return buffer


def fixed_zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    # Tensors made under `torch.inference_mode` could not be written outside of it.
    with torch.inference_mode(False):
        return fixed(torch.zeros(shape, dtype=like.dtype, device=like.device))


def replace_fixed(buffer: torch.Tensor, function) -> torch.Tensor:
    """`function(buffer)`, in place where its shape allows: compiled steps know where the storage is."""
    new = function(buffer)
    return buffer.copy_(new) if new.shape == buffer.shape else fixed_zeros(new, *new.shape).copy_(new)


class TokenRing(State):
    """
    The last tokens of each row, `[B, ..., slots, D]`. The token at position p of its document is in slot
    `-1 - p % slots`: where fewer tokens than slots have been written they are at the end, as in a `TokenHistory`,
    and in attention, to which the order of keys means nothing, one mask serves both. `ordered`: steps get them in
    their order all the same.

    What a prompt leaves behind is written when its call is committed. A step writes at once, over a token that it can
    no longer see.
    """

    fields = ("buffer",)

    def __init__(self, slots: int, ordered: bool):
        self.slots, self.ordered = slots, ordered
        self.buffer: torch.Tensor | None = None
        self.pending: torch.Tensor | None = None

    def append(self, new: torch.Tensor, layout) -> torch.Tensor:
        """
        Adds the tokens of a call, `new` [B, ..., L, D] in aligned order. Returns the tokens of earlier calls and the
        new ones, right-aligned; for a step [B, ..., slots, D].
        """
        if layout.is_step:
            slot = layout.share(("slot", self.slots), lambda: self._slot(layout.position))
            slot = slot.view(-1, *[1] * (new.dim() - 1))
            self.buffer.scatter_(-2, slot.expand_as(new), new.detach().to(self.buffer.dtype))
            stream = self.tokens(layout.position) if self.ordered else self.buffer
            # The next step writes into the storage, which backward of this one may still have to read.
            return stream.to(new.dtype, copy=torch.is_grad_enabled() and new.requires_grad)
        stream = new
        kept = self.slots if layout.past is None else min(self.slots, layout.past)
        if self.buffer is not None and kept:
            tokens = self.tokens(layout.before.position[:, None])[..., self.slots - kept :, :]
            stream = torch.cat([tokens.to(new.dtype), new], dim=-2)
            if layout.counts is not None:
                stream = close_gaps(stream, new.shape[-2], layout.counts)
        self.pending = self.laid_out(stream.detach(), layout.after.position[:, None].to(new.device))
        return stream

    def laid_out(self, stream: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """What the ring holds after the tokens `stream` [B, ..., N, D], the last one at `position` [n, 1]."""
        back = (position - self._slot(torch.arange(self.slots, device=stream.device))) % self.slots
        last = stream.shape[-2] - 1
        tokens = gather_tokens(stream, (last - back).clamp(min=0).expand(len(stream), -1))
        # Of a row with fewer tokens than slots, the rest is never looked at: zeros, as what is there is arbitrary.
        absent = (back > position).view(-1, *[1] * (stream.dim() - 3), self.slots, 1)
        return tokens.masked_fill(absent, 0)

    def commit(self, layout) -> None:
        if self.pending is None:
            return
        if self.buffer is None:
            self.buffer = fixed_zeros(self.pending, *self.pending.shape)
        self.buffer.copy_(self.pending)
        self.pending = None

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.pending = None

    def tokens(self, position: torch.Tensor) -> torch.Tensor:
        """The tokens [B, ..., slots, D] in their order, the last one, at position [n, 1], at the end."""
        position = position.to(self.buffer.device).expand(self.buffer.shape[0], -1)
        back = torch.arange(self.slots - 1, -1, -1, device=position.device)
        return gather_tokens(self.buffer, self._slot(position - back))

    def _slot(self, position: torch.Tensor) -> torch.Tensor:
        return self.slots - 1 - position % self.slots

    def apply(self, function) -> None:
        if self.buffer is not None:
            self.buffer = replace_fixed(self.buffer, function)

    def reset(self) -> None:
        self.pending = None
        if self.buffer is not None:
            self.buffer.zero_()

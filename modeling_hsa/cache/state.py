"""What everything that a cache remembers has in common."""

from collections.abc import Callable, Iterator

import torch


def writable(buffer: torch.Tensor) -> torch.Tensor:
    """A tensor made under `torch.inference_mode` cannot be written outside it; a copy of it can."""
    if torch.compiler.is_compiling():
        return buffer
    return buffer.clone() if buffer.is_inference() and not torch.is_inference_mode_enabled() else buffer


class State:
    """
    A part of a cache. What it remembers are the attributes named in `fields`: numbers, and tensors whose first
    dimension are the rows. That is all that a state has to say to be taken back, forked, reordered, moved and saved.

    A call takes effect when it is committed. Until then what the state held at its start is not overwritten, so that
    `state_dict`, which holds references, is enough to go back.
    """

    fields: tuple[str, ...] = ()

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.fields}

    def load_state_dict(self, state: dict) -> None:
        for name in self.fields:
            setattr(self, name, state[name])

    def saved(self) -> dict:
        """What a session keeps of it: `fields`, without storage that is spare. Tensors, integers, booleans, None."""
        return self.state_dict()

    def restore(self, saved: dict) -> None:
        """Takes over what `saved` gave, the tensors being its own."""
        self.load_state_dict(saved)

    def commit(self, layout) -> None:
        """The call of `layout`, a [`TokenLayout`], has gone through."""

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Changes the rows: `function` takes tensors [B, ...]."""
        for name in self.fields:
            if isinstance(value := getattr(self, name), torch.Tensor):
                setattr(self, name, function(value))

    @property
    def batch_size(self) -> int | None:
        """Rows, or None before anything was stored."""
        return next((x.shape[0] for x in self._tensors()), None)

    @property
    def device(self) -> torch.device | None:
        """Of its tensors, or None before anything was stored."""
        return next((x.device for x in self._tensors()), None)

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (value for value in self.state_dict().values() if isinstance(value, torch.Tensor))

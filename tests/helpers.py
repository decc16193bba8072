"""Small models and comparisons shared by the tests."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM
from modeling_hsa.ops import library


def tiny_config(**overrides) -> HSAConfig:
    """A configuration whose window and chunks are so small that a hundred tokens exercise everything."""
    fields = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_lower_layers": 1,
        "num_upper_layers": 2,
        "num_upper_groups": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 12,
        "chunk_size": 16,
        "chunk_topk": 2,
        "retrieval_dim": 16,
        # Larger than usual, so that attention and retrieval are far from uniform and a mistake shows in the logits.
        "initializer_range": 0.2,
    }
    return HSAConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides) -> HSAForCausalLM:
    """A randomly initialised model of `tiny_config`, in eval mode and fp32."""
    torch.manual_seed(seed)
    return HSAForCausalLM(tiny_config(**overrides)).eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


class InsideOperators(TorchDispatchMode):
    """A dispatch mode that also sees what the operators of `modeling_hsa.ops` do inside, in plain PyTorch."""

    _FUNCTIONS = ("torch_selection", "torch_selection_backward", "torch_attention", "torch_attention_backward")

    def __enter__(self):
        self._functions = {name: getattr(library, name) for name in self._FUNCTIONS}
        for name, function in self._functions.items():
            setattr(library, name, self._watched(function))
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for name, function in self._functions.items():
            setattr(library, name, function)

    def _watched(self, function):
        def run(*args):
            super(InsideOperators, self).__enter__()
            try:
                return function(*args)
            finally:
                super(InsideOperators, self).__exit__(None, None, None)

        return run

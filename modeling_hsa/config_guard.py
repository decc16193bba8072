"""Fields of the configuration that are changed after a model was made: obeyed everywhere, or refused."""

import copy
from dataclasses import fields

from configuration_hsa import HSAConfig


# Looked at in every call. All others shaped the modules of the model.
_LIVE_FIELDS = (
    "vocab_size", "sliding_window", "chunk_size", "chunk_topk", "chunk_weighting", "hsa_residual",
    "hsa_implementation", "retrieval_stride", "retrieval_distance_penalty", "attention_dropout", "initializer_range",
    "max_position_embeddings", "use_cache", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_BUILT_FIELDS = tuple(
    field.name for field in fields(HSAConfig) if field.name in HSAConfig.__annotations__.keys() - set(_LIVE_FIELDS)
)


class ConfigGuard:
    """Remembers what a model was made from."""

    def __init__(self, config: HSAConfig):
        self.built = {name: copy.deepcopy(getattr(config, name)) for name in _BUILT_FIELDS}
        self.live = [getattr(config, name) for name in _LIVE_FIELDS]

    def check(self, config: HSAConfig) -> None:
        """
        Raises: ValueError for a field that was changed and cannot be, or to something that it cannot be.
        """
        for name, value in self.built.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"`config.{name}` was {value!r} when the model was made and is now {getattr(config, name)!r}, but "
                    f"its modules are as they were. Put it back, or load the model with `from_pretrained(..., "
                    f"{name}=...)`."
                )
        live = [getattr(config, name) for name in _LIVE_FIELDS]
        if live != self.live:
            config.validate_hsa()
            self.live = live

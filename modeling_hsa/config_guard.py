"""Fields of the configuration that are changed after a model was made: obeyed everywhere, or refused."""

import copy
from dataclasses import fields
from operator import itemgetter

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


# Of `vars(config)`, as the attribute access of a configuration costs more than a check of every call may.
_built, _live = itemgetter(*_BUILT_FIELDS), itemgetter(*_LIVE_FIELDS)


class ConfigGuard:
    """Remembers what a model was made from."""

    def __init__(self, config: HSAConfig):
        self.built, self.live = copy.deepcopy(_built(vars(config))), _live(vars(config))

    def check(self, config: HSAConfig) -> None:
        """
        Raises: ValueError for a field that was changed and cannot be, or to something that it cannot be.
        """
        built, live = _built(vars(config)), _live(vars(config))
        if built != self.built:
            name, value, now = next(x for x in zip(_BUILT_FIELDS, self.built, built) if x[1] != x[2])
            raise ValueError(
                f"`config.{name}` was {value!r} when the model was made and is now {now!r}, but its modules are as "
                f"they were. Put it back, or load the model with `from_pretrained(..., {name}=...)`."
            )
        if live != self.live:
            config.validate_hsa()
            self.live = live

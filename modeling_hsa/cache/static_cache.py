"""`HSAStaticCache`: an `HSACache` whose steps have fixed shapes."""

import torch
from transformers.utils.generic import is_flash_attention_requested

from configuration_hsa import HSAConfig

from ..layout import Past
from .hsa_cache import HSACache
from .memory import StaticMemory
from .rows import StaticRows
from .storage import FixedStorage


class HSAStaticCache(HSACache):
    """
    A cache of fixed size whose decoding steps can be compiled, also with `mode="reduce-overhead"` (CUDA graphs) and
    `fullgraph=True`: its storage never moves, and where a row stands is known to the device alone, so that a step
    looks at no value. `generate(cache_implementation="static")` makes it by itself.

    A step is a call with one token per row and no attention mask: every token counts as real. The chunk encoder runs
    at every step, on the last `chunk_size` tokens; what it makes of an unfinished chunk is overwritten before anybody
    sees it. Calls of other shapes (prompts, padding) work as with [`HSACache`] and are not meant to be compiled; the
    first call, which allocates the storage, is one of them. `crop`, `fork`, `save_pretrained`, other places of
    the chunk memory than the device, and flash attention are not supported.

    Args:
        config ([`HSAConfig`]): the configuration of the model.
        max_length (`int`): the most tokens of a row, padding included.

    Example:

    ```python
    >>> cache = HSAStaticCache(model.config, max_length=input_ids.shape[1] + 100)
    >>> step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    >>> with torch.no_grad():
    ...     token = model(input_ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    ...     for _ in range(100):
    ...         token = step(token, past_key_values=cache).logits.argmax(-1)
    ```"""

    is_compileable = True
    is_croppable = False

    def __init__(self, config: HSAConfig, max_length: int):
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
            raise ValueError(f"`max_length` must be an integer of at least 1, got {max_length!r}.")
        memory = StaticMemory(-(-max_length // config.chunk_size))
        self._assemble(config, FixedStorage(max_length), StaticRows(), memory)
        self.config = config
        self.max_length = max_length
        self.is_torn = False  # by a call that failed where nothing can be taken back

    # -- used by the model ------------------------------------------------------------------------------------------

    def begin(self, length: int, has_mask: bool, has_positions: bool) -> Past:
        if is_flash_attention_requested(self.config):
            raise ValueError(
                f"A static cache does not go with `attn_implementation={self.config._attn_implementation!r}`. Use "
                "'sdpa', or an HSACache."
            )
        self.settle()
        if self.is_torn:
            raise ValueError("The last call failed while it changed `past_key_values`. Call its `reset()`.")
        if length == 1 and not has_mask and self.rows.state is not None:
            # A step writes at once, over tokens that it no longer sees, unless it starts a new document. Nobody else
            # would notice before the chunks run out of space: the length is checked on the device.
            self.is_torn = has_positions and not torch.compiler.is_compiling()
            torch._assert_async(
                self.rows.count < self.max_length, f"The cache is full: its `max_length` is {self.max_length}."
            )
            return self.rows.past(is_step=True)
        if (columns := self.get_seq_length() + length) > self.max_length:
            raise ValueError(
                f"`max_length` of the cache is {self.max_length}, but it would hold {columns} tokens. Make it with a "
                "larger `max_length`."
            )
        self._before = self.state_dict()
        self.memory.num_chunks = self.rows.most_chunks(self.header["chunk_size"])
        return self.rows.past(is_step=False)

    def commit(self) -> None:
        self.is_torn = not torch.compiler.is_compiling()
        super().commit()
        self.is_torn = False

    # -- `Cache` ----------------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included. Waits for the device."""
        return self.rows.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def fork(self):
        raise NotImplementedError("A static cache cannot be forked. Use an HSACache, or `copy.deepcopy`.")

    def save_pretrained(self, *args, **kwargs):
        raise NotImplementedError("A static cache cannot be saved. Use an HSACache.")

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise NotImplementedError("A session is loaded into an HSACache: use `HSACache.from_pretrained`.")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A static cache cannot be cropped. Use an HSACache.")

    def activate_past_recording(self) -> None:
        raise NotImplementedError("A static cache cannot be cropped, so it records no past. Use an HSACache.")

    def reset(self) -> None:
        """Forgets all tokens. The storage stays, and with it the number of rows and the dtype."""
        super().reset()
        self.is_torn = False

"""
`HSAGenerationMixin`: what `generate` does otherwise for an HSA model than for Llama.

- The cache is an `HSACache` or an `HSAStaticCache`. What can be asked for of a cache is obeyed or refused.
- Every prompt is read in segments, from the CPU if it is there, and what the cache already holds of it is not read
  again. This holds for sampling, beam search, assisted generation, prompt lookup and negative prompts.
- The length of training is no limit.
- Continuous batching is refused: it brings a cache of its own, of keys and values.

Most of the methods that Transformers lets a model change here are private. `tests/model/test_private_api.py` lists
them with their signatures in the supported versions.
"""

import copy
import functools
import inspect

from transformers.generation import GenerationMixin, MaxLengthCriteria, UnbatchedClassifierFreeGuidanceLogitsProcessor

from .cache.hsa_cache import HSACache
from .cache.static_cache import HSAStaticCache
from .decoding import current_steps, make_steps
from .naming import CACHE
from .prompts import PromptReader


class HSAGenerationMixin(PromptReader, GenerationMixin):
    """`GenerationMixin` for HSA models. The model has its decoder without a head as `self.model`."""

    # Whether `generate` captures its steps as a CUDA graph (see `decoding`), which no GPU has run yet.
    captures_steps = False

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        # Transformers knows the cache by the one name or the other, and warns of the older one.
        names = [name for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
        if len(names) == 2:
            raise ValueError("`cache` and `past_key_values` are two names of the same argument. Give one of them.")
        for name in names:
            kwargs[CACHE] = kwargs.pop(name)
        return super().generate(*args, **kwargs)

    # -- the cache --------------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            self._check_given_cache(cache, generation_config, batch_size, max_cache_length)
        if cache is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        kind = generation_config.cache_implementation
        # An assistant is called with the settings of the model that it assists, whose cache may be of another kind.
        settings = {} if generation_config.is_assistant else dict(generation_config.cache_config or {})
        if kind not in (None, "dynamic", "offloaded", "static"):
            raise ValueError(
                f"`cache_implementation={kind!r}` does not exist for HSA models, whose cache is an HSACache. Leave it "
                "out, use 'offloaded' to keep the chunk memory on the CPU, or 'static' to compile decoding."
            )
        if settings and kind in ("offloaded", "static"):
            raise ValueError(
                f"`cache_config` does not go with `cache_implementation={kind!r}`, which already says what the cache "
                "is. Give one of them."
            )
        known = inspect.signature(HSACache).parameters.keys() - {"config"}
        if settings.keys() - known:
            raise ValueError(
                f"`cache_config` has unknown fields {sorted(settings.keys() - known)}. It takes the arguments of "
                f"HSACache: {sorted(known)}."
            )
        if kind == "static":
            # As in Transformers: never shorter than before, so that what was compiled fits again.
            lengths = (max_cache_length, generation_config.max_cache_len, getattr(self, "_max_cache_length", None))
            self._max_cache_length = max(length or 1 for length in lengths)
            model_kwargs[CACHE] = HSAStaticCache(self.config, self._max_cache_length)
        else:
            model_kwargs[CACHE] = HSACache(self.config, **({"offloading": True} if kind == "offloaded" else settings))

    def _check_given_cache(self, cache, generation_config, batch_size: int, max_cache_length: int) -> None:
        """Refuses a cache that `generate` could not use, before anything is written into it."""
        if generation_config.use_cache is False:
            raise ValueError("`past_key_values` does not go with `use_cache=False`. Leave out one of them.")
        if generation_config.cache_config and not generation_config.is_assistant:
            raise ValueError(
                "`cache_config` says how to make a cache and does not go with `past_key_values`, which is one. Leave "
                "out one of them."
            )
        if isinstance(cache, tuple):
            return  # Transformers refuses it, in the words of the version.
        if not hasattr(cache, "reserve"):
            raise TypeError(
                f"`past_key_values` must be an HSACache, got {type(cache).__name__}. Leave it out, or make one with "
                "`HSACache(model.config)`."
            )
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        given = cache.batch_size
        if given not in (-1, rows):
            fix = (
                f"Call `past_key_values.batch_repeat_interleave({rows // given})` first."
                if rows % given == 0
                else "Give a prompt of as many rows."
            )
            raise ValueError(f"`past_key_values` holds {given} rows but {rows} are generated. {fix}")
        if isinstance(cache, HSAStaticCache) and max_cache_length > cache.max_length:
            raise ValueError(
                f"`past_key_values` has the `max_length` {cache.max_length}, but the prompt and the new tokens "
                f"need {max_cache_length}. Make it with a larger `max_length`, or generate fewer tokens."
            )

    def create_masks_for_generate(self, attention_mask, is_first_iteration=False, **kwargs):
        """Of a static cache: after the prompt every token is real, and its steps have no mask, which would grow."""
        return attention_mask if is_first_iteration else None

    def init_continuous_batching(self, *args, **kwargs):
        """Every way to continuous batching begins here, outside the thread in which errors are only logged."""
        raise NotImplementedError(
            "HSA models do not support continuous batching (`cache_implementation='paged'`, `generate_batch`): its "
            "paged cache holds keys and values only, but retrieval needs an HSACache. Use `generate` with a batch "
            "padded on the left."
        )

    # -- the steps --------------------------------------------------------------------------------------------------

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        **model_kwargs,
    ):  # fmt: skip
        """With `captures_steps`, the steps after the prompt are a CUDA graph where they can be. See `decoding`."""
        most = getattr(stopping_criteria, "max_length", None)
        most = None if most is None else most - input_ids.shape[1] - 1
        steps = make_steps(self, model_kwargs.get(CACHE), generation_config, most, synced_gpus)
        token = current_steps.set(steps)
        try:
            return super()._sample(
                input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                generation_config=generation_config, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
            )  # fmt: skip
        finally:
            current_steps.reset(token)
            if steps is not None:
                steps.finish()

    def _own_steps(self):
        steps = current_steps.get()
        return steps if steps is not None and steps.model is self else None

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        return self._own_steps() is not None or super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    # -- the length -------------------------------------------------------------------------------------------------

    # `config.max_position_embeddings` is the length of training and no limit, as Transformers takes it to be: it cuts
    # its default length to it and warns beyond it. It reads the attribute from the same configuration from which
    # evaluation harnesses want it as a number, so that no other name for the length of training would spare the next
    # two methods.

    def _prepare_generated_length(self, generation_config, has_default_max_length, **kwargs):
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = generation_config.max_length
        return super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    # -- reading prompts --------------------------------------------------------------------------------------------

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """
        Reads the start of the prompt in segments and without logits, and leaves the rest to Transformers. (Its own
        segments know neither `inputs_embeds` nor, before 5.20, a cache that already holds tokens.)
        """
        input_ids = self._read_prompt(input_ids, generation_config, model_kwargs, is_first_iteration)
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    @functools.wraps(GenerationMixin._assisted_decoding)  # `generate` looks at the names of its arguments
    def _assisted_decoding(self, input_ids, *, generation_config, **kwargs):
        for field in ("assistant_early_exit", "use_mtp", "speculation_type"):
            if getattr(generation_config, field, None):
                raise ValueError(f"`{field}` does not work with HSA models. Use `assistant_model` or prompt lookup.")
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "`inputs_embeds` does not go with assisted generation or prompt lookup, which draft from token ids. "
                "Pass the prompt as `input_ids`."
            )
        cache = kwargs.get(CACHE)
        observed = generation_config.output_hidden_states or generation_config.output_attentions
        if observed and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "`output_hidden_states` and `output_attentions` of assisted generation are those of the whole prompt, "
                "but `past_key_values` already holds a part of it. Leave out one of them."
            )
        if cache is not None:
            if kwargs.get("attention_mask") is None:
                # By its length `prepare_inputs_for_generation` tells the whole prompt from the tokens to be read.
                columns = getattr(generation_config, "_mask_length", input_ids.shape[1])
                kwargs["attention_mask"] = input_ids.new_ones(input_ids.shape[0], columns)
            if kwargs["attention_mask"].shape[1] != input_ids.shape[1]:
                raise ValueError(
                    f"Assisted generation and prompt lookup need all tokens of the prompt as `input_ids`, those in "
                    f"the cache too: got {input_ids.shape[1]} tokens and an `attention_mask` of "
                    f"{kwargs['attention_mask'].shape[1]}."
                )
            self._read_prompt(input_ids, generation_config, kwargs, most_left=1)  # the first draft comes on top
        if not isinstance(kwargs.get("assistant_model"), HSAGenerationMixin):
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None  # the assistant has its own way of reading
        return super()._assisted_decoding(input_ids, generation_config=generation_config, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` looks at the names of its arguments
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, is_first_iteration=False, **kwargs):
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        if is_first_iteration and next_sequence_length is None and cache is not None and mask is not None:
            # Assisted generation starts with the whole prompt, whatever the cache holds of it.
            if mask.shape[1] == input_ids.shape[1]:
                next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
        )
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = self._on_device(inputs[name])
        return inputs

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                self._read_negative_prompt(processor.unconditional_context, generation_config)
        return processors

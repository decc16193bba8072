"""How `generate` reads prompts into a cache: in segments, after what the cache holds already."""

import torch
from transformers.utils import logging

from .cache.hsa_cache import HSACache
from .naming import CACHE
from .segments import AUTO, automatic_segment


# Prompts that are read in less time have no progress bar.
_SECONDS_WITHOUT_BAR = 3.0


def _progress_bar(tokens: int):
    """As Transformers shows them: not after `logging.disable_progress_bar()`, nor where only errors are logged."""
    return logging.tqdm(
        total=tokens, desc="Reading the prompt", unit="token", unit_scale=True, leave=False,
        delay=_SECONDS_WITHOUT_BAR, disable=logging.get_verbosity() > logging.WARNING,
    )  # fmt: skip


class PromptReader:
    """The part of a model that reads prompts; `HSAGenerationMixin` says when."""

    def _read_negative_prompt(self, context: dict, generation_config) -> None:
        """Reads the start of the negative prompt of classifier-free guidance, which goes on from its context."""
        prompt, mask = context["input_ids"], context["attention_mask"]
        if prompt is None or not context["use_cache"]:
            return
        segment = self._segment_length(generation_config, *prompt.shape)
        if segment is None or prompt.shape[1] <= segment:
            return
        context[CACHE] = HSACache(self.config)
        read = prompt.shape[1] - 1
        self._read_segments({"input_ids": prompt[:, :read]}, segment, context[CACHE], mask)
        context["input_ids"] = prompt[:, read:]
        context["attention_mask"] = torch.ones_like(prompt) if mask is None else mask

    def _read_prompt(
        self, input_ids, generation_config, model_kwargs, is_first_iteration=True, most_left: int | None = None
    ) -> torch.Tensor:
        """
        Reads a prompt longer than a segment (`prefill_chunk_size`) into the cache, after what the cache holds already,
        but for its last tokens, at most `most_left` (default: a segment). Returns the token ids that are left to read;
        of `inputs_embeds`, the token ids unchanged.

        Raises: ValueError if the prompt does not continue the cache, or for a `prefill_chunk_size` nobody can obey.
        """
        cache = model_kwargs.get(CACHE)
        if cache is None:
            if generation_config.prefill_chunk_size not in (None, self.generation_config.prefill_chunk_size):
                raise ValueError("`prefill_chunk_size` needs a cache. Leave it out, or leave out `use_cache=False`.")
            return input_ids
        embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        # Transformers leaves out a mask of ones, from 5.18 on, and notes its length.
        mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        total = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", -1)
        prompt, past = input_ids if embeds is None else embeds, cache.get_seq_length()
        if embeds is not None or prompt.shape[1] == total:  # the cached tokens too, not only the new ones
            if prompt.shape[1] == 0:
                raise ValueError(
                    "The prompt has no tokens, so there is nothing to go on from. Pass at least one, like that which "
                    "begins a text."
                )
            if past >= prompt.shape[1]:
                raise ValueError(
                    f"`past_key_values` holds {past} tokens, but the prompt has {prompt.shape[1]}: none is left to "
                    "read. Pass the whole prompt, the cached tokens included, or new tokens with an `attention_mask` "
                    "for all; `past_key_values.crop(-1)` forgets the last token, to be read again."
                )
            prompt = prompt[:, past:]
        elif total != past + prompt.shape[1] and total >= 0:
            raise ValueError(
                f"`attention_mask` has {total} columns, but `past_key_values` holds {past} tokens and `input_ids` has "
                f"{prompt.shape[1]}. Pass a mask for cached and new tokens together."
            )
        length, read = prompt.shape[1], 0
        segment = self._segment_length(generation_config, prompt.shape[0], past + length)
        # Who asks for what the layers computed gets it for the whole prompt, so in one piece. An assistant whose
        # vocabulary Transformers has cut to that of another model sees more than one token in its first call only.
        in_one_piece = (
            generation_config.output_hidden_states
            or generation_config.output_attentions
            or hasattr(self.get_input_embeddings(), "assistant_overlap_token_ids")
        )
        if segment is not None and length > segment and not in_one_piece:
            name = "input_ids" if embeds is None else "inputs_embeds"
            positions = None if position_ids is None else position_ids[..., -length:]
            step = most_left or segment
            read = (length - 1) // step * step
            records = generation_config.is_assistant
            self._read_segments({name: prompt[:, :read]}, segment, cache, mask, positions, records)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return input_ids if embeds is not None else prompt[:, read:]

    def _read_segments(
        self, prompt: dict[str, torch.Tensor], segment: int, cache, mask=None, positions=None, records: bool = False
    ) -> None:
        """
        Reads a prompt into the cache, `segment` tokens at a time, with a bar where that takes long. The prompt may be
        on the CPU. If it is interrupted, the cache holds the segments that were read, and may be continued.

        Args:
            prompt: `input_ids` [B, L] or `inputs_embeds` [B, L, hidden_size].
            mask: [B, at least cached + L] or None.
            positions: [1 | B, at least L] or None.
            records: whether the cache has to be able to forget the last segment again. Recording all of the prompt
                would keep the keys and values of all its tokens.
        """
        ((name, tokens),) = prompt.items()
        length, past = tokens.shape[1], cache.get_seq_length()
        cache.reserve(past + length + segment)
        with _progress_bar(length) as bar:
            for start in range(0, length, segment):
                end = min(start + segment, length)
                if records and end == length:
                    cache.activate_past_recording()
                self.model(
                    **{name: self._on_device(tokens[:, start:end])},
                    attention_mask=None if mask is None else mask[:, : past + end],
                    position_ids=None if positions is None else self._on_device(positions[..., start:end]),
                    past_key_values=cache,
                    use_cache=True,
                )
                bar.update(end - start)

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        """x, which may be on the CPU, where the model is. (Weights on a disk are "meta"; then hooks move inputs.)"""
        return x if self.device.type == "meta" else x.to(self.device)

    def prefill_segment(self, rows: int = 1, tokens: int = 0) -> int:
        """
        The tokens of a prompt that `generate` reads at a time with `prefill_chunk_size="auto"`, the default: by the
        device, its free memory and the size of the model. The answer is the same for any.

        Args:
            rows: of the prompt, B.
            tokens: of a row, for which the cache will need memory.
        """
        return automatic_segment(self.config, self.device, self.dtype, rows, tokens)

    def _segment_length(self, generation_config, rows: int, tokens: int) -> int | None:
        """Tokens of each of `rows` rows to read at a time, of a prompt of `tokens` with what the cache holds."""
        segment = generation_config.prefill_chunk_size
        if segment == AUTO:
            return self.prefill_segment(rows, tokens)
        if segment is not None and (type(segment) is not int or segment < 1):
            raise ValueError(
                f"`prefill_chunk_size` must be an integer of at least 1, {AUTO!r}, or None for one piece, got "
                f"{segment!r}."
            )
        return segment

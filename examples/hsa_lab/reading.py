"""
Reading texts of any length: in segments, into the cache of the model's family, so that memory beyond the cache is that
of one segment; then scoring their last tokens or continuing them, with a record of what was retrieved.
"""

import copy
import inspect
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES


SEGMENT = 4096
COPIED = 2**24  # tokens whose memory is copied, at most, to ask several questions about a text at once
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"  # the latter up to Transformers 5.23


class Reader:
    """
    Reads with a model whose forward makes its cache itself and returns it, such as Llama (`DynamicCache`). Families
    that need more are in `READERS`; `make_reader` picks.

    Args:
        model: a causal language model.
        segment: tokens read at a time; 0 for all at once, None for what the model reads at a time by itself.
        offload: whether the memory of what was read is kept on the CPU. For HSA models.
    """

    can_offload = False
    cache_name = CACHE

    def __init__(self, model: PreTrainedModel, segment: int | None = None, offload: bool = False):
        if offload and not self.can_offload:
            raise ValueError(f"`--offload` is for HSA models, not for {model.config.model_type!r}: leave it out")
        self.model, self.segment, self.offload = model, segment, offload
        parameters = inspect.signature(model.forward).parameters
        keeps_logits = "logits_to_keep" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.one_logit = {"logits_to_keep": 1} if keeps_logits else {}

    def segment_of(self, input_ids: torch.Tensor) -> int:
        """How many tokens of `input_ids` [B, L] to read at a time."""
        segment = SEGMENT if self.segment is None else self.segment
        return segment or input_ids.shape[1]

    def make_cache(self, tokens: int):
        """An empty cache with room for `tokens`; None: the model makes it."""
        return None

    def record(self, start: int) -> "RetrievalRecorder":
        """A context that records what the tokens from number `start` of its calls on retrieve: here nothing."""
        return RetrievalRecorder(None, start)

    @torch.inference_mode()
    def read(self, input_ids: torch.Tensor):
        """
        The cache of `input_ids` [B, L], with the logits of one token only; None for L = 0.

        Raises: ValueError if the model has no cache to read a prompt of several segments into.
        """
        length = input_ids.shape[1]
        if length == 0:
            return None
        segment = self.segment_of(input_ids)
        cache = self.make_cache(length + segment)
        for part in input_ids.split(segment, dim=1):
            output = self.model(part, **{self.cache_name: cache}, use_cache=True, **self.one_logit)
            cache = output.get(self.cache_name)
            if cache is None:
                raise ValueError(
                    f"{type(self.model).__name__} returns no `{self.cache_name}`, so its prompts cannot be read in "
                    "segments."
                )
        return cache

    @torch.inference_mode()
    def score_last(self, input_ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Teacher forcing: whether each of the last `count` tokens of `input_ids` [B, L] is the argmax after the others.

        Returns: bool [B, count] and, for HSA models, the chunks that the tokens before them retrieved,
        [B, count, layers, Hr, K].
        """
        start = _start(input_ids, count)
        with self.record(start) as recorder:
            cache = self.read(input_ids[:, :start])
            logits = self.model(input_ids[:, start:-1], **{self.cache_name: cache}, use_cache=cache is not None).logits
        return (logits.argmax(-1) == input_ids[:, start + 1 :]).cpu(), recorder.chunks

    @torch.inference_mode()
    def losses(self, input_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Negative log-likelihood of each of the last `count` tokens of `input_ids` [B, L], fp32 [B, count]."""
        start = _start(input_ids, count)
        cache = self.read(input_ids[:, :start])
        losses = []
        pairs = input_ids[:, start:].unfold(1, 2, 1)  # [B, count, 2]: token and next one
        for part in pairs.split(min(self.segment_of(input_ids), SEGMENT), dim=1):  # with all logits
            output = self.model(part[..., 0], **{self.cache_name: cache}, use_cache=True)
            cache = output[self.cache_name]
            losses.append(torch.nn.functional.cross_entropy(output.logits.float().mT, part[..., 1], reduction="none"))
        return torch.cat(losses, dim=1)

    @torch.inference_mode()
    def generate(
        self, input_ids: torch.Tensor, count: int, cache=None, **options
    ) -> tuple[list[int], "RetrievalRecorder"]:
        """
        Greedy continuation of one prompt, `input_ids` [1, L], by up to `count` tokens. `cache`: of its beginning, if
        that was read before. `options` go to `model.generate`.

        Returns: the new token ids, and the record of what the tokens before each of them retrieved.
        """
        length = input_ids.shape[1]
        known = 0 if cache is None else cache.get_seq_length()
        with self.record(length - 1 - known) as recorder:
            cache = self.read(input_ids[:, :-1]) if cache is None else cache
            tokens = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                **{self.cache_name: cache},
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=self.model.generation_config.pad_token_id or 0,
                **options,
            )
        return tokens[0, length:].tolist(), recorder

    def generate_on_text(
        self, prompts: Sequence[torch.Tensor], count: int, **options
    ) -> list[tuple[list[int], torch.Tensor | None]]:
        """
        Greedy continuations of prompts [L] that begin alike, by up to `count` tokens each. The beginning is read once,
        and what differs goes on from forks of its cache, as many at once as would take the memory of `COPIED` tokens.

        Returns: of each prompt the new token ids, and the chunks that the tokens before them retrieved, if any.
        """
        if len(prompts) == 1:
            tokens, recorder = self.generate(prompts[0][None], count, **options)
            return [(tokens, None if recorder.chunks is None else recorder.chunks[0])]
        shared = common_beginning(prompts)
        cache, found = self.read(prompts[0][None, :shared]), []
        rows = max(1, COPIED // max(shared, 1))
        for first in range(0, len(prompts), rows):
            found += self._generate_rows(prompts[first : first + rows], count, shared, self.fork(cache), options)
        return found

    def generate_batch(
        self, prompts: Sequence[torch.Tensor], count: int, **options
    ) -> list[tuple[list[int], torch.Tensor | None]]:
        """As `generate_on_text`, of prompts [L] that share nothing and are read at once."""
        return self._generate_rows(prompts, count, 0, None, options)

    @torch.inference_mode()
    def _generate_rows(self, prompts: Sequence[torch.Tensor], count: int, shared: int, cache, options: dict):
        """Continues prompts of which `cache` holds the first `shared` tokens. They end together."""
        if cache is not None:
            cache.batch_repeat_interleave(len(prompts))
            options = {**options, CACHE: cache}
        length = max(map(len, prompts))
        ids = prompts[0].new_zeros(len(prompts), length)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            for part in (slice(0, shared), slice(length - len(prompt) + shared, length)):
                mask[row, part] = 1
            ids[row, mask[row].bool()] = prompt
        with self.record(length - 1 - shared) as recorder:
            tokens = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=False,
                pad_token_id=self.model.generation_config.pad_token_id or 0, **options,
            )  # fmt: skip
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        found = []
        for row, new in enumerate(tokens[:, length:].tolist()):
            new = new[: next((i for i, token in enumerate(new, 1) if token in ends), len(new))]
            found.append((new, None if recorder.chunks is None else recorder.chunks[row, : len(new)]))
        return found

    def fork(self, cache):
        """A cache that goes on from what `cache` holds, without changing it."""
        return copy.deepcopy(cache)


class HSAReader(Reader):
    """Reads into an `HSACache` with room for the whole text, so that it never grows by copying."""

    can_offload = True

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, segment: int | None = None, offload: bool = False):
        super().__init__(model, segment, offload)
        # The class is that of the code the model came with, which need not be an installed package.
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.cache_class = type(model(token, use_cache=True)[CACHE])

    def segment_of(self, input_ids: torch.Tensor) -> int:
        return self.model.prefill_segment(*input_ids.shape) if self.segment is None else super().segment_of(input_ids)

    def make_cache(self, tokens: int):
        cache = self.cache_class(self.model.config, offloading=self.offload)
        cache.reserve(tokens)
        return cache

    def fork(self, cache):
        return cache.fork()

    def record(self, start: int) -> "RetrievalRecorder":
        return RetrievalRecorder(self.model.base_model if any(self.model.config.hsa_layers) else None, start)


class FlaReader(Reader):
    """Models of flash-linear-attention, which know the cache by its name before Transformers 5.24."""

    cache_name = "past_key_values"


READERS = {"hsa": HSAReader, "nsa": FlaReader}  # by model type


def make_reader(model: PreTrainedModel, segment: int | None = None, offload: bool = False) -> Reader:
    """The reader of the model's family."""
    return READERS.get(model.config.model_type, Reader)(model, segment, offload)


def common_beginning(prompts: Sequence[torch.Tensor]) -> int:
    """How many tokens all of several prompts [L] begin with, at most all but the last of each."""
    length = min(map(len, prompts)) - 1
    same = torch.stack([(prompt[:length] == prompts[0][:length]) for prompt in prompts]).all(0)
    return length if same.all() else int((~same).nonzero()[0])


def _start(input_ids: torch.Tensor, count: int) -> int:
    length = input_ids.shape[1]
    if not 0 < count < length:
        raise ValueError(f"Can score from 1 to {length - 1} of the {length} tokens, not {count}.")
    return length - count - 1


class RetrievalRecorder:
    """
    A context in which what tokens retrieve is recorded, on the CPU: of the tokens that the base model `base` of an HSA
    model is called with, those from number `start` on. Nothing is, without a base model.
    """

    def __init__(self, base: torch.nn.Module | None, start: int):
        self.base, self.start, self.position = base, start, 0
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hooks = []

    def __enter__(self) -> "RetrievalRecorder":
        if self.base is not None:
            self.hooks = [
                self.base.register_forward_pre_hook(self._ask, with_kwargs=True),
                self.base.register_forward_hook(self._keep),
            ]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self.hooks:
            hook.remove()

    def _ask(self, module, args, kwargs):
        # Only of calls with tokens that are asked for: the rest of the prompt costs no memory.
        return args, {**kwargs, "output_retrieval": self.position + _tokens(args, kwargs) > self.start}

    def _keep(self, module, args, output) -> None:
        length = output.last_hidden_state.shape[1]
        if self.position + length > self.start:
            skip = max(self.start - self.position, 0)
            # Joint weighting has no weights of chunks. What a softmax of the scores would give still ranks them.
            weights = [x.scores.softmax(-1) if x.weights is None else x.weights for x in output.retrieval]
            layers = [x.indices for x in output.retrieval], weights
            self.calls.append(tuple(torch.stack([x[:, skip:].cpu() for x in of_all], dim=2) for of_all in layers))
        self.position += length

    @property
    def chunks(self) -> torch.Tensor | None:
        """Chunks [B, tokens, layers, Hr, K], -1 for none."""
        return torch.cat([chunks for chunks, _ in self.calls], dim=1) if self.calls else None

    def weights(self, layer: int | None = None, tokens: slice = slice(None)) -> dict[int, float]:
        """
        Of row 0: chunk -> its weight, the heaviest first, averaged over the retrieval heads, the tokens chosen and,
        where no `layer` is named, the HSA layers.
        """
        if not self.calls:
            return {}
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        chunks, weights = (torch.cat(x, dim=1)[0, tokens, layers].flatten(0, 2) for x in zip(*self.calls))
        total: dict[int, float] = {}
        for chunk, weight in zip(chunks.flatten().tolist(), (weights / max(len(weights), 1)).flatten().tolist()):
            if chunk >= 0:
                total[chunk] = total.get(chunk, 0.0) + weight
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def retrieval_recall(chunks: torch.Tensor, needles: Sequence[tuple[int, int]], chunk_size: int) -> list[float]:
    """
    recall@K of the needles in one sample, per HSA layer and, last, of all layers together: the share of the chunks
    holding tokens of `needles` [(start, end), ...] that at least one token of `chunks` [tokens, layers, Hr, K]
    retrieved.
    """
    wanted = sorted({c for start, end in needles for c in range(start // chunk_size, (end - 1) // chunk_size + 1)})
    found = [set(layer.flatten().tolist()) for layer in chunks.unbind(1)]
    return [sum(c in layer for c in wanted) / len(wanted) for layer in (*found, set().union(*found))]


class PromptBar:
    """A progress bar over the prompt, for any model: counts the tokens that its base model has read. A context."""

    def __init__(self, model: PreTrainedModel, tokens: int):
        self.bar = tqdm(total=tokens, desc="Reading the prompt", unit="token", unit_scale=True)
        self.hook = model.base_model.register_forward_hook(self._count, with_kwargs=True)

    def __enter__(self) -> "PromptBar":
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()
        self.bar.close()

    def _count(self, module, args, kwargs, output) -> None:
        self.bar.update(_tokens(args, kwargs))
        if self.bar.n >= self.bar.total:
            self.__exit__()


def _tokens(args: tuple, kwargs: dict) -> int:
    """How many tokens the base model is called with."""
    embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None)
    return (ids if embeds is None else embeds).shape[1]

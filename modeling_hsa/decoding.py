"""
The steps of `generate` as a CUDA graph: launching the kernels of a token one by one takes longer than running them.

After the prompt the state of the cache is copied into storage of fixed size (`StepCache`). The first steps run as they
are, then one is captured, which runs nothing and takes about as long as a step, and from then on replayed. Nothing is
compiled. Where a graph cannot be, tokens are generated without it, and the reason is logged.
"""

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .cache.hsa_cache import HSACache
from .cache.memory import DeviceMemory
from .cache.step_cache import StepCache
from .naming import CACHE
from .ops.availability import pick_backend


logger = logging.get_logger(__name__)

# Where steps are captured.
_DEVICES = ("cuda",)
# Fewer steps take less time without a graph.
_LEAST_STEPS = 8
# Steps before the one that is captured: they load kernels, and libraries make their workspaces.
_WARM_UP = 2
# Steps for which room is made at once.
_MOST_STEPS = 4096
# What a step may be called with; the mask says what is known: one more token, which is real.
_STEP_ARGUMENTS = {
    "input_ids", "attention_mask", "position_ids", CACHE, "use_cache", "return_dict", "logits_to_keep", "tokenizer",
    "assistant_tokenizer",
}  # fmt: skip

# The steps of the `generate` that runs in this thread.
current_steps: ContextVar["DecodeSteps | None"] = ContextVar("current_steps", default=None)


def find_obstacle(model: nn.Module, cache: HSACache) -> str | None:
    """Why the steps of a `generate` cannot be a graph, or None."""
    config = model.config
    if type(cache.memory) is not DeviceMemory:
        return f"the chunk memory is a {type(cache.memory).__name__}, not on the device"
    if any(history.recording for history in cache._histories()):
        return "the cache records its past"
    if "full_attention" in config.layer_types:
        return "layers of full attention have no storage of fixed size"
    if "linear_attention" in config.layer_types:
        return "layers of linear attention keep their state in no storage of fixed size"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"it needs `attn_implementation='sdpa'` or 'eager', not {config._attn_implementation!r}"
    if model.device.type == "cuda" and any(config.hsa_layers) and _backend(model) != "triton":
        return "retrieval runs in plain PyTorch, which looks at values"
    if model.training or torch.is_autocast_enabled(model.device.type):
        return "the model is in training mode, or autocast is on"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the model is quantized"
    if len({x.device for x in model.parameters()}) > 1:
        return "the model is spread over several devices"
    if any(type(x) is not nn.Parameter for x in model.parameters()):
        return "weights are sharded, or tensors of a class of their own"
    return next((f"the module `{name}` {what}" for name, x in model.named_modules() if (what := _change(x))), None)


def _backend(model: nn.Module) -> str:
    """Of retrieval."""
    config, weight = model.config, model.get_input_embeddings().weight
    sizes = {name: getattr(config, name) for name in ("head_dim", "chunk_size", "retrieval_dim")}
    return pick_backend(config.hsa_implementation, weight, topk=config.chunk_topk, **sizes)


def _change(module: nn.Module) -> str | None:
    """What was done to a module that a graph would not repeat, or None."""
    if "forward" in vars(module) or module._compiled_call_impl is not None:  # as accelerate does it
        return "has been wrapped or compiled"
    if type(module).__module__.split(".")[0] == "peft":
        return "is an adapter"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # Those by which Transformers records outputs stay after they were used.
    if any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks):
        return "has hooks"
    return None


def make_steps(model, cache, generation_config, most: int | None, synced: bool) -> "DecodeSteps | None":
    """The steps of a `generate` with at most `most` of them (None: any number), if they may be a graph."""
    is_wanted = model.captures_steps and not synced
    is_wanted = is_wanted and not generation_config.disable_compile and generation_config.compile_config is None
    enough = most is None or most >= _LEAST_STEPS
    if is_wanted and enough and type(cache) is HSACache and model.device.type in _DEVICES:
        return DecodeSteps(model, cache, most)
    return None


class DecodeSteps:
    """
    Takes the place of `model.__call__` for the steps of a `generate`. While it goes on from the cache, this is lent to
    it: `finish`, or whatever is done to the cache next, gives back what the steps have added.
    """

    def __init__(self, model, cache: HSACache, most: int | None):
        self.model, self.cache = model, cache
        self.left = _MOST_STEPS if most is None else most
        self.is_refused: bool | None = None  # not known before the first step
        self.view: StepCache | None = None
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def __call__(self, **inputs) -> CausalLMOutputWithPast:
        logits = self._run(inputs["input_ids"], inputs.get("position_ids")) if self._takes(inputs) else None
        if logits is None:
            self.finish()
            return self.model(**inputs)
        self.room -= 1
        self.left -= 1
        self.cache.rows.num_columns += 1
        return CausalLMOutputWithPast(logits=logits.clone(), **{CACHE: self.cache})

    def _takes(self, inputs: dict) -> bool:
        if self.is_refused is None:
            obstacle = find_obstacle(self.model, self.cache)
            self._refuse(obstacle)
        given = {name for name, value in inputs.items() if value is not None and value is not False}
        ids = inputs.get("input_ids")
        is_step = ids is not None and ids.shape[1] == 1 and inputs.get(CACHE) is self.cache and inputs["use_cache"]
        return bool(is_step) and given <= _STEP_ARGUMENTS and not self.is_refused

    def _refuse(self, reason: str | None) -> None:
        self.is_refused = reason is not None
        if self.is_refused:
            logger.info(f"Tokens are generated without a CUDA graph, which is slower: {reason}.")

    def _run(self, ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """The logits [B, 1, vocab_size] of one step; None, and nothing is done, where there is to be no graph."""
        if self.view is not None and (self.room == 0 or not self.view.is_current):
            self.finish()
        if self.view is None:
            self._start(ids)
            expected = self.view.rows.state[:, 2:] + 1
            if position_ids is not None and not bool((position_ids.to(expected.device) == expected).all()):
                self._refuse("`position_ids` do not count on from the prompt, as where that is padded on the right")
                return None
        self._ids.copy_(ids)
        if self._warm_ups:
            self._warm_ups -= 1
            return self._beside(self._step)
        if self._replay is None:
            try:
                self._replay, self._logits = capture(self._step, self._stream)
            except RuntimeError as error:
                self._refuse(f"a step could not be captured ({str(error).splitlines()[0]})")
                return None
        self._replay()
        return self._logits

    def _start(self, ids: torch.Tensor) -> None:
        self.room, self._warm_ups = min(max(self.left, _LEAST_STEPS), _MOST_STEPS), _WARM_UP
        self.view = StepCache(self.model.config, self.cache, self.room)
        self.cache.lent_to = self
        self._ids = torch.zeros_like(ids, device=self.model.device)
        self._replay: Callable[[], None] | None = None

    @torch.inference_mode()
    def _step(self) -> torch.Tensor:
        """Writes into storage that may have been made in inference mode."""
        return self.model(self._ids, past_key_values=self.view, use_cache=True).logits

    def _beside(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Runs `function` on the stream of the capture, in its turn."""
        if self._stream is None:
            return function()
        self._stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(self._stream):
            output = function()
        torch.cuda.current_stream(self.model.device).wait_stream(self._stream)
        return output

    def finish(self) -> None:
        """Gives the cache back, with the tokens of the steps."""
        self.cache.lent_to = None
        view, self.view = self.view, None
        self._replay = self._logits = None
        if view is not None:
            view.write_back()


def capture(step: Callable[[], torch.Tensor], stream: "torch.cuda.Stream") -> tuple[Callable[[], None], torch.Tensor]:
    """
    `step` as a CUDA graph: a function that runs it, and where its output then is. Capturing runs nothing. Unlike
    `torch.cuda.graph` it neither waits for the device nor empties the memory that PyTorch holds.
    """
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        # Other threads may go on using the device.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            output = step()
        finally:
            graph.capture_end()
    return graph.replay, output

"""
Hierarchical Sparse Attention (HSA) models, arXiv 2510.17196.

What differs from Llama:
- all attention is to a sliding window, with QK-norm; positions are those inside a document;
- in the middle, a chunk encoder turns every complete chunk of hidden states into a landmark, keys and values;
- each group of upper layers starts with an HSA layer, whose tokens retrieve chunks by their landmarks;
- the cache holds a window per layer and one chunk memory, instead of all keys and values of all layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from configuration_hsa import HSAConfig

from .attention import HSAWindowAttention
from .cache.hsa_cache import HSACache
from .cache.memory import CallMemory
from .chunk_encoder import HSAChunkEncoder
from .config_guard import ConfigGuard
from .copies import is_hsa_config
from .generation import HSAGenerationMixin
from .hub import save_code
from .inputs import LOSS_KEYWORDS, check_head_inputs, check_inputs
from .kinds import LAYER_KINDS
from .layers import HSALayer
from .layout import Past, TokenLayout, build_layout
from .linears import fast_linears
from .modules import HSARMSNorm, HSARotaryEmbedding
from .naming import CACHE, takes_cache
from .parallel import check_parallelism
from .retrieval import ChunkRetrieval, HSARetrieval
from .segments import AUTO


logger = logging.get_logger(__name__)


@dataclass
class HSAModelOutputWithPast(BaseModelOutputWithPast):
    """
    `BaseModelOutputWithPast` and, with `output_retrieval=True`, `retrieval`: a [`ChunkRetrieval`] per HSA layer.
    """

    retrieval: tuple[ChunkRetrieval, ...] | None = None


@dataclass
class HSACausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    `CausalLMOutputWithPast` and, with `output_retrieval=True`, `retrieval`: a [`ChunkRetrieval`] per HSA layer.
    """

    retrieval: tuple[ChunkRetrieval, ...] | None = None


def _through_arguments(checkpoint_function: Callable) -> Callable:
    """Reentrant checkpointing sees tensors that are arguments, but not those inside of one, as in a chunk memory."""

    def run(function, *args):
        leaves, spec = pytree.tree_flatten(args)
        return checkpoint_function(lambda *leaves: function(*pytree.tree_unflatten(leaves, spec)), *leaves)

    return run


class HSAPreTrainedModel(PreTrainedModel):
    config: HSAConfig
    config_class = HSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HSAChunkEncoder", *sorted({kind.layer.__name__ for kind in LAYER_KINDS.values()})]
    _skip_keys_device_placement = ["past_key_values", "cache", "state", "history"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HSALayer,
        "attentions": HSAWindowAttention,
        "retrieval": OutputRecorder(HSARetrieval, index=0),
    }

    def __init__(self, config: HSAConfig, *args, **kwargs):
        if not is_hsa_config(config):
            raise TypeError(
                f"{type(self).__name__} needs an HSAConfig, got {type(config).__name__} (model type "
                f"{getattr(config, 'model_type', None)!r}). Load other models with their own class."
            )
        config.validate_hsa()
        # The heads make their base model through `AutoModel`, also of a configuration class that nobody registered: a
        # subclass, or another copy of HSAConfig.
        if type(config) not in MODEL_MAPPING:
            MODEL_MAPPING.register(type(config), HSAModel)
        if type(config).save_code is None:
            type(config).save_code = staticmethod(save_code)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "initialize"):  # of modules with parameters that Transformers does not know
            module.initialize(self.config.initializer_range)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        super()._set_gradient_checkpointing(enable, _through_arguments(gradient_checkpointing_func), **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        check_parallelism(model.config, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)


class HSAModel(HSAPreTrainedModel):
    """The decoder without a head: token ids to hidden states."""

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LAYER_KINDS[kind].layer(config, layer_idx) for layer_idx, kind in enumerate(config.layer_types)]
        )
        if any(config.hsa_layers):
            self.chunk_encoder = HSAChunkEncoder(config)
        self.norm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HSARotaryEmbedding(config)
        self._config_guard = ConfigGuard(config)
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: HSACache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> HSAModelOutputWithPast:
        r"""
        Args:
            input_ids: int64 [B, L], or `inputs_embeds` [B, L, hidden_size].
            attention_mask: [B, cached + L], 0 for padding. Padding counts as absent, wherever it is: positions and the
                chunk grid of a row start at its first real token. Columns of cached tokens are not looked at again.
            position_ids: int64 [1 | B, L]. Where they do not increase a new document starts (packing), and neither
                window nor retrieval crosses it. By default they are counted from the mask and the cache, or from
                `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [documents + 1]) or `seq_idx` (int32 [1 | B, L]), the forms in
                which `DataCollatorWithFlattening` can also tell where documents start.
            past_key_values: an [`HSACache`]. Also as `cache`, its name in Transformers from 5.24 on.
            use_cache: whether to return a cache, one being made if none is given.
            output_retrieval (`bool`): return what every token retrieved.
            output_hidden_states, output_attentions (`bool`): as in Transformers. Attentions are those of the window,
                [B, Hq, L, keys in reach], and need `attn_implementation="eager"`.

        Raises:
            ValueError: for inputs that do not fit together, with the name of the argument and the fix.
            TypeError: for what is not a tensor, a cache of another kind, and keywords that nobody reads.
        """
        # A model with a head commits the call itself, so that it takes effect with the head or not at all.
        commits = kwargs.pop("commits", True)
        if not torch.compiler.is_compiling():
            self._config_guard.check(self.config)
        position_ids = check_inputs(
            self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs
        )
        if past_key_values is not None:
            past_key_values.attach(self)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # What Transformers switches on is an attribute of the layers. If this module had one too, older versions would
        # switch off `use_cache` for its sake, also where no gradient is wanted.
        is_checkpointing = self.training and torch.is_grad_enabled() and self.layers[0].gradient_checkpointing
        if is_checkpointing and (use_cache or past_key_values is not None):
            logger.warning_once(
                "A cache does not go with gradient checkpointing: `use_cache` and the cache are ignored."
            )
            if past_key_values is not None:
                past_key_values.settle()
            use_cache, past_key_values = False, None
        if past_key_values is None and use_cache:
            past_key_values = HSACache(self.config)

        layout = build_layout(
            *inputs_embeds.shape[:2],
            inputs_embeds.device,
            chunk_size=self.config.chunk_size,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=self._begin(past_key_values, inputs_embeds.shape[1], attention_mask, position_ids),
        )
        with fast_linears(inputs_embeds, self.layers):
            hidden_states = self._decode(inputs_embeds, layout, past_key_values, **kwargs)
        if past_key_values is not None:
            past_key_values.finish(layout)
            if commits:
                past_key_values.commit()
        return HSAModelOutputWithPast(
            last_hidden_state=hidden_states, **{CACHE: past_key_values if use_cache else None}
        )

    @staticmethod
    def _begin(cache: HSACache | None, length: int, attention_mask, position_ids) -> Past | None:
        if cache is None:
            return None
        return cache.begin(length, has_mask=attention_mask is not None, has_positions=position_ids is not None)

    def _decode(
        self, hidden_states: torch.Tensor, layout: TokenLayout, cache: HSACache | None, **kwargs
    ) -> torch.Tensor:
        """Embeddings [B, L, hidden] -> the normed output of the last layer."""
        if layout.real is not None:
            # Padding may hold anything, also NaN, which a mask would not stop.
            real = layout.restore(layout.real[..., None])
            hidden_states = torch.where(real, hidden_states, torch.zeros_like(hidden_states))
        position_embeddings = self.rotary_emb(hidden_states, layout.position_ids)
        memory, history = (CallMemory(), None) if cache is None else (cache.memory, cache.hidden)
        for layer_idx, layer in enumerate(self.layers):
            if layer_idx == self.config.chunk_encoder_layer:
                memory.append(*self.chunk_encoder(hidden_states, layout, history), layout)
            hidden_states = layer(
                *((hidden_states, memory) if layer.retrieves else (hidden_states,)),
                layout=layout,
                position_embeddings=position_embeddings,
                state=None if cache is None else cache.layers[layer_idx],
                **kwargs,
            )
        return self.norm(hidden_states)


class HSAForCausalLM(HSAPreTrainedModel, HSAGenerationMixin):
    """An HSA model with a language modelling head: loads, trains with `Trainer` and generates as Llama does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.model = HSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.prefill_chunk_size = AUTO

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: HSACache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> HSACausalLMOutputWithPast:
        r"""
        As [`HSAModel.forward`], and:

        Args:
            labels: int64 [B, L], shifted inside; -100 is ignored. Gives `loss`.
            logits_to_keep: compute the logits of that many last tokens (0: of all), or of the tokens at these indices.
            num_items_in_batch: what the loss is divided by, instead of by the number of labels that are not ignored.
            shift_labels: int64 [B, L], labels that a collator has shifted already.
            ignore_index: the label that is ignored, if not -100.

        Returns:
            logits [B, L or kept, vocab_size], `loss`, and what was asked for.
        """
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_KEYWORDS if kwargs.get(name) is not None}
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        check_head_inputs(self.config.vocab_size, tokens, labels, logits_to_keep, loss_arguments)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            commits=past_key_values is None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None or "shift_labels" in loss_arguments:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs, **loss_arguments
            )
        if past_key_values is not None:
            past_key_values.commit()
        return HSACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            retrieval=outputs.retrieval,
        )

    def get_compiled_call(self, compile_config):
        """What `generate` calls for a step, where `_valid_auto_compile_criteria` says so."""
        return self._own_steps() or super().get_compiled_call(compile_config)


class HSAForSequenceClassification(GenericForSequenceClassification, HSAPreTrainedModel):
    """An HSA model with a classification head on the last token of each sequence."""

    accepts_loss_kwargs = False  # the loss is a mean, which `Trainer` divides by its steps of gradient accumulation


class HSAForTokenClassification(GenericForTokenClassification, HSAPreTrainedModel):
    """An HSA model with a classification head on every token."""

    accepts_loss_kwargs = False  # the loss is a mean, which `Trainer` divides by its steps of gradient accumulation


class HSAForQuestionAnswering(GenericForQuestionAnswering, HSAPreTrainedModel):
    """An HSA model with a head for the start and end of an answer span."""

    accepts_loss_kwargs = False  # the loss is a mean, which `Trainer` divides by its steps of gradient accumulation


AUTO_CLASSES = {
    AutoModel: HSAModel,
    AutoModelForCausalLM: HSAForCausalLM,
    AutoModelForSequenceClassification: HSAForSequenceClassification,
    AutoModelForTokenClassification: HSAForTokenClassification,
    AutoModelForQuestionAnswering: HSAForQuestionAnswering,
}
for _auto, _model in AUTO_CLASSES.items():
    _auto.register(HSAConfig, _model, exist_ok=True)
HSAConfig.save_code = staticmethod(save_code)

__all__ = [
    "HSAForCausalLM",
    "HSAForQuestionAnswering",
    "HSAForSequenceClassification",
    "HSAForTokenClassification",
    "HSAModel",
    "HSAPreTrainedModel",
]

"""
Hierarchical Sparse Attention (HSA) models, arXiv 2510.17196.

What differs from Llama:
- all attention is to a sliding window, with QK-norm; positions are those inside a document;
- in the middle, a chunk encoder turns every complete chunk of hidden states into a landmark, keys and values;
- each group of upper layers starts with an HSA layer, whose tokens retrieve chunks by their landmarks;
- the cache holds a window per layer and one chunk memory, instead of all keys and values of all layers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
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

from .cache import HSACache
from .generation import PREFILL_CHUNK_SIZE, HSAGenerationMixin
from .hub import save_code
from .layers import (
    ChunkRetrieval,
    HSAChunkEncoder,
    HSADecoderLayer,
    HSALayer,
    HSARetrieval,
    HSARetrievalLayer,
    HSARMSNorm,
    HSARotaryEmbedding,
    HSAWindowAttention,
)
from .layout import build_layout
from .naming import CACHE, takes_cache


logger = logging.get_logger(__name__)

# Fields of the configuration in which a cache has to agree with the model.
CACHE_FIELDS = (
    "num_lower_layers", "num_upper_layers", "num_upper_groups", "hidden_size", "num_key_value_heads", "head_dim",
    "sliding_window", "chunk_size", "hsa_local_attention", "hsa_num_key_value_heads", "num_retrieval_heads",
    "retrieval_dim", "retrieval_stride",
)  # fmt: skip


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


class HSAPreTrainedModel(PreTrainedModel):
    config: HSAConfig
    config_class = HSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HSADecoderLayer", "HSARetrievalLayer", "HSAChunkEncoder"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HSALayer,
        "attentions": HSAWindowAttention,
        "retrieval": OutputRecorder(HSARetrieval, index=0),
    }

    def __init__(self, config: HSAConfig, *args, **kwargs):
        if not isinstance(config, HSAConfig) and getattr(config, "model_type", None) != HSAConfig.model_type:
            raise TypeError(
                f"{type(self).__name__} needs an HSAConfig, got {type(config).__name__} (model type "
                f"{getattr(config, 'model_type', None)!r}). Load other models with their own class."
            )
        config.validate_hsa()
        # Loaded from the Hub, the configuration may be of another copy of its class than the one registered below.
        AutoModel.register(type(config), HSAModel, exist_ok=True)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HSAChunkEncoder) and module.use_cls:
            init.normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """
        As in Transformers, and also saves the code of the model, so that `from_pretrained(...,
        trust_remote_code=True)` loads the folder where this package is not installed.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            save_code(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # The last step of `save_pretrained(push_to_hub=True)` in Transformers: before it, the code has to be there.
        save_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class HSAModel(HSAPreTrainedModel):
    """The decoder without a head: token ids to hidden states."""

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [
                (HSARetrievalLayer if is_hsa else HSADecoderLayer)(config, layer_idx)
                for layer_idx, is_hsa in enumerate(config.hsa_layers)
            ]
        )
        self.chunk_encoder = HSAChunkEncoder(config)
        self.norm = HSARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HSARotaryEmbedding(config)
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
                window nor retrieval crosses it. By default they are counted from the mask and the cache.
            past_key_values: an [`HSACache`]. Also as `cache`, its name in Transformers from 5.24 on.
            use_cache: whether to return a cache, one being made if none is given.
            output_retrieval (`bool`): return what every token retrieved.
            output_hidden_states, output_attentions (`bool`): as in Transformers. Attentions are those of the window,
                [B, Hq, L, keys in reach], and need `attn_implementation="eager"`.

        Raises:
            ValueError: for inputs that do not fit together, with the name of the argument and the fix.
            TypeError: for a cache of another kind.
        """
        self._check_inputs(input_ids, inputs_embeds, past_key_values, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # What Transformers switches on is an attribute of the layers. If this module had one too, older versions would
        # switch off `use_cache` for its sake, also where no gradient is wanted.
        is_checkpointing = self.training and torch.is_grad_enabled() and self.layers[0].gradient_checkpointing
        if is_checkpointing and (use_cache or past_key_values is not None):
            logger.warning_once(
                "A cache does not go with gradient checkpointing: `use_cache` and the cache are ignored."
            )
            use_cache, past_key_values = False, None
        if past_key_values is None and use_cache:
            past_key_values = HSACache(self.config)

        hidden_states = inputs_embeds
        batch, length = hidden_states.shape[:2]
        layout = build_layout(
            batch, length, hidden_states.device, self.config.chunk_size, attention_mask, position_ids, past_key_values
        )
        position_embeddings = self.rotary_emb(hidden_states, layout.position_ids)

        memory = None
        for layer_idx, (layer, is_hsa) in enumerate(zip(self.layers, self.config.hsa_layers)):
            if layer_idx == self.config.num_lower_layers:
                memory = self.chunk_encoder(hidden_states, layout, past_key_values)
            # Tensor by tensor: reentrant checkpointing does not see those inside of an argument.
            inputs = (hidden_states, *memory) if is_hsa else (hidden_states,)
            hidden_states = layer(
                *inputs,
                layout=layout,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)

        if past_key_values is not None:
            past_key_values.commit(layout, batch)
        return HSAModelOutputWithPast(
            last_hidden_state=hidden_states, **{CACHE: past_key_values if use_cache else None}
        )

    def _check_inputs(self, input_ids, inputs_embeds, past_key_values, kwargs) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        given, name, dims = (
            (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
        )
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(given).__name__}.")
        if given.dim() != dims or 0 in given.shape:
            raise ValueError(
                f"`{name}` must be [batch, tokens{', hidden_size' * (dims == 3)}] with at least one row and one "
                f"token, got {list(given.shape)}."
            )
        if inputs_embeds is not None and (
            not inputs_embeds.is_floating_point() or inputs_embeds.shape[-1] != self.config.hidden_size
        ):
            raise ValueError(
                f"`inputs_embeds` must be floating point of the width `hidden_size` ({self.config.hidden_size}), got "
                f"{inputs_embeds.dtype} {list(inputs_embeds.shape)}."
            )
        if input_ids is not None:
            if input_ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"`input_ids` must be int64 or int32, got {input_ids.dtype}. Pass token ids.")
            # On the CPU only: elsewhere it would wait for the device, which raises an error of its own.
            if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
                low, high = torch.aminmax(input_ids)
                if low < 0 or high >= self.config.vocab_size:
                    raise ValueError(
                        f"`input_ids` must be in [0, {self.config.vocab_size}), got ids from {int(low)} to "
                        f"{int(high)}. Does the tokenizer belong to this model?"
                    )
        if past_key_values is not None and not isinstance(past_key_values, HSACache):
            raise TypeError(
                f"`past_key_values` must be an HSACache, got {type(past_key_values).__name__}. Leave it out and pass "
                "`use_cache=True`, or make one with `HSACache(model.config)`."
            )
        if past_key_values is not None and past_key_values.batch_size not in (-1, given.shape[0]):
            raise ValueError(
                f"`past_key_values` holds {past_key_values.batch_size} rows but `{name}` has {given.shape[0]}."
            )
        if past_key_values is not None and past_key_values.config is not self.config:
            for field in CACHE_FIELDS:
                theirs, ours = getattr(past_key_values.config, field), getattr(self.config, field)
                if theirs != ours:
                    raise ValueError(
                        f"`past_key_values` was made for a model with `{field}` {theirs}, but this one has {ours}. "
                        "Make it with `HSACache(model.config)`."
                    )
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_attentions=True` needs `attn_implementation='eager'`, but it is "
                f"{self.config._attn_implementation!r}. Call `model.set_attn_implementation('eager')` first."
            )


class HSAForCausalLM(HSAPreTrainedModel, HSAGenerationMixin):
    """An HSA model with a language modelling head: loads, trains with `Trainer` and generates as Llama does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.model = HSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.prefill_chunk_size = PREFILL_CHUNK_SIZE

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

        Returns:
            logits [B, L or kept, vocab_size], `loss`, and what was asked for.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return HSACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            retrieval=outputs.retrieval,
        )


class HSAForSequenceClassification(GenericForSequenceClassification, HSAPreTrainedModel):
    """An HSA model with a classification head on the last token of each sequence."""


class HSAForTokenClassification(GenericForTokenClassification, HSAPreTrainedModel):
    """An HSA model with a classification head on every token."""


class HSAForQuestionAnswering(GenericForQuestionAnswering, HSAPreTrainedModel):
    """An HSA model with a head for the start and end of an answer span."""


# Also where this file was loaded from the Hub: the classification heads make their base model through `AutoModel`.
AutoModel.register(HSAConfig, HSAModel, exist_ok=True)
AutoModelForCausalLM.register(HSAConfig, HSAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HSAConfig, HSAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HSAConfig, HSAForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(HSAConfig, HSAForQuestionAnswering, exist_ok=True)

__all__ = [
    "HSAForCausalLM",
    "HSAForQuestionAnswering",
    "HSAForSequenceClassification",
    "HSAForTokenClassification",
    "HSAModel",
    "HSAPreTrainedModel",
]

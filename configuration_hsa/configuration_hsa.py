"""Configuration of Hierarchical Sparse Attention (HSA) models, arXiv 2510.17196."""

from .versions import check_versions  # isort: skip

check_versions()  # before anything that older versions of Transformers do not have

import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import field, fields  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, ClassVar  # noqa: E402

from transformers.activations import ACT2FN  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: E402


# The kinds of decoder layers. Window and full attention rotate by the same `rope_parameters`.
LAYER_TYPES = ("sliding_attention", "full_attention", "linear_attention", "hsa")
# The short form of the paper's pattern of layers, and its setting.
_LAYER_COUNTS = {"num_lower_layers": 8, "num_upper_layers": 6, "num_upper_groups": 2}
# Fields that are as another one where they are left out.
_FOLLOWERS = {
    "encoder_intermediate_size": "intermediate_size",
    "hsa_intermediate_size": "intermediate_size",
    "hsa_qk_norm": "qk_norm",
    "attention_output_bias": "attention_bias",
}
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_HSA_FIELD_PREFIXES = (
    "chunk_", "hsa_", "retrieval_", "num_retrieval", "num_lower", "num_upper", "num_encoder", "encoder_", "landmark_",
    "mamba_",
)  # fmt: skip
_NEWER = " If the configuration was written by a newer version of HSA for Transformers, upgrade the package."


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """Whether it is an integer or a float that is finite."""
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


# RoPE variants whose frequencies do not depend on the length of the input, and what each has to and may be given. With
# any other, a prompt read in segments would be rotated differently from the same prompt read at once.
ROPE_TYPES = {
    # The original length is written here by Transformers, and changes nothing.
    "default": ((), ("original_max_position_embeddings",)),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_ROPE_FIELDS = {  # those that are not any number above 0
    "rope_theta": (lambda x: _is_number(x) and x > 1, "a finite number above 1"),
    "factor": (lambda x: _is_number(x) and x >= 1, "a finite number of at least 1"),
    "original_max_position_embeddings": (
        lambda x: _is_int(x) and _is_number(x) and x >= 1,
        "an integer of at least 1, and finite as a float",
    ),
    "truncate": (lambda x: isinstance(x, bool), "True or False"),
}
_YARN_BETAS = {"beta_slow": 1, "beta_fast": 32}  # where they are left out

# Fields of the configuration: a default, what is accepted, and how an error says so.


def _field(default, accepts, expected: str, hint: str = "") -> Any:
    return field(default=default, metadata={"accepts": accepts, "expected": expected, "hint": hint})


def _integer(default: int | None, minimum: int = 1, or_none: bool = False) -> Any:
    """With `or_none`, None is a value of the finished configuration; else it is for what is derived by then."""
    expected = f"an integer of at least {minimum}{' or None' * or_none}"
    return _field(default, lambda x: (or_none and x is None) or (_is_int(x) and x >= minimum), expected)


def _number(default: float, low: float = 0.0, high: float = float("inf")) -> Any:
    """A number of [low, high)."""
    below = "" if high == float("inf") else f" and below {high}"
    return _field(default, lambda x: _is_number(x) and low <= x < high, f"a finite number of at least {low}{below}")


def _switch(default: bool | None) -> Any:
    return _field(default, lambda x: isinstance(x, bool), "True or False")


def _choice(default: str, *others: str) -> Any:
    choices = (default, *others)
    accepts = lambda x: isinstance(x, str) and x in choices  # noqa: E731
    return _field(default, accepts, f"one of {', '.join(map(repr, choices))}", _NEWER)


def _layer_pattern(num_lower_layers: int, num_upper_layers: int, num_upper_groups: int) -> list[str]:
    """The kinds of the layers of the paper's pattern."""
    group = ["hsa"] + ["sliding_attention"] * (num_upper_layers // num_upper_groups)
    return ["sliding_attention"] * num_lower_layers + group * num_upper_groups


class HSAConfig(PreTrainedConfig):
    r"""
    Configuration of an [`HSAModel`]: a decoder whose lower layers see a sliding window and whose upper layers also
    retrieve, for every token, the `chunk_topk` most relevant chunks of everything before it. The defaults have the
    sizes of the paper's models (arXiv 2510.17196) of about 240M parameters, with a softmax over chunks where these
    have stick-breaking.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000):
            Number of tokens of the vocabulary.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the gated MLP of the decoder layers.
        num_lower_layers (`int`, *optional*, defaults to 8):
            Sliding-window layers below the chunk encoder. This field and the two below are the short form of the
            paper's pattern; they are None where `layer_types` has another one.
        num_upper_layers (`int`, *optional*, defaults to 6):
            Sliding-window layers above it, shared out evenly over the groups. The HSA layers come on top.
        num_upper_groups (`int`, *optional*, defaults to 2):
            Groups of the upper decoder. Each starts with one HSA layer, so that the decoder has
            `num_hidden_layers = num_lower_layers + num_upper_layers + num_upper_groups` layers.
        layer_types (`list[str]`, *optional*):
            The kind of every decoder layer: `"sliding_attention"`, `"full_attention"`, `"linear_attention"` (Mamba-2)
            or `"hsa"`. Derived from the three fields above by default, and instead of them where the pattern is
            another one. Without an HSA layer the model has no chunk encoder.
        chunk_encoder_layer (`int`, *optional*):
            The chunk encoder reads the output of the first so many layers, `layers[:chunk_encoder_layer]`. At most,
            and by default, the index of the first HSA layer. None without HSA layers.
        num_hidden_layers (`int`, *optional*):
            Derived: the number of `layer_types`. May be given, but must then agree with it.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Query heads of the window attention, of the chunk encoder and of the HSA layers.
        num_key_value_heads (`int`, *optional*, defaults to 4):
            Key/value heads of the window attention and of the chunk encoder.
        head_dim (`int`, *optional*):
            Size of an attention head, even. Defaults to `hidden_size // num_attention_heads`.
        sliding_window (`int`, *optional*, defaults to 512):
            Tokens a window layer sees, the current one included (so `W - 1` earlier ones).
        chunk_size (`int`, *optional*, defaults to 64):
            Tokens per chunk, a multiple of 16.
        chunk_topk (`int`, *optional*, defaults to 8):
            Chunks each token retrieves. A small number in training is what makes the model extrapolate (section 4).
        chunk_landmark (`str`, *optional*, defaults to `"cls"`):
            What the landmark of a chunk is made from: `"cls"`, a learned token encoded with the chunk; `"mean"`, the
            mean of its encoded tokens; or `"mass"`, the attention of the former to the keys of the chunk, so that the
            score is a lower bound of the log of the chunk's attention mass.
        chunk_weighting (`str`, *optional*, defaults to `"softmax"`):
            How the retrieved chunks are weighted: `"softmax"` of the retrieval scores, `"stick_breaking"` over them
            from the nearest chunk on, or `"joint"`, one softmax over all retrieved tokens (the scores then get no
            gradient).
        num_encoder_layers (`int`, *optional*, defaults to 1):
            Bidirectional layers of the chunk encoder. 0 for none, which needs `chunk_landmark="mean"`.
        encoder_intermediate_size (`int`, *optional*):
            Width of the MLP of the chunk encoder. Defaults to `intermediate_size`.
        encoder_attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the query, key and value projections of the chunk encoder have a bias.
        hsa_residual (`str`, *optional*, defaults to `"bypass"`):
            `"bypass"`: what was retrieved goes through the MLP of the HSA layer only; `"standard"`: it is also added
            to the residual stream.
        hsa_local_attention (`bool`, *optional*, defaults to `True`):
            Whether an HSA layer starts with window attention.
        hsa_num_key_value_heads (`int`, *optional*, defaults to 1):
            Key/value heads of the chunk memory.
        hsa_intermediate_size (`int`, *optional*):
            Width of the MLP of the HSA layers. Defaults to `intermediate_size`. 0 for no MLP, which needs
            `hsa_residual="standard"`.
        hsa_implementation (`str`, *optional*, defaults to `"auto"`):
            Backend of selection and chunk attention: `"auto"`, `"triton"`, `"torch"` or `"naive"`.
        num_retrieval_heads (`int`, *optional*, defaults to 1):
            Independent selections per token. Each serves `num_attention_heads / num_retrieval_heads` query heads.
        retrieval_dim (`int`, *optional*, defaults to 256):
            Size of a landmark and of a retrieval query, per retrieval head. With `chunk_landmark="mass"` it must be
            `head_dim + 1`.
        retrieval_stride (`int`, *optional*, defaults to 1):
            Tokens per retrieval: the tokens of a stride share the selection of its first token.
        retrieval_distance_penalty (`float`, *optional*, defaults to 0.0):
            Chunks are selected by their score less this for every whole doubling of their distance, counted in chunks
            from the newest complete one (1), so that of many chunks of no great use the near ones are taken. Their
            weights are those of the plain scores. Not in the paper. May be set on a trained model.
        landmark_norm (`bool`, *optional*, defaults to `False`):
            Whether landmarks and retrieval queries are RMS-normalised.
        qk_norm (`bool`, *optional*, defaults to `True`):
            Whether queries and keys of window attention, full attention and the chunk encoder are RMS-normalised per
            head.
        hsa_qk_norm (`bool`, *optional*):
            Whether the queries of the HSA layers and the keys of the chunk memory are RMS-normalised per head.
            Defaults to `qk_norm`.
        full_attention_rope (`bool`, *optional*, defaults to `True`):
            Whether queries and keys of full attention are rotated; without, they have no position.
        state_size (`int`, *optional*, defaults to 128):
            Size of the state of a channel of the linear attention. This field and the four below are those of
            Mamba-2.
        conv_kernel (`int`, *optional*, defaults to 4):
            Tokens that its convolution sees.
        expand (`int`, *optional*, defaults to 2):
            Its channels, as a multiple of `hidden_size`.
        n_groups (`int`, *optional*, defaults to 1):
            Groups of its heads, which share what is written to and read from the state.
        mamba_head_dim (`int`, *optional*, defaults to 64):
            Channels of one of its heads.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the MLPs.
        max_position_embeddings (`int`, *optional*, defaults to 4096):
            Training length in tokens. No limit: the model runs on any length.
        rope_parameters (`dict`, *optional*):
            RoPE of window attention, full attention and the chunk encoder, in the form of Transformers v5.
            `rope_type` is one of `"default"`, `"linear"`, `"llama3"` and `"yarn"`; `rope_theta` defaults to 10000.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        rms_norm_eps (`float`, *optional*, defaults to 1e-06):
            Epsilon of the RMS norms.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the query, key and value projections of window and full attention have biases.
        attention_output_bias (`bool`, *optional*):
            Whether their output projections have biases. Defaults to `attention_bias`.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the weights of window and full attention.
        mlp_bias (`bool`, *optional*, defaults to `False`):
            Whether the MLPs have biases.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns an [`HSACache`].
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether input and output embeddings are the same weights.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*):
            Special tokens. None by default: a tokenizer sets them.

    Raises:
        ValueError: for a field that is out of range or unknown; the message names the field, the value and the fix.

    ```python
    >>> from configuration_hsa import HSAConfig
    >>> from modeling_hsa import HSAForCausalLM

    >>> model = HSAForCausalLM(HSAConfig())
    ```"""

    model_type = "hsa"
    # The cache, by its names before and from Transformers 5.24 on.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    # Heads of attention are split over the devices, and with them the MLPs. What an HSA layer retrieves is the same on
    # all of them, as the landmarks and the few key/value heads of the chunk memory are: of this path the two wide
    # projections are split, and gathered around chunk attention. What is not named here is whole on every device.
    # Writes the code of the model into a folder and returns the `auto_map`: set where the model is defined.
    save_code: ClassVar[Callable[[str], dict[str, str]] | None] = None
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "hsa_head_norm",
        "layers.*.self_attn.k_norm": "hsa_head_norm",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.q_proj": "colwise_gather_output",
        "layers.*.o_proj": "rowwise_split_input",
        "chunk_encoder.layers.*.self_attn.q_proj": "colwise",
        "chunk_encoder.layers.*.self_attn.k_proj": "colwise",
        "chunk_encoder.layers.*.self_attn.v_proj": "colwise",
        "chunk_encoder.layers.*.self_attn.q_norm": "hsa_head_norm",
        "chunk_encoder.layers.*.self_attn.k_norm": "hsa_head_norm",
        "chunk_encoder.layers.*.self_attn.o_proj": "rowwise",
        "chunk_encoder.layers.*.mlp.gate_proj": "colwise",
        "chunk_encoder.layers.*.mlp.up_proj": "colwise",
        "chunk_encoder.layers.*.mlp.down_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "chunk_encoder": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = _integer(32000)
    hidden_size: int = _integer(1024)
    intermediate_size: int = _integer(3072)
    num_lower_layers: int | None = _integer(None, 0, or_none=True)
    num_upper_layers: int | None = _integer(None, 0, or_none=True)
    num_upper_groups: int | None = _integer(None, 1, or_none=True)
    layer_types: list[str] | None = None
    chunk_encoder_layer: int | None = _integer(None, 0, or_none=True)
    num_hidden_layers: int | None = None
    num_attention_heads: int = _integer(16)
    num_key_value_heads: int = _integer(4)
    head_dim: int | None = _integer(None, 2)
    sliding_window: int = _integer(512)
    chunk_size: int = _integer(64, 16)
    chunk_topk: int = _integer(8)
    chunk_landmark: str = _choice("cls", "mean", "mass")
    chunk_weighting: str = _choice("softmax", "stick_breaking", "joint")
    num_encoder_layers: int = _integer(1, 0)
    encoder_intermediate_size: int | None = _integer(None)
    encoder_attention_bias: bool = _switch(False)
    hsa_residual: str = _choice("bypass", "standard")
    hsa_local_attention: bool = _switch(True)
    hsa_num_key_value_heads: int = _integer(1)
    hsa_intermediate_size: int | None = _integer(None, 0)
    hsa_implementation: str = _choice("auto", "triton", "torch", "naive")
    num_retrieval_heads: int = _integer(1)
    retrieval_dim: int = _integer(256)
    retrieval_stride: int = _integer(1)
    retrieval_distance_penalty: float = _number(0.0)
    landmark_norm: bool = _switch(False)
    qk_norm: bool = _switch(True)
    hsa_qk_norm: bool | None = _switch(None)
    full_attention_rope: bool = _switch(True)
    state_size: int = _integer(128)
    conv_kernel: int = _integer(4, 2)
    expand: int = _integer(2)
    n_groups: int = _integer(1)
    mamba_head_dim: int = _integer(64)
    hidden_act: str = _field(
        "silu", lambda x: isinstance(x, str) and x in ACT2FN, "an activation of Transformers such as 'silu' or 'gelu'"
    )
    max_position_embeddings: int = _integer(4096)
    rope_parameters: dict | None = None
    initializer_range: float = _number(0.02)
    rms_norm_eps: float = _number(1e-6)
    attention_bias: bool = _switch(False)
    attention_output_bias: bool | None = _switch(None)
    attention_dropout: float = _number(0.0, high=1.0)
    mlp_bias: bool = _switch(False)
    use_cache: bool = _switch(True)
    tie_word_embeddings: bool = _switch(True)
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._check_unknown_fields(kwargs)
        if self.head_dim is None and _is_int(self.hidden_size) and _is_int(self.num_attention_heads):
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        for name, followed in _FOLLOWERS.items():
            if getattr(self, name) is None:
                setattr(self, name, getattr(self, followed))
        self._check_fields()
        self._derive_layers()
        self._check_older_rope(kwargs)
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # Transformers fills it
        super().__post_init__(**kwargs)
        self.validate_hsa()

    def _derive_layers(self) -> None:
        """Fills `layer_types`, `chunk_encoder_layer`, the counts and `num_hidden_layers`, where they were left out."""
        if self.layer_types is None:
            counts = {name: getattr(self, name) for name in _LAYER_COUNTS}
            counts = {name: _LAYER_COUNTS[name] if count is None else count for name, count in counts.items()}
            if counts["num_upper_layers"] % counts["num_upper_groups"]:
                raise ValueError(
                    f"`num_upper_groups` ({counts['num_upper_groups']}) must divide `num_upper_layers` "
                    f"({counts['num_upper_layers']}). Write another pattern as `layer_types`."
                )
            self.layer_types = _layer_pattern(**counts)
            self.update(dict.fromkeys(_LAYER_COUNTS))
        self._check_kinds()
        self.layer_types = list(self.layer_types)
        if self.chunk_encoder_layer is None:
            self.chunk_encoder_layer = self._first_hsa_layer
        for name, count in self._counts_of_layers().items():
            if getattr(self, name) is None:
                setattr(self, name, count)
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.layer_types)

    @property
    def _first_hsa_layer(self) -> int | None:
        return self.layer_types.index("hsa") if "hsa" in self.layer_types else None

    def _counts_of_layers(self) -> dict[str, int | None]:
        """The counts that are short for `layer_types` and `chunk_encoder_layer`; None each if there are none."""
        lower, groups = self._first_hsa_layer, self.layer_types.count("hsa")
        if lower is not None and self.chunk_encoder_layer == lower:
            upper = len(self.layer_types) - lower - groups
            counts = dict(zip(_LAYER_COUNTS, (lower, upper, groups)))
            if _layer_pattern(**counts) == self.layer_types:
                return counts
        return dict.fromkeys(_LAYER_COUNTS)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            models = sorted(str(file.parent) for file in Path(pretrained_model_name_or_path).glob("*/config.json"))
            hint = f"These are: {', '.join(models)}." if models else "Is it the folder of a model?"
            raise OSError(f"{pretrained_model_name_or_path} has no config.json. {hint}")
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As in Transformers, but what overrides a field (`from_pretrained(..., num_lower_layers=4)`) is validated like
        the rest, and what is derived from it follows. Raises `ValueError` for the configuration of another kind of
        model. (A subclass of HSAConfig may have a model type of its own, of which Transformers warns.)
        """
        model_type = config_dict.get("model_type", cls.model_type)
        is_of_a_subclass = "chunk_topk" in config_dict and model_type not in CONFIG_MAPPING_NAMES
        if model_type != cls.model_type and not is_of_a_subclass:
            raise ValueError(
                f"The configuration is of model type {model_type!r}, not {cls.model_type!r}. Load it with "
                "`AutoConfig`."
            )
        fields = {name for base in cls.__mro__ if issubclass(base, HSAConfig) for name in base.__annotations__}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        config_dict = {**config_dict, **overrides}
        replaced = set()
        if overrides.keys() & {*_LAYER_COUNTS, "layer_types"}:
            replaced.add("num_hidden_layers")
        if overrides.get("layer_types") is not None:
            replaced.update(_LAYER_COUNTS)
        for name in replaced - overrides.keys():
            config_dict.pop(name, None)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """
        As in Transformers, without what is derived from other fields: `layer_types` where the counts say as much, and
        the rest where it has its default. Earlier versions of HSA for Transformers thus load what they can run.
        """
        output = super().to_dict()
        counts = self._counts_of_layers()
        if None not in counts.values() and all(output[name] == count for name, count in counts.items()):
            del output["layer_types"]
        if self.chunk_encoder_layer == self._first_hsa_layer:
            del output["chunk_encoder_layer"]
        for name, followed in _FOLLOWERS.items():
            if output[name] == output[followed]:
                del output[name]
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As in Transformers, and also saves the code of the model, so that `from_pretrained(...,
        trust_remote_code=True)` loads the folder where this package is not installed. Models save their configuration
        with this method: wherever there is the `config.json` of an HSA model, there is its code.
        """
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if self.save_code is not None:
            self.auto_map = self.save_code(save_directory)  # also here, as Transformers does for code of a user's

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # The last step of `save_pretrained(push_to_hub=True)` in Transformers: before it, the code has to be there.
        if self.save_code is not None:
            self.save_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @property
    def retrieval_query_dim(self) -> int:
        """What the projections of retrieval make, per retrieval head."""
        return self.head_dim if self.chunk_landmark == "mass" else self.retrieval_dim

    @property
    def hsa_layers(self) -> list[bool]:
        """For each of the `num_hidden_layers` decoder layers, whether it is an HSA layer."""
        return [kind == "hsa" for kind in self.layer_types]

    def _check_unknown_fields(self, fields: dict) -> None:
        known = set(type(self).__dataclass_fields__)
        for name in fields:
            if name.startswith(_HSA_FIELD_PREFIXES) and name not in known:
                raise ValueError(
                    f"HSAConfig has no field {name!r} (given {fields[name]!r}). Check the spelling; if the "
                    "configuration was written by a newer version of HSA for Transformers, upgrade the package."
                )

    def _check_fields(self) -> None:
        """What can be said of each field alone."""
        for one in fields(HSAConfig):
            value = getattr(self, one.name)
            if "accepts" in one.metadata and not one.metadata["accepts"](value):
                expected, hint = one.metadata["expected"], one.metadata["hint"]
                raise ValueError(f"`{one.name}` must be {expected}, got {value!r}.{hint}")

    def _check_kinds(self) -> None:
        kinds = self.layer_types
        if not isinstance(kinds, (list, tuple)) or not kinds:
            raise ValueError(f"`layer_types` must be a list of the kind of every layer, got {kinds!r}.")
        for index, kind in enumerate(kinds):
            if not isinstance(kind, str) or kind not in LAYER_TYPES:
                raise ValueError(
                    f"`layer_types[{index}]` must be one of {', '.join(map(repr, LAYER_TYPES))}, got {kind!r}.{_NEWER}"
                )

    def validate(self) -> None:
        """What Transformers calls before it saves. Its own would not know the kind of layers `"hsa"`."""
        self.validate_output_attentions()
        self.validate_hsa()

    # Not in the way of `@strict`, which gives a subclass its own: of all its methods `validate_*`.
    validate.__is_defined_by_strict_decorator__ = True

    def validate_layer_type(self) -> None:
        """
        In place of that of Transformers. Raises `ValueError` for unknown kinds of layers, and for `layer_types`,
        `chunk_encoder_layer`, the counts and `num_hidden_layers` that do not agree.
        """
        self._check_kinds()
        if not _is_int(self.num_hidden_layers) or self.num_hidden_layers != len(self.layer_types):
            raise ValueError(
                f"`num_hidden_layers` ({self.num_hidden_layers!r}) is derived: `layer_types`, or num_lower_layers + "
                f"num_upper_layers + num_upper_groups, make it {len(self.layer_types)}. Leave it out, or change those."
            )
        first, encoder = self._first_hsa_layer, self.chunk_encoder_layer
        if first is None and encoder is not None:
            raise ValueError(
                f"`chunk_encoder_layer` ({encoder!r}) must be None for `layer_types` without an 'hsa' layer, as there "
                "is no chunk encoder then. Leave it out."
            )
        if first is not None and not (_is_int(encoder) and 0 <= encoder <= first):
            raise ValueError(
                f"`chunk_encoder_layer` must be an integer from 0 to {first}, the index of the first 'hsa' layer in "
                f"`layer_types`, got {encoder!r}: the encoder has to run before. Leave it out for {first}."
            )
        for name, count in self._counts_of_layers().items():
            if getattr(self, name) != count:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)!r}) does not agree with `layer_types` and `chunk_encoder_layer`, "
                    f"which make it {count}. Give either the counts or `layer_types`; to change them, make a new "
                    "configuration, or override them in `from_pretrained`."
                )

    def validate_hsa(self) -> None:
        """Raises `ValueError` for the first field found out of range. Called on construction and by the model."""
        self._check_fields()
        self.validate_layer_type()
        if self.chunk_size % 16:
            raise ValueError(
                f"`chunk_size` must be a multiple of 16, got {self.chunk_size}; 64 is the paper's setting."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, as RoPE rotates pairs, got {self.head_dim}.")
        for name in ("num_key_value_heads", "hsa_num_key_value_heads", "num_retrieval_heads"):
            if self.num_attention_heads % getattr(self, name):
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must divide `num_attention_heads` ({self.num_attention_heads})."
                )
        few, many = sorted((self.hsa_num_key_value_heads, self.num_retrieval_heads))
        if many % few:
            raise ValueError(
                f"One of `hsa_num_key_value_heads` ({self.hsa_num_key_value_heads}) and `num_retrieval_heads` "
                f"({self.num_retrieval_heads}) must divide the other."
            )
        if self.chunk_landmark == "mass":
            self._validate_mass_landmarks()
        if self.num_encoder_layers == 0 and self.chunk_landmark != "mean":
            raise ValueError(
                f"`chunk_landmark={self.chunk_landmark!r}` needs `num_encoder_layers` of at least 1: without an "
                "encoder the CLS token is the same for every chunk. Use `chunk_landmark='mean'`, or add an encoder "
                "layer."
            )
        if self.hsa_intermediate_size == 0 and self.hsa_residual == "bypass":
            raise ValueError(
                "`hsa_intermediate_size=0` needs `hsa_residual='standard'`: with 'bypass' what is retrieved goes "
                "through the MLP only, and would not reach the stream. Use 'standard', or a width of at least 1."
            )
        if "linear_attention" in self.layer_types:
            self._validate_linear_attention()
        self._validate_token_ids()
        self._validate_rope()

    def _validate_mass_landmarks(self) -> None:
        if self.retrieval_dim != self.head_dim + 1:
            raise ValueError(
                f"`chunk_landmark='mass'` needs a `retrieval_dim` of `head_dim` + 1 ({self.head_dim + 1}), got "
                f"{self.retrieval_dim}: a landmark is a mean of keys and an entropy."
            )
        if self.num_retrieval_heads % self.hsa_num_key_value_heads:
            raise ValueError(
                f"`chunk_landmark='mass'` needs `num_retrieval_heads` ({self.num_retrieval_heads}) to be a multiple "
                f"of `hsa_num_key_value_heads` ({self.hsa_num_key_value_heads}): a landmark is for the keys of one."
            )
        if self.landmark_norm:
            raise ValueError("`chunk_landmark='mass'` does not go with `landmark_norm`, which would undo the mass.")

    def _validate_linear_attention(self) -> None:
        channels = self.expand * self.hidden_size
        if channels % self.mamba_head_dim:
            raise ValueError(
                f"`mamba_head_dim` ({self.mamba_head_dim}) must divide the channels of the linear attention, `expand` "
                f"times `hidden_size` ({channels})."
            )
        if (heads := channels // self.mamba_head_dim) % self.n_groups:
            raise ValueError(
                f"`n_groups` ({self.n_groups}) must divide the heads of the linear attention, `expand` times "
                f"`hidden_size` by `mamba_head_dim` ({heads})."
            )

    def _validate_token_ids(self) -> None:
        for name in _SPECIAL_TOKENS:
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if value is not None and not all(_is_int(one) and 0 <= one < self.vocab_size for one in ids):
                raise ValueError(
                    f"`{name}` must be None or {'token ids' if name == 'eos_token_id' else 'a token id'} from 0 to "
                    f"{self.vocab_size - 1}, as `vocab_size` is {self.vocab_size}, got {value!r}."
                )

    def _check_older_rope(self, kwargs: dict) -> None:
        """RoPE in the words of Transformers before v5, of which only one of two that differ would be read."""
        rope, scaling = self.rope_parameters, kwargs.get("rope_scaling")
        for name, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"`{name}` must be a dictionary, got {value!r}.")
        if rope and scaling and rope != scaling:
            raise ValueError(
                f"`rope_scaling` ({scaling!r}) is an older name of `rope_parameters` ({rope!r}). Give one of them."
            )
        rope = rope or scaling or {}
        for name in LAYER_TYPES:
            if name in rope:
                raise ValueError(f"`rope_parameters` are those of all layers: it has no part {name!r}. Give one set.")
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            if name in kwargs and rope.get(name, kwargs[name]) != kwargs[name]:
                raise ValueError(
                    f"`{name}` ({kwargs[name]!r}) does not agree with `rope_parameters[{name!r}]` ({rope[name]!r}). "
                    "Leave out one of them."
                )

    def _validate_rope(self) -> None:
        rope = self.rope_parameters or {}
        rope_type, where = rope.get("rope_type", "default"), "rope_parameters"
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            raise ValueError(
                f"`{where}['rope_type']` must be one of {', '.join(map(repr, ROPE_TYPES))}, got {rope_type!r}: "
                "frequencies that change with the input length would make segmented prefill differ from one pass."
            )
        required, optional = ROPE_TYPES[rope_type]
        for name, value in rope.items():
            if name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor", *required, *optional):
                raise ValueError(
                    f"`{where}[{name!r}]` ({value!r}) is not read by rope_type {rope_type!r}. Leave it out, or choose "
                    "another `rope_type`."
                )
        for name in ("rope_theta", *required, *optional):
            accepts, expected = _ROPE_FIELDS.get(name, (lambda x: _is_number(x) and x > 0, "a finite number above 0"))
            value = rope.get(name, 10000.0 if name == "rope_theta" else None)
            if not accepts(value) and not (value is None and name in optional):
                raise ValueError(f"`{where}[{name!r}]` must be {expected} for rope_type {rope_type!r}, got {value!r}.")
        if rope.get("type", rope_type) != rope_type:
            raise ValueError(f"`{where}['type']` ({rope['type']!r}) is an older name of 'rope_type' ({rope_type!r}).")
        if (factor := rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(f"`{where}['partial_rotary_factor']` must be 1, as heads rotate whole, got {factor!r}.")
        if rope_type == "llama3":
            self._check_rope_order("low_freq_factor", "high_freq_factor")
        if rope_type == "yarn":
            self._check_rope_order("beta_slow", "beta_fast")
            scales = [name for name in ("mscale", "mscale_all_dim") if rope.get(name) is not None]
            if len(scales) == 1 or (scales and rope.get("attention_factor") is not None):
                raise ValueError(
                    f"`{where}[{scales[0]!r}]` is read only if 'mscale' and 'mscale_all_dim' are both given and "
                    "'attention_factor' is not. Leave it out, or give what it needs."
                )

    def _check_rope_order(self, low: str, high: str) -> None:
        low_value, high_value = (self.rope_parameters.get(name) or _YARN_BETAS.get(name) for name in (low, high))
        if not low_value < high_value:
            raise ValueError(
                f"`rope_parameters[{low!r}]` ({low_value!r}) must be less than `rope_parameters[{high!r}]` "
                f"({high_value!r})."
            )


__all__ = ["HSAConfig"]

"""Configuration of Hierarchical Sparse Attention (HSA) models, arXiv 2510.17196."""

from .versions import check_versions  # isort: skip

check_versions()  # before anything that older versions of Transformers do not have

from pathlib import Path  # noqa: E402
from typing import ClassVar  # noqa: E402

from transformers.activations import ACT2FN  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402


CHUNK_LANDMARKS = ("cls", "mean")
CHUNK_WEIGHTINGS = ("softmax", "stick_breaking", "joint")
HSA_RESIDUALS = ("bypass", "standard")
HSA_IMPLEMENTATIONS = ("auto", "triton", "torch", "naive")
# RoPE variants whose frequencies do not depend on the length of the input: with any other one, a prompt read in
# segments would be rotated differently from the same prompt read at once.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_HSA_FIELD_PREFIXES = (
    "chunk_", "hsa_", "retrieval_", "num_retrieval", "num_lower", "num_upper", "num_encoder", "encoder_", "landmark_",
)  # fmt: skip


class HSAConfig(PreTrainedConfig):
    r"""
    Configuration of an [`HSAModel`]: a decoder whose lower layers see a sliding window and whose upper layers also
    retrieve, for every token, the `chunk_topk` most relevant chunks of everything before it. The defaults are the
    setting of the paper (arXiv 2510.17196), about 240M parameters.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000):
            Number of tokens of the vocabulary.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the gated MLP of the decoder layers.
        num_lower_layers (`int`, *optional*, defaults to 8):
            Sliding-window layers below the chunk encoder.
        num_upper_layers (`int`, *optional*, defaults to 6):
            Sliding-window layers above it, shared out evenly over the groups. The HSA layers come on top.
        num_upper_groups (`int`, *optional*, defaults to 2):
            Groups of the upper decoder. Each starts with one HSA layer, so that the decoder has
            `num_hidden_layers = num_lower_layers + num_upper_layers + num_upper_groups` layers.
        num_hidden_layers (`int`, *optional*):
            Derived from the three fields above. May be given, but must then agree with them.
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
            What the landmark of a chunk is made from: `"cls"`, a learned token encoded with the chunk, or `"mean"`,
            the mean of its encoded tokens.
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
        hsa_implementation (`str`, *optional*, defaults to `"auto"`):
            Backend of selection and chunk attention: `"auto"`, `"triton"`, `"torch"` or `"naive"`.
        num_retrieval_heads (`int`, *optional*, defaults to 1):
            Independent selections per token. Each serves `num_attention_heads / num_retrieval_heads` query heads.
        retrieval_dim (`int`, *optional*, defaults to 256):
            Size of a landmark and of a retrieval query, per retrieval head.
        retrieval_stride (`int`, *optional*, defaults to 1):
            Tokens per retrieval: the tokens of a stride share the selection of its first token.
        retrieval_distance_penalty (`float`, *optional*, defaults to 0.0):
            Chunks are selected by their score less this for every whole doubling of their distance, counted in chunks
            from the newest complete one (1), so that of many chunks of no great use the near ones are taken. Their
            weights are those of the plain scores. Not in the paper. May be set on a trained model.
        landmark_norm (`bool`, *optional*, defaults to `False`):
            Whether landmarks and retrieval queries are RMS-normalised.
        qk_norm (`bool`, *optional*, defaults to `True`):
            Whether queries and keys of every attention are RMS-normalised per head.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the MLPs.
        max_position_embeddings (`int`, *optional*, defaults to 4096):
            Training length in tokens. No limit: the model runs on any length.
        rope_parameters (`dict`, *optional*):
            RoPE of the window attention and of the chunk encoder, in the form of Transformers v5. `rope_type` is one
            of `"default"`, `"linear"`, `"llama3"` and `"yarn"`; `rope_theta` defaults to 10000.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        rms_norm_eps (`float`, *optional*, defaults to 1e-06):
            Epsilon of the RMS norms.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of the window attention have biases.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the window attention weights.
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
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_lower_layers: int = 8
    num_upper_layers: int = 6
    num_upper_groups: int = 2
    num_hidden_layers: int | None = None
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    sliding_window: int = 512
    chunk_size: int = 64
    chunk_topk: int = 8
    chunk_landmark: str = "cls"
    chunk_weighting: str = "softmax"
    num_encoder_layers: int = 1
    encoder_intermediate_size: int | None = None
    encoder_attention_bias: bool = False
    hsa_residual: str = "bypass"
    hsa_local_attention: bool = True
    hsa_num_key_value_heads: int = 1
    hsa_implementation: str = "auto"
    num_retrieval_heads: int = 1
    retrieval_dim: int = 256
    retrieval_stride: int = 1
    retrieval_distance_penalty: float = 0.0
    landmark_norm: bool = False
    qk_norm: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._check_unknown_fields(kwargs)
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, dict):
            raise ValueError(f"`rope_parameters` must be a dictionary, got {self.rope_parameters!r}.")
        if self.head_dim is None and _is_int(self.hidden_size) and _is_int(self.num_attention_heads):
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.encoder_intermediate_size is None:
            self.encoder_intermediate_size = self.intermediate_size
        if self.num_hidden_layers is None and all(_is_int(getattr(self, name)) for name in _LAYER_COUNTS):
            self.num_hidden_layers = sum(getattr(self, name) for name in _LAYER_COUNTS)
        super().__post_init__(**kwargs)
        self.validate_hsa()

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
        the rest, and `num_hidden_layers` follows it. Raises `ValueError` for the configuration of another kind of
        model. (A subclass of HSAConfig may have a model type of its own, of which Transformers warns.)
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type and "chunk_topk" not in config_dict:
            raise ValueError(
                f"The configuration is of model type {model_type!r}, not {cls.model_type!r}. Load it with "
                "`AutoConfig`."
            )
        fields = {name for base in cls.__mro__ if issubclass(base, HSAConfig) for name in base.__annotations__}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        config_dict = {**config_dict, **overrides}
        if "num_hidden_layers" not in overrides and overrides.keys() & _LAYER_COUNTS:
            config_dict.pop("num_hidden_layers", None)
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As in Transformers, and also saves the code of the model, so that `from_pretrained(...,
        trust_remote_code=True)` loads the folder where this package is not installed. Models save their configuration
        with this method: wherever there is the `config.json` of an HSA model, there is its code.
        """
        from modeling_hsa.hub import save_code  # which imports this file

        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        self.auto_map = save_code(save_directory)  # also here, as Transformers does for code of a user's

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # The last step of `save_pretrained(push_to_hub=True)` in Transformers: before it, the code has to be there.
        from modeling_hsa.hub import save_code

        save_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @property
    def hsa_layers(self) -> list[bool]:
        """For each of the `num_hidden_layers` decoder layers, whether it is an HSA layer."""
        group = [True] + [False] * (self.num_upper_layers // self.num_upper_groups)
        return [False] * self.num_lower_layers + group * self.num_upper_groups

    def _check_unknown_fields(self, fields: dict) -> None:
        known = set(type(self).__dataclass_fields__)
        for name in fields:
            if name.startswith(_HSA_FIELD_PREFIXES) and name not in known:
                raise ValueError(
                    f"HSAConfig has no field {name!r} (given {fields[name]!r}). Check the spelling; if the "
                    "configuration was written by a newer version of HSA for Transformers, upgrade the package."
                )

    def validate_hsa(self) -> None:
        """Raises `ValueError` for the first field found out of range. Called on construction and by the model."""
        for field, minimum in _INTEGER_MINIMA.items():
            value = getattr(self, field)
            if not _is_int(value) or value < minimum:
                raise ValueError(f"`{field}` must be an integer of at least {minimum}, got {value!r}.")
        for field in _BOOLEANS:
            if not isinstance(value := getattr(self, field), bool):
                raise ValueError(f"`{field}` must be True or False, got {value!r}.")
        for field, (low, high) in _NUMBER_RANGES.items():
            value = getattr(self, field)
            if not _is_number(value) or not low <= value < high:
                raise ValueError(f"`{field}` must be a number of at least {low} and below {high}, got {value!r}.")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(
                f"`hidden_act` must be an activation of Transformers such as 'silu' or 'gelu', got "
                f"{self.hidden_act!r}."
            )
        for field, values in _CHOICES.items():
            if (value := getattr(self, field)) not in values:
                raise ValueError(
                    f"`{field}` must be one of {', '.join(map(repr, values))}, got {value!r}. If the configuration "
                    "was written by a newer version of HSA for Transformers, upgrade the package."
                )
        if self.chunk_size % 16:
            raise ValueError(
                f"`chunk_size` must be a multiple of 16, got {self.chunk_size}; 64 is the paper's setting."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, as RoPE rotates pairs, got {self.head_dim}.")
        for field in ("num_key_value_heads", "hsa_num_key_value_heads", "num_retrieval_heads"):
            if self.num_attention_heads % getattr(self, field):
                raise ValueError(
                    f"`{field}` ({getattr(self, field)}) must divide `num_attention_heads` "
                    f"({self.num_attention_heads})."
                )
        few, many = sorted((self.hsa_num_key_value_heads, self.num_retrieval_heads))
        if many % few:
            raise ValueError(
                f"One of `hsa_num_key_value_heads` ({self.hsa_num_key_value_heads}) and `num_retrieval_heads` "
                f"({self.num_retrieval_heads}) must divide the other."
            )
        if self.num_upper_layers % self.num_upper_groups:
            raise ValueError(
                f"`num_upper_groups` ({self.num_upper_groups}) must divide `num_upper_layers` "
                f"({self.num_upper_layers})."
            )
        layers = self.num_lower_layers + self.num_upper_layers + self.num_upper_groups
        if self.num_hidden_layers != layers:
            raise ValueError(
                f"`num_hidden_layers` ({self.num_hidden_layers}) is derived: num_lower_layers + num_upper_layers + "
                f"num_upper_groups = {layers}. Leave it out, or change those three."
            )
        if self.num_encoder_layers == 0 and self.chunk_landmark == "cls":
            raise ValueError(
                "`chunk_landmark='cls'` needs `num_encoder_layers` of at least 1: without an encoder the CLS token is "
                "the same for every chunk. Use `chunk_landmark='mean'`, or add an encoder layer."
            )
        self._validate_rope(self.rope_parameters or {})

    @staticmethod
    def _validate_rope(rope: dict) -> None:
        rope_type, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 10000.0)
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {', '.join(map(repr, ROPE_TYPES))}, got "
                f"{rope_type!r}: frequencies that change with the input length would make segmented prefill "
                "differ from one pass."
            )
        if not _is_number(theta) or not theta > 0:
            raise ValueError(f"`rope_parameters['rope_theta']` must be a positive number, got {theta!r}.")
        if rope_type != "default" and not (_is_number(factor := rope.get("factor")) and factor >= 1):
            raise ValueError(
                f"`rope_parameters['factor']` must be a number of at least 1 for rope_type {rope_type!r}, got "
                f"{factor!r}."
            )
        for name in _ROPE_NUMBERS.get(rope_type, ()):
            if not _is_number(value := rope.get(name)):
                raise ValueError(
                    f"`rope_parameters[{name!r}]` must be a number for rope_type 'llama3', got {value!r}."
                )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_ROPE_NUMBERS = {"llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
_LAYER_COUNTS = ("num_lower_layers", "num_upper_layers", "num_upper_groups")
_NUMBER_RANGES = {
    "initializer_range": (0.0, float("inf")),
    "rms_norm_eps": (0.0, float("inf")),
    "attention_dropout": (0.0, 1.0),
    "retrieval_distance_penalty": (0.0, float("inf")),
}
_INTEGER_MINIMA = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_lower_layers": 0,
    "num_upper_layers": 0,
    "num_upper_groups": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "sliding_window": 1,
    "chunk_size": 16,
    "chunk_topk": 1,
    "num_encoder_layers": 0,
    "encoder_intermediate_size": 1,
    "hsa_num_key_value_heads": 1,
    "num_retrieval_heads": 1,
    "retrieval_dim": 1,
    "retrieval_stride": 1,
    "max_position_embeddings": 1,
}
_BOOLEANS = (
    "use_cache", "encoder_attention_bias", "hsa_local_attention", "landmark_norm", "qk_norm", "attention_bias",
    "mlp_bias", "tie_word_embeddings",
)  # fmt: skip
_CHOICES = {
    "chunk_landmark": CHUNK_LANDMARKS,
    "chunk_weighting": CHUNK_WEIGHTINGS,
    "hsa_residual": HSA_RESIDUALS,
    "hsa_implementation": HSA_IMPLEMENTATIONS,
}

__all__ = ["HSAConfig"]

"""
HSA models under the common model tests of Transformers, `ModelTesterMixin` and `TrainingTesterMixin`, that every model
of that library has to pass. They are part neither of this repository nor of an installed Transformers:
`python tests/transformers_common/fetch.py` downloads them.
"""

import importlib
import sys
import unittest
import warnings
from types import ModuleType

import pytest
import torch
from transformers import set_seed

from configuration_hsa import HSAConfig
from modeling_hsa import (
    HSAForCausalLM,
    HSAForQuestionAnswering,
    HSAForSequenceClassification,
    HSAForTokenClassification,
    HSAModel,
)
from modeling_hsa.modules import HSARotaryEmbedding
from tests.transformers_common.fetch import fetched_folder, is_fetched


if not is_fetched():
    pytest.skip(
        f"the common model tests of Transformers are not in {fetched_folder()}: run "
        "`python tests/transformers_common/fetch.py`",
        allow_module_level=True,
    )

# In Transformers the package of these tests is called `tests`, as the one of this repository is.
_PACKAGE = "transformers_tests"


def _make_module(name: str, **content) -> None:
    """Makes a module that can be imported, with the given content."""
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def _load_common_tests() -> tuple[ModuleType, ModuleType]:
    """`test_modeling_common` and `test_training_mixin`, their relative imports resolved."""
    _make_module(_PACKAGE, __path__=[str(fetched_folder())])
    # What they import and the source distribution leaves out. Empty, it adds no test.
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        _make_module(f"{_PACKAGE}.{name.partition('.')[0]}", __path__=[])
        _make_module(f"{_PACKAGE}.{name}", **{mixin: type(mixin, (), {})})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        return tuple(
            importlib.import_module(f"{_PACKAGE}.{x}") for x in ("test_modeling_common", "test_training_mixin")
        )


_common, _training = _load_common_tests()
# Which labels a model takes, and whether it is a base model or a language model, is looked up by class name in lists
# of the models of Transformers. Only these tests see the longer lists.
for _list, _model_class in {
    "MODEL_MAPPING_NAMES": HSAModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": HSAForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": HSAForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": HSAForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": HSAForQuestionAnswering,
}.items():
    setattr(_common, _list, {**getattr(_common, _list), HSAConfig.model_type: _model_class.__name__})


class HSAModelTester:
    """Makes the model and the inputs that the common tests work with."""

    causal_lm_class = HSAForCausalLM
    is_training = True
    batch_size = 4
    seq_length = 40  # two complete chunks and a rest
    vocab_size = 99
    hidden_size = 32
    num_attention_heads = 4
    num_hidden_layers = 2  # one below the chunk encoder, and one HSA layer
    attn_implementation = None  # None for the default

    def get_config(self) -> HSAConfig:
        return HSAConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_lower_layers=1,
            num_upper_layers=0,
            num_upper_groups=1,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            sliding_window=12,
            chunk_size=16,
            chunk_topk=2,
            retrieval_dim=16,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation=self.attn_implementation,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[HSAConfig, dict[str, torch.Tensor]]:
        """Rows of different lengths, padded on the right."""
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        lengths = self.seq_length - torch.arange(self.batch_size)
        attention_mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class HSAModelTest(
    _common.ModelTesterMixin, _training.TrainingTesterMixin, _common.GenerationTesterMixin, unittest.TestCase
):
    model_tester = None  # abstract in one of the mixins
    all_model_classes = (
        HSAModel,
        HSAForCausalLM,
        HSAForSequenceClassification,
        HSAForTokenClassification,
        HSAForQuestionAnswering,
    )
    # Asks for a check that is left out for models whose file has no copyright line of 2023 or later.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        set_seed(0)
        self.model_tester = HSAModelTester()

    # Below: tests that are as they are for a reason that lies in the architecture.

    def test_capture_outputs_decorator(self):
        """With eager attention: `output_attentions` is refused where the attention kernel returns no weights."""
        self.model_tester.attn_implementation = "eager"
        super().test_capture_outputs_decorator()

    def test_model_outputs_equivalence(self):
        """With eager attention, as above."""
        self.model_tester.attn_implementation = "eager"
        super().test_model_outputs_equivalence()

    @unittest.skip("`output_attentions` is refused with sdpa, whose kernels return no weights")
    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self):
        pass

    def test_sliding_window_mask(self):
        """All layers have a window and nothing turns it off, so only what lies outside of it is looked at."""
        self.model_tester.attn_implementation = "eager"
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.sliding_window = 3
        position = torch.arange(self.model_tester.seq_length)
        distance = position[:, None] - position
        inside = (distance >= 0) & (distance < config.sliding_window)
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__), torch.no_grad():
                outputs = model_class(config).eval()(inputs["input_ids"], output_attentions=True)
                self.assertEqual(len(outputs.attentions), config.num_hidden_layers)
                for attention in outputs.attentions:
                    self.assertTrue((attention[:, :, ~inside] == 0).all())
                    self.assertTrue((attention[:, :, inside] > 0).all())

    def test_model_rope_scaling_from_config_1_dynamic(self):
        """Frequencies that depend on the length would make a prompt read in segments differ from one read at once."""
        config = self.model_tester.get_config()
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 10.0}
        with self.assertRaisesRegex(ValueError, "rope_type"):
            HSAModel(config)

    def test_model_rope_scaling_frequencies(self):
        """For the scalings that do not depend on the length, see above."""
        config = self.model_tester.get_config()
        positions = torch.arange(96)[None]

        def angles(**rope_parameters) -> torch.Tensor:
            config.rope_parameters = {"rope_theta": 10_000.0, **rope_parameters}
            rope = HSARotaryEmbedding(config)
            whole = torch.stack(rope(torch.ones(1), positions))
            torch.testing.assert_close(torch.stack(rope(torch.ones(1), positions[:, :10])), whole[:, :, :10])
            return whole

        default = angles(rope_type="default")
        torch.testing.assert_close(angles(rope_type="linear", factor=8.0)[:, :, ::8], default[:, :, :12])
        yarn = angles(rope_type="yarn", factor=8.0)
        self.assertFalse(torch.allclose(yarn[:, :, :10], default[:, :, :10]))

"""A configuration class of a user's, derived from HSAConfig, works as one derived from LlamaConfig does."""

import pytest
import torch
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from configuration_hsa import HSAConfig
from modeling_hsa import (
    HSAForCausalLM,
    HSAForQuestionAnswering,
    HSAForSequenceClassification,
    HSAForTokenClassification,
    HSAModel,
)
from tests.models import tiny_config


class OwnType(HSAConfig):
    model_type = "my_hsa"
    flavour: str = "plain"
    hsa_spice: int = 1


class SameType(HSAConfig):
    """With a field of its own, and nothing else."""

    flavour: str = "plain"


class OwnInit(HSAConfig):
    """In the way of Transformers before dataclasses."""

    model_type = "my_old_hsa"

    def __init__(self, flavour="plain", **kwargs):
        super().__init__(**kwargs)
        self.flavour = flavour


class OwnTypeForCausalLM(HSAForCausalLM):
    config_class = OwnType


CLASSES = (OwnType, SameType, OwnInit)
HEADS = (HSAForSequenceClassification, HSAForTokenClassification, HSAForQuestionAnswering)


def make(cls, **fields):
    return cls(**{**tiny_config().to_dict(), "model_type": cls.model_type, "pad_token_id": 0, **fields})


def logits(model):
    with torch.no_grad():
        outputs = model.eval()(torch.arange(40)[None] % 99)
    return outputs.start_logits if "start_logits" in outputs else outputs.logits


@pytest.fixture(autouse=True)
def _registry():
    """What a test registers is gone after it."""
    before = dict(CONFIG_MAPPING._extra_content)
    mappings = [auto._model_mapping for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)]
    kept = [dict(mapping._extra_content) for mapping in mappings]
    yield
    CONFIG_MAPPING._extra_content.clear()
    CONFIG_MAPPING._extra_content.update(before)
    for mapping, content in zip(mappings, kept):
        mapping._extra_content.clear()
        mapping._extra_content.update(content)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("model_class", [HSAForCausalLM, *HEADS])
def test_models_take_it_save_it_and_load_it(cls, model_class, tmp_path):
    model = model_class(make(cls, flavour="odd"))
    model.save_pretrained(tmp_path)
    config = cls.from_pretrained(tmp_path)
    assert type(config) is cls and config.flavour == "odd"
    loaded = model_class.from_pretrained(tmp_path, config=config)
    assert type(loaded.config) is cls
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("cls", [SameType, OwnInit])
def test_it_loads_as_an_hsa_config_too(cls, tmp_path):
    model = HSAForCausalLM(make(cls, flavour="odd"))
    model.save_pretrained(tmp_path)
    loaded = HSAForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.config) is HSAConfig and loaded.config.flavour == "odd"
    assert torch.equal(logits(loaded), logits(model))


def test_a_field_that_only_the_subclass_has_is_not_ignored(tmp_path):
    make(OwnType, hsa_spice=3).save_pretrained(tmp_path)
    assert OwnType.from_pretrained(tmp_path).hsa_spice == 3
    with pytest.raises(ValueError, match="HSAConfig has no field 'hsa_spice'"):
        HSAConfig.from_pretrained(tmp_path)


def test_a_model_class_with_a_configuration_class_of_its_own(tmp_path):
    AutoConfig.register("my_hsa", OwnType)
    AutoModelForCausalLM.register(OwnType, OwnTypeForCausalLM)
    model = OwnTypeForCausalLM(make(OwnType))
    model.save_pretrained(tmp_path)
    for loaded in (OwnTypeForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is OwnTypeForCausalLM and type(loaded.config) is OwnType
        assert torch.equal(logits(loaded), logits(model))


def test_what_the_user_registered_stays():
    class OwnModel(HSAModel):
        config_class = OwnType

    AutoModel.register(OwnType, OwnModel)
    assert type(HSAForSequenceClassification(make(OwnType)).model) is OwnModel
    assert MODEL_MAPPING[OwnType] is OwnModel


@pytest.mark.parametrize("cls", CLASSES)
def test_overrides_are_validated(cls, tmp_path):
    make(cls).save_pretrained(tmp_path)
    config = cls.from_pretrained(tmp_path, num_lower_layers=3, flavour="odd")
    assert (config.num_lower_layers, config.num_hidden_layers, config.flavour) == (3, 7, "odd")
    with pytest.raises(ValueError, match="`chunk_size` must be a multiple of 16"):
        cls.from_pretrained(tmp_path, chunk_size=17)


def test_the_configuration_of_another_model_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    for cls in (HSAConfig, OwnType):
        with pytest.raises(ValueError, match="of model type 'llama', not"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="HSAForCausalLM needs an HSAConfig, got LlamaConfig"):
        HSAForCausalLM(LlamaConfig())

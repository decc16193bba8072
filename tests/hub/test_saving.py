"""
Whatever writes the `config.json` of an HSA model leaves a folder that loads where the package is not installed, and
what a user adds, a class or a file, stays.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM
from modeling_hsa.hub import AUTO_MAP, bundle
from tests.helpers import run_without_the_package
from tests.models import tiny_config, tiny_model


LOAD = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM

prompt = torch.arange(70)[None] % 99
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(prompt).logits, f"{name}.pt")
    model.config.save_pretrained(f"{name}_again")
    AutoConfig.from_pretrained(name, trust_remote_code=True).save_pretrained(f"{name}_config")
"""
MY_MODEL = """
from torch import nn
from modeling_hsa import HSAForCausalLM

class MyHSA(HSAForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.value_head = nn.Linear(config.hidden_size, 1)
        self.post_init()
"""
MY_CONFIG = """
from configuration_hsa import HSAConfig

class MyConfig(HSAConfig):
    model_type = "my_hsa"
    flavour: str = "plain"
"""


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]


def is_complete(folder: Path) -> bool:
    return auto_map(folder) == AUTO_MAP and all((folder / name).read_text() == bundle()[name] for name in bundle())


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Imports code of a user's, as a module of a name, from a folder of its own."""
    added = []

    def make(name: str, code: str):
        (tmp_path / "user").mkdir(exist_ok=True)
        (tmp_path / "user" / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "user"))
        added.append(name)
        return __import__(name)

    yield make
    for name in added:
        sys.modules.pop(name, None)


# -- what writes a configuration --------------------------------------------------------------------------------------


def with_model(model, folder):
    model.save_pretrained(folder)


def config_after_the_model(model, folder):
    model.save_pretrained(folder)
    model.config.save_pretrained(folder)


def config_of_a_loaded_model(model, folder):
    model.save_pretrained(folder)
    loaded = HSAForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(folder)
    loaded.config.save_pretrained(folder)


def accelerate_and_then_the_config(model, folder):
    Accelerator(cpu=True).save_model(model, folder)
    model.config.save_pretrained(folder)


def trainer(model, folder):
    arguments = TrainingArguments(output_dir=str(folder / "run"), use_cpu=True, report_to=[])
    Trainer(model, arguments).save_model(str(folder))


def with_tokenizer_and_generation_config(model, folder):
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def merged_adapter(model, folder):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.merge_and_unload().save_pretrained(folder)


WAYS = [with_model, config_after_the_model, config_of_a_loaded_model, accelerate_and_then_the_config, trainer,
        with_tokenizer_and_generation_config, merged_adapter]  # fmt: skip


@pytest.mark.parametrize("save", WAYS)
def test_the_code_is_there(save, tmp_path):
    save(tiny_model(), tmp_path)
    assert is_complete(tmp_path)


@pytest.mark.slow
def test_every_way_loads_without_the_package(tmp_path):
    for save in WAYS:
        save(tiny_model(), tmp_path / save.__name__)
    run_without_the_package(LOAD, tmp_path, *(save.__name__ for save in WAYS))
    with torch.no_grad():
        expected = tiny_model()(torch.arange(70)[None] % 99).logits
    for save in WAYS:
        assert torch.equal(torch.load(tmp_path / f"{save.__name__}.pt"), expected)
        assert is_complete(tmp_path / f"{save.__name__}_again")


def test_a_configuration_saved_alone_brings_the_code(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert is_complete(tmp_path)


def test_an_adapter_is_saved_without_code(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and not (tmp_path / "config.json").exists()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    prompt = torch.arange(70)[None] % 99
    with torch.no_grad():
        assert torch.equal(loaded.eval()(prompt).logits, adapted.eval()(prompt).logits)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(AssertionError, match="should be a directory"):
        tiny_config().save_pretrained(tmp_path / "x")


@pytest.mark.parametrize("push", ["push_to_hub", "save_pretrained"])
def test_a_configuration_is_pushed_with_the_code(push, tmp_path, hub):
    if push == "push_to_hub":
        tiny_config().push_to_hub("someone/tiny")
    else:
        tiny_config().save_pretrained(str(tmp_path / "x"), push_to_hub=True, repo_id="someone/tiny")
    (commit,) = hub
    assert bundle().items() <= {name: content.decode() for name, content in commit["files"].items()}.items()
    assert json.loads(commit["files"]["config.json"])["auto_map"] == AUTO_MAP


# -- classes of a user's ----------------------------------------------------------------------------------------------


@pytest.fixture
def my_model(user_module):
    """A registered subclass of the model, as the guide of Transformers on custom models has it."""
    cls = user_module("my_model", MY_MODEL).MyHSA
    cls.register_for_auto_class("AutoModelForCausalLM")
    torch.manual_seed(0)
    return cls(tiny_config()).eval()


def test_a_registered_model_keeps_its_entry_and_its_file(my_model, tmp_path):
    for _ in range(2):
        my_model.save_pretrained(tmp_path / "saved")
        my_model.config.save_pretrained(tmp_path / "saved")
        assert auto_map(tmp_path / "saved") == {**AUTO_MAP, "AutoModelForCausalLM": "my_model.MyHSA"}
        assert (tmp_path / "saved" / "my_model.py").read_text() == MY_MODEL
    assert "value_head.weight" in type(my_model).from_pretrained(tmp_path / "saved").state_dict()


@pytest.mark.slow
def test_a_registered_model_loads_with_its_own_class_and_is_saved_again(my_model, tmp_path):
    """Without the package, the file of a user's imports what lies beside it."""
    my_model.save_pretrained(tmp_path / "saved")
    relative = MY_MODEL.replace("from modeling_hsa ", "from .modeling_hsa ")
    (tmp_path / "saved" / "my_model.py").write_text(relative)
    code = """
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
print(type(model).__name__, hasattr(model, "value_head"))
model.save_pretrained("again")
"""
    assert run_without_the_package(code, tmp_path).splitlines()[-1] == "MyHSA True"
    assert auto_map(tmp_path / "again") == auto_map(tmp_path / "saved")
    assert (tmp_path / "again" / "my_model.py").read_text() == relative


def test_a_registered_configuration_keeps_its_entry_and_its_file(user_module, tmp_path):
    cls = user_module("my_config", MY_CONFIG).MyConfig
    cls.register_for_auto_class()
    HSAForCausalLM(cls(**tiny_config().to_dict())).save_pretrained(tmp_path / "saved")
    assert auto_map(tmp_path / "saved") == {**AUTO_MAP, "AutoConfig": "my_config.MyConfig"}
    assert (tmp_path / "saved" / "my_config.py").read_text() == MY_CONFIG


def test_an_entry_whose_file_is_not_there_is_ours(my_model, tmp_path):
    """Loaded with the class of the package, the model is saved as that class, without the file of the user's."""
    my_model.save_pretrained(tmp_path / "saved")
    HSAForCausalLM.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert is_complete(tmp_path / "again")


def test_entries_of_other_repositories(tmp_path):
    entries = {
        "AutoModelForCausalLM": "someone/hsa--modeling_hsa.HSAForCausalLM",  # ours, which is now in this folder
        "AutoModel": "someone/hsa--my_model.MyModel",
        "AutoTokenizer": ["my_tokenizer.MyTokenizer", None],
    }
    tiny_config(auto_map=dict(entries)).save_pretrained(tmp_path)
    assert auto_map(tmp_path) == {**AUTO_MAP, **entries, "AutoModelForCausalLM": "modeling_hsa.HSAForCausalLM"}


def test_a_file_of_the_name_of_ours_is_refused(user_module, tmp_path):
    cls = user_module("hsa_layers", MY_MODEL).MyHSA
    cls.register_for_auto_class("AutoModelForCausalLM")
    with pytest.raises(ValueError, match="hsa_layers.MyHSA` cannot be saved: hsa_layers.py is the name of a file"):
        cls(tiny_config()).save_pretrained(tmp_path / "saved")


def test_files_of_a_user_s_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "train.py").write_text("mine")
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == (tmp_path / "train.py").read_text() == "mine"


def test_a_saved_configuration_is_the_same_one(tmp_path):
    config = tiny_config()
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    assert config.to_dict() == {**before, "auto_map": AUTO_MAP}
    loaded = HSAConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is HSAConfig
    assert type(AutoModelForCausalLM.from_config(HSAConfig.from_pretrained(tmp_path))) is HSAForCausalLM

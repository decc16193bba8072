"""
Contract 8 of the design: a saved folder holds weights, configuration and code, and gives the same model where the
package is installed and where it is not.
"""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.dynamic_module_utils import get_relative_import_files

import configuration_hsa
import modeling_hsa
from modeling_hsa import (
    HSAForCausalLM,
    HSAForQuestionAnswering,
    HSAForSequenceClassification,
    HSAForTokenClassification,
    HSAModel,
)
from modeling_hsa.hub import flat_name, flatten
from tests.helpers import run_without_the_package
from tests.models import tiny_config, tiny_model


AUTO_CLASSES = {
    AutoModel: HSAModel,
    AutoModelForCausalLM: HSAForCausalLM,
    AutoModelForSequenceClassification: HSAForSequenceClassification,
    AutoModelForTokenClassification: HSAForTokenClassification,
    AutoModelForQuestionAnswering: HSAForQuestionAnswering,
}
PACKAGES = ("configuration_hsa", "modeling_hsa")
# In a bundle the files of the same name as the packages stand for these.
PACKAGE_ONLY = {"configuration_hsa/__init__.py", "modeling_hsa/__init__.py"}


def prompt() -> torch.Tensor:
    return torch.randint(0, 99, (2, 70), generator=torch.Generator().manual_seed(0))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(prompt()).logits


def bundle_files(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))}


@pytest.fixture(scope="module")
def model() -> HSAForCausalLM:
    model = tiny_model(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.generation_config.prefill_chunk_size = 32
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-hsa"
    model.save_pretrained(folder)
    return folder


# -- what is saved ----------------------------------------------------------------------------------------------------


def test_folder_holds_weights_configuration_and_code(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "hsa" and config["architectures"] == ["HSAForCausalLM"]
    assert config["auto_map"].keys() == {"AutoConfig", *(auto.__name__ for auto in AUTO_CLASSES)}
    for auto, name in config["auto_map"].items():
        module, name = name.split(".")
        classes = [node.name for node in ast.parse((folder / f"{module}.py").read_text()).body
                   if isinstance(node, ast.ClassDef)]  # fmt: skip
        assert name in classes, auto
    assert json.loads((folder / "generation_config.json").read_text())["prefill_chunk_size"] == 32
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "model.chunk_encoder.cls_token" in weights.keys()


def test_long_prompts_are_read_in_segments_by_default(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["prefill_chunk_size"] == "auto"
    assert HSAForCausalLM.from_pretrained(tmp_path).generation_config.prefill_chunk_size == "auto"


def test_weights_are_sharded_where_they_exceed_the_size(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits_of(HSAForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_tied_or_untied(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert ("lm_head.weight" in weights.keys()) is not tied
    loaded, report = HSAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_code_is_saved_by_the_main_process_alone(model, tmp_path):
    model.save_pretrained(tmp_path / "keyword", is_main_process=False)
    model.save_pretrained(tmp_path / "position", False)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("auto", AUTO_CLASSES, ids=lambda auto: auto.__name__)
def test_every_head_is_saved_with_the_code(auto, tmp_path):
    torch.manual_seed(0)
    model = auto.from_config(tiny_config(pad_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    assert type(model) is AUTO_CLASSES[auto]
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"]
    loaded = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for expected, actual in zip(model(prompt()).to_tuple(), loaded(prompt()).to_tuple()):
            if isinstance(expected, torch.Tensor):
                assert torch.equal(actual, expected)


# -- the code ---------------------------------------------------------------------------------------------------------


def sources() -> list[str]:
    """All files of the packages, from the folder they are in."""
    return [
        f"{package.__name__}/{file.relative_to(Path(package.__file__).parent).as_posix()}"
        for package in (configuration_hsa, modeling_hsa)
        for file in sorted(Path(package.__file__).parent.rglob("*.py"))
    ]


def test_every_file_has_a_name_of_its_own_in_a_bundle():
    names = [flat_name(source) for source in sources() if source not in PACKAGE_ONLY]
    assert len(set(names)) == len(names)


def test_the_bundle_holds_the_files_of_the_packages(folder):
    def without_imports(code: str) -> str:
        return re.sub(r"^ *from (\.[\w.]*|configuration_hsa[\w.]*|modeling_hsa[\w.]*) import ", "import ", code,
                      flags=re.MULTILINE)  # fmt: skip

    files = bundle_files(folder)
    root = Path(modeling_hsa.__file__).parents[1]
    known = {flat_name(source): root / source for source in sources() if source not in PACKAGE_ONLY}
    assert {"configuration_hsa.py", "modeling_hsa.py", "hsa_hub.py", "hsa_ops.py", "hsa_versions.py"} <= files.keys()
    for name, code in files.items():
        assert without_imports(code) == without_imports(known[name].read_text(encoding="utf-8")), name


def test_transformers_finds_every_file_of_the_bundle(folder):
    found = {Path(file).name for file in get_relative_import_files(folder / "modeling_hsa.py")}
    assert found | {"modeling_hsa.py"} == bundle_files(folder).keys()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, code in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code)
    return root


def test_imports_are_flattened(tmp_path):
    packages = {
        "configuration_hsa/configuration_hsa.py": "",
        "configuration_hsa/versions.py": "",
        "modeling_hsa/modeling_hsa.py": "import torch\nfrom torch.nn import Linear\n"
        "from configuration_hsa import HSAConfig\nfrom .cache import (\n    A,  # why\n    B as C,\n)\n"
        "def late():\n    if True:\n        from modeling_hsa.cache.ring import Ring\n        return Ring\n",
        "modeling_hsa/cache/__init__.py": "from .rows import A\n",
        "modeling_hsa/cache/ring.py": '"""\nfrom .nowhere import x\n"""\nfrom ..layout import build\n',
        "modeling_hsa/cache/rows.py": "from configuration_hsa.versions import __version__\nfrom ..cache import A\n",
        "modeling_hsa/layout.py": "X = 'from .layout import'\n",
        "modeling_hsa/unused.py": "from .nowhere import x\n",
    }
    assert flatten(write(tmp_path, packages), "modeling_hsa/modeling_hsa.py") == {
        "configuration_hsa.py": "",
        "hsa_versions.py": "",
        "modeling_hsa.py": "import torch\nfrom torch.nn import Linear\n"
        "from .configuration_hsa import HSAConfig\nfrom .hsa_cache import (\n    A,  # why\n    B as C,\n)\n"
        "def late():\n    if True:\n        from .hsa_cache_ring import Ring\n        return Ring\n",
        "hsa_cache.py": "from .hsa_cache_rows import A\n",
        "hsa_cache_ring.py": '"""\nfrom .nowhere import x\n"""\nfrom .hsa_layout import build\n',
        "hsa_cache_rows.py": "from .hsa_versions import __version__\nfrom .hsa_cache import A\n",
        "hsa_layout.py": "X = 'from .layout import'\n",
    }


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from . import layout", "line 2: Transformers does not see `from . import module`"),
        ("import modeling_hsa.layout", "line 2: write `from module import name`"),
        ("x = 1; from .layout import build", "line 2: `from ... import` must be the beginning of a line"),
        ("from .layout \\\n    import build", "line 2: `from ... import` must be the beginning of a line"),
    ],
)
def test_imports_that_cannot_be_flattened_are_refused(tmp_path, statement, message):
    files = {"modeling_hsa/modeling_hsa.py": f"import torch\n{statement}\n", "modeling_hsa/layout.py": ""}
    with pytest.raises(ValueError, match=f"modeling_hsa/modeling_hsa.py, {re.escape(message)}"):
        flatten(write(tmp_path, files), "modeling_hsa/modeling_hsa.py")


def test_two_files_for_one_name_are_refused(tmp_path):
    files = {"modeling_hsa/cache_ring.py": "", "modeling_hsa/cache/ring.py": ""}
    files["modeling_hsa/modeling_hsa.py"] = "from .cache_ring import A\nfrom .cache.ring import B\n"
    with pytest.raises(ValueError, match="would both be hsa_cache_ring.py in a bundle. Rename one of them."):
        flatten(write(tmp_path, files), "modeling_hsa/modeling_hsa.py")


def test_bundle_imports_nothing_but_its_own_files_and_libraries(folder):
    bundle = bundle_files(folder)
    names = {
        file: {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        | {
            target.id
            for node in ast.parse(code).body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        | {
            a.asname or a.name
            for node in ast.walk(ast.parse(code))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for a in node.names
        }
        for file, code in bundle.items()
    }
    for file, code in bundle.items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {*PACKAGES}, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level in (0, 1) and (node.level or node.module.split(".")[0] not in PACKAGES), file
                if node.level:
                    assert {alias.name for alias in node.names} <= names[f"{node.module}.py"], (file, node.module)


# -- where the package is not installed -------------------------------------------------------------------------------

WITHOUT_THE_PACKAGE = """
import json, sys
from pathlib import Path

import torch
import transformers

folder, again = Path(sys.argv[1]), Path(sys.argv[2])
prompt = torch.load(again.parent / "prompt.pt")
results = {}

def check(name, model):
    model = model.eval()
    with torch.no_grad():
        torch.save(model(prompt).logits, again.parent / f"{name}.pt")
    results[name] = type(model).__module__
    return model

model = check("first", transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
results["config"] = type(model.config).__module__
results["prefill_chunk_size"] = model.generation_config.prefill_chunk_size
results["tokens"] = model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()
model.save_pretrained(again)
check("again", transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True))
config = transformers.AutoConfig.from_pretrained(again, trust_remote_code=True, chunk_topk=1)
results["chunk_topk"] = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).config.chunk_topk
for auto in sys.argv[3:]:
    loaded = getattr(transformers, auto).from_pretrained(again, trust_remote_code=True).eval()
    assert loaded(prompt[:1]) is not None
    results[auto] = type(loaded).__name__
results["package"] = [name for name in sys.modules if name.split(".")[0] in ("modeling_hsa", "configuration_hsa")]
(again.parent / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def elsewhere(folder, tmp_path_factory) -> Path:
    """What a fresh process that cannot import the package made of the saved folder."""
    here = tmp_path_factory.mktemp("elsewhere")
    torch.save(prompt(), here / "prompt.pt")
    arguments = (str(folder), str(here / "again"), *(auto.__name__ for auto in AUTO_CLASSES))
    run_without_the_package(WITHOUT_THE_PACKAGE, here, *arguments)
    return here


@pytest.mark.slow
def test_loads_without_the_package(elsewhere, model):
    results = json.loads((elsewhere / "results.json").read_text())
    assert results["package"] == []
    assert all(results[name].startswith("transformers_modules.") for name in ("first", "again", "config"))
    for auto, cls in AUTO_CLASSES.items():
        assert results[auto.__name__] == cls.__name__
    assert results["chunk_topk"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "again"])
def test_logits_are_identical_without_the_package(elsewhere, model, name):
    assert torch.equal(torch.load(elsewhere / f"{name}.pt"), logits_of(model))


@pytest.mark.slow
def test_generates_the_same_without_the_package(elsewhere, model):
    results = json.loads((elsewhere / "results.json").read_text())
    assert results["prefill_chunk_size"] == 32
    assert results["tokens"] == model.generate(prompt(), max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.slow
def test_saving_from_the_bundle_gives_the_same_bundle(elsewhere, folder):
    assert bundle_files(elsewhere / "again") == bundle_files(folder)
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, elsewhere / "again"))
    assert first == second


@pytest.mark.slow
def test_what_was_saved_without_the_package_loads_with_it(elsewhere, model):
    loaded = AutoModelForCausalLM.from_pretrained(elsewhere / "again")
    assert type(loaded) is HSAForCausalLM
    assert torch.equal(logits_of(loaded), logits_of(model))


# -- where the package is installed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
def test_the_package_is_used_where_it_is_installed(folder, model, arguments):
    loaded = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    assert type(loaded) is HSAForCausalLM
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("spelling", [{"dtype": "auto"}, {"dtype": torch.bfloat16}, {"dtype": "bfloat16"},
                                      {"torch_dtype": torch.bfloat16}, {"torch_dtype": "auto"}],
                         ids=str)  # fmt: skip
def test_dtype_spellings(folder, spelling, tmp_path):
    half = HSAForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    loaded = HSAForCausalLM.from_pretrained(tmp_path, **spelling)
    assert {x.dtype for x in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(loaded), logits_of(half))


def test_dtype_casts_when_loading(folder):
    loaded = HSAForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.config.dtype == torch.bfloat16
    assert HSAForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_equals_loading_it_in_that_dtype(folder, dtype):
    # A cast of the whole model must leave RoPE's frequencies alone: rounded, they would misplace distant tokens.
    loaded = HSAForCausalLM.from_pretrained(folder, dtype=dtype)
    cast = HSAForCausalLM.from_pretrained(folder).to(dtype)
    assert torch.equal(logits_of(cast), logits_of(loaded))


@pytest.mark.parametrize("arguments", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True},
                                       {"device_map": {"": "cpu"}}], ids=str)  # fmt: skip
def test_ways_to_load(folder, model, arguments):
    loaded = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    assert not any(x.is_meta for x in loaded.parameters())
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_layers_may_be_offloaded_to_disk(folder, model, tmp_path):
    devices = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    devices |= {"model.layers": "disk", "model.chunk_encoder": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=devices, offload_folder=tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    expected = model.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(prompt(), max_new_tokens=4, do_sample=False), expected)


# -- the Hub ----------------------------------------------------------------------------------------------------------


def assert_is_complete(commit: dict, folder: Path) -> None:
    expected = {"model.safetensors", "config.json", "generation_config.json", *bundle_files(folder)}
    assert expected <= commit["files"].keys()
    for name, code in bundle_files(folder).items():
        assert commit["files"][name].decode() == code
    assert json.loads(commit["files"]["config.json"])["auto_map"]


def test_push_to_hub_uploads_the_code(hub, model, folder):
    model.push_to_hub("someone/tiny-hsa", commit_message="First", revision="draft")
    (commit,) = hub
    assert_is_complete(commit, folder)
    assert (commit["repo_id"], commit["commit_message"], commit["revision"]) == ("someone/tiny-hsa", "First", "draft")


def test_save_pretrained_with_push_to_hub_uploads_the_code(hub, model, folder, tmp_path):
    model.save_pretrained(
        tmp_path / "x", push_to_hub=True, repo_id="someone/tiny-hsa", commit_message="First", token="t", create_pr=True
    )
    (commit,) = hub
    assert_is_complete(commit, folder)
    assert (commit["repo_id"], commit["commit_message"], commit["token"]) == ("someone/tiny-hsa", "First", "t")
    assert commit["create_pr"] is True
    assert bundle_files(tmp_path / "x") == bundle_files(folder)


def test_what_is_pushed_is_what_was_saved(hub, model, tmp_path):
    # Sharding, a state dict of one's own: the upload is the folder, not a second save with other settings.
    state = {name: x + 1 for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True, max_shard_size="30KB", state_dict=state)
    (commit,) = hub
    saved = {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()}
    assert commit["repo_id"] == "someone/tiny"
    weights = [name for name in saved if name.endswith(".safetensors")]
    assert len(weights) > 1
    assert {name: commit["files"].get(name) == saved[name] for name in weights} == dict.fromkeys(weights, True)


def test_nothing_is_pushed_by_other_processes(hub, model, tmp_path):
    model.save_pretrained(tmp_path, push_to_hub=True, is_main_process=False)
    assert hub == []

"""
The code that travels with a checkpoint: a flat copy of the files of this package, made by rewriting their imports,
that `from_pretrained(..., trust_remote_code=True)` loads without the package.
"""

import json
import re
from pathlib import Path


# File of the package, from its root -> file of the bundle.
_FILES = {
    "configuration_hsa/configuration_hsa.py": "configuration_hsa.py",
    "configuration_hsa/versions.py": "hsa_versions.py",
    "modeling_hsa/modeling_hsa.py": "modeling_hsa.py",
    "modeling_hsa/generation.py": "hsa_generation.py",
    "modeling_hsa/layers.py": "hsa_layers.py",
    "modeling_hsa/cache.py": "hsa_cache.py",
    "modeling_hsa/static_cache.py": "hsa_static_cache.py",
    "modeling_hsa/layout.py": "hsa_layout.py",
    "modeling_hsa/naming.py": "hsa_naming.py",
    "modeling_hsa/window.py": "hsa_window.py",
    "modeling_hsa/hub.py": "hsa_hub.py",
    "modeling_hsa/ops/__init__.py": "hsa_ops.py",
    "modeling_hsa/ops/naive.py": "hsa_ops_naive.py",
    "modeling_hsa/ops/precision.py": "hsa_ops_precision.py",
    "modeling_hsa/ops/selection.py": "hsa_ops_selection.py",
    "modeling_hsa/ops/attention.py": "hsa_ops_attention.py",
    "modeling_hsa/ops/library.py": "hsa_ops_library.py",
    "modeling_hsa/ops/availability.py": "hsa_ops_availability.py",
    "modeling_hsa/ops/inverted_index.py": "hsa_ops_inverted_index.py",
    "modeling_hsa/ops/triton_utils.py": "hsa_ops_triton_utils.py",
    "modeling_hsa/ops/triton_selection.py": "hsa_ops_triton_selection.py",
    "modeling_hsa/ops/triton_attention.py": "hsa_ops_triton_attention.py",
}
AUTO_MAP = {
    "AutoConfig": "configuration_hsa.HSAConfig",
    "AutoModel": "modeling_hsa.HSAModel",
    "AutoModelForCausalLM": "modeling_hsa.HSAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hsa.HSAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hsa.HSAForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hsa.HSAForQuestionAnswering",
}


def _flat_module(path: str) -> str | None:
    """The module of the bundle for a module of the package, given as a path without its ending."""
    for source in (f"{path}.py", f"{path}/__init__.py"):
        if source in _FILES:
            return _FILES[source].removesuffix(".py")
    return None


def _flatten_imports(code: str, source: str) -> str:
    """Rewrites the imports of other files of the package in the code of `source`."""
    folder = source.rpartition("/")[0]

    def rewrite(match: re.Match) -> str:
        module, names = match["module"], match["names"]
        if module == "configuration_hsa":
            return f"{match['indent']}from .configuration_hsa import {names}"
        path = f"{folder}/{module[1:].replace('.', '/')}"
        return f"{match['indent']}from .{_flat_module(path)} import {names}"

    statement = r"^(?P<indent> *)from (?P<module>configuration_hsa|\.\w[\w.]*) import (?P<names>.*)$"
    return re.sub(statement, rewrite, code, flags=re.MULTILINE)


def save_code(folder) -> None:
    """
    Writes the bundle into `folder` and names its classes in the `auto_map` of the folder's `config.json`.

    Works from the installed package and from a bundle alike, so that a model loaded from the Hub can be saved again.
    """
    folder = Path(folder)
    here = Path(__file__).resolve()
    is_bundle = here.name == _FILES["modeling_hsa/hub.py"]
    for source, target in _FILES.items():
        if is_bundle:
            code = (here.parent / target).read_text(encoding="utf-8")
        else:
            code = _flatten_imports((here.parents[1] / source).read_text(encoding="utf-8"), source)
        (folder / target).write_text(code, encoding="utf-8")

    config_file = folder / "config.json"
    if config_file.exists():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["auto_map"] = AUTO_MAP
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""
The code that travels with a configuration: a flat copy of the files that make up the model, with their imports
rewritten, that `from_pretrained(..., trust_remote_code=True)` loads without the package.

Transformers reads such code from one folder, and finds the files that the model needs by their imports `from .name
import`.
"""

import ast
import functools
import json
import re
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


PACKAGES = ("configuration_hsa", "modeling_hsa")
AUTO_MAP = {
    "AutoConfig": "configuration_hsa.HSAConfig",
    "AutoModel": "modeling_hsa.HSAModel",
    "AutoModelForCausalLM": "modeling_hsa.HSAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hsa.HSAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hsa.HSAForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hsa.HSAForQuestionAnswering",
}


def flat_name(source: str) -> str:
    """
    The file of the bundle for a file of the packages: `hsa_cache_ring.py` for `modeling_hsa/cache/ring.py`,
    `hsa_cache.py` for `modeling_hsa/cache/__init__.py`. A package exports what its file of the same name defines, so
    that `configuration_hsa/__init__.py` and `configuration_hsa/configuration_hsa.py` both are `configuration_hsa.py`.
    """
    package, *path = source.removesuffix(".py").split("/")
    if path[-1] == "__init__":
        path.pop()
    return f"{package}.py" if path in ([], [package]) else f"hsa_{'_'.join(path)}.py"


def flatten(root: Path, start: str) -> dict[str, str]:
    """
    Name and code of every file of a bundle: `start`, a file of the packages in `root`, and all that it imports.

    Raises:
        ValueError: for two files that would get one name, and for an import that has no counterpart in a flat folder.
    """
    sources, files, waiting = {}, {}, [start]
    while waiting:
        source = waiting.pop()
        name = flat_name(source)
        if sources.setdefault(name, source) != source:
            raise ValueError(f"{source} and {sources[name]} would both be {name} in a bundle. Rename one of them.")
        if name not in files:
            files[name], imported = _flatten_imports(root, source)
            waiting += imported
    return files


def _flatten_imports(root: Path, source: str) -> tuple[str, list[str]]:
    """The code of `source` for the bundle, and the files of the packages that it imports."""
    code = (root / source).read_text(encoding="utf-8")
    lines, imported = code.split("\n"), []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PACKAGES for alias in node.names):
            raise ValueError(f"{source}, line {node.lineno}: write `from module import name`, which can be flattened.")
        if not isinstance(node, ast.ImportFrom) or (module := _module_of_ours(node, source)) is None:
            continue
        imported.append(_file_of(root, module))
        flat = flat_name(imported[-1]).removesuffix(".py")
        line = node.lineno - 1
        lines[line], found = re.subn(r"^( *)from [\w.]+ import\b", rf"\1from .{flat} import", lines[line])
        if not found:
            raise ValueError(f"{source}, line {node.lineno}: `from ... import` must be the beginning of a line.")
    return "\n".join(lines), imported


def _module_of_ours(node: ast.ImportFrom, source: str) -> str | None:
    """The full name of the module that an import statement of `source` reads; None if it is not of the packages."""
    if node.level == 0:
        return node.module if node.module.split(".")[0] in PACKAGES else None
    if node.module is None:
        raise ValueError(
            f"{source}, line {node.lineno}: Transformers does not see `from . import module` in code from the Hub. "
            "Write `from .module import name`."
        )
    folder = source.split("/")[: -node.level]
    return ".".join([*folder, node.module])


def _file_of(root: Path, module: str) -> str:
    package, *path = module.split(".")
    file = "/".join([package, *(path or [package])])
    return f"{file}.py" if (root / f"{file}.py").is_file() else f"{file}/__init__.py"


@functools.cache
def bundle() -> dict[str, str]:
    """
    Name and code of every file that travels. This code may itself be a bundle: a model that was loaded from the Hub
    can be saved again.
    """
    here = Path(__file__).resolve()
    if here.name == "hub.py":
        return flatten(here.parents[1], "modeling_hsa/modeling_hsa.py")
    model = here.with_name("modeling_hsa.py")
    files = [model, *map(Path, get_relative_import_files(model))]
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def save_code(folder: str | Path) -> dict[str, str]:
    """
    Writes the code of the model into `folder`, and names its classes in the `auto_map` of the `config.json` there. An
    entry for a class of the user's stays, where its file is in the folder or it names another repository.

    Returns:
        The `auto_map`.

    Raises:
        ValueError: where the file of such a class has the name of a file of ours.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    auto_map = dict(AUTO_MAP)
    for auto, reference in config.get("auto_map", {}).items():
        if auto not in AUTO_MAP or _is_of_the_user(reference, folder):
            auto_map[auto] = reference
    for name, code in bundle().items():
        (folder / name).write_text(code, encoding="utf-8")
    config["auto_map"] = auto_map
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return auto_map


def _is_of_the_user(reference: str, folder: Path) -> bool:
    """Of an entry of an `auto_map`, `module.Class` or `repository--module.Class`."""
    repository, _, name = reference.rpartition("--")
    if name in AUTO_MAP.values():
        return False
    file = f"{name.partition('.')[0]}.py"
    if not repository and file in bundle():
        raise ValueError(
            f"`{name}` cannot be saved: {file} is the name of a file of HSA for Transformers. Rename your module."
        )
    return bool(repository) or (folder / file).is_file()

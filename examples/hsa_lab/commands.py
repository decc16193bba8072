"""What the commands share: help that shows defaults, the flags of a model, errors of one line, a quiet Ctrl-C."""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError


REPOSITORY = Path(__file__).resolve().parents[2]
HUB_CARD = REPOSITORY / "hub_card" / "hsa-books-10m"


METAVARS = {"int": "N", "float": "X", "Path": "PATH"}  # by the name of a type


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, adds defaults that say something, and names what a flag takes in a word."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help or ""
        if default in (None, False, [], argparse.SUPPRESS) or action.required or "%(default)" in text:
            return text
        if isinstance(default, float) and default >= 1e9:  # no limit
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} ({shown})".replace("%)", "%%)").lstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(getattr(action.type, "__name__", ""), action.dest.rpartition("_")[2].upper())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Without the second names, with hyphens, that HfArgumentParser gives flags."""
        names = action.option_strings
        action.option_strings = [name for name in names if "-" not in name.lstrip("-")] or names
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = names


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows `doc`, the docstring of the command, and defaults."""
    return argparse.ArgumentParser(description=inspect.cleandoc(doc), formatter_class=HelpFormatter)


def add_commands(parser: argparse.ArgumentParser, docs: dict[str, str]) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the sub-commands `docs`, each with its docstring; `arguments.command` is the name of the one."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    return {
        name: commands.add_parser(
            name, help=doc.strip().split("\n\n")[0], description=inspect.cleandoc(doc), formatter_class=HelpFormatter
        )
        for name, doc in docs.items()
    }


def run(main: Callable[[], None]) -> None:
    """
    Runs the `main` of a command. What a user can mend, ValueError, OSError and ImportError, ends it with one line that
    says what is wrong (`python -X dev` shows where it came from), and the interrupt key without a word.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        if sys.flags.dev_mode:
            raise
        # Of what a worker of a DataLoader raised, without its traceback.
        reason = str(error).rpartition(f"\n{type(error).__name__}: ")[2]
        if isinstance(error, ModuleNotFoundError):
            reason = f"the package {error.name} is missing: run `pip install -e '.[examples]'`"
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(reason.split())}")


def refuse_results(flag: str, folder: Path, *names: str) -> None:
    """Raises: ValueError if `folder`, which `flag` names, holds a file like one of `names`, which would be lost."""
    for name in names:
        if found := sorted(folder.glob(name)):
            raise ValueError(f"`{flag}`: {folder} already holds {found[0].name}. Take another folder, or delete it.")


def at_least(least: int, kind: type = int) -> Callable[[str], int | float]:
    """A type of flags: a number that is not less than `least`."""

    def number(text: str) -> int | float:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value" by it
    return number


def setting(text: str) -> tuple[str, object]:
    """A type of flags: the name and value of NAME=VALUE, of JSON where it is JSON, a string otherwise."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def text_file(text: str) -> Path:
    """A type of flags: a file that `corpus.read_haystack` takes."""
    file = Path(text)
    if not file.name.endswith((".txt", ".jsonl", ".jsonl.gz", ".npy")):
        raise argparse.ArgumentTypeError(f"takes .txt, .jsonl, .jsonl.gz and .npy files, got {text}")
    return existing_file(text)


def existing_file(text: str) -> Path:
    """A type of flags: a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def add_model_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The flags that `models.load` reads. `default`: of `--model`, which is required without one."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=default, required=default is None, help="model folder or Hub id")
    add_device_flag(group)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="auto: float32 on a CPU, else as saved")
    group.add_argument("--attn_implementation", help="sdpa, eager, flash_attention_2, ...; by default the model's own")
    group.add_argument(
        "--config", nargs="+", type=setting, default=[], metavar="NAME=VALUE",
        help="fields of the model's configuration to change, such as chunk_topk=16",
    )  # fmt: skip
    group.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")


def add_device_flag(parser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")


def find_device(name: str) -> torch.device:
    """The device that `--device` names. Raises: ValueError for a CUDA device where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("`--device`: there is no CUDA device here. Use cpu")
    return torch.device(name)

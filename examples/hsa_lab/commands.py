"""What the commands share: help that shows defaults, the flags of a model, errors of one line, a quiet Ctrl-C."""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


REPOSITORY = Path(__file__).resolve().parents[2]
HUB_CARD = REPOSITORY / "hub_card" / "hsa-books-10m"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a description, and adds defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_something = action.default is not None and action.default is not False and action.default != []
        return super()._get_help_string(action) if says_something else action.help


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
    Runs the `main` of a command. What a user can mend, ValueError and OSError, ends it with one line that says what is
    wrong (`python -X dev` shows where it came from), and the interrupt key without a word.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")


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

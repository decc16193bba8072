"""
Downloads the common model tests of Transformers, which come with its source distribution only:

    python tests/transformers_common/fetch.py

They are those of the installed version, and go into `.cache/transformers-tests` of the repository, or into the folder
that the environment variable `HSA_TRANSFORMERS_TESTS` names. Does nothing where they already are.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


FOLDER_VARIABLE = "HSA_TRANSFORMERS_TESTS"
_DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"
_TEST_FILE = re.compile(r"transformers-[^/]+/tests/(?P<name>\w+\.py)")


def fetched_folder() -> Path:
    """Where the tests of the installed version are, or would be."""
    return Path(os.environ.get(FOLDER_VARIABLE) or _DEFAULT_FOLDER) / version("transformers")


def is_fetched() -> bool:
    return (fetched_folder() / "test_modeling_common.py").is_file()


def unpack(archive: Path, folder: Path) -> None:
    """
    Writes the files `tests/*.py` of a source distribution into `folder`, and nothing else of it: a member counts only
    if it is a regular file with a plain name, so that none can land elsewhere.

    Raises: FileNotFoundError if the archive has no common model tests.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            match = _TEST_FILE.fullmatch(member.name)
            if match and member.isreg():
                (folder / match["name"]).write_bytes(tar.extractfile(member).read())
    if not (folder / "test_modeling_common.py").is_file():
        raise FileNotFoundError(f"{archive.name} has no tests/test_modeling_common.py.")


def fetch() -> Path:
    """
    Returns the folder of the tests, after downloading them with pip if need be.

    Raises: subprocess.CalledProcessError if pip cannot download them, after it said why.
    """
    target = fetched_folder()
    if is_fetched():
        return target
    requirement = f"transformers=={target.name}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        downloads, unpacked = Path(scratch) / "downloads", Path(scratch) / "tests"
        unpacked.mkdir()
        subprocess.run([*pip, "--dest", str(downloads), requirement], check=True)
        (archive,) = downloads.glob("*.tar.gz")
        unpack(archive, unpacked)
        # In one step, so that an interrupted run leaves nothing that looks complete.
        unpacked.rename(target)
    return target


if __name__ == "__main__":
    fetch()

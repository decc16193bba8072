"""The package as it is installed: its version, its types, and what a wheel has in it."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.version import Version

import configuration_hsa
import modeling_hsa
from configuration_hsa import versions
from tests.commands import REPOSITORY


PACKAGES = ("configuration_hsa", "modeling_hsa")


def test_both_packages_have_the_version():
    assert configuration_hsa.__version__ == modeling_hsa.__version__ == versions.__version__
    Version(versions.__version__)


def builds() -> bool:
    """Whether a wheel can be built without fetching anything."""
    try:
        return Version(importlib.metadata.version("setuptools")) >= Version("77")
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not builds(), reason="needs setuptools 77 or newer")
def test_wheel_has_the_packages_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    for name in ("tests", "examples"):  # packages that are not to be in it
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    run = subprocess.run([*map(str, command), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(file.relative_to(REPOSITORY)) for name in PACKAGES for file in (REPOSITORY / name).rglob("*.py")}
    about = f"hsa_transformers-{versions.__version__}.dist-info/"
    expected = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}
    assert names == code | {f"{name}/py.typed" for name in PACKAGES} | {about + name for name in expected}
    metadata = zipfile.ZipFile(wheel).read(about + "METADATA").decode()
    for line in ("Author: the HSA for Transformers authors", "Project-URL: Paper, https://arxiv.org/abs/2510.17196"):
        assert line in metadata

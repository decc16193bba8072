"""The package refuses versions of PyTorch and Transformers it does not run with, and says what to do."""

import importlib
import importlib.metadata
import sys

import pytest

from configuration_hsa.versions import check_versions


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """Versions that the package takes for the installed ones."""
    versions = {"torch": "2.9.0", "transformers": "5.17.0"}
    monkeypatch.setattr("configuration_hsa.versions.version", versions.__getitem__)
    return versions


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.9.0"),
        ("torch", "2.9.1+cu128"),
        ("torch", "2.13.0+cpu"),
        ("torch", "2.14.0a0+git1234"),
        ("torch", "2.11.0.dev20260101"),
        ("transformers", "5.17.0"),
        ("transformers", "5.24.0.dev0"),
        ("transformers", "5.99.1"),
    ],
)
def test_versions_in_range_are_accepted(installed, package, version):
    installed[package] = version
    check_versions()


@pytest.mark.parametrize(
    ("package", "version", "shown"),
    [
        ("torch", "2.8.0+cu126", "2.8.0"),
        ("torch", "1.13", "1.13"),
        ("torch", "3.0.0", "3.0.0"),
        ("torch", "3", "3"),
        ("transformers", "4.57.1", "4.57.1"),
        ("transformers", "5.16.9", "5.16.9"),
        ("transformers", "6.0.0", "6.0.0"),
        ("transformers", "6.0.0.dev0", "6.0.0"),
    ],
)
def test_versions_out_of_range_fail_with_one_clear_sentence(installed, package, version, shown):
    installed[package] = version
    with pytest.raises(ImportError) as error:
        check_versions()
    message = str(error.value)
    low, high = {"torch": ("2.9", "3"), "transformers": ("5.17", "6")}[package]
    assert f"supports {package} >= {low}, < {high}, but {shown} is installed" in message
    assert f"pip install '{package}>={low},<{high}'" in message
    assert "\n" not in message


def test_importing_the_package_checks_the_versions(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")
    for name in [name for name in sys.modules if name.split(".")[0] in ("configuration_hsa", "modeling_hsa")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="HSA for Transformers supports torch"):
        importlib.import_module("modeling_hsa")

"""The versions of PyTorch and Transformers the package runs with."""

from importlib.metadata import version

from packaging.version import Version


__version__ = "0.1.0"

SUPPORTED = {"torch": ("2.9", "3"), "transformers": ("5.17", "6")}


def check_versions() -> None:
    """Raises `ImportError` if an installed version is outside the supported range [low, high)."""
    for package, (low, high) in SUPPORTED.items():
        installed = Version(version(package)).release
        if not Version(low).release <= installed < Version(high).release:
            raise ImportError(
                f"HSA for Transformers supports {package} >= {low}, < {high}, but {'.'.join(map(str, installed))} is "
                f"installed: run `pip install '{package}>={low},<{high}'`."
            )

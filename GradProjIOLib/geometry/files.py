"""Writing files and folders whole or not at all, JSON that every reader takes, and checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from GradProjIOLib.errors import InputError, WriteError

STAGING_PREFIX = ".writing-"


@contextmanager
def staging_folder(parent: str | os.PathLike) -> Iterator[Path]:
    """A new hidden folder in `parent` in which results are prepared; it vanishes with all it still holds.

    Folders that killed processes left in the same place are removed first. Each folder has a lock file beside
    it. The operating system releases the lock when the process ends, so a folder whose lock can be taken
    was left behind. Raises OSError where the folder cannot be made.
    """
    import filelock

    parent = Path(parent)
    remove_abandoned(parent)
    folder = parent / f"{STAGING_PREFIX}{uuid4().hex[:12]}"
    lock = folder.with_suffix(".lock")
    # Another process may hold the new lock for a moment, to find out whether it belongs to somebody.
    with filelock.FileLock(lock, timeout=10):
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                lock.unlink()


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well and vanishes when it fails.

    The temporary file has the same name and lies in a hidden folder beside `path`, so formats that write a
    second file (.mhd, .nhdr) work, too. What was at `path` before stays until then. Raises WriteError for an
    OSError in the block (disk full, no permission, no such folder).
    """
    path = Path(path)
    try:
        with staging_folder(path.parent) as folder:
            yield folder / path.name
            # The file itself comes last, because the data file that a header names must be there before it.
            for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                os.replace(written, path.parent / written.name)
    except OSError as error:
        raise write_error(path, error) from error


def library_path(path: str | os.PathLike) -> str:
    """`path` for libraries in C++, which take UTF-8. Raises InputError where the name is no text in it.

    Where the system's encoding is ASCII (LC_ALL=C), Python has such names with surrogates; SimpleITK ends the process
    when it gets one.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(path)!a} is no name in UTF-8; rename the file or its folder.") from error


def path_text(path: str | os.PathLike) -> str:
    """`path` as text to show, whatever the system's encoding."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def write_error(path: Path, error: Exception) -> WriteError:
    """The WriteError that says why `path` could not be written."""
    reason = getattr(error, "strerror", None) or _reason(error)
    return WriteError(
        f"{path} could not be written ({reason}), so nothing was changed there; "
        "free some space or choose another folder."
    )


def incomplete(path: Path) -> InputError:
    """The error for an image file that lacks a part of what it should hold."""
    return InputError(f"{path} is incomplete or damaged; copy or export it again.")


def json_text(value: Any, indent: int | None = None, **options: Any) -> str:
    """`value` as standard JSON, which knows neither NaN nor infinity; see `jsonable`. Options are json.dumps's."""
    return json.dumps(jsonable(value), indent=indent, allow_nan=False, **options)


def jsonable(value: Any) -> Any:
    """`value` with dataclasses as dictionaries, NaN as None and infinity as "inf"."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file as 64 hexadecimal digits. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error


def remove_abandoned(parent: Path) -> None:
    """Remove the staging folders in `parent` whose processes are gone."""
    import filelock

    names = [name for name in os.listdir(parent) if name.startswith(STAGING_PREFIX)]
    for name in names:
        lock = parent / f"{name.removesuffix('.lock')}.lock"
        # A folder without a lock file may belong to another program that is about to fill it.
        if lock.exists():
            with suppress(OSError), filelock.FileLock(lock, timeout=0):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()


def _reason(error: Exception) -> str:
    """The last line of an exception, where SimpleITK says what happened, without its source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("ITK ERROR: ")[-1].rstrip(".") if lines else type(error).__name__

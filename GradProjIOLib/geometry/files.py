"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from GradProjIOLib.errors import WriteError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well and vanishes when it fails.

    The temporary file has the same name and lies in a hidden folder beside `path`, so formats that write a
    second file (.mhd, .nhdr) work, too. What was at `path` before stays until then. Raises WriteError for an
    OSError in the block (disk full, no permission, no such folder).
    """
    path = Path(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield folder / path.name
        # The file itself last: the data file that a header names must be there before it.
        for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(written, path.parent / written.name)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_error(path: Path, error: Exception) -> WriteError:
    """The WriteError that says why `path` could not be written."""
    reason = getattr(error, "strerror", None) or _reason(error)
    return WriteError(
        f"{path} could not be written ({reason}), so nothing was changed there; "
        "free some space or choose another folder."
    )


def _reason(error: Exception) -> str:
    """The last line of an exception, where SimpleITK says what happened, without its source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("ITK ERROR: ")[-1].rstrip(".") if lines else type(error).__name__

"""Network weights as files: where they lie, how they are downloaded and checked. Reading one runs no code from it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urljoin, urlsplit

import torch
from torch import Tensor

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import atomic_path, checksum, staging_folder

ZIP_START = b"PK\x03\x04"
CHUNK = 1 << 16
"""Bytes received at once: few enough that a download can be canceled soon on a slow connection."""
TIMEOUT = 30.0
"""Seconds without an answer after which a download fails."""

Progress = Callable[[int, "int | None"], "bool | None"]


class DownloadCancelled(Exception):  # noqa: N818 - nothing went wrong
    """The caller's progress function returned False."""


def cache_directory() -> Path:
    """Folder for downloaded weights: $GRADPROJIO_CACHE where set, else the user's cache folder."""
    chosen = os.environ.get("GRADPROJIO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("GradProjIO", appauthor=False))


def cached_path(name: str, url: str) -> Path:
    """Where the weights of model `name`, published at `url`, lie in the cache. The file need not exist."""
    return cache_directory() / f"{name}-{PurePosixPath(urlsplit(url).path).name}"


def download(name: str, url: str, on_progress: Progress | None = None) -> Path:
    """Fetch the weights of model `name` over HTTPS and return their path, `cached_path`.

    The file appears, or is replaced, only when everything has arrived; `<path>.lock` keeps a second process out.
    `on_progress(received, total)` gets bytes, `total` is None where the server does not tell; it cancels by returning
    False. $REQUESTS_CA_BUNDLE names other certificates to trust.

    Raises InputError (not HTTPS, no connection, refused by the server, cut short, no space, another process is
    downloading) and DownloadCancelled.
    """
    import filelock
    import pooch

    if urlsplit(url).scheme != "https":
        raise InputError(
            f"The weights of {name} can only be downloaded over HTTPS, not from {url}; give another address."
        )
    destination = cached_path(name, url)
    hooks = {"response": _refuse_other_than_https}
    fetch = pooch.HTTPDownloader(progressbar=_Report(on_progress), chunk_size=CHUNK, timeout=TIMEOUT, hooks=hooks)
    pooch.get_logger().setLevel("WARNING")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{destination}.lock", timeout=0), staging_folder(destination.parent) as folder:
            arrived = pooch.retrieve(url, None, fname=destination.name, path=folder, downloader=fetch)
            _note_of(destination).unlink(missing_ok=True)
            os.replace(arrived, destination)
    except filelock.Timeout as error:
        raise InputError(f"Another process is downloading to {destination}; wait until it is done.") from error
    except OSError as error:  # those of the package requests are, too
        raise InputError(
            f"Could not download the weights of {name} from {url} to {destination} ({_reason(error)}); try again, "
            "or fetch the file by other means and put it there."
        ) from error
    return destination


class _Report:
    """What pooch takes for a progress bar: it counts bytes and calls the caller's function with them."""

    def __init__(self, on_progress: Progress | None) -> None:
        self.on_progress = on_progress
        self.total = 0
        self.received = 0

    def update(self, count: int) -> None:
        """Count bytes; the last piece may be smaller than pooch says."""
        total = self.total or None
        self.received = min(self.received + count, self.total) if total else self.received + count
        if self.on_progress is not None and self.on_progress(self.received, total) is False:
            raise DownloadCancelled(f"The download was canceled after {self.received} bytes.")

    def reset(self) -> None:
        """Nothing: at the end pooch would start to count again."""

    def close(self) -> None:
        """Nothing: there is no bar."""


def _refuse_other_than_https(response: Any, **_: Any) -> None:
    """Follow redirects, which release downloads need, but never away from HTTPS."""
    target = urljoin(response.url, response.headers.get("Location", ""))
    if response.is_redirect and urlsplit(target).scheme != "https":
        raise OSError(f"it redirects to {target}, which is not HTTPS")


def _reason(error: BaseException) -> str:
    """What the operating system or the server said, without the layers that requests and urllib3 add."""
    while (cause := getattr(error, "reason", None) or (error.args[0] if error.args else None)) is not None:
        if not isinstance(cause, BaseException):
            break
        error = cause
    text = next((part for part in error.args if isinstance(part, str)), str(error))
    return text.split("): ")[-1].split(" for url: ")[0].rstrip(".")


def _note_of(path: Path) -> Path:
    """The file beside a weights file in the cache that keeps its checksum."""
    return path.with_name(f"{path.name}.sha256")


def load_cached(path: Path, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], str]:
    """`load_state` for a file in the cache, and the file's checksum.

    The checksum of the first good file is kept in `<path>.sha256`, unless the cache may only be read. Raises
    InputError where a later file has another one.
    """
    digest, note = checksum(path), _note_of(path)
    if note.exists() and note.read_text(errors="replace").split()[:1] != [digest]:
        raise InputError(
            f"The weights file {path} has changed since it was first used (its checksum is no longer that in "
            f"{note.name}); delete both files and download it again."
        )
    state = load_state(path, expected)
    if not note.exists():
        with suppress(InputError), atomic_path(note) as unfinished:
            unfinished.write_text(f"{digest}  {path.name}\n")
    return state, digest


def load_state(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read network weights: key → tensor on the CPU, floating-point values as float32.

    `expected` gives the shape of every key. Raises InputError unless the file is an undamaged zip archive of
    `torch.save` that holds exactly these keys with these shapes, all finite. Objects other than tensors are refused,
    not created. The formats from before torch 1.6, which are no zip archives, are refused too: until torch 2.6
    reading one of them could run code (CVE-2025-32434).
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP_START)) != ZIP_START:
                raise _unusable(path, "is not a PyTorch file")
            if damaged := zipfile.ZipFile(file).testzip():  # torch itself does not compare the CRCs
                raise _unusable(path, f"is damaged (in {damaged})")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise _unusable(path, "is damaged or not complete") from error
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from error
    except Exception as error:  # what torch raises is not documented
        raise _unusable(path, "is damaged or holds Python objects that are not tensors") from error
    if not isinstance(state, dict):
        raise _unusable(path, f"holds a {type(state).__name__} and not a dictionary of tensors")
    _check_keys(path, state, expected)
    return {key: _checked(path, key, state.pop(key), tuple(shape)) for key, shape in expected.items()}


def _check_keys(path: Path, state: Mapping, expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    problems = [
        f"{len(keys)} {what} ({', '.join(map(str, keys[:3]))}{', …' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"))
        if keys
    ]
    if problems:
        raise _unusable(path, f"does not fit this model: of {len(expected)} entries {' and '.join(problems)}")


def _checked(path: Path, key: str, value: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.is_nested:
        raise _unusable(path, f"holds no plain tensor under {key}")
    if tuple(value.shape) != shape:
        raise _unusable(path, f"has shape {list(value.shape)} instead of {list(shape)} for {key}")
    if value.is_floating_point():
        value = value.detach().float()
    elif not key.endswith("num_batches_tracked"):
        raise _unusable(path, f"holds {value.dtype} instead of floating-point values under {key}")
    if not torch.isfinite(value).all():
        raise _unusable(path, f"holds values that are not finite under {key}")
    return value


def _unusable(path: Path, problem: str) -> InputError:
    return InputError(
        f"The weights file {path} {problem}; give a file with weights of this model, or delete it and "
        "download it again."
    )

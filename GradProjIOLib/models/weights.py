"""Network weights as files: where they live, how they get there, how they are checked.

Nothing here touches the network unless `download` is called, and nothing runs code from a file: a
weights file is a zip archive of tensors as `torch.save` writes it, read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import ssl
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, Request, build_opener

from GradProjIOLib.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

ZIP_START = b"PK\x03\x04"
CHUNK = 1 << 16  # bytes read at once: small enough that cancelling is prompt on a slow connection

Progress = Callable[[int, "int | None"], "bool | None"]


class DownloadCancelled(Exception):  # noqa: N818 - nothing went wrong
    """The caller's progress function returned False. What has arrived is kept for the next download."""


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


def missing_message(name: str, url: str, path: str | Path, other_models: Sequence[str] = ()) -> str:
    """One sentence for the user whose model `name` has no weights at `path`."""
    others = f", or choose another model ({', '.join(other_models)})" if other_models else ""
    return (
        f"The weights of {name} are not at {path}; download them with `gradprojio models download {name}`, "
        f"or fetch {url} by other means and put the file there{others}."
    )


def download(
    name: str,
    url: str,
    destination: str | Path | None = None,
    *,
    on_progress: Progress | None = None,
    context: ssl.SSLContext | None = None,
    timeout: float = 30.0,
) -> Path:
    """Fetch the weights of model `name` over HTTPS and return their path (`cached_path` unless given).

    `destination` appears, or is replaced, only when everything has arrived. Until then the bytes are in
    `<destination>.part`, and the next call continues there if the server confirms by its ETag that the
    file is still the same. `<destination>.lock` keeps a second process out; it stays, empty.

    `on_progress(received, total)` gets bytes, `total` is None where the server does not tell; it
    cancels by returning False. `context` replaces the system's certificates. `timeout` is the number
    of seconds without an answer after which the attempt ends.

    Raises InputError (not HTTPS, no connection, refused by the server, cut short, no space, another
    process is at it) and DownloadCancelled.
    """
    if urlsplit(url).scheme != "https":
        raise InputError(
            f"The weights of {name} can only be downloaded over HTTPS, not from {url}; give another address."
        )
    destination = cached_path(name, url) if destination is None else Path(destination)
    opener = build_opener(HTTPSHandler(context=context), _HttpsOnly())
    part = _beside(destination, ".part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _sole_download(destination):
            _fetch(opener, url, part, on_progress, timeout)
            _beside(destination, ".sha256").unlink(missing_ok=True)
            os.replace(part, destination)
            _beside(part, ".etag").unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if type(error) is URLError else error
        raise InputError(
            f"Could not download the weights of {name} from {url} to {destination} ({reason}); try again, "
            "which continues where it ended, or fetch the file by other means and put it there."
        ) from error
    return destination


class _HttpsOnly(HTTPRedirectHandler):
    """Follow redirects, as release downloads need, but never away from HTTPS."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme != "https":
            raise URLError(f"redirected to {newurl}, which is not HTTPS")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def _sole_download(destination: Path) -> Iterator[None]:
    """Hold a lock of the operating system, which ends with the process however that ends."""
    with open(_beside(destination, ".lock"), "a") as lock:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(f"Another process is downloading to {destination}; wait until it is done.") from error
        yield


def _fetch(opener: OpenerDirector, url: str, part: Path, on_progress: Progress | None, timeout: float) -> None:
    response, received = _open(opener, url, part, timeout)
    with response, open(part, "ab" if received else "wb") as file:
        total = None if response.length is None else received + response.length
        if total is not None and total - received > shutil.disk_usage(part.parent).free:
            raise InputError(
                f"The download from {url} needs {(total - received) / 1e6:.0f} MB, for which {part.parent} "
                "has no room; free some space or set GRADPROJIO_CACHE to another folder."
            )
        _remember_version(part, url, response.headers.get("ETag", ""))
        while received != total:
            if on_progress is not None and on_progress(received, total) is False:
                raise DownloadCancelled(f"The download to {part} was cancelled after {received} bytes.")
            chunk = response.read(CHUNK)
            if not chunk:
                break
            file.write(chunk)
            received += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and received != total:
        raise OSError(f"the connection ended after {received} of {total} bytes")
    if on_progress is not None:
        on_progress(received, total)


def _open(opener: OpenerDirector, url: str, part: Path, timeout: float) -> tuple[http.client.HTTPResponse, int]:
    """The server's answer, and how many bytes of `part` it continues (0: it starts over)."""
    size, version = _resume_point(part, url)
    if size:
        request = Request(url, headers={"Range": f"bytes={size}-", "If-Range": version})
        try:
            response = _answer(opener, request, timeout)
        except HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        else:
            continues = response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
            if response.status == http.client.OK:
                return response, 0
            if continues and response.headers.get("ETag") == version:
                return response, size
            response.close()
    response = _answer(opener, Request(url), timeout)
    if response.status != http.client.OK:
        response.close()
        raise OSError(f"the server answered {response.status} {response.reason}")
    return response, 0


def _answer(opener: OpenerDirector, request: Request, timeout: float) -> http.client.HTTPResponse:
    try:
        return opener.open(request, timeout=timeout)
    except HTTPError as error:
        error.close()  # it is a response too, and would hold its connection as long as it is remembered
        raise


def _remember_version(part: Path, url: str, etag: str) -> None:
    """Note which remote file `part` belongs to. A weak ETag does not promise the same bytes."""
    if etag and not etag.startswith("W/"):
        _beside(part, ".etag").write_text(f"{url}\n{etag}", encoding="utf-8")
    else:
        _beside(part, ".etag").unlink(missing_ok=True)


def _resume_point(part: Path, url: str) -> tuple[int, str]:
    try:
        noted_url, etag = _beside(part, ".etag").read_text(encoding="utf-8").split("\n")
        return (part.stat().st_size, etag) if noted_url == url else (0, "")
    except (OSError, ValueError):
        return 0, ""


def checksum(path: str | Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits. Raises InputError where it cannot be read."""
    digest = hashlib.sha256()
    with _opened(Path(path)) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: str | Path) -> str:
    """Checksum of a cached file, compared with the one in `<path>.sha256` where `load_cached` left one.

    Raises InputError where they differ.
    """
    path = Path(path)
    digest = checksum(path)
    note = _beside(path, ".sha256")
    if note.exists() and note.read_text(errors="replace").split()[:1] != [digest]:
        raise InputError(
            f"The weights file {path} has changed since it was first used (its checksum is no longer that in "
            f"{note.name}); delete both files and download it again."
        )
    return digest


def load_cached(path: str | Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`load_state` for a file in the cache: checked by `verify`, and its checksum kept once it was good.

    In a cache that may only be read no checksum is kept. Raises InputError.
    """
    path = Path(path)
    digest = verify(path)
    state = load_state(path, expected)
    note = _beside(path, ".sha256")
    if not note.exists():
        unfinished = _beside(note, f".{os.getpid()}")
        with suppress(OSError):
            unfinished.write_text(f"{digest}  {path.name}\n")
            os.replace(unfinished, note)
    return state


def load_state(path: str | Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read network weights: key → tensor on the CPU, floating-point values as float32.

    `expected` gives the shape of every key, for a torch module
    `{key: tuple(value.shape) for key, value in module.state_dict().items()}`. At most one copy of the
    weights is in memory.

    Raises InputError unless the file is an undamaged zip archive of `torch.save` that holds exactly
    these keys with these shapes, all finite. Objects other than tensors are refused, not created.
    The formats from before torch 1.6, which are no zip archives, are refused too: until torch 2.6 reading
    one of them could run code (CVE-2025-32434).
    """
    import torch

    path = Path(path)
    with _opened(path) as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            raise _unusable(path, "is not a PyTorch file")
        try:
            damaged = zipfile.ZipFile(file).testzip()  # torch itself does not compare the CRCs
            file.seek(0)
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except zipfile.BadZipFile as error:
            raise _unusable(path, "is damaged or not complete") from error
        except Exception as error:  # what torch raises is not documented
            raise _unusable(path, "is damaged or holds Python objects that are not tensors") from error
    if damaged:
        raise _unusable(path, f"is damaged (in {damaged})")
    if not isinstance(state, dict):
        raise _unusable(path, f"holds a {type(state).__name__} and not a dictionary of tensors")
    _check_keys(path, state, expected)
    return {key: _checked(path, key, state.pop(key), tuple(shape)) for key, shape in expected.items()}


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"The weights file {path} cannot be read ({error.strerror}); check the path or download it."
        ) from error


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
    import torch

    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_meta or value.is_nested:
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

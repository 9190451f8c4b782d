"""One pair of a batch: what to register, whether that is done already, and doing it.

The same functions run in a process on this computer and in a worker of a Dask cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.models import registry
from GradProjIOLib.models.weights import checksum
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings

FILE_ROLES = ("fixed", "moving", "fixed_mask", "moving_mask", "moving_labels", "initial_transform")
REPORT, THUMBNAIL, LABELS = "report.json", "thumbnail.png", "warped_labels.nii.gz"
RESULTS = (
    "warped.nii.gz",
    "transform.h5",
    "inverse_transform.h5",
    "jacobian.nii.gz",
    "folding.nii.gz",
    "overview.png",
    THUMBNAIL,
    REPORT,
)
# Where and how a result is computed changes it by rounding at most, so it does not make it outdated.
NOT_COMPARED = ("device", "memory")
WRITING_PREFIX = ".writing-"
DONE, KEPT, FAILED, OPEN = "done", "kept", "failed", "not done yet"


@dataclass(frozen=True)
class Pair:
    """The files of one pair and how to register them; ``case`` names the folder of its results.

    The masks say where each image counts, ``moving_labels`` are warped as well, ``initial_transform`` is an ITK
    transform (fixed → moving) to start from.
    """

    case: str
    fixed: Path
    moving: Path
    settings: Settings = field(default_factory=Settings)
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    moving_labels: Path | None = None
    initial_transform: Path | None = None

    def __post_init__(self) -> None:
        for role in FILE_ROLES:
            if (path := getattr(self, role)) is not None:
                # A worker may run in another folder.
                object.__setattr__(self, role, Path(path).expanduser().absolute())
        settings = self.settings
        if self.initial_transform is not None:
            settings = replace(settings, align="none")
        if settings.model == "auto":
            # A worker may have other weights.
            settings = replace(settings, model=registry.default_model())
        object.__setattr__(self, "settings", settings)
        if self.case in ("", ".", "..") or Path(self.case).name != self.case or self.case.startswith("."):
            raise InputError(f"The case {self.case!r} cannot be the name of a folder; choose another name.")

    @property
    def files(self) -> dict[str, Path]:
        """All files of the pair by their role."""
        return {role: path for role in FILE_ROLES if (path := getattr(self, role)) is not None}


@dataclass(frozen=True)
class Outcome:
    """What became of a pair: ``state`` is DONE, KEPT (was done before), FAILED or OPEN.

    A failed one has a ``message``; its ``kind`` is "input" where the user must change something, else "internal",
    with the traceback as ``details``.
    """

    case: str
    state: str
    message: str = ""
    kind: str = ""
    details: str = ""


@dataclass(frozen=True)
class Task:
    """A pair that has to be registered, the folder for its results, and its `request`."""

    pair: Pair
    folder: Path
    request: dict[str, Any]

    def to_message(self) -> dict[str, Any]:
        """The task as what JSON knows."""
        files = {role: str(path) for role, path in self.pair.files.items()}
        pair = {"case": self.pair.case, "settings": asdict(self.pair.settings), **files}
        return {"pair": pair, "folder": str(self.folder), "request_record": self.request}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Task:
        """The task that `to_message` described."""
        pair = {**message["pair"], "settings": Settings(**message["pair"]["settings"])}
        return cls(Pair(**pair), Path(message["folder"]), message["request_record"])


def request(pair: Pair, checksum: Callable[[Path], str] = checksum) -> dict[str, Any]:
    """What a result depends on: settings, and the SHA-256 of the files (by role) and of the model's weights.

    Raises InputError where files or weights are missing.
    """
    settings = asdict(pair.settings)
    weights = registry.weights_path(settings["model"], settings.pop("weights"))
    for name in NOT_COMPARED:
        del settings[name]
    found = {
        "settings": settings,
        "files": {role: checksum(path) for role, path in pair.files.items()},
        "weights": checksum(weights) if weights is not None else None,
    }
    return json.loads(json.dumps(found))


def is_done(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds the whole result of the request ``wanted``."""
    report = read_report(folder)
    names = [*RESULTS, LABELS] if "moving_labels" in wanted["files"] else RESULTS
    return report.get("request") == wanted and all((folder / name).is_file() for name in names)


def read_report(folder: Path) -> dict[str, Any]:
    """The report in a folder of results; empty where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def read_inputs(task: Task) -> dict[str, Any] | Outcome:
    """The volumes and the transform of a task by their role, or why they cannot be read."""
    from GradProjIOLib.spatial.deformation import read_initial

    try:
        readers = {"moving_labels": read_labels, "initial_transform": lambda path: read_initial(str(path))}
        return {role: readers.get(role, read_volume)(path) for role, path in task.pair.files.items()}
    except Exception as error:
        return failure(task.pair.case, error)


def finish(task: Task, inputs: dict[str, Any] | Outcome) -> Outcome:
    """Register what `read_inputs` has read and put the results into the task's folder, whole or not at all."""
    if isinstance(inputs, Outcome):
        return inputs
    try:
        _register(task, dict(inputs))
    except Exception as error:
        return failure(task.pair.case, error)
    return Outcome(task.pair.case, DONE)


def failure(case: str, error: Exception) -> Outcome:
    """The outcome of a pair that ended in ``error``."""
    if isinstance(error, (InputError, MemoryError)):
        return Outcome(case, FAILED, str(error) or "There is not enough memory.", "input")
    details = "".join(traceback.format_exception(error))
    return Outcome(case, FAILED, f"{type(error).__name__}: {error}", "internal", details)


def _register(task: Task, inputs: dict[str, Any]) -> None:
    from GradProjIOLib.report.thumbnail import write_thumbnail

    labels = inputs.pop("moving_labels", None)
    result = register(inputs.pop("fixed"), inputs.pop("moving"), task.pair.settings, **inputs)
    result.report["request"] = task.request
    with staging(task.folder.parent) as temporary:
        whole = temporary / "result"
        result.write(whole, labels)
        write_thumbnail(whole, result.fixed)
        _take_over(whole, task.folder, temporary / "outdated")


def remove_unfinished(folder: Path) -> None:
    """Remove what `staging` left in ``folder`` when it was killed.

    A worker that lives on may be about to take its result out of there; after the new name it finds nothing, while
    from one that is being emptied it would take a half.
    """
    for path in folder.glob(f"{WRITING_PREFIX}*"):
        renamed = path.with_name(f"{WRITING_PREFIX}{uuid4().hex}")
        with suppress(OSError):
            os.replace(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in ``folder`` that vanishes with all it holds."""
    temporary = Path(tempfile.mkdtemp(prefix=WRITING_PREFIX, dir=folder))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_over(whole: Path, folder: Path, outdated: Path) -> None:
    """Make ``whole`` the folder of results; what else lay in an outdated one stays.

    In between there is no such folder, so whoever looks, or kills, finds a whole result or none.
    """
    if folder.exists():
        known = {*RESULTS, LABELS}
        for path in folder.iterdir():
            if path.name not in known:
                shutil.copytree(path, whole / path.name) if path.is_dir() else shutil.copy2(path, whole)
        os.replace(folder, outdated)
    os.replace(whole, folder)

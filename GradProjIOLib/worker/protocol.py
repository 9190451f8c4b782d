"""What an application and its worker process say to each other. This is the only place that defines it.

The application writes requests to the worker's standard input, the worker writes events to its standard output.
Each is one JSON object on one line.

A request is `{"request": kind, "id": number, …}`. The client chooses the number, and every event about the request
carries it:

| request    | further content                | effect                                                              |
|------------|--------------------------------|---------------------------------------------------------------------|
| `register` | the fields of RegisterRequest  | registers a pair of images                                          |
| `evaluate` | the fields of EvaluateRequest  | measures a deformation with labels or landmarks                     |
| `download` | the fields of DownloadRequest  | fetches the weights of a model                                      |
| `cancel`   | none                           | ends that registration after the current step; its result is kept   |

An event is `{"event": kind, …}`. All but the first two have an `id`. One of the last six ends each request:

| event       | further content                                     | meaning                                          |
|-------------|-----------------------------------------------------|--------------------------------------------------|
| `ready`     | `pid`                                               | the process runs                                 |
| `devices`   | `devices` and `models`, as `answers` finds them     | what can compute, and with what                  |
| `started`   | `total`, `levels` and `before`: numbers of steps    | the work on the request begins                   |
| `download`  | `received` and `total` bytes; `total` may be null   | the model's weights are being fetched            |
| `step`      | the fields of `Step`                                | one optimization step is done                    |
| `so far`    | `transform`, the record of a displacement field     | what is reached on the way, coarsely             |
| `done`      | `report`, `result`                                  | the registration is finished                     |
| `canceled`  | the same; nothing where there was no step yet       | the registration ended early, as requested       |
| `evaluated` | `row`, as `evaluation.cases.measure_result` gives it | the evaluation is finished                      |
| `downloaded` | none                                               | the weights are there                            |
| `failed`    | `message`; `kind`: "input", "weights" or "internal" | no result; "weights" asks to allow the download  |
| `died`      | `message`; `code`, the exit status                  | the process ended; the client itself says so     |

What is reached so far is sent only where the request asks for it, and not again before the application has removed the
file of the last time.

`total` are the steps to come, `levels` those of each level of the refinement, and `before` those that the network has
taken already in a registration that goes on.

Image data do not pass through the pipes. They lie as uncompressed .npy files in a folder that belongs to one request,
and a record (a JSON object) says where each file is and where its image lies in space: `array` (path), `affine` (4x4,
index to RAS mm) and `name`. The record of a displacement field u has the 4x4 `matrix` of the map x → matrix·(x + u(x)),
too; that of a linear map has nothing else. Writing and reading such a file costs as much as copying the array. `result`
holds records by the names below.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.landmarks import Landmarks
from GradProjIOLib.geometry.volume import Volume

CANCEL = "cancel"
READY, DEVICES, STARTED, DOWNLOAD, STEP = "ready", "devices", "started", "download", "step"
SO_FAR = "so far"
DONE, CANCELED, EVALUATED, FAILED, DIED = "done", "canceled", "evaluated", "failed", "died"
DOWNLOADED = "downloaded"
LAST_EVENTS = (DONE, CANCELED, EVALUATED, DOWNLOADED, FAILED, DIED)
INPUT_PROBLEM, WEIGHTS_MISSING, INTERNAL_PROBLEM = "input", "weights", "internal"

TRANSFORM, INVERSE, WARPED, WARPED_LABELS = "transform", "inverse", "warped", "warped_labels"
JACOBIAN, FOLDING, BETWEEN = "jacobian", "folding", "folding between"

FOLDER_PREFIX = "gradprojio-"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RegisterRequest:
    """Register a pair of images.

    `inputs` are records by the names that `registration.register.register` has for them: `fixed` and `moving`, and
    where there are any `fixed_mask`, `moving_mask`, `fixed_points`, `moving_points`, `fixed_labels`, `moving_labels`
    and `initial_transform`, which maps fixed to moving points in RAS mm. `guiding_labels` are names or values of the
    labels that guide, or {name: weight}. `labels_to_warp` are labels of the moving image that do not guide.
    `folder` is the folder of this request's arrays, also those of the result. `settings` are names and values of
    `settings.Settings`. `allow_download` says that the user has agreed to fetch the model's weights.

    `so_far_seconds` says how often what is reached so far is sent; never where it is None.

    `earlier` is a result to go on with: its `report`, its `transform` and `inverse` as records of displacement fields,
    and how many more `steps` are taken. `settings` are then those that change, and there is no `initial_transform`
    where the report has its matrix.
    """

    kind: ClassVar[str] = "register"
    folder: str
    inputs: Mapping[str, Record]
    settings: Mapping[str, Any] = field(default_factory=dict)
    guiding_labels: Sequence[int | str] | Mapping[str, float] | None = None
    labels_to_warp: Record | None = None
    allow_download: bool = False
    so_far_seconds: float | None = None
    earlier: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class EvaluateRequest:
    """Measure the deformation `transform`, the record of a displacement field, on the lattice of `reference`.

    `folder` is the folder of this request's arrays. `labels` are records of volumes, `points` are records of landmarks,
    each those of the fixed and of the moving image, or none.
    """

    kind: ClassVar[str] = "evaluate"
    folder: str
    transform: Record
    reference: Record
    labels: Sequence[Record] = ()
    points: Sequence[Record] = ()


@dataclass(frozen=True)
class DownloadRequest:
    """Fetch the weights of the model of this name, to which the user has agreed."""

    kind: ClassVar[str] = "download"
    model: str
    folder: str | None = None


Request = RegisterRequest | EvaluateRequest | DownloadRequest


def to_message(request: Request) -> dict[str, Any]:
    """The JSON object for `request`; the client adds the number."""
    return {"request": request.kind, **vars(request)}


def from_message(message: Mapping[str, Any]) -> Request:
    """The request in a JSON object. Raises KeyError for an unknown kind, TypeError for unknown content."""
    kinds: dict[str, type[Request]] = {kind.kind: kind for kind in (RegisterRequest, EvaluateRequest, DownloadRequest)}
    content = {name: value for name, value in message.items() if name not in ("request", "id")}
    return kinds[message["request"]](**content)


def new_folder() -> Path:
    """A new, empty folder for the arrays of one request. Raises InputError where the disk has no room for it."""
    try:
        return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    except OSError as error:
        raise InputError(
            f"The folder for temporary files cannot be used ({error.strerror}); free some space there or set "
            "another one in Slicer's application settings."
        ) from error


def remove_folder(folder: Path | str) -> None:
    """Remove a folder that new_folder made, with all it holds; anything else is left alone."""
    if Path(folder).name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def write_volume(volume: Volume, folder: Path, name: str) -> dict[str, Any]:
    """Write the array of `volume` to `folder` and return its record. Raises InputError where there is no room."""
    return _write(volume.array, volume.affine, folder / f"{name}.npy", volume.name)


def write_labels(labels: Labels, folder: Path, name: str) -> dict[str, Any]:
    """The same for labels, whose record has the `names` of their values, too."""
    return write_volume(labels.volume, folder, name) | {"names": list(labels.names.items())}


def write_field(
    displacement: np.ndarray, affine: np.ndarray, matrix: np.ndarray, folder: Path, name: str
) -> dict[str, Any]:
    """Write a displacement [k, j, i, 3] in RAS mm and the matrix (4x4) after it, as `spatial.deformation` has them.

    Returns the record. Raises InputError where there is no room.
    """
    return _write(displacement, affine, folder / f"{name}.npy", name) | {"matrix": np.asarray(matrix).tolist()}


def write_points(points: Landmarks) -> dict[str, Any]:
    """The record of landmarks, which are few enough to be part of the message."""
    return {"names": points.names, "points": points.points.tolist(), "source": points.source}


def _write(array: np.ndarray, affine: np.ndarray, path: Path, name: str) -> dict[str, Any]:
    try:
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        raise InputError(
            f"{name} could not be copied to {path.parent} ({error.strerror}); free some space there."
        ) from error
    return {"array": str(path), "affine": np.asarray(affine).tolist(), "name": name}


def read(record: Record) -> Any:
    """What a record describes: a Volume, Labels or Landmarks.

    Of a linear map it is the matrix (4x4), and of a displacement field the displacement [k, j, i, 3] in RAS mm, the
    affine (4x4) of its lattice and the matrix (4x4).
    """
    if "points" in record:
        return Landmarks(record["names"], np.array(record["points"]), record["source"])
    if "array" not in record:
        return np.array(record["matrix"], dtype=np.float64)
    array, affine = np.load(record["array"], allow_pickle=False), np.array(record["affine"])
    if "matrix" in record:
        return array, affine, np.array(record["matrix"])
    volume = Volume(array, affine, record["name"])
    return Labels(volume, dict(record["names"])) if "names" in record else volume

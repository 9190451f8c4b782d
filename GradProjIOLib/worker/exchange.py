"""How Slicer and its worker process hand volumes to each other: raw arrays in a folder of their own.

A volume is an uncompressed .npy file and a record (a JSON object) that says where it lies in space. Writing
and reading one costs as much as copying it, which files made for keeping do not promise.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume

FOLDER_PREFIX = "gradprojio-"
FIELD_AXES = 4


def new_folder() -> Path:
    """A new, empty folder for one request. Raises InputError where the disk has no room for it."""
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
    """Write the array of `volume` to `folder`; return the record to read it back with.

    Raises InputError where there is no room.
    """
    return _write(volume.array, volume.affine, folder / f"{name}.npy", volume.name)


def write_field(displacement: np.ndarray, affine: np.ndarray, folder: Path, name: str) -> dict[str, Any]:
    """Write a displacement [k, j, i, 3] in RAS mm; return its record. Raises InputError, see write_volume."""
    return _write(displacement, affine, folder / f"{name}.npy", name)


def _write(array: np.ndarray, affine: np.ndarray, path: Path, name: str) -> dict[str, Any]:
    try:
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        raise InputError(
            f"{name} could not be copied to {path.parent} ({error.strerror}); free some space there."
        ) from error
    return {"array": str(path), "affine": np.asarray(affine).tolist(), "name": name}


def read_volume(record: Mapping[str, Any]) -> Volume:
    """The volume that `record` stands for."""
    return Volume(_read(record), np.array(record["affine"]), record["name"])


def read_field(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Displacement [k, j, i, 3] in RAS mm and affine (4x4) that `record` stands for."""
    displacement = _read(record)
    if displacement.ndim != FIELD_AXES or displacement.shape[-1] != 3:
        raise ValueError(f"expected a displacement [k, j, i, 3], found the shape {displacement.shape}")
    return displacement, np.array(record["affine"])


def _read(record: Mapping[str, Any]) -> np.ndarray:
    return np.load(record["array"], allow_pickle=False)

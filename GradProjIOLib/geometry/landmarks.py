"""Landmark files: Slicer's markups (.mrk.json, .fcsv) and tables (.csv), read as points in RAS mm."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import RAS_TO_LPS, apply_matrix

FRAMES = ("LPS", "RAS", "voxels")
SUFFIXES = (".mrk.json", ".fcsv", ".csv")
FIDUCIAL_DEFINED = "2"  # the position status that newer versions of Slicer append to a row


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Named points: `points` [n, 3] in RAS mm.

    tolerances: [n], how exact each is, in mm; NaN or None where that is not said.
    """

    names: list[str]
    points: np.ndarray
    source: str = "landmarks"
    tolerances: np.ndarray | None = None


def read_landmarks(path: str | os.PathLike, frame: str | None = None, affine: np.ndarray | None = None) -> Landmarks:
    """The landmarks in the file `path`.

    Slicer's files say themselves whether they are in LPS or RAS. Of a .csv file `frame` says it ("LPS", "RAS"
    in mm, or "voxels", indices (i, j, k) of the image with `affine`); its columns are x, y, z or i, j, k, and
    optionally name or label, and tolerance (mm); without a header they are the first three. Points that Slicer marks as
    not placed are left out. Raises InputError for other files, and where the frame or the affine is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path.")
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path} is no landmark file; use one of {', '.join(SUFFIXES)}.")
    tolerances = None
    try:
        if path.name.lower().endswith(".mrk.json"):
            names, positions, frame = _read_markups(path)
        elif path.name.lower().endswith(".fcsv"):
            names, positions, frame = _read_fiducials(path)
        else:
            names, positions, tolerances = _read_table(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as landmarks ({error}); export it again.") from error
    if not names:
        raise InputError(f"{path} holds no landmark; place some, or choose another file.")
    points = np.array(positions, dtype=np.float64)
    if not np.isfinite(points).all():
        raise InputError(f"{path} has a landmark whose position is no number; correct or remove it.")
    found = Landmarks(names, to_ras(points, frame, affine, path), str(path), tolerances)
    tolerances_of(found)
    return found


def tolerances_of(landmarks: Landmarks) -> np.ndarray:
    """How exact each landmark is: [n] in mm, NaN where that is not said.

    Raises InputError where they are not one number for each landmark, positive and finite, or NaN.
    """
    if landmarks.tolerances is None:
        return np.full(len(landmarks.names), np.nan)
    found = np.asarray(landmarks.tolerances, dtype=np.float64)
    if found.shape != (len(landmarks.names),) or not (np.isnan(found) | ((found > 0) & (found < np.inf))).all():
        raise InputError(
            f"The tolerances of {landmarks.source} must be one positive number in mm for each landmark; "
            "leave out those that are not known."
        )
    return found


def match_landmarks(fixed: Sequence[str], moving: Sequence[str]) -> list[int]:
    """For every name in `fixed` the position of its partner in `moving`.

    By name where both lists hold the same names, each once; by order where they share none or repeat some.
    Raises InputError where the numbers differ or only some names are shared.
    """
    if len(fixed) != len(moving):
        raise InputError(
            f"There are {len(fixed)} fixed and {len(moving)} moving landmarks; "
            "give the same number, in the same order or with the same names."
        )
    unique = len(set(fixed)) == len(fixed) and len(set(moving)) == len(moving)
    alone = set(fixed) - set(moving)
    if unique and alone and len(alone) < len(fixed):
        raise InputError(
            f"The fixed landmark {min(alone)} has no moving one of its name, but others have; "
            "rename it, or rename all moving landmarks to match them by their order."
        )
    if unique and not alone:
        return [moving.index(name) for name in fixed]
    return list(range(len(fixed)))


def to_ras(points: np.ndarray, frame: str | None, affine: np.ndarray | None, path: str | os.PathLike) -> np.ndarray:
    """`points` [n, 3] in `frame` ("LPS", "RAS" or "voxels") as points in RAS mm. Raises InputError."""
    return apply_matrix(frame_matrix(frame, affine, path), points)


def frame_matrix(frame: str | None, affine: np.ndarray | None, path: str | os.PathLike) -> np.ndarray:
    """The 4x4 matrix from `frame` to RAS mm; `affine` is that of "voxels". Raises InputError where one is missing."""
    if frame == "voxels" and affine is None:
        raise InputError(f"{path} is in voxels, but of which image is unknown; give that image, too.")
    to_mm = {"RAS": np.eye(4), "LPS": RAS_TO_LPS, "voxels": affine}.get(frame or "")
    if to_mm is None:
        raise InputError(f"{path} does not say in which coordinates its points are; say {', '.join(FRAMES)}.")
    return to_mm


def _read_markups(path: Path) -> tuple[list[str], list[list[float]], str]:
    markups = json.loads(path.read_text(encoding="utf-8"))["markups"]
    if len(markups) != 1:
        raise InputError(f"{path} holds {len(markups)} point lists; save one of them to its own file.")
    placed = [point for point in markups[0].get("controlPoints", []) if is_placed(point)]
    names = [str(point.get("label", "")) for point in placed]
    check_unit(markups[0], path)
    frame = slicer_frame(markups[0].get("coordinateSystem", "LPS"))
    return names, [point["position"][:3] for point in placed], frame


def check_unit(markup: dict[str, Any], path: Path) -> None:
    """Raise InputError where a point list of Slicer is not in mm."""
    # Either "mm" or a coded entry such as ["UCUM", "mm", "millimeter"].
    units = markup.get("coordinateUnits") or "mm"
    if "mm" not in units:
        raise InputError(f"{path} is in {units}, not in mm; save it from a scene whose unit of length is mm.")


def is_placed(point: dict[str, Any]) -> bool:
    """Whether a control point of Slicer has a position."""
    return point.get("positionStatus", "defined") == "defined" and bool(point.get("position"))


def is_placed_row(row: list[str]) -> bool:
    """The same for a row of a .fcsv file."""
    return len(row) <= 14 or row[14] == FIDUCIAL_DEFINED


def _read_fiducials(path: Path) -> tuple[list[str], list[list[float]], str]:
    # Files of Slicer 3 and 4.0 have no header and are in RAS; the order of the columns has never changed.
    frame, names, positions = "RAS", [], []
    with open(path, encoding="utf-8", newline="") as file:
        for line in file:
            if line.startswith("#"):
                key, _, value = line[1:].partition("=")
                frame = slicer_frame(value.strip()) if key.strip() == "CoordinateSystem" else frame
            elif line.strip():
                row = next(csv.reader([line]))
                if not is_placed_row(row):
                    continue
                names.append(row[11] if len(row) > 11 else row[0])
                positions.append([float(value) for value in row[1:4]])
    return names, positions, frame


def slicer_frame(value: str | int) -> str:
    """Slicer once wrote a number for the coordinate system."""
    return {"0": "RAS", "1": "LPS"}.get(str(value), str(value))


def read_rows(path: Path) -> tuple[list[list[str]], list[int], int]:
    """The rows of a .csv file with a header or without, which columns are the coordinates, and which the name."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        raise InputError(f"{path} holds no landmark; place some, or choose another file.")
    if is_number(rows[0][0]):
        return rows, [0, 1, 2], 3
    header = [cell.strip().lower() for cell in rows[0]]
    axes = "xyz" if "x" in header else "ijk"
    if not set(axes) <= set(header):
        raise InputError(f"{path} has the columns {', '.join(header)}; name three of them x, y, z or i, j, k.")
    name_column = next((header.index(name) for name in ("name", "label") if name in header), len(header))
    return rows, [header.index(axis) for axis in axes], name_column


def is_number(cell: str) -> bool:
    """Whether a cell holds a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_table(path: Path) -> tuple[list[str], list[list[float]], np.ndarray | None]:
    rows, columns, name_column = read_rows(path)
    tolerances = None
    if not is_number(rows[0][columns[0]]):
        header = [cell.strip().lower() for cell in rows.pop(0)]
        column = next((header.index(name) for name in ("tolerance", "tolerance_mm") if name in header), None)
        if column is not None:
            cells = [row[column:][:1] for row in rows]
            tolerances = np.array([float(cell[0]) if cell and cell[0].strip() else np.nan for cell in cells])
    names = [
        row[name_column].strip() if len(row) > name_column else str(number) for number, row in enumerate(rows, start=1)
    ]
    return names, [[float(row[column]) for column in columns] for row in rows], tolerances

"""Landmark files: Slicer's markups (.mrk.json, .fcsv) and tables (.csv), read as points in RAS mm."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
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
    lists, _ = read_point_lists(Path(path), frame, affine)
    if len(lists) != 1:
        raise InputError(f"{path} holds {len(lists)} point lists; save one of them to its own file.")
    found = lists[0]
    if not found.names:
        raise InputError(f"{path} holds no landmark; place some, or choose another file.")
    if not np.isfinite(found.points).all():
        raise InputError(f"{path} has a landmark whose position is no number; correct or remove it.")
    tolerances_of(found)
    return found


def read_point_lists(
    path: Path, frame: str | None, affine: np.ndarray | None
) -> tuple[list[Landmarks], Callable[[Sequence[np.ndarray]], str]]:
    """The point lists in a landmark file, and what gives the file's text with other points (RAS mm) in their places.

    See `read_landmarks`; only the files .mrk.json can hold several lists, or empty ones. Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path.")
    read = next((read for suffix, read in _READERS.items() if path.name.lower().endswith(suffix)), None)
    if read is None:
        raise InputError(f"{path} is no landmark file; use one of {', '.join(SUFFIXES)}.")
    lists, to_mm = [], []
    try:
        found, places, current_text = read(path)
        for names, rows, own_frame, tolerances in found:
            to_mm.append(frame_matrix(own_frame or frame, affine, path))
            positions = np.array([[row[place] for place in places] for row in rows], dtype=np.float64)
            points = apply_matrix(to_mm[-1], positions.reshape(len(names), 3))
            lists.append(Landmarks(names, points, str(path), tolerances))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as landmarks ({error}); export it again.") from error

    def text(points: Sequence[np.ndarray]) -> str:
        for (_, rows, *_), matrix, new in zip(found, to_mm, points, strict=True):
            for row, position in zip(rows, apply_matrix(np.linalg.inv(matrix), new).tolist(), strict=True):
                for place, value in zip(places, position, strict=True):
                    row[place] = value
        return current_text()

    return lists, text


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


def frame_matrix(frame: str | None, affine: np.ndarray | None, path: str | os.PathLike) -> np.ndarray:
    """The 4x4 matrix from `frame` to RAS mm; `affine` is that of "voxels". Raises InputError where one is missing."""
    if frame == "voxels" and affine is None:
        raise InputError(f"{path} is in voxels, but of which image is unknown; give that image, too.")
    to_mm = {"RAS": np.eye(4), "LPS": RAS_TO_LPS, "voxels": affine}.get(frame or "")
    if to_mm is None:
        raise InputError(f"{path} does not say in which coordinates its points are; say {', '.join(FRAMES)}.")
    return to_mm


# What a reader finds: of each list the names, rows, frame and tolerances (None where the file does not say); the places
# of the coordinates in each row; and a function that gives the file's text with what the rows then hold.
_Lists = list[tuple[list[str], list[list[Any]], str | None, np.ndarray | None]]
_Found = tuple[_Lists, Sequence[int], Callable[[], str]]


def _read_markups(path: Path) -> _Found:
    content = json.loads(path.read_text(encoding="utf-8"))
    lists: _Lists = []
    for markup in content["markups"]:
        # Either "mm" or a coded entry such as ["UCUM", "mm", "millimeter"].
        units = markup.get("coordinateUnits") or "mm"
        if "mm" not in units:
            raise InputError(f"{path} is in {units}, not in mm; save it from a scene whose unit of length is mm.")
        points = [
            point
            for point in markup.get("controlPoints", [])
            if point.get("positionStatus", "defined") == "defined" and point.get("position")
        ]
        names = [str(point.get("label", "")) for point in points]
        frame = _slicer_frame(markup.get("coordinateSystem", "LPS"))
        lists.append((names, [point["position"] for point in points], frame, None))
    return lists, range(3), lambda: json.dumps(content, indent=4) + "\n"


def _read_fiducials(path: Path) -> _Found:
    # Files of Slicer 3 and 4.0 have no header and are in RAS; the order of the columns has never changed.
    frame, lines = "RAS", path.read_text(encoding="utf-8").splitlines()
    rows: dict[int, list[str]] = {}
    for number, line in enumerate(lines):
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            frame = _slicer_frame(value.strip()) if key.strip() == "CoordinateSystem" else frame
        elif line.strip():
            row = next(csv.reader([line]))
            if len(row) <= 14 or row[14] == FIDUCIAL_DEFINED:
                rows[number] = row

    def text() -> str:
        for number, row in rows.items():
            lines[number] = _csv_text([row]).removesuffix("\n")
        return "\n".join(lines) + "\n"

    names = [row[11] if len(row) > 11 else row[0] for row in rows.values()]
    return [(names, list(rows.values()), frame, None)], range(1, 4), text


def _slicer_frame(value: str | int) -> str:
    """The coordinate system that a file of Slicer names; older versions wrote a number."""
    return {"0": "RAS", "1": "LPS"}.get(str(value), str(value))


def _read_table(path: Path) -> _Found:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        raise InputError(f"{path} holds no landmark; place some, or choose another file.")
    titles = [] if _is_number(rows[0][0]) else [rows.pop(0)]
    header = [cell.strip().lower() for cell in titles[0]] if titles else ["x", "y", "z", "name"]
    axes = "xyz" if "x" in header else "ijk"
    if not set(axes) <= set(header):
        raise InputError(f"{path} has the columns {', '.join(header)}; name three of them x, y, z or i, j, k.")

    def column(*names: str) -> list[str | None]:
        """The cells of the first column with one of these names; None where there is none."""
        place = next((header.index(name) for name in names if name in header), sys.maxsize)
        return [row[place].strip() if len(row) > place else None for row in rows]

    names = [str(number) if name is None else name for number, name in enumerate(column("name", "label"), start=1)]
    tolerances = np.array([float(cell or "nan") for cell in column("tolerance", "tolerance_mm")])
    places = [header.index(axis) for axis in axes]
    return [(names, rows, None, tolerances)], places, lambda: _csv_text([*titles, *rows])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _csv_text(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


_READERS = {".mrk.json": _read_markups, ".fcsv": _read_fiducials, ".csv": _read_table}

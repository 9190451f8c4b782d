"""Files of points and surfaces with their positions mapped; everything else in them stays as it is."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry import landmarks
from GradProjIOLib.geometry.files import atomic_path, library_path
from GradProjIOLib.geometry.image_files import check_readable
from GradProjIOLib.geometry.lattice import apply_matrix

MESH_SUFFIXES = (".vtk", ".vtp", ".ply", ".stl")
SUFFIXES = (*landmarks.SUFFIXES, *MESH_SUFFIXES)
PointMap = Callable[[np.ndarray], np.ndarray]


def map_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    map_points: PointMap,
    frame: str | None = None,
    affine: np.ndarray | None = None,
) -> int:
    """Write the points or the surface in `source` to `target`, mapped by `map_points` ([n, 3] in RAS mm).

    Landmarks are those that `landmarks.read_landmarks` reads, and `frame` and `affine` mean the same. Surfaces (.vtk,
    .vtp, .ply, .stl) are in LPS mm unless the file says otherwise, as 3D Slicer writes them, or `frame` does; reading
    them takes the package vtk. Both files have the same suffix. Returns how many points were mapped. Raises
    InputError, and WriteError where the disk refuses.
    """
    source, target = Path(source), Path(target)
    check_readable(source, SUFFIXES)
    suffix = _suffix(source)
    if _suffix(target) != suffix:
        raise InputError(f"{source} has the suffix {suffix}, but {target} has not; give both the same one.")
    if suffix in MESH_SUFFIXES:
        return _map_mesh(source, target, map_points, frame, affine)
    write = {".mrk.json": _map_markups, ".fcsv": _map_fiducials, ".csv": _map_table}[suffix]
    try:
        # It refuses, in a sentence, what is no landmark file.
        if suffix != ".mrk.json":
            landmarks.read_landmarks(source, frame, affine)
        text, count = write(source, map_points, frame, affine)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source} cannot be read as landmarks ({error}); export it again.") from error
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    return count


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), path.suffix)


def _moved(
    points: list[list[float]], map_points: PointMap, frame: str | None, affine: np.ndarray | None, path: Path
) -> list[list[float]]:
    """Points of a frame, mapped, in the same frame."""
    to_mm = landmarks.frame_matrix(frame, affine, path)
    mapped = map_points(apply_matrix(to_mm, np.array(points, dtype=np.float64).reshape(-1, 3)))
    return apply_matrix(np.linalg.inv(to_mm), mapped).tolist()


def _map_markups(path: Path, map_points: PointMap, frame: str | None, affine: np.ndarray | None) -> tuple[str, int]:
    content = json.loads(path.read_text(encoding="utf-8"))
    count = 0
    for markup in content["markups"]:
        landmarks.check_unit(markup, path)
        points = [point for point in markup.get("controlPoints", []) if landmarks.is_placed(point)]
        own = landmarks.slicer_frame(markup.get("coordinateSystem", "LPS"))
        for point, position in zip(
            points, _moved([p["position"] for p in points], map_points, own, None, path), strict=True
        ):
            point["position"] = position
            count += 1
    return json.dumps(content, indent=4) + "\n", count


def _map_fiducials(path: Path, map_points: PointMap, frame: str | None, affine: np.ndarray | None) -> tuple[str, int]:
    frame, lines = "RAS", path.read_text(encoding="utf-8").splitlines()
    placed: dict[int, list[str]] = {}
    for number, line in enumerate(lines):
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            frame = landmarks.slicer_frame(value.strip()) if key.strip() == "CoordinateSystem" else frame
        elif line.strip() and landmarks.is_placed_row(row := next(csv.reader([line]))):
            placed[number] = row
    moved = _moved([[float(cell) for cell in row[1:4]] for row in placed.values()], map_points, frame, None, path)
    for (number, row), position in zip(placed.items(), moved, strict=True):
        lines[number] = _csv_line([row[0], *map(repr, position), *row[4:]])
    return "\n".join(lines) + "\n", len(placed)


def _map_table(path: Path, map_points: PointMap, frame: str | None, affine: np.ndarray | None) -> tuple[str, int]:
    rows, columns, _ = landmarks.read_rows(path)
    header = [] if landmarks.is_number(rows[0][columns[0]]) else [rows.pop(0)]
    moved = _moved([[float(row[column]) for column in columns] for row in rows], map_points, frame, affine, path)
    for row, position in zip(rows, moved, strict=True):
        for column, value in zip(columns, position, strict=True):
            row[column] = repr(value)
    return "".join(_csv_line(row) + "\n" for row in [*header, *rows]), len(rows)


def _csv_line(row: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(row)
    return text.getvalue()


def _map_mesh(source: Path, target: Path, map_points: PointMap, frame: str | None, affine: np.ndarray | None) -> int:
    vtk = _vtk()
    from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

    kind = {".vtk": "PolyData", ".vtp": "XMLPolyData", ".ply": "PLY", ".stl": "STL"}[_suffix(source)]
    reader = getattr(vtk, f"vtk{kind}Reader")()
    problems: list[str] = []
    reader.AddObserver("ErrorEvent", lambda *_: problems.append("error"))
    reader.SetFileName(library_path(source))
    reader.Update()
    surface = reader.GetOutput()
    if problems or surface is None or not surface.GetNumberOfPoints():
        raise InputError(f"{source} cannot be read as a surface with points; export it again as .vtk or .vtp.")
    with open(source, "rb") as file:
        said = re.search(rb"SPACE=(RAS|LPS)", file.read(2048))
    frame = said.group(1).decode() if said else (frame or "LPS")
    points = vtk_to_numpy(surface.GetPoints().GetData()).astype(np.float64)
    mapped = np.asarray(_moved(points.tolist(), map_points, frame, affine, source))
    surface.GetPoints().SetData(numpy_to_vtk(mapped, deep=True))
    # Normals belong to the surface as it was.
    for data in (surface.GetPointData(), surface.GetCellData()):
        data.RemoveArray("Normals")
    note = f"3D Slicer output. SPACE={frame}"
    writer = getattr(vtk, f"vtk{kind}Writer")()
    if kind in ("PolyData", "STL"):
        writer.SetHeader(note)
    elif kind == "PLY":
        writer.AddComment(note)
    if kind in ("PLY", "STL"):
        writer.SetFileTypeToBinary()
    writer.SetInputData(surface)
    with atomic_path(target) as temporary:
        writer.SetFileName(library_path(temporary))
        if not writer.Write():
            raise OSError("vtk could not write it")
    return len(mapped)


def _vtk() -> Any:
    try:
        import vtk
    except ImportError as error:
        raise InputError("Surfaces need the package vtk; install it (pip install vtk).") from error
    return vtk

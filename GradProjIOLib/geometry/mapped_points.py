"""Files of points and surfaces with their positions mapped; everything else in them stays as it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

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
    # This refuses, in a sentence, what is no landmark file; one of Slicer's may hold several point lists, or none.
    if suffix != ".mrk.json":
        landmarks.read_landmarks(source, frame, affine)
    lists, text = landmarks.read_point_lists(source, frame, affine)
    moved = [map_points(one.points) for one in lists]
    with atomic_path(target) as temporary:
        temporary.write_text(text(moved), encoding="utf-8", newline="")
    return sum(map(len, moved))


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), path.suffix)


def _map_mesh(source: Path, target: Path, map_points: PointMap, frame: str | None, affine: np.ndarray | None) -> int:
    try:
        import vtk
        from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    except ImportError as error:
        raise InputError("Surfaces need the package vtk; install it (pip install vtk).") from error

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
    to_mm = landmarks.frame_matrix(frame, affine, source)
    points = vtk_to_numpy(surface.GetPoints().GetData()).astype(np.float64)
    mapped = apply_matrix(np.linalg.inv(to_mm), map_points(apply_matrix(to_mm, points)))
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

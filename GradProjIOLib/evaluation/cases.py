"""Measure one result, or a table of them, against labels, landmarks and masks in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import metrics, tables
from GradProjIOLib.geometry.files import checksum
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.geometry.landmarks import Landmarks, read_landmarks
from GradProjIOLib.geometry.tables import read_table
from GradProjIOLib.geometry.transform_files import TRANSFORM_OF_RESULT
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation

INPUTS = ("fixed_labels", "moving_labels", "fixed_points", "moving_points", "mask")
"""The files that a result is measured with."""
REPORT = "report.json"


@dataclass(frozen=True)
class Case:
    """A result (a folder of `gradprojio register`, or a transform file) and what to measure it with.

    `points_frame` ("LPS", "RAS" or "voxels") is for landmarks in .csv files. `group` is the method or
    setting: groups are compared with each other case by case.
    """

    result: Path
    case: str = ""
    group: str = ""
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_points: Path | None = None
    moving_points: Path | None = None
    points_frame: str | None = None
    mask: Path | None = None


def measure(case: Case, structures: Sequence[int] | None = None) -> tables.Row:
    """The row of `case` (see `tables`). Raises InputError where something cannot be read or does not fit."""
    paths = _both(case.fixed_labels, case.moving_labels, "labels")
    labels = (read_labels(paths[0]), read_labels(paths[1])) if paths else None
    deformation, reference = read_result(case.result, labels[0] if labels else None)
    points = None
    if paths := _both(case.fixed_points, case.moving_points, "points"):
        # Voxel indices are those of the fixed image and of the moving labels or image.
        moving_affine = labels[1].affine if labels else None
        if case.points_frame == "voxels" and moving_affine is None:
            moving_affine = _moving_affine(case.result)
        points = (
            read_landmarks(paths[0], case.points_frame, reference.affine),
            read_landmarks(paths[1], case.points_frame, moving_affine),
        )
    mask = read_labels(case.mask) if case.mask else None
    row: tables.Row = {"case": case.case or case.result.name, "group": case.group, "result": str(case.result)}
    return row | measure_result(deformation, reference, labels, points, mask, structures)


def measure_result(
    deformation: Deformation,
    reference: Volume,
    labels: tuple[Volume, Volume] | None = None,
    points: tuple[Landmarks, Landmarks] | None = None,
    mask: Volume | None = None,
    structures: Sequence[int] | None = None,
) -> tables.Row:
    """The measured columns of a row: with fixed and moving labels and landmarks where given, and folding on the
    lattice of `reference`. Raises InputError."""
    row: tables.Row = {}
    if labels is not None:
        row |= metrics.evaluate_labels(deformation, *labels, structures)
    if points is not None:
        row |= metrics.evaluate_landmarks(deformation, *points)
    return row | metrics.evaluate_folding(deformation, reference, mask)


def read_result(path: Path, fixed_labels: Volume | None = None) -> tuple[Deformation, Volume]:
    """The deformation of a result and an image on the fixed image's lattice.

    `path` is a folder that `gradprojio register` wrote, or any transform or displacement file; of the latter
    the fixed labels give the lattice, without them its own. Raises InputError.
    """
    if path.is_dir():
        if not (path / TRANSFORM_OF_RESULT).exists():
            raise InputError(f"{path} holds no {TRANSFORM_OF_RESULT}; choose a result of `gradprojio register`.")
        return Deformation.read(path), read_volume(path / "warped.nii.gz")
    if fixed_labels is not None:
        return Deformation.read(path, fixed_labels.shape, fixed_labels.affine), fixed_labels
    deformation = Deformation.read(path)
    if deformation.is_linear:
        raise InputError(f"{path} is linear, which says nothing about where to measure it; give the fixed labels, too.")
    return deformation, Volume(deformation.displacement[..., 0], deformation.affine, str(path))


def read_cases(path: Path, defaults: Case) -> list[Case]:
    """The cases of a table with a header: the fields of `Case` as columns, `result` required.

    Paths are relative to the table's folder; an empty cell takes what `defaults` has, but for the case, which is then
    the name of the result. Raises InputError for a table that cannot be used, and repeated cases.
    """
    rows = read_table(path, [field.name for field in fields(Case)], ["result"])
    cases = {}
    for number, row in rows.items():
        if not row["result"]:
            raise InputError(f"{path}, line {number}: fill result.")
        values: dict[str, Any] = {"case": Path(row["result"]).name}
        values |= {key: path.parent / cell if key in (*INPUTS, "result") else cell for key, cell in row.items() if cell}
        case = replace(defaults, **values)
        if (case.case, case.group) in cases:
            raise InputError(
                f"{path} has the case {case.case} twice in the same group; name the cases, or the groups, differently."
            )
        cases[case.case, case.group] = case
    return list(cases.values())


def measure_all(
    cases: Sequence[Case], structures: Sequence[int] | None = None, on_problem: Callable[[str], None] = print
) -> tuple[list[tables.Row], list[dict[str, str]]]:
    """The rows of all cases that can be measured, and the failed ones; one does not stop the rest.

    `on_problem` is called with a line for each that fails, and for each measured with what guided it.
    """
    rows, failed = [], []
    for case in cases:
        try:
            rows.append(measure(case, structures))
            if note := guidance_note(case):
                on_problem(f"{case.case}: {note}")
        except InputError as error:
            failed.append({"case": case.case, "group": case.group, "message": str(error)})
            on_problem(f"{case.case}: {error}")
    return rows, failed


def guidance_note(case: Case) -> str | None:
    """A sentence where a case is measured with files that guided its registration; None where it is not.

    The files are compared with those in the result's report.json by their checksums.
    """
    report = _report(case.result)
    guides = [str(path) for role in INPUTS if (path := getattr(case, role)) and _guided(report, role, path)]
    if not guides:
        return None
    names = [one["name"] for key in ("landmarks", "labels") for one in report.get(key) or ()]
    return (
        f"{' and '.join(guides)} guided this registration, so what is measured with {', '.join(names)} tells how far "
        "it followed, not how good it is."
    )


def _guided(report: dict[str, Any], role: str, path: Path) -> bool:
    key = {"labels": "labels", "points": "landmarks"}.get(role.partition("_")[2])
    return bool(key and report.get(key)) and report["inputs"].get(role, {}).get("sha256") == checksum(path)


def _both(fixed: Path | None, moving: Path | None, what: str) -> tuple[Path, Path] | None:
    """Both files, or None where there are none. Raises InputError where there is only one."""
    if (fixed is None) != (moving is None):
        missing = "fixed" if fixed is None else "moving"
        raise InputError(f"Of the {what} only one side is given; give the {missing} {what}, too.")
    return (fixed, moving) if fixed and moving else None


def _moving_affine(result: Path) -> np.ndarray | None:
    """The affine of the moving image that the report of a result names, if it is still there."""
    try:
        return read_volume(_report(result)["inputs"]["moving"]["path"]).affine
    except (KeyError, TypeError, InputError):
        return None


def read_report(folder: Path) -> dict[str, Any]:
    """The report in a folder of results; empty where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _report(result: Path) -> dict[str, Any]:
    """The report of a result, which lies beside a transform."""
    return read_report(result if result.is_dir() else result.parent)

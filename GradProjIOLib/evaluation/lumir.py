"""The LUMIR task of the Learn2Reg challenge: its folder, displacement fields, submission and metrics.

Everything in this file that is an array [i, j, k] has the axes of LUMIR's files, first index first, as
`scipy.ndimage.map_coordinates` uses them. The definitions are those of the challenge's public evaluation
(github.com/JHU-MedImage-Reg/LUMIR_L2R, folder L2R_LUMIR_Eval); three of them are not what one would expect:
the background (label 0) counts as a structure, a landmark is the center of a nearest-neighbor-warped label,
and folding is counted where the *moving* image is above 0, without the outermost layer of voxels.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import metrics, tables
from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.geometry.image_files import check_readable, read_labels, read_volume
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_points
from GradProjIOLib.geometry.pairs import Pair
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation

DATASET_FILE = "LUMIR_dataset.json"


def displacement_file(pair: Pair) -> str:
    """The file name that the challenge expects for the field of a pair."""
    return f"disp_{pair.case}.nii.gz"


def companions(pair: Pair, kind: str) -> tuple[Path, Path] | None:
    """Both subjects' files in the folder that has `kind` ("labels", "landmarks") in place of "images".

    None where they are not there: the challenge keeps those of its validation set to itself.
    """
    fixed, moving = (
        path.parent.parent / path.parent.name.replace("images", kind) / path.name for path in (pair.fixed, pair.moving)
    )
    return (fixed, moving) if fixed.exists() and moving.exists() else None


def validation_pairs(folder: Path, settings: Settings | None = None) -> list[Pair]:
    """The validation pairs that LUMIR_dataset.json in `folder` lists, to be registered with `settings`.

    A pair's case is FIXED_MOVING, the subjects' numbers. Raises InputError.
    """
    path = folder / DATASET_FILE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["validation"]
        images = [(folder / entry["fixed"], folder / entry["moving"]) for entry in listed]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; choose the folder of the LUMIR data.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not list validation pairs ({error}); download it again.") from error
    if not images:
        raise InputError(f"{path} lists no validation pair; download it again.")
    return [
        Pair(f"{_subject(fixed)}_{_subject(moving)}", fixed, moving, settings or Settings()) for fixed, moving in images
    ]


def voxel_displacement(deformation: Deformation, fixed: Volume, moving: Volume) -> np.ndarray:
    """What to add to an index of `fixed` to get the corresponding one of `moving`: float32 [i, j, k, 3]."""
    index_of = np.linalg.inv(moving.affine)
    points = deformation.map_points(lattice_points(fixed.shape, fixed.affine))
    shift = apply_matrix(index_of, points) - lattice_points(fixed.shape, np.eye(4))
    return np.ascontiguousarray(shift.transpose(2, 1, 0, 3), dtype=np.float32)


def write_displacement(field: np.ndarray, affine: np.ndarray, path: str | os.PathLike) -> None:
    """Write `field` [i, j, k, 3] as a 4-D NIfTI file with `affine` (index → RAS mm). Raises WriteError."""
    import nibabel

    with atomic_path(path) as temporary:
        nibabel.save(nibabel.Nifti1Image(field, affine), temporary)


def read_displacement(path: str | os.PathLike) -> np.ndarray:
    """The displacement field in a submission's file as [i, j, k, 3]; [3, i, j, k] is accepted, as by LUMIR.

    Raises InputError where it is no such field.
    """
    import nibabel

    check_readable(Path(path), (".nii.gz",))
    try:
        field = np.asanyarray(nibabel.Nifti1Image.from_filename(path).dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path} cannot be read ({error}); write it again.") from error
    if field.ndim != 4 or 3 not in (field.shape[0], field.shape[3]):
        raise InputError(f"{path} has the shape {field.shape}; LUMIR wants [X, Y, Z, 3], single numbers.")
    return field if field.shape[3] == 3 else np.moveaxis(field, 0, -1)


def write_submission(files: Sequence[Path], path: Path) -> None:
    """Pack displacement files into the zip file `path`, in one folder of its name, whole or not at all."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, f"{path.stem}/{file.name}")


def unpack_submission(path: Path, folder: Path) -> None:
    """Unpack the displacement files of the submission `path` into `folder`, without the folders inside it.

    Raises InputError where it is no zip file or has a file twice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".nii.gz")]
            names = [Path(member.filename).name for member in members]
            if len(set(names)) != len(names):
                raise InputError(f"{path} holds {max(names, key=names.count)} more than once.")
            for member, name in zip(members, names, strict=True):
                (folder / name).write_bytes(archive.read(member))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a zip file ({error}); write it again.") from error


def measure_pair(pair: Pair, field: np.ndarray, structures: Sequence[int] | None = None) -> tables.Row:
    """The challenge's metrics for the displacement `field` [i, j, k, 3] of one pair, as a row (see `tables`).

    Dice and HD95, and TRE, only where labels and landmarks are there. `structures` are label values; without
    them all that occur, and 0. Raises InputError where the field is unusable or does not fit the images.
    """
    moving = read_volume(pair.moving).array.T
    shape = read_volume(pair.fixed).shape[::-1]
    if field.shape[:3] != shape:
        raise InputError(f"{displacement_file(pair)} has the shape {field.shape}; LUMIR wants {(*shape, 3)}.")
    if field.dtype != np.float32 or not np.isfinite(field).all():
        raise InputError(
            f"{displacement_file(pair)} has {field.dtype} values, or some that are not finite; "
            "LUMIR wants finite float32 ones."
        )
    row: tables.Row = {"case": pair.case, "group": ""}
    if files := companions(pair, "labels"):
        row |= _measure_labels(files, field, structures)
    if files := companions(pair, "landmarks"):
        row |= _measure_landmarks(files, field)
    return row | _measure_folding(moving, field)


def check_submission(
    path: Path,
    folder: Path,
    structures: Sequence[int] | None = None,
    on_problem: Callable[[str], None] = print,
) -> tuple[list[tables.Row], list[dict[str, str]]]:
    """Measure every validation pair of the LUMIR `folder` on the submission `path`: rows, and what failed.

    `path` is the zip file or the folder of displacement files. `on_problem` is called with a line for each failure.
    """
    pairs = validation_pairs(folder)
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as unpacked:
        if path.is_file():
            unpack_submission(path, Path(unpacked))
        source = Path(unpacked) if path.is_file() else path
        for pair in pairs:
            try:
                rows.append(measure_pair(pair, read_displacement(source / displacement_file(pair)), structures))
            except InputError as error:
                failed.append({"case": pair.case, "group": "", "message": str(error)})
                on_problem(f"{pair.case}: {error}")
        expected = {displacement_file(pair) for pair in pairs}
        for extra in sorted({file.name for file in source.glob("*.nii.gz")} - expected):
            failed.append({"case": extra, "group": "", "message": "is of no validation pair"})
            on_problem(f"{extra}: is of no validation pair; remove it.")
    return rows, failed


def warp_labels(labels: np.ndarray, field: np.ndarray) -> np.ndarray:
    """`labels` [i, j, k] at the index plus `field`, nearest neighbor, 0 outside: the challenge's warp."""
    indices = np.indices(field.shape[:3]) + np.moveaxis(field.astype(np.float64), -1, 0)
    return ndimage.map_coordinates(labels, indices, order=0)


def _measure_labels(files: tuple[Path, Path], field: np.ndarray, structures: Sequence[int] | None) -> tables.Row:
    """Every voxel counts as 1 mm, as LUMIR's are."""
    fixed, moving = (read_labels(path).array.T for path in files)
    if structures is None:
        structures = np.union1d(fixed, moving).tolist()
    warped = warp_labels(moving, field)
    overlaps = metrics.label_overlap(fixed, warped, (1, 1, 1), structures, moving)
    undeformed = warp_labels(moving, np.zeros_like(field))
    before = np.nanmean(metrics.dice_of(fixed, undeformed, structures))
    return metrics.label_columns(overlaps, float(before))


def _measure_landmarks(files: tuple[Path, Path], field: np.ndarray) -> tables.Row:
    """The distance of the centers of every landmark's voxels. One that the warp has lost leaves no TRE."""
    fixed, moving = (read_labels(path).array.T for path in files)
    names = np.unique(fixed)[1:].tolist()
    centers = metrics.label_centers(fixed, names)
    before, after = (
        np.linalg.norm(metrics.label_centers(marks, names) - centers, axis=1)
        for marks in (moving, warp_labels(moving, field))
    )
    return metrics.landmark_columns(names, before, after)


def _measure_folding(moving: np.ndarray, field: np.ndarray) -> tables.Row:
    displacement = torch.from_numpy(np.moveaxis(field, -1, 0).astype(np.float64))
    inner = (slice(1, -1),) * 3
    region = moving[inner] > 0
    if not region.any():
        raise InputError("The moving image has no voxel above 0, where LUMIR counts folding.")
    volume = jacobian.non_diffeomorphic_volume(displacement).numpy()[inner][region]
    determinant = jacobian.jacobian_determinant(displacement).numpy()[inner][region]
    return {
        "ndv_percent": float(100 * volume.sum() / volume.size),
        "folded_voxels": int((determinant <= 0).sum()),
        "std_log_jacobian": jacobian.summary(determinant)["std_log"],
    }


def _subject(path: Path) -> str:
    """3455 of LUMIRMRI_3455_0000.nii.gz."""
    parts = path.name.split("_")
    if len(parts) != 3 or not path.name.endswith(".nii.gz"):
        raise InputError(f"{path.name} is not named like LUMIR's images, LUMIRMRI_SUBJECT_0000.nii.gz.")
    return parts[1]

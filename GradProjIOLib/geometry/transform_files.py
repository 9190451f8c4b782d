"""ITK's transform files and displacement images, read into and written from RAS mm.

A file maps the fixed image's points to the moving image's, the direction in which ITK, ANTs and 3D Slicer use
it to resample the moving image.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import atomic_path, library_path, write_error
from GradProjIOLib.geometry.image_files import WRITTEN_SUFFIXES as IMAGE_SUFFIXES
from GradProjIOLib.geometry.image_files import check_readable, read_sitk, write_sitk
from GradProjIOLib.geometry.lattice import RAS_TO_LPS, affine_of, apply_matrix, lattice_points
from GradProjIOLib.geometry.volume import lattice_of, sitk_image

if TYPE_CHECKING:
    import SimpleITK

HDF5_SUFFIXES = (".h5", ".hdf5")
WRITTEN_SUFFIXES = (*HDF5_SUFFIXES, ".tfm", ".txt")
TRANSFORM_OF_RESULT = "transform.h5"
READ_SUFFIXES = (*WRITTEN_SUFFIXES, ".mat", ".xfm", *IMAGE_SUFFIXES)
RAS_TO_LPS_VECTOR = np.array([-1, -1, 1], dtype=np.float32)


def transform_in(path: str | os.PathLike) -> Path:
    """The file of a transform: the path itself, or transform.h5 in it, where it is the folder of a result."""
    inside = Path(path) / TRANSFORM_OF_RESULT
    return inside if inside.is_file() else Path(path)


def linear_from_sitk(transform: SimpleITK.Transform) -> np.ndarray:
    """The 4x4 matrix (RAS mm) of a linear SimpleITK transform (LPS mm), also of a composite of such."""
    corners = np.vstack([np.zeros(3), np.eye(3)])
    images = np.array([transform.TransformPoint(point) for point in corners.tolist()])
    return RAS_TO_LPS @ affine_of((images[1:] - images[0]).T, images[0]) @ RAS_TO_LPS


def read_transform(
    path: str | os.PathLike, shape: tuple[int, int, int] | None = None, affine: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map x → matrix·(x + u(x)) in `path`: u [k, j, i, 3] (RAS mm), the affine (4x4) of its lattice, the matrix.

    The folder of a result stands for its transform.h5.
    `matrix` (4x4) is the product of all linear parts of the transform; u is what the other parts add. A linear
    transform has u = 0. One with a single displacement field keeps that field's lattice. Others (B-splines, several
    fields) are sampled on the lattice `shape` (K, J, I), `affine`. Raises InputError where the
    file is missing, unreadable, or holds something else, or where such a lattice is missing. What is undefined in a
    field is left as it is: NaN, or as large as 3.4e38.
    """
    import SimpleITK as sitk

    path = transform_in(path)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return *_read_field_image(path), np.eye(4)
    transform = _read_transform(path)
    parts = _parts(transform)
    matrix = _product(part for part in parts if part.IsLinear())
    bending = [number for number, part in enumerate(parts) if not part.IsLinear()]
    if not bending:
        return np.zeros((2, 2, 2, 3), np.float32), np.eye(4), matrix
    if len(bending) == 1 and parts[bending[0]].GetName() == "DisplacementFieldTransform":
        return *_single_field(parts, bending[0]), matrix
    if shape is None or affine is None:
        raise InputError(
            f"{path} holds a {transform.GetName()}, which needs an image that says where to sample it; "
            "give the fixed image, too."
        )
    to_field = sitk.TransformToDisplacementFieldFilter()
    to_field.SetReferenceImage(sitk_image(np.zeros(shape, np.uint8), affine))
    to_field.SetOutputPixelType(sitk.sitkVectorFloat64)
    undone = sitk_from_linear(np.linalg.inv(matrix))
    return *_from_sitk(to_field.Execute(sitk.CompositeTransform([undone, transform]))), matrix


def write_transform(displacement: np.ndarray, affine: np.ndarray, matrix: np.ndarray, path: str | os.PathLike) -> None:
    """Write the map x → matrix·(x + u(x)), with u = `displacement` [k, j, i, 3] (RAS mm), whole or not at all.

    The suffix chooses an ITK transform (.h5, .tfm) or an image of the whole displacement (.nii.gz, .nrrd, .mha …).
    The transform is composite (the affine, and the displacement field before it) unless `matrix` is the identity or
    u is zero. Raises WriteError.
    """
    import SimpleITK as sitk

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITTEN_SUFFIXES:
        linear_part = lattice_points(displacement.shape[:3], (matrix - np.eye(4)) @ affine)
        whole = (displacement @ matrix[:3, :3].T + linear_part).astype(np.float32)
        return write_sitk(sitk_image(whole * RAS_TO_LPS_VECTOR, affine), path)
    parts: list[SimpleITK.Transform] = []
    if not np.array_equal(matrix, np.eye(4)):
        parts.append(sitk_from_linear(matrix))
    if displacement.any() or not parts:
        field = sitk_image(displacement * RAS_TO_LPS_VECTOR, affine)
        parts.append(sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64)))
    transform = parts[0] if len(parts) == 1 else sitk.CompositeTransform(parts)
    bytes_per_number = 8 if suffix in HDF5_SUFFIXES else 25
    with atomic_path(path) as temporary:
        # On a full disk ITK's text writer says nothing and HDF5 brings the process down when it ends.
        _require_space(temporary, 65536 + bytes_per_number * displacement.size)
        try:
            sitk.WriteTransform(transform, library_path(temporary))
        except RuntimeError as error:
            raise write_error(path, error) from error
    return None


def sitk_from_linear(matrix: np.ndarray, center: np.ndarray | None = None, rigid: bool = False) -> SimpleITK.Transform:
    """The SimpleITK transform (LPS mm) of the map `matrix` (4x4, RAS mm), whose parameters refer to `center` (RAS mm).

    The center is the origin unless given. rigid: whether it is an Euler3DTransform rather than an AffineTransform.
    """
    import SimpleITK as sitk

    lps = RAS_TO_LPS @ matrix @ RAS_TO_LPS
    middle = apply_matrix(RAS_TO_LPS, np.zeros(3) if center is None else center)
    transform = sitk.Euler3DTransform() if rigid else sitk.AffineTransform(3)
    transform.SetCenter(middle.tolist())
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation((apply_matrix(lps, middle) - middle).tolist())
    return transform


def _parts(transform: SimpleITK.Transform) -> list[SimpleITK.Transform]:
    """The transforms that a composite applies one after the other, the last one first; else the transform itself."""
    import SimpleITK as sitk

    if transform.GetName() != "CompositeTransform":
        return [transform]
    composite = sitk.CompositeTransform(transform)
    composite.FlattenTransform()
    return [composite.GetNthTransform(number).Downcast() for number in range(composite.GetNumberOfTransforms())]


def _product(parts: Iterable[SimpleITK.Transform]) -> np.ndarray:
    """The 4x4 matrix (RAS mm) of linear transforms, of which the last one is applied first."""
    return functools.reduce(np.matmul, (linear_from_sitk(part) for part in parts), np.eye(4))


def _single_field(parts: list[SimpleITK.Transform], number: int) -> tuple[np.ndarray, np.ndarray]:
    """u and the affine of its lattice such that x + u(x), and then all linear parts, is the whole map.

    For the linear map L that is applied before a field v, L·x + v(L·x) = L·(x + u(x)) with u(x) = L⁻¹·v(L·x).
    """
    import SimpleITK as sitk

    displacement, affine = _from_sitk(sitk.DisplacementFieldTransform(parts[number]).GetDisplacementField())
    if number == len(parts) - 1:
        return displacement, affine
    undone = np.linalg.inv(_product(parts[number + 1 :]))
    with np.errstate(over="ignore", invalid="ignore"):
        return (displacement @ undone[:3, :3].T).astype(np.float32), undone @ affine


def _read_transform(path: Path) -> SimpleITK.Transform:
    import SimpleITK as sitk

    check_readable(path, READ_SUFFIXES)
    if path.suffix.lower() in HDF5_SUFFIXES and not _is_hdf5(path):
        raise _unreadable(path)
    try:
        transform = sitk.ReadTransform(library_path(path))
    except RuntimeError as error:
        raise _unreadable(path) from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path} is a {transform.GetDimension()}-D transform; choose a 3-D one.")
    return transform


def _is_hdf5(path: Path) -> bool:
    """Whether the file starts as HDF5 does. Its library prints pages of errors where it does not."""
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def _read_field_image(path: Path) -> tuple[np.ndarray, np.ndarray]:
    def accept(reader: SimpleITK.ImageFileReader) -> None:
        if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 3:
            raise InputError(
                f"{path} is not a displacement image; choose a 3-D image with three components per voxel (mm)."
            )

    image, not_finite, _ = read_sitk(path, accept)
    displacement, affine = _from_sitk(image)
    if not_finite is not None:
        displacement[not_finite.reshape(3, *displacement.shape[:3]).any(axis=0)] = np.nan
    return displacement, affine


def _from_sitk(field: SimpleITK.Image) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    # ANTs marks what is undefined by the largest number there is.
    with np.errstate(over="ignore"):
        return sitk.GetArrayFromImage(field).astype(np.float32) * RAS_TO_LPS_VECTOR, lattice_of(field)


def _require_space(path: Path, size: int) -> None:
    """Raise OSError where a file of `size` bytes cannot be written at `path`."""
    block = bytes(1 << 16)
    with open(path, "wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)
    path.unlink()


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path} cannot be read as an ITK transform; export it again, as .h5 or .tfm.")

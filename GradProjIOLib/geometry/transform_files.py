"""ITK's transform files and displacement images, read into and written from RAS mm.

A file maps the fixed image's points to the moving image's, the direction in which ITK, ANTs and 3D Slicer use
it to resample the moving image.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import atomic_path, write_error
from GradProjIOLib.geometry.image_files import WRITTEN_SUFFIXES as IMAGE_SUFFIXES
from GradProjIOLib.geometry.image_files import check_readable, read_sitk, write_sitk
from GradProjIOLib.geometry.lattice import RAS_TO_LPS
from GradProjIOLib.geometry.volume import lattice_of, set_lattice

if TYPE_CHECKING:
    import SimpleITK

HDF5_SUFFIXES = (".h5", ".hdf5")
WRITTEN_SUFFIXES = (*HDF5_SUFFIXES, ".tfm", ".txt")
READ_SUFFIXES = (*WRITTEN_SUFFIXES, ".mat", ".xfm", *IMAGE_SUFFIXES)
RAS_TO_LPS_VECTOR = np.array([-1, -1, 1], dtype=np.float32)


def read_linear(path: str | os.PathLike) -> np.ndarray | None:
    """The 4x4 matrix (RAS mm, fixed → moving) of the linear ITK transform in `path`, None for any other one.

    Raises InputError where the file is missing or is no ITK transform.
    """
    path = Path(path)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return None
    transform = _read_transform(path)
    return linear_from_sitk(transform) if transform.IsLinear() else None


def linear_from_sitk(transform: SimpleITK.Transform) -> np.ndarray:
    """The 4x4 matrix (RAS mm) of a linear SimpleITK transform (LPS mm), also of a composite of such."""
    corners = np.vstack([np.zeros(3), np.eye(3)])
    images = np.array([transform.TransformPoint(point) for point in corners.tolist()])
    matrix = np.eye(4)
    matrix[:3, :3] = (images[1:] - images[0]).T
    matrix[:3, 3] = images[0]
    return RAS_TO_LPS @ matrix @ RAS_TO_LPS


def read_field(
    path: str | os.PathLike, shape: tuple[int, int, int] | None = None, affine: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The displacement [k, j, i, 3] (RAS mm) in `path` and the affine (4x4) of its lattice.

    One displacement field, as an ITK transform or as an image, comes on its own lattice. Any other ITK
    transform (linear, B-spline, composite) is sampled on the lattice `shape` (K, J, I), `affine`. Raises
    InputError where the file is missing, unreadable, or holds something else.
    """
    import SimpleITK as sitk

    path = Path(path)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return _from_sitk(_read_field_image(path), path)
    transform = _read_transform(path)
    if transform.GetName() == "DisplacementFieldTransform":
        return _from_sitk(sitk.DisplacementFieldTransform(transform).GetDisplacementField(), path)
    if shape is None or affine is None:
        raise InputError(
            f"{path} holds a {transform.GetName()}, which needs an image that says where to sample it; "
            "give the fixed image, too."
        )
    return _from_sitk(_sampled(transform, shape, affine), path)


def write_field(displacement: np.ndarray, affine: np.ndarray, path: str | os.PathLike) -> None:
    """Write `displacement` [k, j, i, 3] (RAS mm) on the lattice `affine` (4x4), whole or not at all.

    The suffix chooses an ITK transform (.h5, .tfm) or a displacement image (.nii.gz, .nrrd, .mha …). Raises
    WriteError.
    """
    import SimpleITK as sitk

    path = Path(path)
    suffix = path.suffix.lower()
    image = sitk.GetImageFromArray(displacement * RAS_TO_LPS_VECTOR, isVector=True)
    set_lattice(image, affine)
    if suffix not in WRITTEN_SUFFIXES:
        return write_sitk(image, path)
    transform = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    bytes_per_number = 8 if suffix in HDF5_SUFFIXES else 25
    with atomic_path(path) as temporary:
        # On a full disk ITK's text writer says nothing and HDF5 brings the process down when it ends.
        _require_space(temporary, 65536 + bytes_per_number * transform.GetNumberOfParameters())
        try:
            sitk.WriteTransform(transform, str(temporary))
        except RuntimeError as error:
            raise write_error(path, error) from error


def _read_transform(path: Path) -> SimpleITK.Transform:
    import SimpleITK as sitk

    check_readable(path, READ_SUFFIXES)
    if path.suffix.lower() in HDF5_SUFFIXES and not _is_hdf5(path):
        raise _unreadable(path)
    try:
        transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise _unreadable(path) from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path} is a {transform.GetDimension()}-D transform; choose a 3-D one.")
    return transform


def _is_hdf5(path: Path) -> bool:
    """Whether the file starts as HDF5 does. Its library prints pages of errors where it does not."""
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def _read_field_image(path: Path) -> SimpleITK.Image:
    def accept(reader: SimpleITK.ImageFileReader) -> None:
        if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 3:
            raise InputError(
                f"{path} is not a displacement image; choose a 3-D image with three components per voxel (mm)."
            )

    return read_sitk(path, accept)


def _from_sitk(field: SimpleITK.Image, path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    displacement = sitk.GetArrayFromImage(field).astype(np.float32)
    if not np.isfinite(displacement).all():
        raise InputError(f"{path} has NaN or infinity among its displacements; compute it again.")
    return displacement * RAS_TO_LPS_VECTOR, lattice_of(field)


def _sampled(transform: SimpleITK.Transform, shape: tuple[int, int, int], affine: np.ndarray) -> SimpleITK.Image:
    """The displacement of any transform on a lattice, as a vector image."""
    import SimpleITK as sitk

    lattice = sitk.Image([int(n) for n in shape[::-1]], sitk.sitkUInt8)
    set_lattice(lattice, affine)
    to_field = sitk.TransformToDisplacementFieldFilter()
    to_field.SetReferenceImage(lattice)
    to_field.SetOutputPixelType(sitk.sitkVectorFloat64)
    return to_field.Execute(transform)


def _require_space(path: Path, size: int) -> None:
    """Raise OSError where a file of `size` bytes cannot be written at `path`."""
    block = bytes(1 << 16)
    with open(path, "wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)
    path.unlink()


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path} cannot be read as an ITK transform; export it again, as .h5 or .tfm.")

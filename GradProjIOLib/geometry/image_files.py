"""Images in NIfTI, NRRD and MetaImage files: reading with validation, writing whole or not at all."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import SimpleITK
from GradProjIOLib.errors import InputError, WriteError
from GradProjIOLib.geometry.files import atomic_path, write_error
from GradProjIOLib.geometry.lattice import _badly_placed, is_rectangular
from GradProjIOLib.geometry.volume import Volume, _check_kind, _refuse_not_finite, from_sitk, lattice_of, to_sitk

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


# Size of the header → type and place of the axes' lengths, the bits per voxel and the start of the data.
NIFTI_FIELDS = {348: (("8h", 40), ("h", 72), ("f", 108)), 540: (("8q", 16), ("h", 14), ("q", 168))}


NIFTI_FLOATS = {16: np.float32, 64: np.float64}


def read_volume(path: str | os.PathLike) -> Volume:
    """The 3-D image in the NIfTI, NRRD or MetaImage file `path`, with the pixel type of the file.

    Raises InputError for a missing, unreadable or truncated file, an unsupported format, and images that are
    not scalar and 3-D (a 4-D file with one frame is accepted).
    """
    import SimpleITK as sitk

    path = Path(path)
    check_readable(path)
    _check_nifti_values(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        pixel_type = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        _check_kind(reader.GetSize(), reader.GetNumberOfComponents(), pixel_type, str(path))
        image = reader.Execute()
    except RuntimeError as error:
        if "orthonormal" in str(error) or "Bad direction" in str(error):
            raise _badly_placed(str(path)) from error
        raise InputError(
            f"{path} cannot be read as an image; check that it is complete, or export it again as .nii.gz or .nrrd."
        ) from error
    return from_sitk(image, str(path))


def read_labels(path: str | os.PathLike) -> Volume:
    """The label map in the file `path`, as whole numbers. Raises InputError where it holds anything else."""
    labels = read_volume(path)
    if labels.array.dtype.kind in "ui":
        return labels
    whole = np.rint(labels.array)
    if not np.isfinite(labels.array).all() or np.abs(labels.array - whole).max() > 1e-3:
        raise InputError(f"{path} is not a label map: its values are not all whole numbers.")
    return Volume(whole.astype(np.int32), labels.affine, labels.name)


def write_volume(volume: Volume, path: str | os.PathLike) -> None:
    """Write `volume` to `path`, whole or not at all; the suffix chooses the format (see IMAGE_SUFFIXES).

    Raises WriteError where the file cannot be written.
    """
    write_sitk(to_sitk(volume), path)


def write_sitk(image: SimpleITK.Image, path: str | os.PathLike) -> None:
    """Write a SimpleITK image to `path`, compressed, whole or not at all. Raises WriteError."""
    import SimpleITK as sitk

    path = Path(path)
    if not path.name.lower().endswith(IMAGE_SUFFIXES):
        raise WriteError(f"{path} cannot be written: use one of the suffixes {', '.join(IMAGE_SUFFIXES)}.")
    if ".nii" in path.name.lower()[-7:] and not is_rectangular(lattice_of(image)):
        raise WriteError(f"{path} cannot be written: its axes are not at right angles, use .nrrd or .mha.")
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise write_error(path, error) from error
        # ITK's NIfTI writer says nothing when the disk is full.
        if not is_complete(temporary):
            raise write_error(path, OSError("the disk is full or the file is too large"))


def check_readable(path: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
    """Raise InputError where the file is missing, has an unsupported suffix, or is truncated."""
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")
    if not path.is_file():
        raise InputError(f"{path} is a folder; choose a file ({', '.join(suffixes)}).")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; check its permissions.")
    if not path.name.lower().endswith(suffixes):
        raise InputError(f"{path} has an unsupported format; convert it to one of {', '.join(suffixes)}.")
    if path.stat().st_size == 0 or not is_complete(path):
        raise InputError(f"{path} is incomplete or damaged; copy or export it again.")


def is_complete(path: Path) -> bool:
    """Whether a NIfTI file holds all the data its header promises (ITK reads the missing part as zeros).

    Other formats are left to their readers, which notice.
    """
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return True
    try:
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
            header = file.read(352)
            length = len(header)
            while chunk := file.read(1 << 20):
                length += len(chunk)
    except (OSError, EOFError, zlib.error):
        return False
    return length >= _nifti_length(header)


def _check_nifti_values(path: Path) -> None:
    """Raise InputError for a NIfTI file with NaN or infinity, which ITK would read as zeros."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        header = file.read(540)
        order = next(order for order in "<>" if struct.unpack_from(order + "i", header)[0] in NIFTI_FIELDS)
        second = struct.unpack_from(order + "i", header)[0] == 540
        code = struct.unpack_from(order + "h", header, 12 if second else 70)[0]
        offset = struct.unpack_from(order + ("q" if second else "f"), header, 168 if second else 108)[0]
        if code not in NIFTI_FLOATS:
            return
        file.seek(int(offset))
        values = np.frombuffer(file.read(), np.dtype(NIFTI_FLOATS[code]).newbyteorder(order))
    _refuse_not_finite(int((~np.isfinite(values)).sum()), values.size, str(path))


def _nifti_length(header: bytes) -> float:
    """Bytes of the whole file that starts with the NIfTI `header`; infinity where that is invalid."""
    for order, (size, fields) in itertools.product("<>", NIFTI_FIELDS.items()):
        if len(header) < 348 or struct.unpack_from(order + "i", header)[0] != size:
            continue
        (rank, *lengths), (bits,), (offset,) = (
            struct.unpack_from(order + code, header, place) for code, place in fields
        )
        if 1 <= rank <= 7 and min(lengths[:rank]) > 0:
            return offset + math.prod(lengths[:rank]) * bits / 8
    return float("inf")

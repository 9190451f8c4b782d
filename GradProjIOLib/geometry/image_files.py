"""Images in files: reading with validation, writing whole or not at all."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from GradProjIOLib.errors import InputError, WriteError
from GradProjIOLib.geometry.files import atomic_path, incomplete, library_path, path_text, write_error
from GradProjIOLib.geometry.lattice import badly_placed, is_rectangular
from GradProjIOLib.geometry.nifti import check_place, complete_header, is_nifti, readable_file
from GradProjIOLib.geometry.volume import (
    SKEW_NOTE,
    Volume,
    check_kind,
    from_nibabel,
    from_sitk,
    lattice_of,
    refuse_not_finite,
    straightened,
    to_sitk,
)

if TYPE_CHECKING:
    import nibabel
    import SimpleITK

WRITTEN_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
FREESURFER_SUFFIXES = (".mgz", ".mgh")
HEADER_BYTES = 1 << 16
IMAGE_SUFFIXES = (*WRITTEN_SUFFIXES, *FREESURFER_SUFFIXES)


def read_volume(path: str | os.PathLike) -> Volume:
    """The 3-D image in the NIfTI, NRRD, MetaImage or FreeSurfer file `path`, with the pixel type of the file.

    Raises InputError for a missing, unreadable or truncated file, an unsupported format, and images that are
    not scalar and 3-D (a 4-D file with one frame is accepted).
    """
    path = Path(path)
    volumes, _ = _read(path)
    return volumes[0].read_from(path)


def read_sitk(
    path: Path, accept: Callable[[SimpleITK.ImageFileReader], None]
) -> tuple[SimpleITK.Image, np.ndarray | None, bool]:
    """The image in the NIfTI, NRRD or MetaImage file `path` as SimpleITK reads it, and what SimpleITK does not say.

    That is where a NIfTI file has NaN and infinity, which ITK reads as zeros (flat in the file's order; None for whole
    numbers and other formats), and whether the axes were straightened. `accept` gets the reader when it knows the
    header but no voxel yet, and may raise InputError. Raises InputError for a file that is missing, unreadable or
    truncated.
    """
    import SimpleITK as sitk

    check_readable(path, WRITTEN_SUFFIXES)
    _check_data_file(path)
    with readable_file(path) as (readable, header, repaired):
        reader = sitk.ImageFileReader()
        reader.SetFileName(library_path(readable))
        try:
            reader.ReadImageInformation()
            accept(reader)
            not_finite = _not_finite(readable, header)
            image = reader.Execute()
            check_place(image, header, path)
            return image, not_finite, repaired
        except RuntimeError as error:
            if "orthonormal" in str(error) or "Bad direction" in str(error):
                raise badly_placed(str(path)) from error
            raise InputError(
                f"{path} cannot be read as an image; check that it is complete, or export it again as .nii.gz or .nrrd."
            ) from error


def read_frames(path: str | os.PathLike) -> tuple[list[Volume], float | None]:
    """The frames of a 4-D image and their distance (s), or the only frame of a 3-D one and None.

    Raises InputError as `read_volume` does.
    """
    return _read(Path(path), frames=True)


def write_frames(frames: Sequence[Volume], path: str | os.PathLike, step: float | None) -> None:
    """Write what `read_frames` gives: one image where there is no `step` (s) between frames, else all as a 4-D one.

    Raises WriteError.
    """
    import SimpleITK as sitk

    if step is None:
        write_volume(frames[0], path)
    else:
        write_sitk(sitk.JoinSeries([to_sitk(frame) for frame in frames], 0.0, step), path)


def read_labels(path: str | os.PathLike) -> Volume:
    """The label map in the file `path`, as whole numbers. Raises InputError where it holds anything else."""
    return whole_numbers_of(read_volume(path))


def whole_numbers_of(labels: Volume) -> Volume:
    """A label map with a type of whole numbers. Raises InputError where it holds anything else, or too large ones."""
    if labels.array.dtype.kind in "ui":
        return labels
    whole = np.rint(labels.array)
    if not np.isfinite(labels.array).all() or np.abs(labels.array - whole).max() > 1e-3:
        raise InputError(f"{labels.name} is not a label map: its values are not all whole numbers.")
    largest = np.abs(whole).max()
    if largest >= 2**63:
        raise InputError(f"{labels.name} has labels up to {largest:g}, which are too large; renumber them.")
    return Volume(whole.astype(np.int32 if largest < 2**31 else np.int64), labels.affine, labels.name)


def write_volume(volume: Volume, path: str | os.PathLike, note: str = "") -> None:
    """Write `volume` to `path`, whole or not at all; the suffix chooses the format (see WRITTEN_SUFFIXES).

    The header keeps the `note` that says what it is, in NIfTI as the description. Raises WriteError where the file
    cannot be written.
    """
    image = to_sitk(volume)
    if note:
        image.SetMetaData("ITK_FileNotes", note)
    write_sitk(image, path)


def write_sitk(image: SimpleITK.Image, path: str | os.PathLike) -> None:
    """Write a SimpleITK image to `path`, compressed, whole or not at all. Raises WriteError."""
    import SimpleITK as sitk

    path = Path(path)
    if not path.name.lower().endswith(WRITTEN_SUFFIXES):
        raise WriteError(f"{path} cannot be written: use one of the suffixes {', '.join(WRITTEN_SUFFIXES)}.")
    if is_nifti(path) and image.GetDimension() == 3 and not is_rectangular(lattice_of(image)):
        raise WriteError(f"{path} cannot be written: its axes are not at right angles, use .nrrd or .mha.")
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, library_path(temporary), useCompression=True)
        except RuntimeError as error:
            raise write_error(path, error) from error
        # ITK's NIfTI writer says nothing when the disk is full.
        if is_nifti(path) and complete_header(temporary) is None:
            raise write_error(path, OSError("the disk is full or the file is too large"))


def check_readable(path: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
    """Raise InputError where the file is missing, empty, may not be read, or has an unsupported suffix."""
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")
    if not path.is_file():
        raise InputError(f"{path} is a folder; choose a file ({', '.join(suffixes)}).")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; check its permissions.")
    if not path.name.lower().endswith(suffixes):
        raise InputError(f"{path} has an unsupported format; convert it to one of {', '.join(suffixes)}.")
    if path.stat().st_size == 0:
        raise incomplete(path)


def _check_data_file(path: Path) -> None:
    """Raise InputError where the header of an NRRD or MetaImage file takes the voxels from something that is no file.

    A device may have no end.
    """
    if is_nifti(path):
        return
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES).partition(b"\n\n")[0]
    for line in header.splitlines():
        key, _, value = line.replace(b"=", b":", 1).partition(b":")
        if key.strip().lower().replace(b" ", b"") in (b"datafile", b"elementdatafile"):
            data = path.parent / os.fsdecode(value.strip().replace(b"\0", b""))
            if data.exists() and not data.is_file():
                raise InputError(f"{path} takes its voxels from {data}, which is no file; export the image again.")


def _check_kind(path: Path, reader: SimpleITK.ImageFileReader, frames: bool = False) -> None:
    """Raise InputError unless the file holds a single 3-D volume of numbers, or with `frames` one or more of them."""
    import SimpleITK as sitk

    size = reader.GetSize()
    size = size[:3] if frames and len(size) == 4 else size
    pixel_type = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    check_kind(size, reader.GetNumberOfComponents(), pixel_type, path_text(path))


def _read(path: Path, frames: bool = False) -> tuple[list[Volume], float | None]:
    """The only image in a file and None; with `frames` also those of a 4-D file, and their distance (s)."""
    if path.name.lower().endswith(FREESURFER_SUFFIXES):
        check_readable(path)
        return [straightened(_read_freesurfer(path))], None
    image, not_finite, repaired = read_sitk(path, partial(_check_kind, path, frames=frames))
    name = path_text(path)
    if not_finite is not None:
        refuse_not_finite(not_finite, name)
    parts = [image] if image.GetDimension() == 3 else [image[..., number] for number in range(image.GetSize()[3])]
    volumes = [straightened(from_sitk(part, name)) for part in parts]
    if repaired:
        volumes = [replace(volume, note=SKEW_NOTE.format(name=name)) for volume in volumes]
    return volumes, image.GetSpacing()[3] if image.GetDimension() == 4 else None


def _not_finite(path: Path, header: nibabel.Nifti1Header | None) -> np.ndarray | None:
    """Where an unpacked NIfTI file of floating-point numbers has NaN or infinity, flat in its order; else None."""
    if header is None or header["datatype"] not in (16, 64):
        return None
    count = math.prod(header.get_data_shape())
    values = np.fromfile(path, header.get_data_dtype(), count, offset=int(header["vox_offset"]))
    return ~np.isfinite(values)


def _read_freesurfer(path: Path) -> Volume:
    import nibabel

    try:
        return from_nibabel(nibabel.MGHImage.from_filename(path), path_text(path))
    except InputError:
        raise
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise incomplete(path) from error

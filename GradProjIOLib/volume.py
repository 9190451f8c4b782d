"""Three-dimensional images in physical space: the array, its affine, its validation, its files.

Inside the package every coordinate is RAS mm. ITK's files and objects use LPS mm; the sign changes here, in
`to_sitk` and `from_sitk`, and nowhere else.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import SimpleITK

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
SMALLEST_AXIS = 8
# Size of the header → type and place of the axes' lengths, the bits per voxel and the start of the data.
NIFTI_FIELDS = {348: (("8h", 40), ("h", 72), ("f", 108)), 540: (("8q", 16), ("h", 14), ("q", 168))}
NIFTI_FLOATS = {16: np.float32, 64: np.float64}
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class InputError(ValueError):
    """What the user must change, in one sentence that names the file or node."""


class WriteError(InputError):
    """A result could not be written (disk full, no permission); nothing was left behind."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image: `array` [k, j, i] and `affine` (4x4) from the index (i, j, k, 1) to RAS mm.

    `name` stands for the volume in messages. Raises InputError where the array is not 3-D or the affine is
    singular.
    """

    array: np.ndarray
    affine: np.ndarray
    name: str = "volume"

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", np.asarray(self.array))
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        if self.array.ndim != 3:
            raise InputError(
                f"{self.name} has {self.array.ndim} dimensions; choose a single 3-D volume instead."
            )
        check_affine(self.affine, self.name)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along (k, j, i)."""
        return self.array.shape

    @property
    def spacing(self) -> np.ndarray:
        """Distance between neighboring voxels along (i, j, k) in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_volume(self) -> float:
        """Volume of one voxel in mm³."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))


def check_affine(affine: np.ndarray, name: str) -> None:
    """Raise InputError unless `affine` is a finite, invertible 4x4 matrix with the last row (0, 0, 0, 1)."""
    usable = affine.shape == (4, 4) and np.isfinite(affine).all() and np.array_equal(affine[3], [0, 0, 0, 1])
    if usable:
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        # Relative to the spacing: the volume spanned by the unit vectors of the three axes.
        usable = lengths.min() > 0 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6
    if not usable:
        raise _badly_placed(name)


def is_rectangular(affine: np.ndarray) -> bool:
    """Whether the axes of `affine` are at right angles. ITK changes them without a word in NIfTI files."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() < 1e-4)


def check_image(volume: Volume) -> None:
    """Raise InputError where `volume` is no image to register: tiny, NaN, constant, a label map."""
    if min(volume.shape) < SMALLEST_AXIS:
        size = " x ".join(str(n) for n in reversed(volume.shape))
        raise InputError(
            f"{volume.name} has {size} voxels, too few to register; "
            f"choose a volume with at least {SMALLEST_AXIS} voxels along each axis."
        )
    bad = 0 if volume.array.dtype.kind in "bui" else int((~np.isfinite(volume.array)).sum())
    _refuse_not_finite(bad, volume.array.size, volume.name)
    if volume.array.min() == volume.array.max():
        raise InputError(
            f"{volume.name} has the same value ({volume.array.flat[0]:g}) everywhere; "
            "choose a volume that shows an image."
        )
    if looks_like_labels(volume.array):
        raise InputError(
            f"{volume.name} looks like a label map (a few whole numbers in large uniform regions); "
            "choose the image it was drawn on and give the label map as labels or mask."
        )


def looks_like_labels(array: np.ndarray) -> bool:
    """Whether `array` [k, j, i] is a label map: whole numbers, at most 256 of them, in uniform regions.

    Uniform means that of all pairs of neighbors along i of which neither holds the most frequent value (the
    background), at least 85 % are equal. That is 90 to 99 % in label maps, also when they were resampled to
    4 mm, but about 9 % in a brain MRI with 8 bits and 70 % when only 4 bits of it are left.
    """
    sample = array[::3, ::3, ::3]
    if array.dtype.kind == "f" and not np.array_equal(sample, np.rint(sample)):
        return False
    values, counts = np.unique(sample, return_counts=True)
    if len(values) > 256:
        return False
    foreground = array != values[counts.argmax()]
    pairs = foreground[:, :, :-1] & foreground[:, :, 1:]
    equal = pairs & (array[:, :, :-1] == array[:, :, 1:])
    return bool(pairs.any()) and int(equal.sum()) >= 0.85 * int(pairs.sum())


def lattice_affine(
    affine: np.ndarray, size: tuple[int, int, int], lattice: tuple[int, int, int]
) -> np.ndarray:
    """Affine (4x4, index → RAS mm) of `lattice` samples (K, J, I) stretched over an image.

    The image has `size` voxels (K, J, I) and `affine`. Sample n of a lattice lies at the image index
    (n + 0.5)·size/lattice − 0.5, which is torch's `align_corners=False`.
    """
    scale = np.array(size[::-1], dtype=np.float64) / np.array(lattice[::-1], dtype=np.float64)
    stretch = np.diag([*scale, 1.0])
    stretch[:3, 3] = 0.5 * scale - 0.5
    return np.asarray(affine, dtype=np.float64) @ stretch


def to_sitk(volume: Volume) -> SimpleITK.Image:
    """`volume` as a SimpleITK image, in LPS mm. Booleans become 8-bit, half floats single."""
    import SimpleITK as sitk

    stored = {"bool": np.uint8, "float16": np.float32}.get(volume.array.dtype.name, volume.array.dtype)
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array, dtype=stored))
    set_lattice(image, volume.affine)
    return image


def from_sitk(image: SimpleITK.Image, name: str = "volume") -> Volume:
    """The scalar 3-D SimpleITK `image` (LPS mm) as a Volume. A fourth axis of length one is dropped.

    Raises InputError for 2-D, 4-D, vector, color and complex images and for singular directions.
    """
    import SimpleITK as sitk

    _check_kind(image.GetSize(), image.GetNumberOfComponentsPerPixel(), image.GetPixelIDTypeAsString(), name)
    if image.GetDimension() == 4:
        image = image[:, :, :, 0]
    return Volume(sitk.GetArrayFromImage(image), lattice_of(image), name)


def set_lattice(image: SimpleITK.Image, affine: np.ndarray) -> None:
    """Place the 3-D SimpleITK `image` in space by the `affine` (4x4) from its index to RAS mm."""
    placed = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(placed[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(placed[:3, 3].tolist())
    image.SetDirection((placed[:3, :3] / spacing).ravel().tolist())


def lattice_of(image: SimpleITK.Image) -> np.ndarray:
    """The affine (4x4) from the index of the 3-D SimpleITK `image` to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return RAS_TO_LPS @ affine


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
            f"{path} cannot be read as an image; check that it is complete, or export it again as .nii.gz or "
            ".nrrd."
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


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well and vanishes when it fails.

    The temporary file has the same name and lies in a hidden folder beside `path`, so formats that write a
    second file (.mhd, .nhdr) work, too. What was at `path` before stays until then. Raises WriteError for an
    OSError in the block (disk full, no permission, no such folder).
    """
    path = Path(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield folder / path.name
        # The file itself last: the data file that a header names must be there before it.
        for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(written, path.parent / written.name)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_error(path: Path, error: Exception) -> WriteError:
    """The WriteError that says why `path` could not be written."""
    reason = getattr(error, "strerror", None) or _reason(error)
    return WriteError(f"{path} could not be written ({reason}), so nothing was changed there; "
                      "free some space or choose another folder.")


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


def _refuse_not_finite(bad: int, size: int, name: str) -> None:
    if bad:
        raise InputError(
            f"{name} has NaN or infinity in {bad} of {size} voxels; replace them by the background value first."
        )


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


def _badly_placed(name: str) -> InputError:
    return InputError(
        f"{name} has a singular or skewed orientation matrix, so its place in space is unclear; "
        "correct its spacing and axis directions, or resample it to a rectangular lattice."
    )


def _check_kind(size: tuple[int, ...], components: int, pixel_type: str, name: str) -> None:
    if len(size) == 4 and size[3] == 1:
        size = size[:3]
    if len(size) != 3:
        what = "a time series" if len(size) == 4 else "a flat image"
        raise InputError(f"{name} is {len(size)}-D ({what}); choose or export a single 3-D volume.")
    if components != 1 or "complex" in pixel_type:
        raise InputError(
            f"{name} has {components} components per voxel ({pixel_type}); "
            "choose a volume with one gray value per voxel."
        )
    if min(size) < 1:
        raise InputError(f"{name} is empty; choose a volume with voxels.")


def _reason(error: Exception) -> str:
    """The last line of an exception, where SimpleITK says what happened, without its source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("ITK ERROR: ")[-1].rstrip(".") if lines else type(error).__name__

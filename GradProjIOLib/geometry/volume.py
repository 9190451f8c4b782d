"""Three-dimensional images in physical space: the array, its affine, its validation.

Inside the package every coordinate is RAS mm. ITK's files and objects use LPS mm; the sign changes here for the places
of images, in `sitk_image` and `from_sitk`, and in `transform_files` for displacements and matrices.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import RAS_TO_LPS, affine_of, check_affine, describe_lattice, straight_affine

if TYPE_CHECKING:
    import SimpleITK
    from nibabel.spatialimages import SpatialImage

SMALLEST_AXIS = 5
SKEW_NOTE = "The axes of {name} are not quite at right angles; the nearest ones that are were taken."


@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """A 3-D image: `array` [k, j, i] and `affine` (4x4) from the index (i, j, k, 1) to RAS mm.

    `name` stands for the volume in messages; `note` is a sentence about it that the user should read. Raises
    InputError where the array is not 3-D or the affine is singular.
    """

    array: np.ndarray
    affine: np.ndarray
    name: str = "volume"
    note: str = ""
    # Not given to __init__, so dataclasses.replace makes a volume that comes from no file.
    _source: tuple[Path, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", np.asarray(self.array))
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        if self.array.ndim != 3:
            raise InputError(f"{self.name} has {self.array.ndim} dimensions; choose a single 3-D volume instead.")
        check_affine(self.affine, self.name)

    def __repr__(self) -> str:
        return f"Volume({self.name!r}, {describe_lattice(self.shape, self.affine, 'voxels')}, {self.array.dtype})"

    def read_from(self, path: Path) -> Volume:
        """Remember `path` as the file from which the voxels were read; returns the volume itself."""
        object.__setattr__(self, "_source", (path, self._voxel_checksum()))
        return self

    @property
    def path(self) -> Path | None:
        """The file that the voxels were read from; None where they were made or changed in memory."""
        if self._source is None or self._source[1] != self._voxel_checksum():
            return None
        return self._source[0]

    def _voxel_checksum(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.array).data)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along (k, j, i)."""
        return self.array.shape

    @property
    def spacing(self) -> np.ndarray:
        """Distance between neighboring voxels along (i, j, k) in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def in_ras_order(volume: Volume) -> tuple[Volume, tuple[int, int, int]]:
    """The same image with its voxels stored along the axes nearest to S, A and R, and the order of the axes.

    Axis n of the new array [k, j, i] was axis order[n] of the old one. Whether an axis was reversed is not returned.
    """
    from nibabel import orientations

    found = orientations.io_orientation(volume.affine)
    array = np.ascontiguousarray(orientations.apply_orientation(volume.array.T, found).T)
    affine = volume.affine @ orientations.inv_ornt_aff(found, volume.shape[::-1])
    i, j, k = (int(np.flatnonzero(found[:, 0] == axis)[0]) for axis in range(3))
    return Volume(array, affine, volume.name), (2 - k, 2 - j, 2 - i)


def straightened(volume: Volume) -> Volume:
    """The volume with its axes at right angles where they are off by rounding, and a note; else as it is."""
    affine = straight_affine(volume.affine)
    return volume if affine is None else replace(volume, affine=affine, note=SKEW_NOTE.format(name=volume.name))


def check_image(volume: Volume) -> None:
    """Raise InputError where `volume` is no image to register: too small, NaN or infinity, or constant."""
    if min(volume.shape) < SMALLEST_AXIS:
        size = " x ".join(str(n) for n in reversed(volume.shape))
        raise InputError(
            f"{volume.name} has {size} voxels, too few to register; "
            f"choose a volume with at least {SMALLEST_AXIS} voxels along each axis."
        )
    if volume.array.dtype.kind not in "bui":
        refuse_not_finite(~np.isfinite(volume.array), volume.name)
    if volume.array.min() == volume.array.max():
        raise InputError(
            f"{volume.name} has the same value ({volume.array.flat[0]:g}) everywhere; "
            "choose a volume that shows an image."
        )


def image_warnings(*volumes: Volume) -> list[str]:
    """What the user should know about the `volumes`: their notes, and which look like label maps."""
    return [volume.note for volume in volumes if volume.note] + [
        f"{volume.name} looks like a label map (a few whole numbers in large uniform regions); the similarity is "
        "made for images, and label maps belong to the labels or masks."
        for volume in volumes
        if looks_like_labels(volume.array)
    ]


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


def from_nibabel(image: SpatialImage, name: str) -> Volume:
    """The scalar 3-D nibabel `image`, whose affine is in RAS mm, as a Volume; [i, j, k] becomes [k, j, i].

    A fourth axis of length one is dropped. Raises InputError for any other image and for one without affine.
    """
    array = np.asanyarray(image.dataobj)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 or array.dtype.kind not in "buif":
        raise InputError(
            f"{name} has the shape {array.shape} and values of the type {array.dtype}; "
            "choose a single 3-D volume with one gray value per voxel."
        )
    if image.affine is None:
        raise InputError(f"{name} has no affine, so its place in space is unclear; give it one.")
    return Volume(np.ascontiguousarray(array.T, array.dtype.newbyteorder("=")), image.affine, name)


def to_sitk(volume: Volume) -> SimpleITK.Image:
    """`volume` as a SimpleITK image, in LPS mm. Booleans become 8-bit, half floats single."""
    stored = {"bool": np.uint8, "float16": np.float32}.get(volume.array.dtype.name, volume.array.dtype)
    return sitk_image(np.ascontiguousarray(volume.array, dtype=stored), volume.affine)


def from_sitk(image: SimpleITK.Image, name: str = "volume") -> Volume:
    """The scalar 3-D SimpleITK `image` (LPS mm) as a Volume. A fourth axis of length one is dropped.

    Raises InputError for 2-D, 4-D, vector, color and complex images and for singular directions.
    """
    import SimpleITK as sitk

    check_kind(image.GetSize(), image.GetNumberOfComponentsPerPixel(), image.GetPixelIDTypeAsString(), name)
    if image.GetDimension() == 4:
        image = image[:, :, :, 0]
    return Volume(sitk.GetArrayFromImage(image), lattice_of(image), name)


def sitk_image(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """The SimpleITK image of an `array` [k, j, i], or of vectors [k, j, i, 3].

    `affine` (4x4) from the index to RAS mm places it in space. Vectors are taken as they are: LPS, where ITK is to read
    them as displacements.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    placed = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(placed[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(placed[:3, 3].tolist())
    image.SetDirection((placed[:3, :3] / spacing).ravel().tolist())
    return image


def lattice_of(image: SimpleITK.Image) -> np.ndarray:
    """The affine (4x4) from the index of the 3-D SimpleITK `image` to RAS mm."""
    axes = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    return RAS_TO_LPS @ affine_of(axes, image.GetOrigin())


def refuse_not_finite(bad: np.ndarray, name: str) -> None:
    """Raise InputError where any voxel is NaN or infinite; `bad` says which are."""
    if bad.any():
        raise InputError(
            f"{name} has NaN or infinity in {bad.sum()} of {bad.size} voxels; "
            "replace them by the background value first."
        )


def check_kind(size: tuple[int, ...], components: int, pixel_type: str, name: str) -> None:
    """Raise InputError unless an image of this size and pixel type is a single 3-D volume of numbers."""
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

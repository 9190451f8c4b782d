"""Images as a notebook has them, turned into volumes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_volume
from GradProjIOLib.geometry.volume import Volume, from_nibabel, from_sitk

if TYPE_CHECKING:
    import SimpleITK
    from nibabel.spatialimages import SpatialImage

Image: TypeAlias = "str | os.PathLike | Volume | SimpleITK.Image | SpatialImage | tuple[np.ndarray, np.ndarray]"

ACCEPTED = (
    "pass the path of an image file, a Volume, a SimpleITK or nibabel image, or a pair (array, affine) "
    "of a 3-D array [k, j, i] and the 4x4 matrix from the voxel index (i, j, k) to RAS mm"
)


def as_volume(image: Image, role: str) -> Volume:
    """`image` as a Volume, which is called `role` ("the fixed image") in messages unless it comes from a file.

    A path is read, and a Volume is returned as it is. SimpleITK images (LPS mm) and nibabel images (RAS mm) keep their
    place. Of a pair (array, affine) the array is indexed [k, j, i], as `SimpleITK.GetArrayFromImage` returns it, and
    the affine (4x4) takes the index (i, j, k) to RAS mm: (n.get_fdata().T, n.affine) for a nibabel image n.

    Raises InputError for anything else, and for an image that is not scalar and 3-D.
    """
    import SimpleITK as sitk

    if isinstance(image, Volume):
        return image
    if isinstance(image, (str, os.PathLike)):
        return read_volume(image)
    if isinstance(image, sitk.Image):
        return from_sitk(image, role)
    if isinstance(image, (tuple, list)) and len(image) == 2:
        return _from_pair(*image, role)
    from nibabel.spatialimages import SpatialImage

    if isinstance(image, SpatialImage):
        return from_nibabel(image, role)
    raise InputError(f"{role} is of the type {type(image).__name__}; {ACCEPTED}.")


def _from_pair(array: Any, affine: Any, role: str) -> Volume:
    array, affine = np.asarray(array), np.asarray(affine)
    if array.ndim != 3 or array.dtype.kind not in "buif" or affine.shape != (4, 4) or affine.dtype.kind not in "uif":
        raise InputError(
            f"{role} is a pair of arrays with the shapes {array.shape} and {affine.shape} and the types "
            f"{array.dtype} and {affine.dtype}; {ACCEPTED}."
        )
    return Volume(array, affine, role)

"""Fields with samples that are undefined: NaN, infinite, or as large as the 3.4e38 that ANTs writes."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from GradProjIOLib.errors import InputError

LARGEST_DISPLACEMENT = 1e6
"""A displacement (mm) of this length or more is not one."""


def fill_gaps(displacement: np.ndarray, undefined: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The field [k, j, i, 3] with its nearest defined value in every gap, and where the gaps are [k, j, i], if any.

    Gaps are the samples marked in `undefined` and those that are NaN or too large. Raises InputError where every sample
    is a gap.
    """
    # Cheap, as nearly all fields have no gap: NaN comes out of the maximum, too.
    if not max(displacement.max(), -displacement.min()) < LARGEST_DISPLACEMENT:
        found = ~(np.abs(displacement) < LARGEST_DISPLACEMENT).all(axis=-1)
        undefined = found if undefined is None else found | undefined
        if undefined.all():
            raise InputError("The displacement field is undefined everywhere (NaN or too large); compute it again.")
        nearest = ndimage.distance_transform_edt(undefined, return_distances=False, return_indices=True)
        displacement = displacement[tuple(nearest)]
    return displacement, undefined if undefined is not None and undefined.any() else None


def correct_beside(determinant: np.ndarray, displacement: np.ndarray, undefined: np.ndarray | None) -> None:
    """Compute the Jacobian determinants [k, j, i] of i → i + d(i) beside gaps anew, without what is filled in there.

    `displacement` d is [k, j, i, 3] in voxels along k, j and i. The differences leave out what is undefined or outside:
    they are one-sided where one neighbor is missing. Where both are, d counts as constant along that axis.
    """
    if undefined is None:
        return
    index = np.argwhere(ndimage.binary_dilation(undefined) & ~undefined)
    here = displacement[tuple(index.T)]
    columns = []
    for axis, size in enumerate(undefined.shape):
        ends, steps = [], np.zeros(len(index))
        for step in (1, -1):
            neighbor = index.copy()
            neighbor[:, axis] += step
            inside = (neighbor[:, axis] >= 0) & (neighbor[:, axis] < size)
            place = tuple(np.where(inside[:, None], neighbor, index).T)
            known = inside & ~undefined[place]
            ends.append(np.where(known[:, None], displacement[place], here))
            steps += known
        column = (ends[0] - ends[1]) / np.maximum(steps, 1)[:, None]
        column[:, axis] += 1
        columns.append(column)
    determinant[tuple(index.T)] = np.linalg.det(np.stack(columns, axis=-1))

"""Arrays along the anatomical axes."""

from __future__ import annotations

import numpy as np


def to_anatomical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """An array [k, j, i] as [right, anterior, superior], by the nearest axes of `affine` (4x4, index → RAS mm)."""
    from nibabel.orientations import apply_orientation, io_orientation

    return apply_orientation(array.T, io_orientation(affine))


def anatomical_affine(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The affine (4x4, index → RAS mm) of what `to_anatomical` makes of an array of `shape` (K, J, I)."""
    from nibabel.orientations import inv_ornt_aff, io_orientation

    return affine @ inv_ornt_aff(io_orientation(affine), shape[::-1])


def worst_fold(determinant: np.ndarray, folded: np.ndarray) -> np.ndarray:
    """The index of the smallest `determinant` in the mask `folded`, which is not empty."""
    return np.array(np.unravel_index(np.argmin(np.where(folded, determinant, np.inf)), folded.shape))

"""Arrays along the anatomical axes."""

from __future__ import annotations

import numpy as np

from GradProjIOLib.geometry.volume import Volume, in_ras_order


def to_anatomical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """An array [k, j, i] as [right, anterior, superior], by the nearest axes of `affine` (4x4, index → RAS mm)."""
    return in_ras_order(Volume(array, affine))[0].array.T


def worst_fold(determinant: np.ndarray, folded: np.ndarray) -> np.ndarray:
    """The index of the smallest `determinant` in the mask `folded`, which is not empty."""
    return np.array(np.unravel_index(np.argmin(np.where(folded, determinant, np.inf)), folded.shape))

"""Interpolation of what lies on a lattice.

Arrays are [k, j, i]; an index is a point (i, j, k) in voxels; affines (4x4) take an index to RAS mm.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sample(image: Tensor, points: Tensor, padding: str = "border") -> Tensor:
    """Trilinear values [N, C, …] of an image [N, C, D, H, W] at points [N, …, 3].

    A point is (x, y, z) along the axes (W, H, D); −1 and +1 are the centers of the first and the last sample.
    Outside, `padding` "border" goes on with the outermost values, "reflection" mirrors, and "zeros" takes 0.
    """
    return F.grid_sample(image, points, mode="bilinear", padding_mode=padding, align_corners=True)


def sample_linear(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Trilinear samples of `values` [k, j, i, channels] at `index` [..., 3], given as (i, j, k) and clamped.

    Returns float32 [..., channels].
    """
    extent = np.maximum(np.array(values.shape[2::-1]) - 1, 1)
    grid = torch.from_numpy((index * (2 / extent) - 1).astype(np.float32).reshape(1, 1, 1, -1, 3))
    source = torch.from_numpy(np.asarray(values, dtype=np.float32)).permute(3, 0, 1, 2)[None]
    return sample(source, grid)[0, :, 0, 0].T.reshape(*index.shape[:-1], values.shape[3]).numpy()


def interpolator(array: np.ndarray, interpolation: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of an index [..., 3] (i, j, k) that interpolates `array` [k, j, i] there.

    `interpolation` is "linear", "bspline" (cubic) or "nearest". Outside the array its border goes on, and for
    "bspline" its mirror image.
    """
    if interpolation == "linear":
        values = array.astype(np.float32)[..., None]
        return lambda index: sample_linear(values, index)[..., 0]
    if interpolation == "nearest":
        return lambda index: array[_nearest(array.shape, index)]
    if interpolation == "bspline":
        from scipy import ndimage

        coefficients = ndimage.spline_filter(array, order=3, mode="mirror", output=np.float32)
        return lambda index: ndimage.map_coordinates(
            coefficients, np.moveaxis(index[..., ::-1], -1, 0), order=3, mode="mirror", prefilter=False
        )
    raise ValueError(f"interpolation is one of linear, bspline, nearest; found {interpolation!r}")


def _nearest(shape: tuple[int, int, int], index: np.ndarray) -> tuple[np.ndarray, ...]:
    rounded = np.clip(np.floor(index + 0.5), 0, np.array(shape[::-1]) - 1).astype(np.intp)
    return tuple(np.moveaxis(rounded[..., ::-1], -1, 0))


def to_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` as `dtype`; whole-number types get the nearest whole number in their range."""
    if dtype.kind in "ui" and values.dtype.kind == "f":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values.astype(np.float64)), limits.min, limits.max)
    return values.astype(dtype, copy=False)

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


def sample_at(values: Tensor, index: Tensor) -> Tensor:
    """Trilinear values [n, C] of [1, C, K, J, I] at an index [n, 3], given as (i, j, k) and clamped.

    On a processor torch shares sampling among threads by batch entries, so each thread gets one.
    """
    extent = torch.tensor([max(size - 1, 1) for size in reversed(values.shape[2:])])
    threads = torch.get_num_threads()
    each = -(-len(index) // threads)
    points = F.pad(index * (2 / extent) - 1, (0, 0, 0, each * threads - len(index)))
    found = sample(values.expand(threads, -1, -1, -1, -1), points.view(threads, 1, 1, each, 3))
    return found[:, :, 0, 0].movedim(1, 2).flatten(0, 1)[: len(index)]


def sample_linear(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Trilinear samples of `values` [k, j, i, channels] at `index` [..., 3], given as (i, j, k) and clamped.

    Returns float32 [..., channels].
    """
    source = torch.from_numpy(np.asarray(values, dtype=np.float32)).permute(3, 0, 1, 2)[None]
    found = sample_at(source, torch.from_numpy(index.astype(np.float32).reshape(-1, 3)))
    return found.reshape(*index.shape[:-1], values.shape[3]).numpy()


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

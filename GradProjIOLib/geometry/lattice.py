"""Lattices of samples in space: their affines and their points.

Arrays are [k, j, i]; an index is a point (i, j, k) in voxels; affines (4x4) take an index to RAS mm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from GradProjIOLib.errors import InputError

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
POINTS_AT_ONCE = 1 << 18
LARGEST_COARSE_LATTICE = 175
LARGEST_SKEW = 2.5e-3
"""Axes (unit vectors) whose scalar product is at most this count as perpendicular; the user gets a warning."""


def check_affine(affine: np.ndarray, name: str) -> None:
    """Raise InputError unless `affine` is a finite, invertible 4x4 matrix with the last row (0, 0, 0, 1)."""
    usable = affine.shape == (4, 4) and np.isfinite(affine).all() and np.array_equal(affine[3], [0, 0, 0, 1])
    if usable:
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        # Relative to the spacing: the volume spanned by the unit vectors of the three axes.
        usable = lengths.min() > 0 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6
    if not usable:
        raise badly_placed(name)


def is_rectangular(affine: np.ndarray) -> bool:
    """Whether the axes of `affine` are at right angles; ITK silently changes skewed ones in NIfTI files."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() < 1e-4)


def straight_affine(affine: np.ndarray) -> np.ndarray | None:
    """`affine` with the nearest axes at right angles, where its own are off by rounding; None where they are not.

    More than LARGEST_SKEW is not rounding.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not spacing.all() or is_rectangular(affine):
        return None
    directions = affine[:3, :3] / spacing
    if np.abs(directions.T @ directions - np.eye(3)).max() > LARGEST_SKEW:
        return None
    left, _, right = np.linalg.svd(directions)
    straight = affine.copy()
    straight[:3, :3] = left @ right * spacing
    return straight


def lattice_affine(affine: np.ndarray, size: tuple[int, int, int], lattice: tuple[int, int, int]) -> np.ndarray:
    """Affine (4x4, index → RAS mm) of `lattice` samples (K, J, I) stretched over an image.

    The image has `size` voxels (K, J, I) and `affine`. Sample n of a lattice lies at the image index
    (n + 0.5)·size/lattice − 0.5, which is torch's `align_corners=False`.
    """
    scale = np.array(size[::-1], dtype=np.float64) / np.array(lattice[::-1], dtype=np.float64)
    return np.asarray(affine, dtype=np.float64) @ affine_of(np.diag(scale), 0.5 * scale - 0.5)


def coarse_lattice(size: tuple[int, int, int], affine: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (K, J, I) and affine of a lattice over an image of `size` voxels on which a smooth map may be sampled.

    It is the image's own where no axis has more than LARGEST_COARSE_LATTICE voxels.
    """
    k, j, i = (min(n, LARGEST_COARSE_LATTICE) for n in size)
    return (k, j, i), lattice_affine(affine, size, (k, j, i))


def describe_lattice(shape: tuple[int, int, int], affine: np.ndarray, unit: str = "samples") -> str:
    """A lattice of `shape` (K, J, I) in words, its axes in the order (i, j, k)."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return f"{' x '.join(map(str, reversed(shape)))} {unit} of {' x '.join(f'{step:.3g}' for step in spacing)} mm"


def badly_placed(name: str) -> InputError:
    """The error for an image whose affine does not say where it lies in space."""
    return InputError(
        f"{name} has a singular or skewed orientation matrix, so its place in space is unclear; "
        "correct its spacing and axis directions, or resample it to a rectangular lattice."
    )


def lattice_points(shape: tuple[int, int, int], affine: np.ndarray, slab: slice = slice(None)) -> np.ndarray:
    """Where `affine` (4x4) puts the indices of a lattice of `shape` (K, J, I): [k, j, i, 3], float64.

    `slab` chooses the slices k that are computed.
    """
    k, j, i = np.arange(shape[0])[slab], np.arange(shape[1]), np.arange(shape[2])
    return k[:, None, None, None] * affine[:3, 2] + (
        j[:, None, None] * affine[:3, 1] + (i[:, None] * affine[:3, 0] + affine[:3, 3])
    )


def slabs(shape: tuple[int, int, int], affine: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of slices k of a lattice with their points, few enough to stay small in memory."""
    thickness = max(1, POINTS_AT_ONCE // (shape[1] * shape[2]))
    for first in range(0, shape[0], thickness):
        slab = slice(first, first + thickness)
        yield slab, lattice_points(shape, affine, slab)


def affine_of(linear: np.ndarray, shift: ArrayLike) -> np.ndarray:
    """The affine map x → linear·x + shift as one matrix (4x4)."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, shift
    return matrix


def in_view(index: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Which voxel indices [..., 3] (i, j, k) lie in the field of view of an image of `shape` (K, J, I): [...].

    It ends half a voxel outside the centers of the outermost voxels.
    """
    return np.asarray(((index >= -0.5) & (index <= np.array(shape[::-1]) - 0.5)).all(axis=-1))


def apply_matrix(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The images of `points` [..., 3] under the affine map `matrix` (4x4)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]

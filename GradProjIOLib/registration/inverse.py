"""The map moving → fixed that belongs to the one that a registration has found."""

from __future__ import annotations

import warnings

import numpy as np

from GradProjIOLib.geometry.lattice import apply_matrix, lattice_affine, slabs
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.refinement import lattice_for
from GradProjIOLib.spatial.deformation import Deformation

LARGEST_CHECK = 96
"""The round trip is measured at so many points of the fixed image along an axis, at most."""


def inverse_of(whole: Deformation, fixed: Volume, moving: Volume) -> tuple[Deformation, dict[str, float | None]]:
    """The inverse of a map fixed → moving over the moving image, as fine as the map, and how well it undoes the map.

    The second is the "mean" and "max" (mm) of the distance from fixed points to where they are after both maps, over
    those that the first one takes into the moving image; None where there is no such point.
    """
    lattice = lattice_for(moving, float(np.linalg.norm(whole.affine[:3, :3], axis=0).min()))
    with warnings.catch_warnings():
        # Where the map folds there is no inverse. The figures say how far off it is.
        warnings.simplefilter("ignore", RuntimeWarning)
        inverse = whole.inverse(lattice, lattice_affine(moving.affine, moving.shape, lattice))
    return inverse, round_trip(whole, inverse, fixed, moving)


def round_trip(whole: Deformation, inverse: Deformation, fixed: Volume, moving: Volume) -> dict[str, float | None]:
    """How well an inverse undoes a map fixed → moving: the second that ``inverse_of`` gives."""
    k, j, i = (min(size, LARGEST_CHECK) for size in fixed.shape)
    to_index = np.linalg.inv(moving.affine)
    distances = []
    for _, points in slabs((k, j, i), lattice_affine(fixed.affine, fixed.shape, (k, j, i))):
        moved = whole.map_points(points)
        index = apply_matrix(to_index, moved)
        inside = ((index >= 0) & (index <= np.array(moving.shape[::-1]) - 1)).all(axis=-1)
        back = inverse.map_points(moved[inside])
        distances.append(np.linalg.norm(back - points[inside], axis=-1))
    distance = np.concatenate(distances)
    if not distance.size:
        return {"mean": None, "max": None}
    return {"mean": float(distance.mean()), "max": float(distance.max())}

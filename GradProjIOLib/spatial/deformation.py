"""Deformations: a displacement in RAS mm on a lattice, and what one does with it.

A deformation maps a point x of the fixed image to x + u(x) in the moving image. Coordinates are RAS mm; ITK's
files, in LPS mm, are translated when they are read and written.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np

from GradProjIOLib.geometry import transform_files
from GradProjIOLib.geometry.lattice import apply_matrix, check_affine, describe_lattice, lattice_points, slabs
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.inversion import PointMap, solve
from GradProjIOLib.spatial.sampling import interpolator, sample_linear, to_type

Lattice = tuple[tuple[int, int, int], np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Deformation:
    """The map x → x + u(x), with u = `displacement` [k, j, i, 3] in RAS mm and `affine` (4x4) from the index
    (i, j, k, 1) of its lattice to RAS mm.

    u is trilinear inside the lattice. Outside it keeps the value of the nearest point of the border, as in
    3D Slicer; ITK takes u = 0 from half a voxel outside on.
    """

    displacement: np.ndarray
    affine: np.ndarray

    def __post_init__(self) -> None:
        displacement = np.ascontiguousarray(self.displacement, dtype=np.float32)
        if displacement.ndim != 4 or displacement.shape[3] != 3:
            raise ValueError(f"expected a displacement of shape [k, j, i, 3], found {displacement.shape}")
        object.__setattr__(self, "displacement", displacement)
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        check_affine(self.affine, "the lattice of the deformation")

    def __repr__(self) -> str:
        longest = np.linalg.norm(self.displacement, axis=-1).max()
        return f"Deformation({describe_lattice(self.shape, self.affine)}, displacements up to {longest:.3g} mm)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of samples of the lattice along (k, j, i)."""
        return self.displacement.shape[:3]

    @classmethod
    def from_linear(cls, matrix: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray) -> Deformation:
        """The linear map `matrix` (4x4, RAS mm) sampled on a lattice."""
        return cls(lattice_points(shape, (matrix - np.eye(4)) @ affine), affine)

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """x + u(x) for `points` [..., 3] in RAS mm."""
        points = np.asarray(points, dtype=np.float64)
        return points + self._displacement_at(points)

    def sample(self, shape: tuple[int, int, int], affine: np.ndarray) -> Deformation:
        """The same deformation sampled on another lattice of `shape` (K, J, I)."""
        if shape == self.shape and np.array_equal(affine, self.affine):
            return self
        return _deformation_from(lambda points: points, self._displacement_at, shape, affine)

    def warp(
        self,
        volume: Volume,
        reference: Volume | Lattice,
        interpolation: str = "linear",
        background: float | None = None,
    ) -> Volume:
        """The moving `volume` drawn onto the fixed image: voxel x of `reference` gets volume(x + u(x)).

        `interpolation` is "linear", "bspline" (cubic) or "nearest" (labels). The pixel type stays; whole
        numbers are rounded. `background` is given to points more than half a voxel outside `volume`; it is
        the volume's minimum unless given, and 0 for "nearest".
        """
        shape, affine = (reference.shape, reference.affine) if isinstance(reference, Volume) else reference
        interpolate = interpolator(volume.array, interpolation)
        if background is None:
            background = 0 if interpolation == "nearest" else volume.array.min()
        to_index = np.linalg.inv(volume.affine)
        upper = np.array(volume.shape[::-1]) - 0.5
        warped = np.empty(shape, dtype=volume.array.dtype)
        for slab, points in slabs(shape, affine):
            index = apply_matrix(to_index, self.map_points(points))
            values = to_type(interpolate(index), warped.dtype)
            inside = ((index >= -0.5) & (index <= upper)).all(axis=-1)
            warped[slab] = np.where(inside, values, np.asarray(background, dtype=warped.dtype))
        return Volume(warped, affine, volume.name)

    def compose(self, inner: Deformation) -> Deformation:
        """x → self(inner(x)), on the lattice of `inner`."""
        return _deformation_from(inner.map_points, self._displacement_at, inner.shape, inner.affine)

    def then_linear(self, matrix: np.ndarray) -> Deformation:
        """x → matrix·(x + u(x)), on the same lattice and exact inside it; `matrix` is 4x4 in RAS mm."""
        linear_part = lattice_points(self.shape, (matrix - np.eye(4)) @ self.affine)
        return Deformation(self.displacement @ np.asarray(matrix)[:3, :3].T + linear_part, self.affine)

    def preceded_by_linear(self, matrix: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray) -> Deformation:
        """y → matrix·y + u(matrix·y), sampled on the given lattice; `matrix` is 4x4 in RAS mm."""
        inner = partial(apply_matrix, matrix)
        return _deformation_from(inner, self._displacement_at, shape, affine)

    def inverse(self, shape: tuple[int, int, int] | None = None, affine: np.ndarray | None = None) -> Deformation:
        """The inverse map, y → x with x + u(x) = y, on this lattice or a given one.

        Each point is found to 1 % of the lattice's spacing by the iteration in `inversion.solve`. Where the
        deformation folds, several x belong to one y and there is no inverse: the iteration ends at one of
        them, or at the nearest it came to, and neighbors may take different ones. A RuntimeWarning says at
        how many points it did not come near enough, and by how much at most.
        """
        shape, affine = (shape or self.shape), (self.affine if affine is None else affine)
        tolerance = 0.01 * float(np.linalg.norm(self.affine[:3, :3], axis=0).min())
        linear = np.linalg.inv(self._linear_part())
        displacement = np.empty((*shape, 3), dtype=np.float32)
        error = np.empty(shape)
        for slab, points in slabs(shape, affine):
            found, distance = solve(self.map_points, points.reshape(-1, 3), linear, tolerance)
            displacement[slab] = found.reshape(points.shape) - points
            error[slab] = distance.reshape(points.shape[:3])
        missed = int((error > tolerance).sum())
        if missed:
            warnings.warn(
                f"the inverse deformation is off by up to {error.max():.2g} mm, at {missed} of {error.size} "
                f"points by more than {tolerance:.2g} mm; the deformation folds there",
                RuntimeWarning,
                stacklevel=2,
            )
        return Deformation(displacement, affine)

    def write(self, path: str | os.PathLike) -> None:
        """Write an ITK transform (.h5, .tfm) or a displacement image (.nii.gz, .nrrd, .mha …), whole or not at all.

        Both are in LPS mm and map the fixed image's points to the moving image's, as ITK, ANTs and 3D Slicer expect
        it. Raises WriteError.
        """
        transform_files.write_field(self.displacement, self.affine, path)

    @classmethod
    def read(
        cls, path: str | os.PathLike, shape: tuple[int, int, int] | None = None, affine: np.ndarray | None = None
    ) -> Deformation:
        """Read what `write` writes, or any other ITK transform (linear, B-spline, composite).

        With `shape` (K, J, I) and `affine` the result is sampled on that lattice; they may be left out for a
        file that holds one displacement field. Raises InputError where the file is missing, unreadable, or
        holds something else.
        """
        found = cls(*transform_files.read_field(path, shape, affine))
        return found if shape is None or affine is None else found.sample(shape, affine)

    def _displacement_at(self, points: np.ndarray) -> np.ndarray:
        return sample_linear(self.displacement, apply_matrix(np.linalg.inv(self.affine), points))

    def _linear_part(self) -> np.ndarray:
        """The 3x3 matrix M of the affine map closest to x + u(x), from a part of the samples."""
        k, j, i = (max(1, n // 16) for n in self.shape)
        coarse = self.displacement[::k, ::j, ::i]
        points = lattice_points(coarse.shape[:3], self.affine @ np.diag([i, j, k, 1])).reshape(-1, 3)
        known = np.column_stack([points - points.mean(axis=0), np.ones(len(points))])
        change, *_ = np.linalg.lstsq(known, coarse.reshape(-1, 3), rcond=None)
        return np.eye(3) + change[:3].T


def _deformation_from(
    inner: PointMap, displacement_at: PointMap, shape: tuple[int, int, int], affine: np.ndarray
) -> Deformation:
    """The deformation x → inner(x) + displacement_at(inner(x)) sampled on a lattice."""
    displacement = np.empty((*shape, 3), dtype=np.float32)
    for slab, points in slabs(shape, affine):
        moved = inner(points)
        displacement[slab] = moved - points + displacement_at(moved)
    return Deformation(displacement, affine)


def read_initial(path: str | os.PathLike | None) -> Deformation | np.ndarray | None:
    """The initial transform in a file: 4x4 (RAS mm, fixed to moving) where it is linear, else a Deformation."""
    if path is None:
        return None
    matrix = transform_files.read_linear(path)
    return Deformation.read(path) if matrix is None else matrix

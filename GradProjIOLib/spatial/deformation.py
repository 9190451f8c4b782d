"""Deformations: a displacement in RAS mm on a lattice and a linear map after it, and what one does with them.

A deformation maps a point x of the fixed image to matrix·(x + u(x)) in the moving image. Coordinates are RAS mm;
ITK's files, in LPS mm, are translated when they are read and written.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from GradProjIOLib.geometry import transform_files
from GradProjIOLib.geometry.lattice import (
    affine_of,
    apply_matrix,
    check_affine,
    coarse_lattice,
    describe_lattice,
    in_view,
    lattice_points,
    slabs,
)
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.gaps import fill_gaps
from GradProjIOLib.spatial.inversion import solve
from GradProjIOLib.spatial.sampling import interpolator, sample_linear, to_type

Lattice = tuple[tuple[int, int, int], np.ndarray]
TOLERANCE = 0.01
"""How far off, in voxels, a point of an inverse may be."""


@dataclass(frozen=True, eq=False, repr=False)
class Deformation:
    """The map x → matrix·(x + u(x)), with u = `displacement` [k, j, i, 3] in RAS mm and `affine` (4x4) from the
    index (i, j, k, 1) of its lattice to RAS mm. `matrix` (4x4, RAS mm) is the identity unless given.

    u is trilinear inside the lattice. Outside it keeps the value of the nearest point of the border, as in
    3D Slicer; ITK takes u = 0 from half a voxel outside on. The matrix goes on everywhere.

    `undefined` [k, j, i] marks samples without a displacement: NaN, infinite, longer than a kilometer, or passed as
    undefined. It is None where there are none. Such samples take the nearest defined displacement. `warp` draws the
    background there, and measurements leave them out. Raises InputError where every sample is undefined.
    """

    displacement: np.ndarray
    affine: np.ndarray
    matrix: np.ndarray = field(default_factory=lambda: np.eye(4))
    undefined: np.ndarray | None = None

    def __post_init__(self) -> None:
        displacement = np.ascontiguousarray(self.displacement, dtype=np.float32)
        if displacement.ndim != 4 or displacement.shape[3] != 3:
            raise ValueError(f"expected a displacement of shape [k, j, i, 3], found {displacement.shape}")
        displacement, undefined = fill_gaps(displacement, self.undefined)
        object.__setattr__(self, "displacement", displacement)
        object.__setattr__(self, "undefined", undefined)
        for name, what in (("affine", "the lattice of the deformation"), ("matrix", "the linear part")):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.float64))
            check_affine(getattr(self, name), what)

    def __repr__(self) -> str:
        longest = np.linalg.norm(self.displacement, axis=-1).max()
        return f"Deformation({describe_lattice(self.shape, self.affine)}, displacements up to {longest:.3g} mm)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of samples of the lattice along (k, j, i)."""
        return self.displacement.shape[:3]

    @cached_property
    def is_linear(self) -> bool:
        """Whether there is nothing but the linear part: u is zero everywhere."""
        return not self.displacement.any()

    @classmethod
    def from_linear(
        cls, matrix: np.ndarray, shape: tuple[int, int, int] = (2, 2, 2), affine: np.ndarray | None = None
    ) -> Deformation:
        """The linear map `matrix` (4x4, RAS mm), with u = 0 on a lattice."""
        return cls(np.zeros((*shape, 3), np.float32), np.eye(4) if affine is None else affine, matrix)

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """matrix·(x + u(x)) for `points` [..., 3] in RAS mm."""
        points = np.asarray(points, dtype=np.float64)
        return apply_matrix(self.matrix, points + self._displacement_at(points))

    def sample(self, shape: tuple[int, int, int], affine: np.ndarray) -> Deformation:
        """The same deformation with u sampled on another lattice of `shape` (K, J, I)."""
        if shape == self.shape and np.array_equal(affine, self.affine):
            return self
        displacement = np.empty((*shape, 3), dtype=np.float32)
        undefined = np.zeros(shape, dtype=bool)
        for slab, points in slabs(shape, affine):
            displacement[slab] = self._displacement_at(points)
            undefined[slab] = self.undefined_at(points)
        return Deformation(displacement, affine, self.matrix, undefined)

    def undefined_at(self, points: np.ndarray) -> np.ndarray:
        """Whether the nearest sample to each of the `points` [..., 3] (RAS mm) is undefined: bool [...]."""
        if self.undefined is None:
            return np.zeros(points.shape[:-1], dtype=bool)
        return interpolator(self.undefined, "nearest")(apply_matrix(np.linalg.inv(self.affine), points))

    def warp(
        self,
        volume: Volume,
        reference: Volume | Lattice,
        interpolation: str = "linear",
        background: float | None = None,
    ) -> Volume:
        """The moving `volume` drawn onto the fixed image: voxel x of `reference` gets volume(matrix·(x + u(x))).

        `interpolation` is "linear", "bspline" (cubic) or "nearest" (labels). The pixel type stays; whole
        numbers are rounded. `background` is given to points more than half a voxel outside `volume`, and to those
        where the deformation is undefined; it is the volume's minimum unless given, and 0 for "nearest".
        """
        shape, affine = (reference.shape, reference.affine) if isinstance(reference, Volume) else reference
        interpolate = interpolator(volume.array, interpolation)
        if background is None:
            background = 0 if interpolation == "nearest" else volume.array.min()
        to_index = np.linalg.inv(volume.affine)
        warped = np.empty(shape, dtype=volume.array.dtype)
        for slab, points in slabs(shape, affine):
            index = apply_matrix(to_index, self.map_points(points))
            values = to_type(interpolate(index), warped.dtype)
            inside = in_view(index, volume.shape) & ~self.undefined_at(points)
            warped[slab] = np.where(inside, values, np.asarray(background, dtype=warped.dtype))
        return Volume(warped, affine, volume.name)

    def compose(self, inner: Deformation) -> Deformation:
        """x → self(inner(x)), on the lattice of `inner`. Its matrix is the product of both."""
        matrix = self.matrix @ inner.matrix
        undone = np.linalg.inv(matrix)
        displacement = np.empty((*inner.shape, 3), dtype=np.float32)
        undefined = np.zeros(inner.shape, dtype=bool) if inner.undefined is None else inner.undefined.copy()
        for slab, points in slabs(inner.shape, inner.affine):
            between = inner.map_points(points)
            displacement[slab] = apply_matrix(undone, self.map_points(between)) - points
            undefined[slab] |= self.undefined_at(between)
        return Deformation(displacement, inner.affine, matrix, undefined)

    def then_linear(self, matrix: np.ndarray) -> Deformation:
        """x → matrix·self(x), exactly; `matrix` is 4x4 in RAS mm."""
        return replace(self, matrix=np.asarray(matrix) @ self.matrix)

    def preceded_by_linear(self, matrix: np.ndarray) -> Deformation:
        """x → self(matrix·x), exactly, on a lattice that may be skewed; `matrix` is 4x4 in RAS mm."""
        undone = np.linalg.inv(matrix)
        return Deformation(
            self.displacement @ undone[:3, :3].T, undone @ self.affine, self.matrix @ matrix, self.undefined
        )

    def fading(self) -> Deformation:
        """The same inside the lattice; around it u falls to zero, over a distance twice as long as u.

        So the map is the matrix far outside, for this class and 3D Slicer as for ITK, and folds nowhere on the way.
        """
        ends = [self.displacement.take(end, axis).reshape(-1, 3) for axis in range(3) for end in (0, -1)]
        border = np.concatenate(ends)
        to_index = np.linalg.inv(self.affine[:3, :3])
        i, j, k = (int(n) for n in np.ceil(2 * np.abs(border @ to_index.T).max(axis=0)) + 1)
        widths = ((k, k), (j, j), (i, i))
        displacement = np.pad(self.displacement, (*widths, (0, 0)), mode="edge")
        for axis, (before, after) in enumerate(widths):
            size = self.shape[axis]
            ramp = np.concatenate([np.arange(before) / before, np.ones(size), np.arange(after)[::-1] / after])
            displacement *= np.expand_dims(ramp, [n for n in range(4) if n != axis]).astype(np.float32)
        undefined = None if self.undefined is None else np.pad(self.undefined, widths)
        return Deformation(displacement, self.affine @ affine_of(np.eye(3), (-i, -j, -k)), self.matrix, undefined)

    def inverse(self, shape: tuple[int, int, int] | None = None, affine: np.ndarray | None = None) -> Deformation:
        """The inverse map, y → x with self(x) = y, on a given lattice.

        Without `shape` and `affine` the inverse is on this deformation's own lattice, which the matrix moves into the
        moving image.

        Each point is found to 1 % of the lattice's spacing by the iteration in `inversion.solve`. Where the
        deformation folds, several x belong to one y and there is no inverse: the iteration ends at one of
        them, or at the nearest it came to, and neighbors may take different ones. A RuntimeWarning says at
        how many points it did not come near enough, and by how much at most.
        """
        shape, affine = (shape or self.shape), (self.matrix @ self.affine if affine is None else affine)
        to_mm, to_index = self.affine[:3, :3], np.linalg.inv(self.affine)
        in_voxels, linear = self._to_solve()
        back = np.linalg.inv(self.matrix)
        displacement = np.empty((*shape, 3), dtype=np.float32)
        missed, worst = 0, 0.0
        for slab, points in slabs(shape, to_index @ back @ affine):
            targets = torch.from_numpy(points.reshape(-1, 3).astype(np.float32))
            found, left = solve(in_voxels, targets, linear, TOLERANCE)
            # The inverse is x = matrix⁻¹·y + d. A Deformation adds its displacement before its matrix, so d is turned.
            displacement[slab] = ((found - targets).numpy() @ (self.matrix[:3, :3] @ to_mm).T).reshape(points.shape)
            missed += int((left.norm(dim=1) > TOLERANCE).sum())
            worst = max(worst, float(np.linalg.norm(left.numpy() @ to_mm.T, axis=1).max()))
        if missed:
            warnings.warn(
                f"the inverse deformation is off by up to {worst:.2g} mm, at {missed} of {math.prod(shape)} "
                f"points by more than {TOLERANCE:.0%} of the spacing; the deformation folds there",
                RuntimeWarning,
                stacklevel=2,
            )
        return Deformation(displacement, affine, back)

    def source_points(self, points: np.ndarray) -> np.ndarray:
        """Where `points` [n, 3] (RAS mm) come from: the inverse map at single points, without a lattice.

        Found as in `inverse`, which says what it means where the deformation folds.
        """
        to_index = np.linalg.inv(self.matrix @ self.affine)
        index = apply_matrix(to_index, np.asarray(points, dtype=np.float64))
        in_voxels, linear = self._to_solve()
        found, _ = solve(in_voxels, torch.from_numpy(index.astype(np.float32)), linear, TOLERANCE / 10)
        return apply_matrix(self.affine, found.numpy().astype(np.float64))

    def write(self, path: str | os.PathLike) -> None:
        """Write an ITK transform (.h5, .tfm) or a displacement image (.nii.gz, .nrrd, .mha …), whole or not at all.

        Both are in LPS mm and map the fixed image's points to the moving image's, as ITK, ANTs and 3D Slicer expect
        it. A transform with a linear part is written as a composite of an affine and a displacement field. An image
        holds both in its displacements, and ends with its lattice. What is undefined is written as it was filled in.
        Raises WriteError.
        """
        transform_files.write_transform(self.displacement, self.affine, self.matrix, path)

    @classmethod
    def read(
        cls, path: str | os.PathLike, shape: tuple[int, int, int] | None = None, affine: np.ndarray | None = None
    ) -> Deformation:
        """Read what `write` writes, or any other ITK transform (linear, B-spline, composite).

        With `shape` (K, J, I) and `affine` the displacement is sampled on that lattice; they may be left out for a
        file that holds at most one displacement field, and linear transforms. Raises InputError where the file is
        missing, unreadable, or holds something else.
        """
        found = cls(*transform_files.read_transform(path, shape, affine))
        return found if shape is None or affine is None else found.sample(shape, affine)

    def _displacement_at(self, points: np.ndarray) -> np.ndarray:
        if self.is_linear:
            return np.zeros(points.shape, dtype=np.float32)
        return sample_linear(self.displacement, apply_matrix(np.linalg.inv(self.affine), points))

    def _to_solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What `inversion.solve` takes, with components along (i, j, k).

        u [1, 3, K, J, I] in voxels, and the inverse (3x3) of the linear part of x + u(x).
        """
        to_mm, to_index = self.affine[:3, :3], np.linalg.inv(self.affine[:3, :3])
        in_voxels = torch.from_numpy((self.displacement @ to_index.T).astype(np.float32)).movedim(-1, 0)[None]
        return in_voxels, torch.from_numpy((to_index @ np.linalg.inv(self._linear_part()) @ to_mm).astype(np.float32))

    def _linear_part(self) -> np.ndarray:
        """The 3x3 matrix M of the affine map closest to x + u(x), from a part of the samples."""
        k, j, i = (max(1, n // 16) for n in self.shape)
        coarse = self.displacement[::k, ::j, ::i]
        points = lattice_points(coarse.shape[:3], self.affine @ np.diag([i, j, k, 1])).reshape(-1, 3)
        known = np.column_stack([points - points.mean(axis=0), np.ones(len(points))])
        change, *_ = np.linalg.lstsq(known, coarse.reshape(-1, 3), rcond=None)
        return np.eye(3) + change[:3].T


def as_deformation(transform: Deformation | np.ndarray) -> Deformation:
    """A linear map (4x4, RAS mm) as a Deformation; a Deformation as it is."""
    return transform if isinstance(transform, Deformation) else Deformation.from_linear(transform)


def read_initial(path: str | os.PathLike, fixed: Volume) -> Deformation | np.ndarray:
    """The initial transform in a file: 4x4 (RAS mm, fixed to moving) where it is linear, else a Deformation.

    What has to be sampled is sampled over the fixed image, as `coarse_lattice` says. Raises InputError.
    """
    found = Deformation(*transform_files.read_transform(path, *coarse_lattice(fixed.shape, fixed.affine)))
    return found.matrix if found.is_linear else found

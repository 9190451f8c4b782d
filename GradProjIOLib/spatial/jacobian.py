"""Where a deformation grows, shrinks and folds: Jacobian determinants and the non-diffeomorphic volume.

Everything is computed from the displacement in voxels, d = A⁻¹·u for a lattice with the affine A: the map
i → i + d(i) has the same Jacobian determinant as the physical map x → x + u(x). The linear part of a deformation
multiplies it by a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from GradProjIOLib.errors import InputError
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.spatial.gaps import correct_beside

VOXELS_AT_ONCE = 1 << 17
"""How many voxels are computed at the same time, which bounds the memory."""
LEAST_DETERMINANT = np.float32(1e-3)
"""The smallest determinant of which a map of logarithms shows the logarithm."""


@dataclass(frozen=True, eq=False)
class Folding:
    """How much a deformation folds: the measures of Liu et al. 2024 (IJCV), which the LUMIR challenge uses.

    `ndv_voxels` is the non-diffeomorphic volume in voxels and `ndv_percent` the same as a share of the
    `voxels` that were looked at; `mask` [k, j, i] marks the `folded_voxels` voxels among them whose
    determinant is not positive. `region` [k, j, i] says which were looked at; it is None where all were.
    """

    ndv_percent: float
    ndv_voxels: float
    folded_voxels: int
    mask: np.ndarray
    voxels: int
    region: np.ndarray | None

    @property
    def folded_percent(self) -> float:
        """Folded voxels as a share of the voxels that were looked at."""
        return 100 * self.folded_voxels / self.voxels


def determinant_map(deformation: Deformation, with_affine: bool = True) -> np.ndarray:
    """Jacobian determinant of the whole map at every sample of the deformation's lattice: float32 [k, j, i].

    1 keeps the volume, 2 doubles it, 0 and below folds; it is 1 where the deformation is undefined. It may leave out
    the linear part. See `jacobian_determinant` and `gaps.correct_beside` for the differences.
    """
    displacement = voxel_displacement(deformation)
    determinant = jacobian_determinant(displacement).numpy()
    correct_beside(determinant, displacement.movedim(0, -1).numpy(), deformation.undefined)
    if with_affine:
        determinant *= linear_determinant(deformation)
    if deformation.undefined is not None:
        determinant[deformation.undefined] = 1
    return determinant


def linear_determinant(deformation: Deformation) -> np.float32:
    """Determinant of the linear part: what it makes of volumes everywhere."""
    return np.float32(np.linalg.det(deformation.matrix[:3, :3]))


def folding(deformation: Deformation, region: np.ndarray | None = None) -> Folding:
    """Non-diffeomorphic volume and folded voxels of a deformation on its lattice, as LUMIR computes them.

    Only voxels in `region` count (bool [k, j, i], not empty; all, without it); undefined voxels never count. Raises
    InputError where no voxel is left.

    The displacement goes on unchanged outside the lattice, so at the lattice's border the central differences
    are half the one-sided ones of `determinant_map`. The linear part does not change where the
    deformation folds; it only scales the folded volume.
    """
    if deformation.undefined is not None:
        region = ~deformation.undefined if region is None else region & ~deformation.undefined
        if not region.any():
            raise InputError("The transform is undefined (NaN or too large) wherever it should be measured.")
    displacement = voxel_displacement(deformation)
    volume = non_diffeomorphic_volume(displacement).numpy() * abs(linear_determinant(deformation))
    determinant = _over_blocks(_central_determinant, _padded(displacement)).numpy()
    correct_beside(determinant, displacement.movedim(0, -1).numpy(), deformation.undefined)
    mask = determinant <= 0
    if region is not None:
        volume = volume[region]
        mask &= region
    total = float(volume.sum(dtype=np.float64))
    return Folding(100 * total / volume.size, total, int(mask.sum()), mask, volume.size, region)


def non_diffeomorphic_volume(displacement: torch.Tensor) -> torch.Tensor:
    """Volume in voxels that i → i + d(i) turns inside out around every voxel: [K, J, I].

    `displacement` d is [3, K, J, I] in voxels, components along k, j, i; it goes on unchanged outside. The
    sum is the non-diffeomorphic volume of Liu et al. 2024.
    """
    return _over_blocks(_folded_volume, _padded(displacement))


def summary(determinant: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """Range of a determinant map, in a mask if one is given: min, max, percentile_1, percentile_99, and of log |J|
    over the voxels that do not fold: mean_log and its standard deviation std_log.
    """
    values = determinant[mask.astype(bool)] if mask is not None else determinant.ravel()
    low, high = np.percentile(values, [1, 99])
    logarithm = np.log(values[values > 0])
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_1": float(low),
        "percentile_99": float(high),
        "mean_log": float(logarithm.mean(dtype=np.float64)) if logarithm.size else 0.0,
        "std_log": float(logarithm.std(dtype=np.float64)) if logarithm.size else 0.0,
    }


def logarithm(determinant: np.ndarray) -> np.ndarray:
    """The natural logarithm of a determinant map; that of LEAST_DETERMINANT where it is less, as in folds."""
    return np.log(np.maximum(determinant, LEAST_DETERMINANT))


def voxel_displacement(deformation: Deformation) -> torch.Tensor:
    """The displacement u [3, K, J, I] in voxels of its lattice, before the linear part; components along k, j and i."""
    to_index = np.linalg.inv(deformation.affine[:3, :3])[::-1].astype(np.float32)
    displacement = torch.from_numpy(deformation.displacement)
    return torch.einsum("ab,kjib->akji", torch.from_numpy(np.ascontiguousarray(to_index)), displacement)


def jacobian_determinant(displacement: torch.Tensor) -> torch.Tensor:
    """Determinant of i → i + d(i) for `displacement` d [3, K, J, I] in voxels (components along k, j, i).

    Central differences inside, one-sided ones at the border, so a linear map has the same value everywhere.
    """
    padded = _padded(displacement)
    for axis, size in enumerate(displacement.shape[1:], start=1):
        if size > 1:
            for end, inward in ((0, 2), (-1, -3)):
                padded.select(axis, end).mul_(2).sub_(padded.select(axis, inward))
    return _over_blocks(_central_determinant, padded)


def _padded(displacement: torch.Tensor) -> torch.Tensor:
    """The displacement with one more sample on every side, which repeats the border."""
    return F.pad(displacement[None], (1,) * 6, mode="replicate")[0]


def _over_blocks(compute: Callable[[torch.Tensor], torch.Tensor], padded: torch.Tensor) -> torch.Tensor:
    """What `compute` makes of a padded displacement [3, k + 2, j + 2, i + 2], a few slices k at a time: [k, j, i]."""
    depth, height, width = (size - 2 for size in padded.shape[1:])
    result = padded.new_empty(depth, height, width)
    thickness = max(1, VOXELS_AT_ONCE // (height * width))
    for first in range(0, depth, thickness):
        result[first : first + thickness] = compute(padded[:, first : first + thickness + 2])
    return result


def _central_determinant(block: torch.Tensor) -> torch.Tensor:
    """Determinants from central differences, at the inner points of `block` [3, k + 2, j + 2, i + 2]."""
    columns = []
    for axis in range(3):
        column = _neighbor(block, {axis: 1}).sub(_neighbor(block, {axis: -1})).mul_(0.5)
        column[axis] += 1
        columns.append(column)
    return _dot(columns[0], _cross(columns[1], columns[2]))


def _folded_volume(block: torch.Tensor) -> torch.Tensor:
    """Volume in voxels that the map turns inside out around each of the inner points of `block`.

    Liu et al. 2024: around each point the map is taken as linear on tetrahedra. Eight have the point and one
    neighbor along each axis as corners, and two the point and three of its diagonal neighbors; in these ten
    every cell of the lattice is covered twice, whence the factor 1/2. A tetrahedron has a sixth of its
    determinant as volume.
    """
    along = [[_difference(block, {axis: sign}).mul_(sign) for sign in (1, -1)] for axis in range(3)]
    folded = torch.zeros_like(along[0][0][0])
    for along_j, along_i in itertools.product(along[1], along[2]):
        normal = _cross(along_j, along_i)
        for along_k in along[0]:
            folded -= _dot(along_k, normal).clamp_(max=0)
    for sign in (1, -1):
        # The order of the columns makes the determinant of the identity positive.
        kj, ki, ji = (_difference(block, dict.fromkeys(axes, sign)) for axes in ((0, 1), (0, 2), (1, 2)))
        folded += (sign * _dot(kj, _cross(ki, ji))).clamp_(min=0)
    return folded / 12


def _difference(block: torch.Tensor, offset: dict[int, int]) -> torch.Tensor:
    """Difference of the map i + d(i) between the neighbors at `offset` and the inner points of `block`."""
    difference = _neighbor(block, offset) - _neighbor(block, {})
    for axis, step in offset.items():
        difference[axis] += step
    return difference


def _neighbor(block: torch.Tensor, offset: dict[int, int]) -> torch.Tensor:
    """The displacement at the neighbors of the inner points of `block`, by the steps along each axis."""
    for axis in range(3):
        block = block.narrow(axis + 1, 1 + offset.get(axis, 0), block.shape[axis + 1] - 2)
    return block


def _cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cross product along the first axis; torch.linalg.cross takes several times as long along it."""
    product = torch.empty_like(a)
    for row in range(3):
        second, third = (row + 1) % 3, (row + 2) % 3
        torch.mul(a[second], b[third], out=product[row]).addcmul_(a[third], b[second], value=-1)
    return product


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a[0] * b[0]).addcmul_(a[1], b[1]).addcmul_(a[2], b[2])

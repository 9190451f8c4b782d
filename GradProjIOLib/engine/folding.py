"""Folding as an objective: how far Jacobian determinants fall short of a small positive number.

Gradient inverse consistency keeps maps close to diffeomorphisms, but it is sampled at a few points of the lattice and
does not see every fold. This penalty does: mean of max(0, ε − det) over all cells of both directions, with the
determinant of the three edges that meet in one corner of the cell. It is zero, and so is its gradient, where nothing
comes close to folding. Each step of an optimization looks at another of the eight corners, as a cell can fold at any.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_DETERMINANT = 0.2
"""ε: determinants above it cost nothing."""
CORNERS = 8
"""Of a cell of the lattice."""
SLICES = 4
"""How many slices are computed at once, so that what lies between is still in a processor's cache."""


def folding_penalty(displacement: Tensor, least: float = LEAST_DETERMINANT, corner: int = 0) -> Tensor:
    """Mean of max(0, least − det) over all cells, summed over the batch entries: a scalar.

    displacement: [N, 3, D, H, W] in samples of the lattice, components along (x, y, z) = (W, H, D). An axis with one
    sample counts as undeformed. corner: 0 for forward differences; its bits 1, 2 and 4 take backward ones along x, y
    and z. Only the few cells that contribute are looked at for the gradient.
    """
    mirrored = [axis for axis in range(3) if corner >> axis & 1]
    if mirrored:
        # Mirrored along an axis, a map has the same determinants, and forward differences for backward ones.
        signs = torch.ones(3, 1, 1, 1, device=displacement.device)
        signs[mirrored] = -1
        displacement = displacement.flip([4 - axis for axis in mirrored]) * signs
    with torch.no_grad():
        determinants = cell_determinants(displacement)
        entry, z, y, x = (determinants < least).nonzero(as_tuple=True)
        count = determinants[0].numel()
        last_z, last_y, last_x = (n - 1 for n in displacement.shape[2:])
        # One look-up for the corner of a cell and its three neighbors: each has a gradient as large as the field.
        at_z = torch.stack([z, z, z, (z + 1).clamp(max=last_z)])
        at_y = torch.stack([y, y, (y + 1).clamp(max=last_y), y])
        at_x = torch.stack([x, (x + 1).clamp(max=last_x), x, x])
    corner, *neighbors = displacement[entry, :, at_z, at_y, at_x]
    return (least - _determinants([neighbor - corner for neighbor in neighbors])).sum() / count


def cell_determinants(displacement: Tensor) -> Tensor:
    """Jacobian determinants by forward differences: [N, D − 1, H − 1, W − 1] (an axis with one sample keeps it)."""
    depth = displacement.shape[2]
    blocks = [displacement[:, :, first : first + SLICES + 1] for first in range(0, max(depth - 1, 1), SLICES)]
    return torch.cat([_block_determinants(block) for block in blocks], dim=1)


def _block_determinants(displacement: Tensor) -> Tensor:
    size = [max(n - 1, 1) for n in displacement.shape[2:]]
    corner = _cells(displacement, size)
    differences = []
    for axis in (4, 3, 2):
        first = min(1, displacement.shape[axis] - 1)
        neighbor = displacement.narrow(axis, first, corner.shape[axis])
        differences.append(_cells(neighbor, size) - corner)
    return _determinants(differences)


def _cells(values: Tensor, size: list[int]) -> Tensor:
    return values[:, :, : size[0], : size[1], : size[2]]


def _determinants(differences: list[Tensor]) -> Tensor:
    """Determinants [N, …] from the differences [N, 3, …] of the displacement along x, y and z."""
    columns = [list(difference.unbind(1)) for difference in differences]
    for component, column in enumerate(columns):
        column[component] = column[component] + 1
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = columns
    return ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)

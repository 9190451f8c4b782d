"""Folding as an objective: how far Jacobian determinants fall short of a small positive number.

Gradient inverse consistency keeps maps close to diffeomorphisms, but it is sampled at a few points of the lattice and
does not see every fold. This penalty does: mean of max(0, ε − det) over all cells of both directions, with the
determinant of the three edges that meet in one corner of the cell. It is zero, and so is its gradient, where nothing
comes close to folding. Each step of an optimization looks at another of the eight corners, as a cell can fold at any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_DETERMINANT = 0.2
"""ε: determinants above it cost nothing."""
CORNERS = 8
"""Of a cell of the lattice."""
SLICES = 4
"""How many slices are computed at once, so that what lies between is still in a processor's cache."""


def folding_penalty(displacement: Tensor, corner: int = 0) -> Tensor:
    """Mean of max(0, ε − det) over all cells, summed over the batch entries: a scalar.

    displacement: [N, 3, D, H, W] in samples of the lattice, components along (x, y, z) = (W, H, D). An axis with one
    sample counts as undeformed. corner: see ``cell_determinants``. Only the few cells that contribute are looked at for
    the gradient.
    """
    with torch.no_grad():
        determinants = cell_determinants(displacement, corner)
        entry, *cell = (determinants < LEAST_DETERMINANT).nonzero(as_tuple=True)
        count = determinants[0].numel()
        # One look-up for both ends of the three edges: each look-up has a gradient as large as the field.
        ends = [first for axis in range(3) for first in _ends(corner, axis, displacement.shape[2:])]
        z, y, x = (torch.stack([place + end[axis] for end in ends]) for axis, place in enumerate(cell))
    x0, x1, y0, y1, z0, z1 = displacement[entry, :, z, y, x]
    return (LEAST_DETERMINANT - _determinants([x1 - x0, y1 - y0, z1 - z0])).sum() / count


def cell_determinants(displacement: Tensor, corner: int = 0) -> Tensor:
    """Jacobian determinants in all cells: [N, D − 1, H − 1, W − 1] (an axis with one sample keeps it).

    Each is that of the three edges which meet in one corner of the cell. corner: 0 for the first along all axes; its
    bits 1, 2 and 4 choose the last along x, y and z.
    """
    depth = displacement.shape[2]
    blocks = [displacement[:, :, first : first + SLICES + 1] for first in range(0, max(depth - 1, 1), SLICES)]
    return torch.cat([_block_determinants(block, corner) for block in blocks], dim=1)


def _block_determinants(displacement: Tensor, corner: int) -> Tensor:
    shape = displacement.shape[2:]
    size = [max(n - 1, 1) for n in shape]

    def at(end: Sequence[int]) -> Tensor:
        z, y, x = (slice(first, first + n) for first, n in zip(end, size, strict=True))
        return displacement[:, :, z, y, x]

    edges = (_ends(corner, axis, shape) for axis in range(3))
    return _determinants([at(last) - at(first) for first, last in edges])


def _ends(corner: int, axis: int, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where a cell's edge along an axis (0 is x) begins and ends, along (z, y, x) from the cell's first sample."""
    first = [corner >> 2 & 1, corner >> 1 & 1, corner & 1]
    last = list(first)
    first[2 - axis], last[2 - axis] = 0, 1
    limits = [min(1, n - 1) for n in shape]
    return list(map(min, first, limits)), list(map(min, last, limits))


def _determinants(differences: list[Tensor]) -> Tensor:
    """Determinants [N, …] from the differences [N, 3, …] of the displacement along x, y and z."""
    columns = [list(difference.unbind(1)) for difference in differences]
    for component, column in enumerate(columns):
        column[component] = column[component] + 1
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = columns
    return ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)

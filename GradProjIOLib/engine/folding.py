"""Folding as an objective: how far Jacobian determinants fall short of a small positive number.

Gradient inverse consistency keeps maps close to diffeomorphisms, but it is sampled at a few points of the lattice and
does not see every fold. This penalty does: mean of max(0, ε − det) over all cells of both directions, with the
determinant of forward differences, one for each cell of the lattice. It is zero, and so is its gradient, where nothing
comes close to folding.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_DETERMINANT = 0.1
"""ε: determinants above it cost nothing."""


def folding_penalty(displacement: Tensor, least: float = LEAST_DETERMINANT) -> Tensor:
    """Mean of max(0, least − det) over all cells, summed over the batch entries: a scalar.

    displacement: [N, 3, D, H, W] in samples of the lattice, components along (x, y, z) = (W, H, D). An axis with one
    sample counts as undeformed.
    """
    return torch.relu(least - cell_determinants(displacement)).mean(dim=(1, 2, 3)).sum()


def cell_determinants(displacement: Tensor) -> Tensor:
    """Jacobian determinants by forward differences: [N, D − 1, H − 1, W − 1] (an axis with one sample keeps it)."""
    size = [max(n - 1, 1) for n in displacement.shape[2:]]
    columns = []
    for component, axis in enumerate((4, 3, 2)):
        if displacement.shape[axis] == 1:
            column = list(torch.zeros_like(_cells(displacement, size)).unbind(1))
        else:
            column = list(_cells(displacement.diff(dim=axis), size).unbind(1))
        column[component] = column[component] + 1
        columns.append(column)
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = columns
    return ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)


def _cells(values: Tensor, size: list[int]) -> Tensor:
    return values[:, :, : size[0], : size[1], : size[2]]

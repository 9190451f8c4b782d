"""Landmarks as an objective: points that a person has marked in both images.

Their gradient is one more that is projected where it conflicts with the others, in both stages. So where a landmark and
the images disagree, the projection decides what gives way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from GradProjIOLib.spatial import maps

RADIUS = 12.0
"""How far around a landmark, in mm, the images count as much as it does."""


class LandmarkDistance:
    """How far pairs of landmarks are apart under the maps of both directions.

    fixed, moving: [n, 3] in the frame of ``spatial.maps``; moving landmarks lie where the initial transform puts them.
    mm_per_unit: [3, 3], from a difference of points in that frame to RAS mm. tolerance: mm within which a landmark
    hardly pulls, as no click is exact. share: the part of the lattice that one landmark stands for.
    """

    def __init__(self, fixed: Tensor, moving: Tensor, mm_per_unit: Tensor, tolerance: float, share: float):
        self.sides = fixed, moving
        self.mm_per_unit, self.tolerance = mm_per_unit, tolerance
        self.weight = share * len(fixed)

    def distances(self, fields: Sequence[Tensor]) -> Tensor:
        """Distances in mm [2, n] between where a direction maps a landmark and its partner, fixed → moving first."""
        chains = zip(*(field.split(1) for field in fields), strict=True)
        return torch.stack([
            self._distance(maps.displace(chain, start.view(1, -1, 1, 1, 3)).view(-1, 3), end)
            for chain, start, end in zip(chains, self.sides, reversed(self.sides), strict=True)
        ])  # fmt: skip

    def __call__(self, fields: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar: √(1 + d²/t²) − 1 for a distance d and the tolerance t, averaged, of both directions.

        It is quadratic near zero and linear far away, so that one wrong landmark does not outweigh all others.
        """
        return ((1 + (self.distances(fields) / self.tolerance).square()).sqrt() - 1).mean(dim=1).sum()

    def _distance(self, mapped: Tensor, end: Tensor) -> Tensor:
        # The small number keeps the derivative of the root finite.
        return (((mapped - end) @ self.mm_per_unit.T).square().sum(dim=-1) + 1e-12).sqrt()

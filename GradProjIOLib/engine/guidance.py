"""Landmarks and labels as objectives: points and structures that a person has marked in both images.

Their gradients are further ones that are projected where they conflict with the others, in both stages. So where a
landmark and the images disagree, the projection decides what gives way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from GradProjIOLib.spatial import maps
from GradProjIOLib.spatial.sampling import sample

RADIUS = 12.0
"""How far around a landmark or a structure, in mm, the images count as much as it does."""
TOLERANCE = 2.0
"""Distance in mm within which a structure's surface hardly pulls."""


class LandmarkDistance:
    """How far pairs of landmarks are apart under the maps of both directions.

    fixed, moving: [n, 3] in the frame of ``spatial.maps``; moving landmarks lie where the initial transform puts them.
    mm_per_unit: [3, 3], from a difference of points in that frame to RAS mm. tolerances: [n], mm within which a
    landmark hardly pulls, as no click is exact. share: the part of the lattice that one landmark stands for.
    """

    def __init__(self, fixed: Tensor, moving: Tensor, mm_per_unit: Tensor, tolerances: Tensor, share: float):
        self.sides = fixed, moving
        self.mm_per_unit, self.tolerances = mm_per_unit, tolerances
        self.weight = share * len(fixed)

    def distances(self, fields: Sequence[Tensor]) -> Tensor:
        """Distances in mm [2, n] between where a direction maps a landmark and its partner, fixed → moving first."""
        chains = zip(*(field.split(1) for field in fields), strict=True)
        distances = []
        for chain, start, end in zip(chains, self.sides, reversed(self.sides), strict=True):
            mapped = maps.displace(chain, start.view(1, -1, 1, 1, 3)).view(-1, 3)
            square = ((mapped - end) @ self.mm_per_unit.T).square().sum(dim=-1)
            # The small number keeps the derivative of the root finite.
            distances.append((square + 1e-12).sqrt())
        return torch.stack(distances)

    def __call__(self, fields: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar: √(1 + d²/t²) − 1 for a distance d and the tolerance t, averaged, of both directions.

        It is quadratic near zero and linear far away, so that one wrong landmark does not outweigh all others.
        """
        return ((1 + (self.distances(fields) / self.tolerances).square()).sqrt() - 1).mean(dim=1).sum()


@dataclass(frozen=True)
class Structure:
    """One image's side of a structure: points in and on it, and a map of it around them.

    points: [n, 3] in any frame; a loss wants that of ``spatial.maps``. values: [2, n], the map there: how much of each
    point lies inside, 0 to 1, and its signed distance from the surface in mm, negative inside. surface: [n], whether a
    point is on it. volumes: [n], what each point stands for. image: the map [1, 2, D, H, W]. to_image: [4, 4], from the
    frame of the points to that of the map. near: volume in mm³ of what lies within RADIUS around the structure.
    """

    points: Tensor
    values: Tensor
    surface: Tensor
    volumes: Tensor
    image: Tensor
    to_image: Tensor
    near: float

    def at(self, points: Tensor) -> Tensor:
        """The map [2, n] at points [n, 3]."""
        inside = points @ self.to_image[:3, :3].T + self.to_image[:3, 3]
        return sample(self.image, inside.view(1, -1, 1, 1, 3)).view(2, -1)

    def loss(self, found: Tensor) -> Tensor:
        """The loss where the map of the other image's structure is ``found`` [2, n] at the mapped points."""
        inside, distance = self.values
        other_inside, other_distance = found
        shared = (self.volumes * inside * other_inside).sum()
        total = (self.volumes * (inside.square() + other_inside.square())).sum()
        apart = (other_distance - distance)[self.surface] / TOLERANCE
        return 1 - 2 * shared / total + ((1 + apart.square()).sqrt() - 1).mean()


class LabelOverlap:
    """How well structures of two label maps meet under the maps of both directions.

    structures: the fixed and the moving image's side of each; the moving one lies where the initial transform puts it.
    weights: of each structure.
    """

    def __init__(self, structures: Sequence[Sequence[Structure]], weights: Sequence[float]):
        self.structures = structures
        self.weight = sum(weights)
        self.shares = [weight / self.weight for weight in weights]

    def __call__(self, fields: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar: of each direction and structure what does not overlap, and how far surfaces are apart.

        The first is 1 − 2 Σ a b / Σ (a² + b²) (Milletari et al., 3DV 2016) for how much of a point lies inside its own
        structure, a, and how much of where it is mapped lies inside the other image's, b. The second is that of
        landmarks, for the points on the surface and their distance from the other image's; it is what lets structures
        find each other that do not overlap yet. The structures' mean, by their weights.
        """
        chains = zip(*(field.split(1) for field in fields), strict=True)
        losses = []
        for direction, chain in enumerate(chains):
            own = [pair[direction] for pair in self.structures]
            others = [pair[1 - direction] for pair in self.structures]
            points = torch.cat([one.points for one in own])
            mapped = maps.displace(chain, points.view(1, -1, 1, 1, 3)).view(-1, 3)
            parts = mapped.split([len(one.points) for one in own])
            for one, other, part, share in zip(own, others, parts, self.shares, strict=True):
                losses.append(share * one.loss(other.at(part)))
        return torch.stack(losses).sum()

"""Random changes of an image in training: place, size, side and brightness.

The changes, their ranges and probabilities are those of Zhang, Zhao and Tao (Learn2Reg 2024), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES = 10.0
MILLIMETRES = 5.0
SCALE = 0.03
GAMMA = 0.2
PROBABILITY = 0.5
GAMMA_PROBABILITY = 0.1


@dataclass(frozen=True)
class Change:
    """What is done to one image.

    matrix 3x3 and shift (mm) along (x, y, z) = (W, H, D) of the lattice map points of the changed image, measured
    in mm from its middle, to points of the original. Intensities in [0, 1] are raised to the power ``gamma``.
    """

    matrix: Tensor
    shift: Tensor
    gamma: float

    def __call__(self, image: Tensor, spacing: Tensor) -> Tensor:
        """The changed image: [1, D, H, W] → [1, D, H, W]; 0 comes in from outside. spacing: mm along (x, y, z)."""
        if not torch.equal(self.matrix, torch.eye(3)) or self.shift.any():
            extent = spacing * torch.tensor(image.shape[:0:-1]) / 2
            theta = torch.cat([self.matrix * extent / extent[:, None], (self.shift / extent)[:, None]], dim=1)
            grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
            image = F.grid_sample(image[None], grid, align_corners=False)[0]
        return image if self.gamma == 1 else image.clamp(0, 1) ** self.gamma


def random_change(generator: torch.Generator) -> Change:
    """Rotation, translation, scale and vertical flip with a probability of 50 % each, gamma with 10 %."""

    def happens(probability: float = PROBABILITY) -> bool:
        return torch.rand((), generator=generator).item() < probability

    def drawn(limit: float, count: int) -> Tensor:
        return limit * (2 * torch.rand(count, generator=generator) - 1)

    angles, shift, scale, gamma = drawn(DEGREES, 3), drawn(MILLIMETRES, 3), drawn(SCALE, 1), drawn(GAMMA, 1)
    matrix = torch.eye(3)
    if happens():
        matrix = matrix @ _rotation(torch.deg2rad(angles))
    if not happens():
        shift = torch.zeros(3)
    if happens():
        matrix = matrix / (1 + scale)
    if happens():
        # Upside down: along the axis D of arrays [k, j, i] in RAS order.
        matrix = matrix @ torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    return Change(matrix, shift, 1 + gamma.item() if happens(GAMMA_PROBABILITY) else 1.0)


def _rotation(angles: Tensor) -> Tensor:
    """Rotation by an angle in radians about each of x, y and z, one after the other."""
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles.tolist()):
        generator = torch.zeros(3, 3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        generator[second, first], generator[first, second] = angle, -angle
        matrix = torch.linalg.matrix_exp(generator) @ matrix
    return matrix

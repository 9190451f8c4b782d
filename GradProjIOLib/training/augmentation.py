"""Random changes of an image in training: place, size, side and brightness.

The changes, their ranges and probabilities are those of Zhang, Zhao and Tao (Learn2Reg 2024), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from GradProjIOLib.spatial.sampling import sample

DEGREES = 10.0
MILLIMETERS = 5.0
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
            extent = spacing * (torch.tensor(image.shape[:0:-1]) - 1) / 2
            theta = torch.cat([self.matrix * extent / extent[:, None], (self.shift / extent)[:, None]], dim=1)
            points = F.affine_grid(theta[None], [1, *image.shape], align_corners=True)
            image = sample(image[None], points, "zeros")[0]
        return image if self.gamma == 1 else image.clamp(0, 1) ** self.gamma


def random_change(generator: torch.Generator) -> Change:
    """Rotation, translation, scale and vertical flip with a probability of 50 % each, gamma with 10 %."""

    def happens(probability: float = PROBABILITY) -> bool:
        return torch.rand((), generator=generator).item() < probability

    def drawn(limit: float, count: int) -> Tensor:
        return limit * (2 * torch.rand(count, generator=generator) - 1)

    angles, shift, scale, gamma = drawn(DEGREES, 3), drawn(MILLIMETERS, 3), drawn(SCALE, 1), drawn(GAMMA, 1)
    matrix = torch.eye(3)
    if happens():
        # About x, y and z, one after the other.
        turn = Rotation.from_euler("xyz", angles.numpy(), degrees=True).as_matrix()
        matrix = matrix @ torch.from_numpy(turn).float()
    if not happens():
        shift = torch.zeros(3)
    if happens():
        matrix = matrix / (1 + scale)
    if happens():
        # Upside down: along the axis D of arrays [k, j, i] in RAS order.
        matrix = matrix @ torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    return Change(matrix, shift, 1 + gamma.item() if happens(GAMMA_PROBABILITY) else 1.0)

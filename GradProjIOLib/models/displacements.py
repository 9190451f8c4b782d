"""A deformation model whose parameters are the two displacement fields themselves."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from GradProjIOLib.spatial import maps

KNOTS_PER_DEVIATION = 0.75
"""Standard deviation of the Gaussians divided by the distance between two knots.

The Gaussians then add up to a constant within 0.02 %.
"""
NEGLIGIBLE = 1e-8
"""What a Gaussian has less than that at its tails adds nothing in single precision."""


class Displacements(nn.Module):
    """Displacement fields of both directions: the fields to start from, and a smooth change that is optimized.

    start: [2, 3, D, H, W] in samples of the lattice, components along (x, y, z) = (W, H, D), fixed → moving first.
    smoothing: standard deviation, in samples, of the Gaussians that make up the change, one around each knot of a
    coarser grid. It makes the change smooth, and a step of the optimizer as well, which moves neighborhoods rather than
    single samples. (The same with B-splines instead of Gaussians: Rueckert et al., IEEE TMI 18(8), 1999.)
    """

    unit: Tensor
    start: Tensor

    def __init__(self, start: Tensor, smoothing: float):
        super().__init__()
        lattice = start.shape[2:]
        self.register_buffer("unit", (1 / maps.voxels_per_unit(lattice, start.device)).view(1, 3, 1, 1, 1))
        self.register_buffer("start", (start * self.unit).contiguous())
        self.bases = [_gaussians(size, smoothing, start.device) for size in lattice]
        knots = [basis.shape[1] for basis in self.bases]
        self.change = nn.Parameter(torch.zeros(*start.shape[:2], *knots, device=start.device))

    def forward(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """The fields [2, 3, D, H, W] in the frame of :mod:`spatial.maps`; the images are not looked at."""
        along_d, along_h, along_w = self.bases
        change = along_h @ (self.unit * self.change @ along_w.T)
        # The sum is part of the last product, where it costs no further pass over the memory.
        field = torch.baddbmm(
            self.start.view(6, len(along_d), -1), along_d.expand(6, -1, -1), change.view(6, change.shape[2], -1)
        )
        return [field.view(self.start.shape)]


@lru_cache(maxsize=16)
def _gaussians(size: int, deviation: float, device: torch.device) -> Tensor:
    """What a knot contributes to each sample of an axis: [size, knots]; every row sums to one."""
    distance = deviation / KNOTS_PER_DEVIATION
    count = max(1, round((size - 1) / distance)) + 1
    knots = torch.linspace(0, size - 1, count, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64)[:, None] - knots) / deviation).square())
    # Processors multiply subnormal numbers a hundred times more slowly than others.
    weights[weights < NEGLIGIBLE] = 0
    return (weights / weights.sum(dim=1, keepdim=True)).to(device, torch.float32)

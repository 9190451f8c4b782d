"""A deformation model whose parameters are the two displacement fields themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from GradProjIOLib.engine.similarity import gaussian_blur
from GradProjIOLib.spatial import maps


class Displacements(nn.Module):
    """Displacement fields of both directions: the fields to start from, and a smoothed change that is optimized.

    start: [2, 3, D, H, W] in samples of the lattice, components along (x, y, z) = (W, H, D), fixed → moving first.
    smoothing: standard deviation, in samples, of the Gaussian that makes the change out of the parameters. It makes
    the change smooth, and a gradient step as well: the optimizer moves a neighborhood rather than single samples.
    """

    unit: Tensor
    start: Tensor

    def __init__(self, start: Tensor, smoothing: float):
        super().__init__()
        self.smoothing = smoothing
        lattice = start.shape[2:]
        self.register_buffer("unit", (1 / maps.voxels_per_unit(lattice, start.device)).view(1, 3, 1, 1, 1))
        self.register_buffer("start", start * self.unit)
        self.change = nn.Parameter(torch.zeros_like(start))

    def forward(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """The fields [2, 3, D, H, W] in the frame of :mod:`spatial.maps`; the images are not looked at."""
        return [torch.addcmul(self.start, gaussian_blur(self.change, self.smoothing), self.unit)]

"""Gradient inverse consistency, the regularizer of GradICON.

‖∇(φ_AB ∘ φ_BA) − I‖²_F, averaged over a jittered half-resolution lattice, with the derivatives taken as forward
differences (Tian et al., "GradICON: Approximate diffeomorphisms via gradient inverse consistency", CVPR
2023; the jitter and the step are those of uniGradICON). It asks the composition of the two directions to be
a translation, which keeps each of them close to a diffeomorphism.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from GradProjIOLib.spatial import maps

STEP = 0.001
"""Step of the forward differences, as a part of the lattice's extent."""


class GradientInverseConsistency:
    """The regularizer on one lattice (D, H, W).

    Derivatives are in samples per sample, so that on a lattice of isotropic voxels no axis counts more than
    another; on a cubic lattice that is the same as in the units of the extent, which uniGradICON uses. stride: how
    many samples the points lie apart before they are jittered; uniGradICON has 2.
    """

    def __init__(self, lattice: Sequence[int], device: torch.device | str = "cpu", stride: int = 2):
        self.points = maps.identity(lattice, device, stride)
        scale = maps.voxels_per_unit(lattice, device)
        self.jitter_size = 4 / torch.tensor(list(reversed(lattice)), dtype=torch.float32, device=device)
        self.steps = 2 * STEP * torch.eye(3, device=device)
        self.derivative_scale = (scale[None, :] / scale[:, None] / (2 * STEP)).view(3, 3, 1, 1, 1)

    def jitter(self, generator: torch.Generator | None = None) -> Tensor:
        """Normally distributed shifts of the points, two samples in standard deviation: [1, …, 3]."""
        noise = torch.randn(self.points.shape, generator=generator, device=self.points.device)
        return noise.mul_(self.jitter_size)

    def __call__(self, forward: Sequence[Tensor], backward: Sequence[Tensor], jitter: Tensor) -> Tensor:
        """The loss, a scalar, of two maps given by their chains of displacement fields [1, 3, …]."""
        base = self.points + jitter
        points = torch.cat([base, *(base + step for step in self.steps)])
        mapped = self._mapped([*forward, *backward], points)
        error = (points - mapped).movedim(-1, 1)
        gradient = (error[0] - error[1:]) * self.derivative_scale
        return gradient.square().mean(dim=(1, 2, 3, 4)).sum()

    @staticmethod
    def _mapped(fields: Sequence[Tensor], points: Tensor) -> Tensor:
        """Where a chain of fields [1, 3, …] takes four sets of points.

        On a CPU, torch samples batch entries in parallel, but only these. So there are as many as there are
        threads, each with its copy of the gradient, which is why there are no more.
        """
        threads = torch.get_num_threads() if points.device.type == "cpu" else 1
        entries = 4 if threads > 2 else threads
        shared = points.view(entries, -1, *points.shape[2:])
        return maps.displace([field.expand(entries, -1, -1, -1, -1) for field in fields], shared).view(points.shape)

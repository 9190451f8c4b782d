"""Gradient inverse consistency, the regularizer of GradICON.

‖∇(φ_AB ∘ φ_BA) − I‖²_F, averaged over points that are drawn anew in each step, with the derivatives taken as forward
differences (Tian et al., "GradICON: Approximate diffeomorphisms via gradient inverse consistency", CVPR 2023). It asks
the composition of the two directions to be a translation, which keeps each of them close to a diffeomorphism.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from GradProjIOLib.spatial import maps

STEP = 0.001
"""Step of the forward differences, as a part of the lattice's extent."""
BENDING_WEIGHT = 3.0
"""It keeps the error in a masked cavity below 1 mm; a larger one makes the fields too stiff there."""
STRIDE = 3
"""Of the points on a lattice. Fewer points would miss more; more would take longer."""


class GradientInverseConsistency:
    """The regularizer of a network's maps on one lattice (D, H, W): jitter and steps are those of uniGradICON.

    Derivatives are in samples per sample, so that on a lattice of isotropic voxels no axis counts more than
    another; on a cubic lattice that is the same as in the units of the extent, which uniGradICON uses.
    """

    def __init__(self, lattice: Sequence[int], device: torch.device | str = "cpu"):
        self.points = maps.identity(lattice, device, stride=2)
        scale = maps.voxels_per_unit(lattice, device)
        self.jitter_size = 4 / torch.tensor(list(reversed(lattice)), dtype=torch.float32, device=device)
        self.steps = 2 * STEP * torch.eye(3, device=device)
        # [step, 1, component]
        self.derivative_scale = (scale[None, :] / scale[:, None] / (2 * STEP))[:, None]

    def jitter(self, generator: torch.Generator | None = None) -> Tensor:
        """Normally distributed shifts of the points, two samples in standard deviation: [1, …, 3]."""
        noise = torch.randn(self.points.shape, generator=generator, device=self.points.device)
        return noise.mul_(self.jitter_size)

    def __call__(self, forward: Sequence[Tensor], backward: Sequence[Tensor], jitter: Tensor | None = None) -> Tensor:
        """The loss, a scalar, of two maps given by their chains of displacement fields [1, 3, …]."""
        base = self.points if jitter is None else self.points + jitter
        points = torch.cat([base, *(base + step for step in self.steps)]).flatten(1, 3)
        return _mean_square(points, _mapped([*forward, *backward], points), self.derivative_scale)


class LatticeInverseConsistency:
    """The same for maps that are one displacement field each, on the lattice itself.

    Differences are those between neighboring samples, where one of the two maps is known without interpolation. That
    halves the time. The points lie STRIDE samples apart, and all move by the same whole number of samples.
    """

    def __init__(self, lattice: Sequence[int], device: torch.device | str = "cpu"):
        _, height, width = lattice
        strides = [min(STRIDE, size - 1) for size in lattice]
        axes = [torch.arange(0, size - stride, stride) for size, stride in zip(lattice, strides, strict=True)]
        z, y, x = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        per_step = torch.tensor([1, width, height * width])
        base = z * per_step[2] + y * per_step[1] + x
        self.samples = torch.stack([base, *(base + step for step in per_step)]).to(device)
        self.identity = maps.identity(lattice, device).view(-1, 3)
        self.per_step = per_step.to(device)
        self.strides = torch.tensor(strides[::-1], device=device)
        self.derivative_scale = maps.voxels_per_unit(lattice, device)

    def jitter(self, generator: torch.Generator | None = None) -> Tensor:
        """A shift of all points in whole samples along (x, y, z): [3]."""
        part = torch.rand(3, generator=generator, device=self.strides.device)
        return (part * self.strides).long()

    def __call__(self, forward: Sequence[Tensor], backward: Sequence[Tensor], jitter: Tensor | None = None) -> Tensor:
        """The loss, a scalar, of two maps given by one displacement field [1, 3, D, H, W] each."""
        samples = self.samples if jitter is None else self.samples + (jitter * self.per_step).sum()
        points = self.identity[samples]
        (field,) = backward
        inner = field.view(3, -1)[:, samples].movedim(0, -1)
        return _mean_square(points, _mapped(forward, points + inner), self.derivative_scale)


def bending(field: Tensor, weights: Tensor) -> Tensor:
    """BENDING_WEIGHT times the mean squared second differences of displacement fields [N, 3, D, H, W] along the axes.

    They are in samples, and count where weights [1, 1, D, H, W] are not 0. Where nothing is seen of the images,
    gradient inverse consistency lets a deformation drift, as long as the other direction drifts along. This makes it
    go on smoothly from where something is seen.
    """
    per_unit = maps.voxels_per_unit(field.shape[2:], field.device).view(3, 1, 1, 1)
    total = torch.zeros((), device=field.device)
    for axis, size in enumerate(field.shape[2:], start=2):
        first, middle, last = (field.narrow(axis, start, size - 2) for start in range(3))
        curvature = (first - 2 * middle + last) * per_unit
        total = total + (curvature.square() * weights.narrow(axis, 1, size - 2)).sum()
    return BENDING_WEIGHT * total / (3 * field[:, 0].numel())


def _mean_square(points: Tensor, mapped: Tensor, scale: Tensor) -> Tensor:
    """Mean squared derivatives of mapped − points, both [4, n, 3]: a point and its neighbors along x, y and z."""
    error = points - mapped
    gradient = (error[0] - error[1:]) * scale
    return gradient.square().mean(dim=(1, 2)).sum()


def _mapped(fields: Sequence[Tensor], points: Tensor) -> Tensor:
    """Where a chain of fields [1, 3, …] takes points [4, n, 3].

    On a CPU torch samples in parallel only over batch entries. So the points are split into one entry per thread (four,
    where there are more than two threads). Each entry needs a gradient of its own.
    """
    threads = torch.get_num_threads() if points.device.type == "cpu" else 1
    entries = 4 if threads > 2 else threads
    shared = points.view(entries, -1, 1, 1, 3)
    return maps.displace([field.expand(entries, -1, -1, -1, -1) for field in fields], shared).view(points.shape)

"""Smooth random fields on a lattice, and diffeomorphisms made from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from GradProjIOLib.spatial import sampling


def spline_weights(size: int, knots: int) -> Tensor:
    """Weights [size, knots + 3] of cubic B-splines with `knots` equal intervals at `size` cell centers."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * knots / size
    distance = (position[:, None] - torch.arange(-1, knots + 2, dtype=torch.float64)[None]).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far).float()


def resize(field: Tensor, lattice: Sequence[int]) -> Tensor:
    """Stretch `field` [C, d, h, w] linearly to `lattice` over the same field of view."""
    return functional.interpolate(field[None], tuple(lattice), mode="trilinear", align_corners=False)[0]


def smooth_noise(lattice: Sequence[int], wavelength: float, generator: torch.Generator, channels: int = 1) -> Tensor:
    """Zero-mean Gaussian noise of about unit variance that is twice continuously differentiable.

    Independent normal coefficients of cubic B-splines whose knots lie `wavelength` voxels apart.
    Returns a float32 tensor [channels, D, H, W].
    """
    knots = [math.ceil(size / wavelength) for size in lattice]
    coefficients = torch.randn(channels, *(count + 3 for count in knots), generator=generator)
    weights = [spline_weights(size, count) for size, count in zip(lattice, knots, strict=True)]
    # The mean square of the B-spline sum is the mean of the squared weights along each axis.
    spread = math.prod(math.sqrt(matrix.square().sum(1).mean().item()) for matrix in weights)
    return torch.einsum("cdhw,Dd,Hh,Ww->cDHW", coefficients, *weights) / spread


def identity_points(lattice: Sequence[int]) -> Tensor:
    """Index coordinates (d, h, w) of every voxel: float32 [3, D, H, W]."""
    axes = [torch.arange(size, dtype=torch.float32) for size in lattice]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def sample(field: Tensor, points: Tensor) -> Tensor:
    """Trilinear samples of `field` [C, d, h, w] at index coordinates `points` [3, D, H, W]: [C, D, H, W].

    Outside the lattice the outermost values continue.
    """
    sizes = torch.tensor(field.shape[-3:], dtype=points.dtype)
    normalized = points.movedim(0, -1) * (2 / (sizes - 1)) - 1
    return sampling.sample(field[None], normalized.flip(-1)[None])[0]


def integrate(velocity: Tensor, squarings: int = 6) -> Tensor:
    """Displacement of the flow of a stationary velocity field after unit time, by scaling and squaring.

    `velocity` [3, D, H, W] in voxels per unit time, component order (d, h, w); the displacement has the same
    shape and unit. Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006.
    """
    identity = identity_points(velocity.shape[1:])
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        displacement = displacement + sample(displacement, identity + displacement)
    return displacement

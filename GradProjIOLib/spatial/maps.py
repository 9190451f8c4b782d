"""Points and displacement fields on the network's lattice.

A point is (x, y, z) along the axes (W, H, D) of a lattice [D, H, W]; −1 and +1 are the centers of the first and the
last sample of each axis, as in ``torch.nn.functional.grid_sample`` with ``align_corners=True``. Points are tensors
[N, D, H, W, 3]; displacement fields are [N, 3, D, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from GradProjIOLib.spatial.sampling import sample


def identity(lattice: Sequence[int], device: torch.device | str = "cpu", stride: int = 1) -> Tensor:
    """Points [1, D, H, W, 3] of every ``stride``-th sample of a lattice (D, H, W)."""
    axes = [torch.linspace(-1, 1, size, device=device)[::stride] for size in lattice]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y, z], dim=-1)[None]


def voxels_per_unit(lattice: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Samples per unit of the frame along (x, y, z): [3]."""
    return torch.tensor([(size - 1) / 2 for size in reversed(lattice)], device=device)


def displace(fields: Sequence[Tensor], points: Tensor) -> Tensor:
    """φ(points) for φ = φ₁ ∘ φ₂ ∘ … with φᵢ(x) = x + fieldᵢ(x): the last field moves the points first."""
    for field in reversed(fields):
        points = points + sample(field, points).movedim(1, -1)
    return points


def displaced_identity(fields: Sequence[Tensor], points: Tensor) -> Tensor:
    """φ at the samples of a lattice: ``displace`` where ``points`` is that lattice's identity.

    The first field is read at lattice points, so it is resized (or taken as it is) rather than sampled.
    """
    *outer, first = fields
    lattice = points.shape[1:4]
    if first.shape[2:] != lattice:
        first = F.interpolate(first, size=tuple(lattice), mode="trilinear", align_corners=True)
    return displace(outer, points + first.movedim(1, -1))


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Field of x → outer(inner(x)) on the lattice of ``inner``, of two displacement fields."""
    points = identity(inner.shape[2:], inner.device) + inner.movedim(1, -1)
    return inner + sample(outer, points)

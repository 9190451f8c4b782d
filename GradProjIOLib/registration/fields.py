"""The displacement fields that the stages of a registration hand on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from GradProjIOLib.geometry.lattice import apply_matrix, lattice_affine, slabs
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation, as_deformation


@dataclass(frozen=True, eq=False)
class Fields:
    """Displacements of both directions about the initial transform, on a lattice over the fixed image.

    samples: [2, 3, K, J, I], in samples of the lattice along (x, y, z) = (I, J, K), fixed → moving first. affine: 4x4,
    of the lattice, to RAS mm. The first direction takes fixed points to where the initial transform takes over, the
    second one back.
    """

    samples: Tensor
    affine: np.ndarray

    @classmethod
    def over(cls, fixed: Volume, samples: Tensor) -> Fields:
        """Displacements [2, 3, K, J, I] in samples of a lattice that is stretched over the fixed image."""
        k, j, i = samples.shape[2:]
        return cls(samples, lattice_affine(fixed.affine, fixed.shape, (k, j, i)))

    @property
    def forward(self) -> Deformation:
        """The direction fixed → moving in RAS mm."""
        return Deformation(np.moveaxis(self.samples[0].cpu().numpy(), 0, -1) @ self.affine[:3, :3].T, self.affine)

    def on_lattice(self, lattice: tuple[int, int, int]) -> Tensor:
        """The displacements in samples of another lattice (K, J, I) over the same image."""
        if self.shape == lattice:
            return self.samples
        finer = [new / old for new, old in zip(reversed(lattice), reversed(self.shape), strict=True)]
        resized = F.interpolate(self.samples, size=lattice, mode="trilinear", align_corners=False)
        return resized * torch.tensor(finer, device=resized.device).view(3, 1, 1, 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of samples of the lattice along (K, J, I)."""
        k, j, i = self.samples.shape[2:]
        return k, j, i

    @classmethod
    def between(
        cls,
        forward: Deformation,
        inverse: Deformation,
        initial: Deformation | np.ndarray,
        fixed: Volume,
        lattice: tuple[int, int, int],
    ) -> Fields:
        """The displacements that make whole maps, ``forward`` fixed → moving and its ``inverse``, of ``initial``.

        initial: 4x4 or a Deformation, fixed → moving, RAS mm. They are sampled on a lattice (K, J, I) over ``fixed``.
        """
        first = as_deformation(initial)
        undone = (
            first.source_points if isinstance(initial, Deformation) else partial(apply_matrix, np.linalg.inv(initial))
        )
        affine = lattice_affine(fixed.affine, fixed.shape, lattice)
        displacements = np.empty((2, *lattice, 3))
        for slab, points in slabs(lattice, affine):
            there = forward.map_points(points).reshape(-1, 3)
            displacements[0, slab] = undone(there).reshape(points.shape) - points
            displacements[1, slab] = inverse.map_points(first.map_points(points)) - points
        samples = np.moveaxis(displacements @ np.linalg.inv(affine[:3, :3]).T, -1, 1)
        return cls(torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)), affine)

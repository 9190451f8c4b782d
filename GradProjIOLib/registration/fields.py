"""The displacement fields that the stages of a registration hand on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.geometry.lattice import lattice_affine
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation


@dataclass(frozen=True, eq=False)
class Fields:
    """Displacements of both directions about the initial transform, on a lattice over the fixed image.

    samples: [2, 3, K, J, I], in samples of the lattice along (x, y, z) = (I, J, K), fixed → moving first. affine: 4x4,
    of the lattice, to RAS mm. The first direction takes fixed points to where the initial transform takes over, the
    second one back.
    """

    samples: Tensor
    affine: np.ndarray

    @property
    def forward(self) -> Deformation:
        """The direction fixed → moving in RAS mm."""
        return Deformation(np.moveaxis(self.samples[0].cpu().numpy(), 0, -1) @ self.affine[:3, :3].T, self.affine)

    def on_lattice(self, lattice: tuple[int, int, int]) -> Tensor:
        """The displacements in samples of another lattice (K, J, I) over the same image."""
        shape = self.samples.shape[2:]
        if shape == lattice:
            return self.samples
        finer = [new / old for new, old in zip(reversed(lattice), reversed(shape), strict=True)]
        resized = F.interpolate(self.samples, size=lattice, mode="trilinear", align_corners=False)
        return resized * torch.tensor(finer, device=resized.device).view(3, 1, 1, 1)

    @classmethod
    def of(cls, objective: Objective, affine: np.ndarray) -> Fields:
        """What an objective's model gives now; ``affine`` is that of its lattice."""
        return cls(objective.displacements(), affine)

    @classmethod
    def zero(cls, fixed: Volume) -> Fields:
        """No displacement anywhere in the fixed image."""
        lattice = (2, 2, 2)
        return cls(torch.zeros(2, 3, *lattice), lattice_affine(fixed.affine, fixed.shape, lattice))

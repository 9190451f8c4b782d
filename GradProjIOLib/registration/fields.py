"""The displacement fields that the stages of a registration hand on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.geometry.lattice import corner_affine
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation


@dataclass(frozen=True)
class Fields:
    """Displacements of both directions about the initial transform, on a lattice over the fixed image.

    ``forward`` takes fixed points to where the initial transform takes over, ``backward`` back; both in RAS mm.
    """

    forward: Deformation
    backward: Deformation

    @classmethod
    def from_samples(cls, displacements: np.ndarray, affine: np.ndarray) -> Fields:
        """From displacements [2, 3, K, J, I] in samples along (x, y, z) of a lattice with ``affine``."""
        return cls(*(Deformation(np.moveaxis(one, 0, -1) @ affine[:3, :3].T, affine) for one in displacements))

    def to_samples(self, lattice: tuple[int, int, int], affine: np.ndarray) -> Tensor:
        """Displacements [2, 3, K, J, I] in samples along (x, y, z) of a lattice (K, J, I) with ``affine``."""
        to_index = np.linalg.inv(affine[:3, :3]).astype(np.float32)
        both = [one.sample(lattice, affine).displacement @ to_index.T for one in (self.forward, self.backward)]
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.stack(both), -1, 1)))

    @classmethod
    def of(cls, objective: Objective, affine: np.ndarray) -> Fields:
        """What an objective's model gives now; ``affine`` is that of its lattice."""
        return cls.from_samples(objective.displacements().cpu().numpy(), affine)

    @classmethod
    def zero(cls, fixed: Volume) -> Fields:
        """No displacement anywhere in the fixed image."""
        still = Deformation(np.zeros((2, 2, 2, 3)), corner_affine(fixed.affine, fixed.shape))
        return cls(still, still)

"""Overlap of label maps as a loss, where the structures of both images are known, as in synthetic pairs.

Labels tell where structures lie also where noise and bias hide it from the similarity, as in Hoffmann et al.,
SynthMorph: learning contrast-invariant registration without acquired images, IEEE TMI 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from GradProjIOLib.spatial import maps


class Overlap:
    """1 − mean soft Dice coefficient of the structures that both label maps have, summed over both directions.

    Labels are integers [1, D, H, W], 0 is background. Compared at half the resolution, where a sample knows what
    share of it each structure fills: 2 Σ a·b / (Σ a² + Σ b²) (Milletari et al., "V-Net", 3DV 2016).
    """

    def __init__(self, fixed: Tensor, moving: Tensor, device: torch.device | str = "cpu"):
        structures = sorted((set(fixed.unique().tolist()) & set(moving.unique().tolist())) - {0})
        shares = [_shares(labels.to(device), structures) for labels in (fixed, moving)]
        self.targets = torch.cat(shares)
        self.sources = torch.cat(shares[::-1])
        self.points = maps.identity(self.targets.shape[2:], device)

    def __call__(self, fields: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar, of ``Objective.fields``; 0 where no structure is in both maps."""
        if self.targets.shape[1] == 0:
            return fields[0].sum() * 0
        warped = maps.sample(self.sources, maps.displaced_identity(fields, self.points))
        space = (2, 3, 4)
        common = (warped * self.targets).sum(space)
        dice = 2 * common / (warped.square().sum(space) + self.targets.square().sum(space))
        return (1 - dice.mean(dim=1)).sum()


def _shares(labels: Tensor, structures: Sequence[int]) -> Tensor:
    """How much of each sample of half the resolution each structure fills: [1, structures, D/2, H/2, W/2]."""
    halved = [F.avg_pool3d((labels == label).float(), 2, ceil_mode=True) for label in structures]
    size = [-(-length // 2) for length in labels.shape[1:]]
    return torch.stack(halved, dim=1) if halved else labels.new_zeros(1, 0, *size, dtype=torch.float32)

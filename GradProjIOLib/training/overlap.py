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


def overlap_loss(fixed: Tensor, moving: Tensor, fields: Sequence[Tensor]) -> Tensor:
    """1 − mean soft Dice coefficient of the structures that both label maps have, summed over both directions.

    Labels are integers [1, D, H, W], 0 is background; `fields` are those of ``Objective.fields``. Compared at half the
    resolution, where a sample knows what share of it each structure fills: 2 Σ a·b / (Σ a² + Σ b²) (Milletari et al.,
    "V-Net", 3DV 2016). Returns a scalar, 0 where no structure is in both maps.
    """
    structures = sorted((set(fixed.unique().tolist()) & set(moving.unique().tolist())) - {0})
    if not structures:
        return fields[0].sum() * 0
    shares = [_shares(labels.to(fields[0].device), structures) for labels in (fixed, moving)]
    targets, sources = torch.cat(shares), torch.cat(shares[::-1])
    points = maps.identity(targets.shape[2:], targets.device)
    warped = maps.sample(sources, maps.displaced_identity(fields, points))
    space = (2, 3, 4)
    common = (warped * targets).sum(space)
    dice = 2 * common / (warped.square().sum(space) + targets.square().sum(space))
    return (1 - dice.mean(dim=1)).sum()


def _shares(labels: Tensor, structures: Sequence[int]) -> Tensor:
    """How much of each sample of half the resolution each structure fills: [1, structures, D/2, H/2, W/2]."""
    return torch.stack([F.avg_pool3d((labels == one).float(), 2, ceil_mode=True) for one in structures], dim=1)

"""How well a network registers pairs that it does not learn from."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.evaluation.metrics import dice_of
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.synthetic.pairs import TrainingPair


@torch.no_grad()
def measure(objective: Objective, pair: TrainingPair) -> dict[str, float]:
    """How well the deformation fixed → moving that the network gives registers a pair.

    similarity and regularity are those of ``Objective.losses``. folded_percent: samples whose determinant is not
    positive, and ndv_percent: non-diffeomorphic volume, both in percent of the lattice. dice and dice_before: mean over
    the structures, after and before the registration; NaN without labels.
    """
    fields = objective.fields()
    similarity, regularity = objective.losses(fields)
    displacement = objective.displacements_of(fields)[0].flip(0).cpu()  # along (D, H, W)
    samples = displacement[0].numel()
    folded = (jacobian.jacobian_determinant(displacement) <= 0).sum().item()
    volume = jacobian.non_diffeomorphic_volume(displacement).sum().item()
    dice, dice_before = _overlap(pair, displacement)
    return {
        "similarity": similarity.item(),
        "regularity": regularity.item(),
        "folded_percent": 100 * folded / samples,
        "ndv_percent": 100 * volume / samples,
        "dice": dice,
        "dice_before": dice_before,
    }


def mean(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure, over those pairs that have it."""
    figures = np.ma.masked_invalid([list(one.values()) for one in found])
    return dict(zip(found[0], figures.mean(axis=0).filled(np.nan).tolist(), strict=True))


def _overlap(pair: TrainingPair, displacement: Tensor) -> tuple[float, float]:
    if pair.fixed_labels is None or pair.moving_labels is None:
        return math.nan, math.nan
    fixed, moving = pair.fixed_labels[0].numpy(), pair.moving_labels[0].numpy()
    structures = [int(label) for label in np.intersect1d(fixed, moving) if label != 0]
    if not structures:
        return math.nan, math.nan
    points = np.indices(fixed.shape) + displacement.numpy()
    moved = ndimage.map_coordinates(moving, points, order=0, mode="nearest")
    after, before = (dice_of(fixed, warped, structures) for warped in (moved, moving))
    return float(np.mean(after)), float(np.mean(before))

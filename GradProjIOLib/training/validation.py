"""How well a network registers pairs that it does not learn from."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.evaluation.metrics import dice_of
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.training.pairs import TrainingPair


@dataclass(frozen=True)
class Quality:
    """How well one pair is registered, or several on average.

    The losses are those of ``objective.Losses``. folded_percent: samples whose determinant is not positive, and
    ndv_percent: non-diffeomorphic volume, both in percent of the lattice. dice and dice_before: mean over the
    structures, after and before the registration; NaN without labels.
    """

    similarity: float
    regularity: float
    folded_percent: float
    ndv_percent: float
    dice: float
    dice_before: float


@torch.no_grad()
def measure(objective: Objective, pair: TrainingPair) -> Quality:
    """Quality of the deformation fixed → moving that the network gives for a pair."""
    losses = objective.losses(torch.zeros_like(objective.regularity.points))
    displacement = objective.displacements()[0].flip(0).cpu()  # along (D, H, W)
    samples = displacement[0].numel()
    folded = (jacobian.jacobian_determinant(displacement) <= 0).sum().item()
    volume = jacobian.non_diffeomorphic_volume(displacement).sum().item()
    return Quality(
        losses.similarity.item(), losses.regularity.item(), 100 * folded / samples, 100 * volume / samples,
        *_overlap(pair, displacement),
    )  # fmt: skip


def mean(qualities: list[Quality]) -> Quality:
    """Mean of each figure, over those pairs that have it."""
    figures = np.ma.masked_invalid([astuple(quality) for quality in qualities])
    return Quality(*figures.mean(axis=0).filled(np.nan).tolist())


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

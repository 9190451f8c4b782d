"""Points that a displacement field takes to given targets. Everything is in voxels of the field's lattice."""

from __future__ import annotations

import torch
from torch import Tensor

from GradProjIOLib.spatial.sampling import sample_at

FIXED_POINT_STEPS = 30
NEWTON_STEPS = 30
LARGEST_SHARE_GOING = 0.7
"""Points that are near enough are set aside only when no more than this share of the points still moves."""


def solve(displacement: Tensor, targets: Tensor, linear: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Points x [n, 3] with x + d(x) = `targets` [n, 3], and the residuals x + d(x) − target [n, 3] that are left.

    d is the `displacement` [1, 3, K, J, I]; components and points are along (i, j, k), all in single precision. The
    first steps are x ← x − linear·(x + d(x) − target), where `linear` (3x3) inverts the linear part of the map. For the
    identity this is the iteration of Chen et al. 2008 (Medical Physics 35(1)), which converges where the displacement
    is a contraction. Points that are then still too far away get Gauss-Newton steps. A step that does not come closer
    is halved. The steps end for points nearer than a quarter of `tolerance`.
    """

    def off(points: Tensor, aims: Tensor) -> Tensor:
        return points + sample_at(displacement, points) - aims

    enough = (tolerance / 4) ** 2
    found, left = targets.clone(), torch.empty_like(targets)
    number, points, aims = torch.arange(len(targets)), targets, targets
    residual = off(points, aims)
    error = residual.square().sum(dim=1)
    for newton, steps in ((False, FIXED_POINT_STEPS), (True, NEWTON_STEPS)):
        pace = torch.ones(len(number), 1)
        for _ in range(steps):
            going = error > enough
            if going.sum() < LARGEST_SHARE_GOING * len(number):
                found[number], left[number] = points, residual
                kept = going.nonzero()[:, 0]
                number, points, aims, residual, error, pace = (
                    one[kept] for one in (number, points, aims, residual, error, pace)
                )
            if not len(number):
                return found, left
            direction = _newton_direction(displacement, points, residual) if newton else residual @ linear.T
            trial = points - pace * direction
            trial_residual = off(trial, aims)
            trial_error = trial_residual.square().sum(dim=1)
            closer = (trial_error < error)[:, None]
            pace = torch.where(closer, (2 * pace).clamp_(max=1), pace / 2)
            points, residual = torch.where(closer, trial, points), torch.where(closer, trial_residual, residual)
            error = torch.minimum(error, trial_error)
    found[number], left[number] = points, residual
    return found, left


def _newton_direction(displacement: Tensor, points: Tensor, residual: Tensor, distance: float = 0.02) -> Tensor:
    """The Gauss-Newton step at `points` [n, 3] from differences over `distance` voxels.

    It is damped a little, so that it exists where the map folds.
    """
    columns = [
        sample_at(displacement, points + shift) - sample_at(displacement, points - shift)
        for shift in distance * torch.eye(3)
    ]
    jacobian = torch.eye(3) + torch.stack(columns, dim=-1) / (2 * distance)
    transposed = jacobian.mT
    return torch.linalg.solve(transposed @ jacobian + 1e-3 * torch.eye(3), transposed @ residual[..., None])[..., 0]

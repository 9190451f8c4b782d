"""Points that a map takes to given targets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

FIXED_POINT_STEPS = 30
NEWTON_STEPS = 30

PointMap = Callable[[np.ndarray], np.ndarray]


def solve(
    forward: PointMap, targets: np.ndarray, linear: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 3] whose images under `forward` are `targets` [n, 3], and how far off the images are [n].

    The first steps are x ← x − linear·(forward(x) − target), where `linear` (3x3) inverts the linear part of
    `forward`. For the identity this is the iteration of Chen et al. 2008 (Medical Physics 35(1)), which converges
    where the displacement is a contraction. The few points where it is not get Gauss-Newton steps. A step that
    does not come closer is halved. Points nearer than a tenth of `tolerance` (mm) stay where they are.
    """
    found = targets.copy()
    residual = forward(found) - targets
    error = np.linalg.norm(residual, axis=1)
    for newton, steps in ((False, FIXED_POINT_STEPS), (True, NEWTON_STEPS)):
        pace = np.ones(len(targets))
        for _ in range(steps):
            active = np.flatnonzero(error > tolerance / 10)
            if active.size == 0:
                return found, error
            if newton:
                direction = _newton_direction(forward, found[active], residual[active], 2 * tolerance)
            else:
                direction = residual[active] @ linear.T
            trial = found[active] - pace[active, None] * direction
            trial_residual = forward(trial) - targets[active]
            trial_error = np.linalg.norm(trial_residual, axis=1)
            closer = trial_error < error[active]
            pace[active] = np.where(closer, np.minimum(2 * pace[active], 1), pace[active] / 2)
            improved = active[closer]
            found[improved], residual[improved] = trial[closer], trial_residual[closer]
            error[improved] = trial_error[closer]
    return found, error


def _newton_direction(forward: PointMap, points: np.ndarray, residual: np.ndarray, distance: float) -> np.ndarray:
    """The Gauss-Newton step at `points` [n, 3] from differences over `distance` (mm).

    It is damped a little, so that it exists where `forward` folds.
    """
    columns = [(forward(points + shift) - forward(points - shift)) for shift in distance * np.eye(3)]
    jacobian = np.stack(columns, axis=-1) / (2 * distance)
    transposed = jacobian.transpose(0, 2, 1)
    return np.linalg.solve(transposed @ jacobian + 1e-3 * np.eye(3), transposed @ residual[..., None])[..., 0]

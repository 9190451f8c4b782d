"""Ending an instance optimisation early: readers of its steps that say when going on is not worth it."""

from __future__ import annotations

from collections import deque

import torch

from GradProjIOLib import jacobian
from GradProjIOLib.optimization import InstanceOptimizer

WINDOW = 10
LEAST_IMPROVEMENT = 1e-3
STEPS_BETWEEN_FOLDING = 5


class Plateau:
    """True for a step after which going on is not worth it.

    That is when the mean objective (similarity + weight · regularity, both noisy) over the last `window`
    steps is less than `least` (a share of it) below that over the `window` steps before.
    """

    def __init__(
        self, regularity_weight: float, window: int = WINDOW, least: float = LEAST_IMPROVEMENT
    ) -> None:
        if window < 1 or least < 0:
            raise ValueError(f"expected window >= 1 and least >= 0, found {window} and {least}")
        self.weight, self.window, self.least = regularity_weight, window, least
        self._objectives: deque[float] = deque(maxlen=2 * window)

    def __call__(self, similarity: float, regularity: float) -> bool:
        """Take in the losses of one step."""
        self._objectives.append(similarity + self.weight * regularity)
        if len(self._objectives) < 2 * self.window:
            return False
        values = list(self._objectives)
        before, now = (sum(part) / self.window for part in (values[: self.window], values[self.window :]))
        return before - now < self.least * abs(before)


class FoldingBudget:
    """True for a step with which more than ``percent`` of the lattice's samples came to be folded.

    The deformation fixed → moving is looked at before the first step, after every ``every``-th and after the last;
    ``go_back`` returns to the last look that found it within the budget, or to the start.
    """

    def __init__(self, optimizer: InstanceOptimizer, percent: float, every: int = STEPS_BETWEEN_FOLDING) -> None:
        if percent < 0 or every < 1:
            raise ValueError(f"expected percent >= 0 and every >= 1, found {percent} and {every}")
        self.optimizer, self.percent, self.every = optimizer, percent, every
        self._keep()
        self.exceeded = self._folded_percent() > percent

    def __call__(self, last: bool = False) -> bool:
        """Called after each step; ``last``: whether no other will be taken."""
        taken = self.optimizer.taken
        if last or taken % self.every == 0 or taken == self.optimizer.steps:
            self.exceeded = self._folded_percent() > self.percent
            if not self.exceeded:
                self._keep()
        return self.exceeded

    @torch.no_grad()
    def go_back(self) -> int:
        """Give the network the parameters that were kept; returns the number of steps behind them."""
        for parameter, value in zip(self.optimizer.parameters, self.kept, strict=True):
            parameter.copy_(value)
        return self.kept_steps

    def _keep(self) -> None:
        self.kept = [parameter.detach().to("cpu", copy=True) for parameter in self.optimizer.parameters]
        self.kept_steps = self.optimizer.taken

    def _folded_percent(self) -> float:
        displacement = self.optimizer.objective.displacements()[0].flip(0).cpu()  # along (D, H, W)
        return 100 * (jacobian.jacobian_determinant(displacement) <= 0).float().mean().item()

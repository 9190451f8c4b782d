"""Ending an instance optimization early: a reader of its steps that says when nothing improves any more."""

from __future__ import annotations

from collections import deque

WINDOW = 10
LEAST_IMPROVEMENT = 1e-3


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

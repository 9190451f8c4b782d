"""How far a registration has come: the time that is left, and the progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tqdm.auto import tqdm

from GradProjIOLib.engine.optimization import Step

RECENT_STEPS = 5


class RemainingTime:
    """How long the steps that are left will take, from how long the latest ones took.

    costs: what each step costs, as a multiple of what another one costs, in the order in which they are taken.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs = costs
        self.taken = 0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def after(self, seconds: float) -> float:
        """Seconds left after one more step, which took so many."""
        cost = self.costs[self.taken]
        if self.taken and cost != self.costs[self.taken - 1]:
            self.recent.clear()
        self.taken += 1
        self.recent.append(seconds / cost)
        return sum(self.costs[self.taken :]) * sum(self.recent) / len(self.recent)


class Progress(tqdm):
    """A bar with the losses and the number of conflicts, on a terminal or in a notebook."""

    conflicts = 0

    def restart(self) -> None:
        """Count from zero again; the time until now says nothing about how long the steps will take."""
        self.reset()
        self.conflicts = 0

    def show(self, step: Step) -> None:
        """Count a step and show its losses and the time that is left."""
        self.conflicts += step.projected not in (None, "none")
        self.set_postfix_str(
            f"{step.remaining_seconds:.0f} s left, {step.stage}, similarity {step.similarity:.4f}, "
            f"regularity {step.regularity:.4f}, {self.conflicts} conflicts",
            refresh=False,
        )
        self.update()

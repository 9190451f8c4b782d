"""The progress bar of a registration."""

from __future__ import annotations

from tqdm.auto import tqdm

from GradProjIOLib.engine.optimization import Step


class Progress:
    """A bar with both losses and the number of conflicts, on a terminal or in a notebook.

    total: how many steps there will be. Nothing is shown where `shown` is False.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = tqdm(total=total, unit="step", disable=not shown, leave=False)
        self.conflicts = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def restart(self) -> None:
        """Count from zero again; the time until now says nothing about how long the steps will take."""
        self.bar.reset()
        self.conflicts = 0

    def show(self, step: Step) -> None:
        """Count a step and show its losses."""
        self.conflicts += step.projected not in (None, "none")
        self.bar.set_postfix_str(
            f"similarity {step.similarity:.4f}, regularity {step.regularity:.4f}, {self.conflicts} conflicts",
            refresh=False,
        )
        self.bar.update()

"""The job of ``gradprojio compare``: run each method on each pair, and measure after some of the steps.

Settings that differ only in the number of steps share one optimization, and the result without steps is the start of
the first one. A run that has ended is kept, so that a comparison that was killed goes on after the last one, and one
that gets more pairs or settings computes only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.batch.tasks import DONE, FAILED, KEPT, Job, Outcome, Task, images_of
from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import metrics, tables
from GradProjIOLib.evaluation.comparison import COMPARED, Comparison, Record, record_path
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.register import Running, register
from GradProjIOLib.spatial.deformation import Deformation


@dataclass(frozen=True)
class Trajectories(Job):
    """Runs the methods of a comparison.

    ``on_progress`` is called with a line of text after each measurement but the one without steps.
    """

    comparison: Comparison
    on_progress: Callable[[str], None] = print

    def fingerprint(self, found: dict[str, Any]) -> dict[str, Any]:
        """Records depend on all but the method and the numbers of steps.

        Raises InputError where there is no network but steps of one are to be compared.
        """
        if found["settings"]["model"] == "none" and self.comparison.on_network:
            raise InputError("The model none has no network to optimize; compare methods such as projected:0+60.")
        settings = {name: value for name, value in found["settings"].items() if name not in COMPARED}
        structures = self.comparison.structures
        return {**found, "settings": settings, "structures": structures and list(structures)}

    def is_done(self, task: Task) -> bool:
        """Whether all is measured. Raises InputError for records of other files or settings."""
        return not self.comparison.missing(task.folder, task.pair.case, task.fingerprint)

    def compute(self, task: Task, inputs: dict[str, Any]) -> None:
        """Run what is missing, from its beginning to its end."""
        (task.folder / task.pair.case).mkdir(exist_ok=True)
        for name in self.comparison.missing(task.folder, task.pair.case, task.fingerprint):
            record = self._run(task, inputs, name)
            tables.write_json(record, record_path(task.folder, task.pair.case, name))

    def _run(self, task: Task, inputs: dict[str, Any], name: str) -> Record:
        """The record of a run, which is measured on the way, or at its end if it has a refinement."""
        setting, wanted = self.comparison.runs[name], self.comparison.measured_steps(name)
        title = f"{task.pair.case}: {name}"
        measured: dict[int, tables.Row] = {}
        running: Running

        def start(started: Running) -> None:
            nonlocal running
            running = started
            # Where memory ran out, it starts anew.
            measured.clear()
            if 0 in wanted:
                measured[0] = measure_after(0)

        def note(step: Step) -> None:
            taken = step.index + 1
            if taken in wanted:
                row = measured[taken] = measure_after(taken)
                self.on_progress(
                    f"{title}, step {taken} of {setting.steps}, {_in_words(row)}, {step.seconds:.1f} s per step"
                )

        def measure_after(steps: int) -> tables.Row:
            return measure(running.forward(), inputs, self.comparison.structures, wanted[steps])

        settings = replace(task.pair.settings, **asdict(setting))
        result = register(**images_of(inputs), settings=settings, on_start=start, on_step=note)
        steps = result.report["steps"]
        if setting.refine_steps:
            row = measured[len(steps)] = measure(result.forward, inputs, self.comparison.structures, True)
            self.on_progress(f"{title}, {_in_words(row)}, {result.report['seconds']:.1f} s")
        return Record(task.fingerprint, steps, measured)

    def write_summary(self, outcomes: Sequence[Outcome], folder: Path) -> None:
        """Write the tables and curves of the pairs that are done."""
        cases = [outcome.case for outcome in outcomes if outcome.state in (DONE, KEPT)]
        failed = [{"case": outcome.case, "group": "", "message": outcome.message, "kind": outcome.kind}
                  for outcome in outcomes if outcome.state == FAILED]  # fmt: skip
        self.comparison.write_results(cases, failed, folder)


def _in_words(row: tables.Row) -> str:
    return f"Dice {row['dice']:.4f}, NDV {row['ndv_percent']:.3g} %"


def measure(
    deformation: Deformation, inputs: Mapping[str, Any], structures: Sequence[int] | None, with_distances: bool
) -> tables.Row:
    """Overlap and folding of a deformation, and where asked for the distances between the structures' surfaces."""
    labels = inputs["fixed_labels"], inputs["moving_labels"]
    if with_distances:
        row = metrics.evaluate_labels(deformation, *labels, structures)
    else:
        row = {"dice": mean_dice(deformation, *labels, structures)}
    return row | metrics.evaluate_folding(deformation, inputs["fixed"])


def mean_dice(deformation: Deformation, fixed: Volume, moving: Volume, structures: Iterable[int] | None) -> float:
    """Mean Dice over the structures that are in both label maps, as in `metrics.evaluate_labels`."""
    warped = deformation.warp(moving, fixed, "nearest").array
    shared = np.intersect1d(fixed.array, moving.array)
    wanted = shared[shared != 0] if structures is None else np.intersect1d(shared, list(structures))
    found = metrics.dice_of(fixed.array, warped, wanted.tolist())
    return float(np.mean(found)) if found else np.nan

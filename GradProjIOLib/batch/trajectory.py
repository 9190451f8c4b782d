"""The job of ``gradprojio compare``: run each method on each pair, and measure after some of the steps.

Settings that differ only in the number of steps share one optimization, and the result without steps is the start of
the first one. What was computed is kept, step by step, so that a comparison that was killed continues where it stopped,
and one that gets more pairs or settings computes only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from GradProjIOLib.batch.tasks import DONE, FAILED, KEPT, Job, Outcome, Task, images_of
from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import metrics, tables
from GradProjIOLib.evaluation.comparison import COMPARED, Comparison, Record, Setting, record_path
from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.geometry.pairs import Pair
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.register import Running, register
from GradProjIOLib.spatial.deformation import Deformation

SECONDS_BETWEEN_STATES = 60.0


@dataclass(frozen=True)
class Trajectories(Job):
    """Runs the methods of a comparison. ``on_progress`` is called with a line of text after each measurement."""

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

    def is_done(self, pair: Pair, folder: Path, fingerprint: dict[str, Any]) -> bool:
        """Whether all is measured. Raises InputError for records of other files or settings."""
        comparison = self.comparison
        records = {name: Record.read(record_path(folder, pair.case, name), fingerprint) for name in comparison.names}
        missing = [method for method in comparison.methods if comparison.missing(records[method], method)]
        missing += [str(setting) for setting in comparison.refined if not records[str(setting)].measured]
        return not missing

    def compute(self, task: Task, inputs: dict[str, Any]) -> None:
        """Run every method as far as it is not there yet."""
        (task.folder / task.pair.case).mkdir(exist_ok=True)
        for method in self.comparison.methods:
            Trajectory(self, task, inputs, method).run()
        for setting in self.comparison.refined:
            self._refine(task, inputs, setting)

    def _refine(self, task: Task, inputs: dict[str, Any], setting: Setting) -> None:
        """Run a setting with refinement from its beginning to its end, and measure there."""
        path = record_path(task.folder, task.pair.case, str(setting))
        if Record.read(path, task.fingerprint).measured:
            return
        result = register(**images_of(inputs), settings=replace(task.pair.settings, **asdict(setting)))
        row = measure(result.forward, inputs, self.comparison.structures, with_distances=True)
        steps = result.report["steps"]
        Record(task.fingerprint, steps, {len(steps): row}).write(path)
        self.on_progress(
            f"{task.pair.case}: {setting}, Dice {row['dice']:.4f}, NDV {row['ndv_percent']:.3g} %, "
            f"{result.report['seconds']:.1f} s"
        )

    def write_summary(self, outcomes: Sequence[Outcome], folder: Path) -> None:
        """Write the tables and curves of the pairs that are done."""
        cases = [outcome.case for outcome in outcomes if outcome.state in (DONE, KEPT)]
        failed = [{"case": outcome.case, "group": "", "message": outcome.message, "kind": outcome.kind}
                  for outcome in outcomes if outcome.state == FAILED]  # fmt: skip
        self.comparison.write_results(cases, failed, folder)


class Trajectory:
    """One method on one pair: measures after some of the steps, and stores the state from which to continue."""

    def __init__(self, job: Trajectories, task: Task, inputs: dict[str, Any], method: str) -> None:
        self.comparison, self.on_progress = job.comparison, job.on_progress
        self.task, self.inputs, self.method = task, inputs, method
        self.path = record_path(task.folder, task.pair.case, method)
        self.state_path = self.path.with_suffix(".state")
        self.record = Record.read(self.path, task.fingerprint)
        self.stored = time.monotonic()
        self.running: Running

    def run(self) -> None:
        """Take the steps that are missing."""
        if self.comparison.missing(self.record, self.method):
            steps = self.comparison.last_step(self.method)
            settings = replace(self.task.pair.settings, method=self.method, steps=steps, refine_steps=0)
            register(**images_of(self.inputs), settings=settings, on_start=self.start, on_step=self.step)
        self.state_path.unlink(missing_ok=True)

    def start(self, running: Running) -> None:
        """Continue from the stored state, or begin."""
        self.running = running
        taken = self._restore()
        del self.record.steps[taken:]
        self.record.measured = {steps: row for steps, row in self.record.measured.items() if steps <= taken}
        if taken:
            self.on_progress(f"{self.task.pair.case}: {self.method} goes on after step {taken}")
        elif 0 in self.comparison.missing(self.record, self.method):
            self.record.measured[0] = self.measure(0)
            self.record.write(self.path)

    def step(self, step: Step) -> None:
        """Note the step; measure and store where it is time to."""
        self.record.steps.append(asdict(step))
        taken = step.index + 1
        wanted = taken in self.comparison.measured_steps(self.method)
        if wanted:
            row = self.record.measured[taken] = self.measure(taken)
            last = self.comparison.last_step(self.method)
            self.on_progress(
                f"{self.task.pair.case}: {self.method}, step {taken} of {last}, Dice {row['dice']:.4f}, "
                f"NDV {row['ndv_percent']:.3g} %, {step.seconds:.1f} s per step"
            )
        if wanted or time.monotonic() - self.stored > SECONDS_BETWEEN_STATES:
            self._store()

    def measure(self, steps: int) -> tables.Row:
        """Measure the deformation that was reached, with distances if the table has a row for it."""
        with_distances = self.comparison.is_compared(self.method, steps)
        return measure(self.running.forward(), self.inputs, self.comparison.structures, with_distances)

    def _store(self) -> None:
        """The record first: if it is ahead of the state after a crash, `start` forgets the surplus."""
        self.record.write(self.path)
        with atomic_path(self.state_path) as temporary:
            torch.save(self.running.optimizer.state(), temporary)
        self.stored = time.monotonic()

    def _restore(self) -> int:
        """Load the stored state; return how many steps it has taken, or 0 where it cannot be used."""
        if not self.state_path.exists():
            return 0
        state = torch.load(self.state_path, weights_only=True, map_location="cpu")
        missing = self.comparison.missing(self.record, self.method)
        if state["taken"] >= missing[0] or state["taken"] > len(self.record.steps):
            return 0
        self.running.optimizer.restore(state)
        return state["taken"]


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

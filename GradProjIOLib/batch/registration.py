"""The usual job of a batch: each pair is registered into a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from GradProjIOLib.batch import summary
from GradProjIOLib.batch.summary import REPORT, read_report
from GradProjIOLib.batch.tasks import Job, Outcome, Task, images_of
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.pairs import Pair
from GradProjIOLib.registration.register import register
from GradProjIOLib.registration.result import Reached

LABELS = "warped_labels.nii.gz"
NEEDED = (
    "warped.nii.gz",
    "transform.h5",
    "inverse_transform.h5",
    "jacobian.nii.gz",
    "folding.nii.gz",
    REPORT,
)
"""The files of a whole result, beside LABELS where they are wanted, and pictures, which cannot always be drawn."""
FINGERPRINT = "request"
"""Where the report has the fingerprint."""


class Registration(Job):
    """Registers pairs into folders named after their cases, with what ``gradprojio register`` writes."""

    def is_done(self, pair: Pair, folder: Path, fingerprint: dict[str, Any]) -> bool:
        """Whether the pair's folder holds a whole result. Raises InputError where it holds something else."""
        own = folder / pair.case
        if own.exists() and not (own / REPORT).is_file() and (not own.is_dir() or any(own.iterdir())):
            raise InputError(f"{own} is there but holds no result of a registration; move it or rename the case.")
        names = [*NEEDED, LABELS] if "moving_labels" in fingerprint["files"] else NEEDED
        return read_report(own).get(FINGERPRINT) == fingerprint and all((own / name).is_file() for name in names)

    def compute(self, task: Task, inputs: dict[str, Any]) -> None:
        """Register the pair; its folder appears, or is replaced, when all is written."""
        result = register(**images_of(inputs), settings=task.pair.settings)
        # The optimizer's state would be four times as large as the network, for each pair.
        result = replace(result, reached=Reached())
        result.report[FINGERPRINT] = task.fingerprint
        result.write(task.folder / task.pair.case, inputs.get("moving_labels"), thumbnail=True)

    def write_summary(self, outcomes: Sequence[Outcome], folder: Path) -> None:
        """Write the table and the page of all pairs."""
        summary.write(outcomes, folder)

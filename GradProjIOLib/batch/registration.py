"""The usual job of a batch: each pair is registered into a folder of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from GradProjIOLib.batch import summary
from GradProjIOLib.batch.tasks import Job, Outcome, Task, images_of
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.cases import REPORT, read_report
from GradProjIOLib.geometry.files import staging_folder
from GradProjIOLib.registration.register import register
from GradProjIOLib.registration.result import RESULT_FILES, Reached

LABELS = "warped_labels.nii.gz"
NEEDED = (
    "warped.nii.gz",
    "transform.h5",
    "inverse_transform.h5",
    "jacobian.nii.gz",
    "folding.nii.gz",
    REPORT,
)
"""The files of a whole result, without LABELS, which are there where wanted, and pictures, which may not be drawn."""
FINGERPRINT = "request"
"""Where the report has the fingerprint."""


class Registration(Job):
    """Registers pairs into folders named after their cases, with what ``gradprojio register`` writes."""

    def is_done(self, task: Task) -> bool:
        """Whether the pair's folder holds a whole result. Raises InputError where it holds something else."""
        own = task.folder / task.pair.case
        if own.exists() and not (own / REPORT).is_file() and (not own.is_dir() or any(own.iterdir())):
            raise InputError(f"{own} is there but holds no result of a registration; move it or rename the case.")
        names = [*NEEDED, LABELS] if "moving_labels" in task.fingerprint["files"] else NEEDED
        return read_report(own).get(FINGERPRINT) == task.fingerprint and all((own / name).is_file() for name in names)

    def compute(self, task: Task, inputs: dict[str, Any]) -> None:
        """Register the pair; its folder appears, or is replaced, when all is written."""
        result = register(**images_of(inputs), settings=task.pair.settings)
        # The optimizer's state would be four times as large as the network, for each pair.
        result = replace(result, reached=Reached())
        result.report[FINGERPRINT] = task.fingerprint
        with staging_folder(task.folder) as temporary:
            whole = temporary / "result"
            result.write(whole, inputs.get("moving_labels"), thumbnail=True)
            _take_over(whole, task.folder / task.pair.case, temporary / "outdated")

    def write_summary(self, outcomes: Sequence[Outcome], folder: Path) -> None:
        """Write the table and the page of all pairs."""
        summary.write(outcomes, folder)


def _take_over(whole: Path, folder: Path, outdated: Path) -> None:
    """Make ``whole`` the folder of results; files that are no results stay.

    In between there is no such folder, so whoever looks, or kills, finds a whole result or none.
    """
    if folder.exists():
        for path in folder.iterdir():
            if path.name not in RESULT_FILES:
                shutil.copytree(path, whole / path.name) if path.is_dir() else shutil.copy2(path, whole)
        os.replace(folder, outdated)
    os.replace(whole, folder)

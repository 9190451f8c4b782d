"""The job of ``gradprojio lumir register``: one displacement file for each validation pair of LUMIR."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from GradProjIOLib.batch.tasks import Job, Task
from GradProjIOLib.evaluation import lumir, tables
from GradProjIOLib.registration.register import register


class LumirFields(Job):
    """Registers pairs and writes the files that the challenge expects, each with its fingerprint beside it.

    The submission is packed when all fields are there, so there is no summary to write before.
    """

    def is_done(self, task: Task) -> bool:
        """Whether the pair's field is there. Raises InputError for one of other files or settings."""
        path = task.folder / lumir.displacement_file(task.pair)
        record = _record(path)
        if not (path.exists() and record.exists()):
            return False
        tables.check_fingerprint(json.loads(record.read_text(encoding="utf-8")), task.fingerprint, path)
        return True

    def compute(self, task: Task, inputs: dict[str, Any]) -> None:
        """Register the pair and write its field."""
        fixed, moving = inputs["fixed"], inputs["moving"]
        field = lumir.voxel_displacement(register(fixed, moving, task.pair.settings).forward, fixed, moving)
        path = task.folder / lumir.displacement_file(task.pair)
        lumir.write_displacement(field, fixed.affine, path)
        # Last, because a field counts as done only with its fingerprint.
        tables.write_json(task.fingerprint, _record(path))


def _record(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")

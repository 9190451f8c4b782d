"""Jobs for the processes of a batch, which import this file."""

from __future__ import annotations

import os
from dataclasses import dataclass

from GradProjIOLib.errors import InputError


@dataclass(frozen=True)
class Abort:
    """Brings the process down at some pairs, as a crash or the system would."""

    cases: set[str]

    def compute(self, task, inputs) -> None:
        if task.pair.case in self.cases:
            os.abort()


@dataclass(frozen=True)
class Say:
    """Fails with what a test wants to know of the process: its device or its number of threads."""

    what: str

    def compute(self, task, inputs) -> None:
        raise InputError(task.pair.settings.device if self.what == "device" else os.environ["OMP_NUM_THREADS"])

"""What a batch computes: jobs, tasks and what became of them.

This file loads neither torch nor a network, so that a process that only hands tasks on starts fast.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.geometry.pairs import Pair

DONE, KEPT, FAILED, OPEN = "done", "kept", "failed", "not done yet"
# A second pair at a time would need memory and processor cores that the first one has.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """What became of a pair: ``state`` is DONE, KEPT (was done before), FAILED or OPEN.

    A failed one has a ``message``; its ``kind`` is "input" where the user must change something, else "internal",
    with the traceback as ``details``.
    """

    case: str
    state: str
    message: str = ""
    kind: str = ""
    details: str = ""


class Job(Protocol):
    """What is to be done with each pair of a batch. It must be possible to send it to another process.

    A fingerprint is what a result depends on, in types that JSON knows: "settings" (without where to compute),
    "files" (SHA-256 by role) and "weights" (SHA-256, or None).
    """

    def fingerprint(self, found: dict[str, Any]) -> dict[str, Any]:
        """``found`` without what does not matter to this job, and with what else does."""
        return found

    def is_done(self, task: Task) -> bool:
        """Whether the task's whole result with its fingerprint is there.

        Raises InputError where something else is there that must not be replaced.
        """

    def compute(self, task: Task, inputs: dict[str, Any]) -> None:
        """Compute the result and write it, whole or not at all. ``inputs`` are volumes and transforms by their role."""

    def write_summary(self, outcomes: Sequence[Outcome], folder: Path) -> None:
        """Write the summary of all pairs, where there is one."""
        return


@dataclass(frozen=True)
class Task:
    """A pair for which a job has to be done, the folder of the batch, and the fingerprint of the result."""

    job: Job
    pair: Pair
    folder: Path
    fingerprint: dict[str, Any]


def images_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``register`` takes of the inputs of a pair."""
    return {role: image for role, image in inputs.items() if not role.endswith("labels")}


def do(task: Task) -> Outcome:
    """Do a task, and say what became of it."""
    try:
        with _ONE_AT_A_TIME:
            task.job.compute(task, {role: read(role, path) for role, path in task.pair.files.items()})
    except Exception as error:
        return failure(task.pair.case, error)
    return Outcome(task.pair.case, DONE)


def read(role: str, path: Path) -> Any:
    """What a job gets of a file of the pair: a volume, or the path of a transform."""
    if role == "initial_transform":
        # Some have to be sampled over the fixed image, which the registration does.
        return path
    return read_labels(path) if role.endswith("labels") else read_volume(path)


def failure(case: str, error: BaseException) -> Outcome:
    """The outcome of a pair that ended in ``error``."""
    if isinstance(error, (InputError, MemoryError)):
        return Outcome(case, FAILED, str(error) or "There is not enough memory.", "input")
    details = "".join(traceback.format_exception(error))
    return Outcome(case, FAILED, f"{type(error).__name__}: {error}", "internal", details)

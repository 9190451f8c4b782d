"""The loop over many pairs; what is done already is not done again.

`run` checks all pairs, does a job for those that are not done, and writes a summary of them all. What is done with a
pair is a `Job`: `registration.Registration`, `trajectory.Trajectories` or `lumir_fields.LumirFields`. Where it is done
is a function from tasks to outcomes: `here`, `processes.compute` or `cluster.compute`. The last two try a pair again
whose process was lost; a pair that failed is tried again by the next run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from GradProjIOLib.batch import processes
from GradProjIOLib.batch.registration import Registration
from GradProjIOLib.batch.summary import PAGE, TABLE
from GradProjIOLib.batch.tasks import DONE, FAILED, KEPT, OPEN, Job, Outcome, Task, do, failure, read
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import checksum, remove_abandoned, write_error
from GradProjIOLib.geometry.pairs import IMAGES, Pair, check_cases
from GradProjIOLib.geometry.volume import Volume, check_image
from GradProjIOLib.models import registry
from GradProjIOLib.registration.initial_transform import LEAST_OVERLAP
from GradProjIOLib.spatial import alignment
from GradProjIOLib.spatial.deformation import read_initial

LOCK = ".lock"
SECONDS_BETWEEN_SUMMARIES = 30.0
# Where and how a result is computed changes it by rounding at most, so it does not make it outdated.
NOT_COMPARED = ("device", "memory")

Compute = Callable[[Sequence[Task]], Generator[Outcome, None, None]]
OnOutcome = Callable[[Outcome], None]


def here(tasks: Sequence[Task]) -> Generator[Outcome, None, None]:
    """Do the tasks in this process, one after the other."""
    usable, outcomes = processes.with_devices(tasks)
    yield from outcomes
    yield from map(do, usable)


def run(
    pairs: Sequence[Pair],
    folder: str | os.PathLike,
    compute: Compute = processes.compute,
    on_outcome: OnOutcome | None = None,
    *,
    job: Job | None = None,
    failed: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Do a job for all pairs, with results in ``folder``; return what became of each, the ``failed`` ones first.

    job: what to do; without it, each pair is registered into a folder of its own in ``folder``.
    on_outcome is called once for each pair, first for those that are done already or cannot be done. ``failed`` are
    cases that were found unusable before, with the reason.

    The summary is written at the end, also where that is an exception (Ctrl-C), and now and then before. Results of
    pairs that are not complete by then do not appear. Raises InputError where two pairs have the same case, where
    ``folder`` cannot be written, or where another batch works there.
    """
    folder = Path(folder).absolute()
    job = job or Registration()
    check_cases([pair.case for pair in pairs] + [TABLE, PAGE], "The batch")
    with _lock(folder):
        outcomes = {case: Outcome(case, FAILED, message, "input") for case, message in (failed or {}).items()}
        tasks, planned = plan(pairs, folder, job)
        outcomes |= planned

        def note(outcome: Outcome) -> None:
            outcomes[outcome.case] = outcome
            if on_outcome is not None:
                on_outcome(outcome)

        try:
            for outcome in list(outcomes.values()):
                if outcome.state != OPEN:
                    note(outcome)
            # Pairs of one model one after the other, so that each process loads it once.
            tasks.sort(key=lambda task: (task.fingerprint["settings"]["model"], str(task.fingerprint["weights"])))
            if tasks:
                written = time.monotonic()
                with closing(compute(tasks)) as computed:
                    for outcome in computed:
                        note(outcome)
                        if time.monotonic() - written > SECONDS_BETWEEN_SUMMARIES:
                            job.write_summary(list(outcomes.values()), folder)
                            written = time.monotonic()
        finally:
            for task in tasks:
                # The end may have come between the result and its outcome.
                if outcomes[task.pair.case].state == OPEN and job.is_done(task):
                    note(Outcome(task.pair.case, DONE))
            remove_abandoned(folder)
            job.write_summary(list(outcomes.values()), folder)
    return list(outcomes.values())


def plan(pairs: Sequence[Pair], folder: Path, job: Job) -> tuple[list[Task], dict[str, Outcome]]:
    """What has to be done, and by case whether it is open, done already, or cannot be done.

    Reads every file that is needed.
    """
    # Each file once, however many pairs it belongs to.
    checksum_of, lattice_of = cache(checksum), cache(_lattice)
    tasks: list[Task] = []
    outcomes: dict[str, Outcome] = {}
    for pair in pairs:
        case = pair.case
        try:
            # Another computer may have other weights.
            pair = replace(pair, settings=replace(pair.settings, model=registry.chosen_model(pair.settings)))
            task = Task(job, pair, folder, job.fingerprint(fingerprint(pair, checksum_of)))
            if job.is_done(task):
                outcomes[case] = Outcome(case, KEPT)
                continue
            _check_files(pair, lattice_of)
            outcomes[case] = Outcome(case, OPEN)
            tasks.append(task)
        except Exception as error:
            outcomes[case] = failure(case, error)
    return tasks, outcomes


def fingerprint(pair: Pair, checksum: Callable[[Path], str]) -> dict[str, Any]:
    """What a result depends on: settings, and the SHA-256 of the files (by role) and of the model's weights.

    Raises InputError where files or weights are missing.
    """
    settings = asdict(pair.settings)
    model, given = settings["model"], settings.pop("weights")
    weights = None if model == "none" else registry.weights_path(model, given)
    for name in NOT_COMPARED:
        del settings[name]
    found = {
        "settings": settings,
        "files": {role: checksum(path) for role, path in pair.files.items()},
        "weights": checksum(weights) if weights is not None else None,
    }
    # As it comes back from a file, where tuples are lists.
    return json.loads(json.dumps(found))


def _check_files(pair: Pair, lattice_of: Callable[[str, Path], Volume]) -> None:
    lattices = {role: lattice_of(role, path) for role, path in pair.files.items() if role != "initial_transform"}
    if pair.initial_transform is not None:
        read_initial(pair.initial_transform, lattices["fixed"])
        return
    apart = alignment.overlap(lattices["fixed"], lattices["moving"], np.eye(4)) < LEAST_OVERLAP
    if apart and pair.settings.align == "none":
        raise InputError(
            f"{pair.fixed} and {pair.moving} do not overlap in space; set align to centers, rigid or affine."
        )


def _lattice(role: str, path: Path) -> Volume:
    """The image at ``path`` without its voxels, after a check that it fits its role."""
    volume = read(role, path)
    if role in IMAGES:
        check_image(volume)
    return Volume(np.broadcast_to(np.float32(0), volume.shape), volume.affine, volume.name)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Make the folder, keep other batches out of it, and remove what a killed one left unfinished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The system takes the lock away from a process that ends, however it ends.
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout as error:
        raise InputError(f"Another batch is at work in {folder}; wait for it or choose another folder.") from error
    except OSError as error:
        raise write_error(folder, error) from error
    with lock:
        remove_abandoned(folder)
        yield

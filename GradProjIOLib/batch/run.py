"""Many pairs, each into a folder of its own; what is done already is not done again.

`run` checks all pairs, registers those that are not done, and writes a summary of them all. How they are computed
is a function from tasks to outcomes: `batch_processes.compute` or `batch_cluster.compute`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from GradProjIOLib.batch import summary
from GradProjIOLib.batch.pair import (
    DONE,
    FAILED,
    FILE_ROLES,
    KEPT,
    OPEN,
    REPORT,
    Outcome,
    Pair,
    Task,
    failure,
    is_done,
    remove_unfinished,
    request,
)
from GradProjIOLib.batch.processes import compute as compute_here
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import write_error
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.geometry.volume import Volume, check_image
from GradProjIOLib.models.weights import checksum
from GradProjIOLib.registration.register import LEAST_OVERLAP
from GradProjIOLib.spatial import alignment

LOCK = ".lock"
SECONDS_BETWEEN_SUMMARIES = 30.0

Compute = Callable[[Sequence[Task]], Iterator[Outcome]]
OnOutcome = Callable[[Outcome], None]

__all__ = ["DONE", "FAILED", "KEPT", "OPEN", "Outcome", "Pair", "plan", "run"]


@dataclass
class Files:
    """What is known of the files of a batch. Each is looked at once, however many pairs it belongs to."""

    checksums: dict[Path, str] = field(default_factory=dict)
    places: dict[tuple[str, Path], Volume | InputError] = field(default_factory=dict)

    def checksum(self, path: Path) -> str:
        """SHA-256 of a file. Raises InputError where it cannot be read."""
        if path not in self.checksums:
            if not path.is_file():
                raise InputError(f"{path} does not exist; check the path.")
            self.checksums[path] = checksum(path)
        return self.checksums[path]

    def place(self, role: str, path: Path) -> Volume:
        """The lattice of an image that can be registered, without its voxels. Raises InputError."""
        kind = "image" if role in ("fixed", "moving") else role
        if (kind, path) not in self.places:
            try:
                self.places[kind, path] = _checked(kind, path)
            except InputError as error:
                self.places[kind, path] = error
        found = self.places[kind, path]
        if isinstance(found, InputError):
            raise found
        return found


def _checked(kind: str, path: Path) -> Volume:
    volume = read_labels(path) if kind == "moving_labels" else read_volume(path)
    if kind == "image":
        check_image(volume)
    return Volume(np.broadcast_to(np.float32(0), volume.shape), volume.affine, volume.name)


def plan(pairs: Iterable[Pair], folder: Path, check_device: Callable[[str], None]) -> list[Task | Outcome]:
    """For each pair what has to be done, or that it is done or cannot be done. Reads every file that is needed."""
    files = Files()
    return [_plan_one(pair, folder / pair.case, files, check_device) for pair in pairs]


def _plan_one(pair: Pair, folder: Path, files: Files, check_device: Callable[[str], None]) -> Task | Outcome:
    try:
        wanted = request(pair, files.checksum)
        if is_done(folder, wanted):
            return Outcome(pair.case, KEPT)
        if folder.exists() and not (folder / REPORT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is there but holds no result of a registration; move it or rename the case.")
        check_device(pair.settings.device)
        _check_files(pair, files)
    except Exception as error:
        return failure(pair.case, error)
    return Task(pair, folder, wanted)


def _check_files(pair: Pair, files: Files) -> None:
    from GradProjIOLib.spatial.deformation import read_initial

    places = {role: files.place(role, path) for role, path in pair.files.items() if role != FILE_ROLES[-1]}
    if pair.initial_transform is not None:
        read_initial(str(pair.initial_transform))
        return
    apart = alignment.overlap(places["fixed"], places["moving"], np.eye(4)) < LEAST_OVERLAP
    if apart and pair.settings.align == "none":
        raise InputError(
            f"{pair.fixed} and {pair.moving} do not overlap in space; set align to centers, rigid or affine."
        )


def run(
    pairs: Sequence[Pair],
    folder: str | os.PathLike,
    compute: Compute = compute_here,
    on_outcome: OnOutcome | None = None,
    *,
    failed: Sequence[Outcome] = (),
    check_device: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:
    """Register all pairs into folders of their own in ``folder``; return what became of each, in their order.

    on_outcome hears of every pair once, first of those that are done already or cannot be done. ``failed`` are
    outcomes of pairs that were found unusable before, for the summary. ``check_device`` raises InputError for a
    device that the workers do not have.

    The summary is written at the end, also where that is an exception (Ctrl-C), and now and then before. Results of
    pairs that are not complete by then do not appear. Raises InputError where two pairs have the same case, where
    ``folder`` cannot be written, or where another batch works there.
    """
    folder = Path(folder).absolute()
    _check_cases(pairs)
    hear = on_outcome or (lambda outcome: None)
    with _sole_use(folder):
        planned = plan(pairs, folder, check_device)
        tasks = [item for item in planned if isinstance(item, Task)]
        board = _Board([*failed, *(Outcome(item.pair.case, OPEN) if isinstance(item, Task) else item
                                   for item in planned)], folder)  # fmt: skip
        try:
            for outcome in board.outcomes:
                if outcome.state != OPEN:
                    hear(outcome)
            # Pairs of one model one after the other, so that each process loads it once.
            tasks.sort(key=lambda task: (task.request["settings"]["model"], str(task.request["weights"])))
            if tasks:
                with closing(compute(tasks)) as outcomes:
                    for outcome in outcomes:
                        board.note(outcome)
                        hear(outcome)
        finally:
            for task in tasks:
                # Whole, but not told of before the end came.
                if board.is_open(task.pair.case) and is_done(task.folder, task.request):
                    board.note(outcome := Outcome(task.pair.case, DONE))
                    hear(outcome)
            remove_unfinished(folder)
            board.write()
    return board.outcomes


class _Board:
    """The outcomes so far, and the summary of them in a folder."""

    def __init__(self, outcomes: list[Outcome], folder: Path) -> None:
        self._outcomes = {outcome.case: outcome for outcome in outcomes}
        self._folder = folder
        self._written = time.monotonic()

    @property
    def outcomes(self) -> list[Outcome]:
        return list(self._outcomes.values())

    def is_open(self, case: str) -> bool:
        return self._outcomes[case].state == OPEN

    def note(self, outcome: Outcome) -> None:
        self._outcomes[outcome.case] = outcome
        if time.monotonic() - self._written > SECONDS_BETWEEN_SUMMARIES:
            self.write()

    def write(self) -> None:
        summary.write(self.outcomes, self._folder)
        self._written = time.monotonic()


def _check_cases(pairs: Sequence[Pair]) -> None:
    reserved = {summary.TABLE, summary.PAGE}
    seen: set[str] = set()
    for pair in pairs:
        # Some file systems do not tell upper from lower case.
        name = pair.case.lower()
        if name in seen or name in reserved:
            why = "is there twice" if name in seen else "is the name of a summary"
            raise InputError(f"The case {pair.case!r} {why}; name the cases differently.")
        seen.add(name)


@contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Make the folder, hold a lock of the operating system on it, remove what a killed batch left unfinished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a")  # noqa: SIM115 - the lock lasts as long as the file is open
    except OSError as error:
        raise write_error(folder, error) from error
    with lock:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(f"Another batch is at work in {folder}; wait for it or choose another folder.") from error
        remove_unfinished(folder)
        yield

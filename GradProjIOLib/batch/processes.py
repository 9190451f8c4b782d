"""The processes of a batch on this computer: one per graphics card, or some on the processor.

Each is an executor of loky with a single process, so that it is known which pair a process died of, and each process
has its own graphics card. A pair whose process died is tried once more, alone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from loky import ProcessPoolExecutor, cpu_count
from loky.backend import get_context

from GradProjIOLib.batch.tasks import FAILED, Outcome, Task, failure, finish, read_inputs

# On Windows, Ctrl-C does not end a wait.
WAIT_SECONDS = 0.5
DIED_AGAIN = (
    "The process that computed it died, and so did a second one; there may be too little memory for so many processes."
)
THREADS = ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def graphics_cards() -> int:
    """How many CUDA devices this process may use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_device(name: str) -> None:
    """Raise InputError for a device that this computer does not have; no graphics card is taken up for it."""
    from GradProjIOLib.engine.devices import find_device

    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdigit() or int(number or 0) >= graphics_cards():
        find_device(name)


def compute(tasks: Iterable[Task], workers: int | None = None) -> Generator[Outcome, None, None]:
    """Do the tasks in processes of their own; yields the outcomes as they come, in any order.

    workers: how many processes share the graphics cards, or the processor cores; without it one per graphics card,
    else one. Closing the iterator ends the processes at once, and nothing half is left but hidden folders.
    """
    waiting = deque(tasks)
    cards = graphics_cards()
    count = workers or cards or 1
    threads = max(cpu_count() // count, 1)
    processes = [_Process(threads, number % cards if cards else None) for number in range(count)]
    # Cases that were in a process when it died. They are tried once more, each alone.
    suspects: set[str] = set()
    try:
        _hand_out(waiting, processes, suspects)
        while futures := [process.future for process in processes if process.future is not None]:
            done, _ = wait(futures, WAIT_SECONDS, FIRST_COMPLETED)
            outcomes = [_collect(process, waiting, suspects) for process in processes if process.future in done]
            # Before the outcomes are looked at, which may take a while.
            _hand_out(waiting, processes, suspects)
            yield from (outcome for outcome in outcomes if outcome is not None)
    finally:
        for process in processes:
            process.end()


def _hand_out(waiting: deque[Task], processes: Sequence[_Process], suspects: set[str]) -> None:
    """Give each process without work a task, and one to read ahead as long as none goes without work for it."""
    idle = [process for process in processes if process.future is None]
    for process in idle:
        if waiting and not process.tasks:
            process.tasks.append(waiting.popleft())
    for process in idle:
        if process.tasks:
            cases = {task.pair.case for task in (process.tasks[0], *list(waiting)[:1])}
            if len(waiting) >= len(processes) and suspects.isdisjoint(cases):
                process.tasks.append(waiting.popleft())
            process.start()


def _collect(process: _Process, waiting: deque[Task], suspects: set[str]) -> Outcome | None:
    """What became of the first task of a process. None where the process has died and its tasks wait once more."""
    future, process.future = process.future, None
    error = future.exception()
    if not isinstance(error, BrokenProcessPool):
        case = process.tasks.pop(0).pair.case
        return future.result() if error is None else failure(case, error)
    process.end()
    lost, process.tasks = process.tasks, []
    outcome = None
    if lost[0].pair.case in suspects:
        outcome = Outcome(lost.pop(0).pair.case, FAILED, DIED_AGAIN, "internal", str(error))
    suspects.update(task.pair.case for task in lost)
    waiting.extendleft(reversed(lost))
    return outcome


class _Process:
    """One process, which is started when it is needed.

    Of its ``tasks`` the first is computed, and the second is read meanwhile. ``future`` will have the outcome of the
    first; it is None where there is nothing to wait for.
    """

    def __init__(self, threads: int, card: int | None) -> None:
        # What the user has set stays. Torch reads it when it is loaded, so it must be there from the beginning.
        self._environment = {name: os.environ.get(name, str(threads)) for name in THREADS}
        self._card = card
        self._executor: ProcessPoolExecutor | None = None
        # The worker ends when the other end is closed, as it is when the parent ends, however it ends.
        self._pipe = get_context("loky").Pipe(duplex=False)
        self.tasks: list[Task] = []
        self.future: Future[Outcome] | None = None

    def start(self) -> None:
        """Begin with the first task."""
        with _interrupts_blocked():
            if self._executor is None:
                self._executor = ProcessPoolExecutor(
                    1, context=get_context("loky"), initializer=_begin, initargs=self._pipe[:1], env=self._environment
                )
            try:
                self.future = self._executor.submit(_compute, *map(self._on_card, self.tasks))
            except BrokenProcessPool as error:
                # It died while it had nothing to do.
                self.future = Future()
                self.future.set_exception(error)

    def end(self) -> None:
        """End the process at once, if it is there."""
        if self._executor is not None:
            self._executor.shutdown(kill_workers=True)
            self._executor = None

    def _on_card(self, task: Task) -> Task:
        if self._card is None or task.pair.settings.device not in ("auto", "cuda"):
            return task
        settings = replace(task.pair.settings, device=f"cuda:{self._card}")
        return replace(task, pair=replace(task.pair, settings=settings))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal; those started in here ignore it, because their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What follows is called in the processes.

_reader = ThreadPoolExecutor(1)
_read: dict[str, Future[Any]] = {}


def _begin(parent: Connection) -> None:
    """Ignore Ctrl-C, and end when the process at the other end of the connection is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        try:
            parent.recv()
        finally:
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _compute(task: Task, ahead: Task | None = None) -> Outcome:
    """Do a task, and read the files of the next one meanwhile."""
    inputs = (_read.pop(task.pair.case, None) or _reader.submit(read_inputs, task)).result()
    if ahead is not None:
        _read[ahead.pair.case] = _reader.submit(read_inputs, ahead)
    return finish(task, inputs)

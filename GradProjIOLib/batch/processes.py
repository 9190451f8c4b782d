"""The processes of a batch on this computer: one per graphics card, or some on the processor.

Each is an executor of loky with a single process, so that it is known which pair a process died of, and each process
has its own graphics card. A pair whose process died is tried once more.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection

from loky import ProcessPoolExecutor, cpu_count
from loky.backend import get_context

from GradProjIOLib.batch.tasks import FAILED, Outcome, Task, do, failure

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


def with_devices(tasks: Iterable[Task]) -> tuple[list[Task], list[Outcome]]:
    """The tasks whose device this computer has, and the outcomes of the others."""
    usable, outcomes = [], []
    for task in tasks:
        try:
            check_device(task.pair.settings.device)
            usable.append(task)
        except Exception as error:
            outcomes.append(failure(task.pair.case, error))
    return usable, outcomes


def compute(tasks: Iterable[Task], workers: int | None = None) -> Generator[Outcome, None, None]:
    """Do the tasks in processes of their own; yields the outcomes as they come, in any order.

    workers: how many processes share the graphics cards, or the processor cores; without it one per graphics card,
    else one. Closing the iterator ends the processes at once, and nothing half is left but hidden folders.
    """
    usable, unusable = with_devices(tasks)
    yield from unusable
    waiting = deque(usable)
    cards = graphics_cards()
    count = workers or cards or 1
    threads = max(cpu_count() // count, 1)
    processes = [_Process(threads, number % cards if cards else None) for number in range(count)]
    idle = deque(processes)
    working: dict[Future[Outcome], tuple[_Process, Task]] = {}
    outcomes: list[Outcome] = []
    # Cases whose process has died once.
    lost: set[str] = set()
    try:
        while waiting or working or outcomes:
            while waiting and idle:
                process, task = idle.popleft(), waiting.popleft()
                working[process.start(task)] = process, task
            # Only now, because whoever looks at them may take a while.
            yield from outcomes
            outcomes = []
            for future in wait(working, WAIT_SECONDS, FIRST_COMPLETED).done:
                process, task = working.pop(future)
                idle.append(process)
                case, error = task.pair.case, future.exception()
                if not isinstance(error, BrokenProcessPool):
                    outcomes.append(future.result() if error is None else failure(case, error))
                    continue
                process.end()
                if case in lost:
                    outcomes.append(Outcome(case, FAILED, DIED_AGAIN, "internal", str(error)))
                else:
                    lost.add(case)
                    waiting.appendleft(task)
    finally:
        for process in processes:
            process.end()


class _Process:
    """One process, which is started when it is needed, and computes one pair at a time."""

    def __init__(self, threads: int, card: int | None) -> None:
        # What the user has set stays. Torch reads it when it is loaded, so it must be there from the beginning.
        self._environment = {name: os.environ.get(name, str(threads)) for name in THREADS}
        self._card = card
        self._executor: ProcessPoolExecutor | None = None
        # The worker ends when the other end is closed, as it is when the parent ends, however it ends.
        self._pipe = get_context("loky").Pipe(duplex=False)

    def start(self, task: Task) -> Future[Outcome]:
        """Begin with a task."""
        with _interrupts_blocked():
            if self._executor is None:
                self._executor = ProcessPoolExecutor(
                    1, context=get_context("loky"), initializer=_begin, initargs=self._pipe[:1], env=self._environment
                )
            try:
                return self._executor.submit(do, self._on_card(task))
            except BrokenProcessPool as error:
                # It died while it had nothing to do.
                future: Future[Outcome] = Future()
                future.set_exception(error)
                return future

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


def _begin(parent: Connection) -> None:
    """In a process: ignore Ctrl-C, and end when the process at the other end of the connection is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        try:
            parent.recv()
        finally:
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

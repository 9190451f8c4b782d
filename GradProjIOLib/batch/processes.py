"""The workers of a batch on this computer: one process per graphics card, or some on the processor."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from GradProjIOLib.batch.pair import FAILED, Outcome, Task
from GradProjIOLib.worker.client import WorkerClient, python_executable

POLL_SECONDS = 0.02
ATTEMPTS = 2
THREADS = "OMP_NUM_THREADS"
ITK_THREADS = "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"


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


def usable_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """One process, and the tasks it has: the first is computed, the second read ahead."""

    def __init__(self, command: Sequence[str], threads: int, card: int | None) -> None:
        # What the user has set stays.
        limits = {name: os.environ.get(name, str(threads)) for name in (THREADS, ITK_THREADS)}
        self.client = WorkerClient(command, limits)
        self.card = card
        self.tasks: dict[int, Task] = {}

    def give(self, task: Task) -> None:
        with _undisturbed():
            self.tasks[self.client.submit(self._message(task))] = task

    def _message(self, task: Task) -> dict[str, Any]:
        if self.card is not None and task.pair.settings.device in ("auto", "cuda"):
            settings = replace(task.pair.settings, device=f"cuda:{self.card}")
            task = replace(task, pair=replace(task.pair, settings=settings))
        return {"request": "register", **task.to_message()}


class _Crew:
    """Gives tasks to workers and takes care of those that a worker did not survive."""

    def __init__(self, tasks: Iterable[Task], workers: list[_Worker]) -> None:
        self.waiting = deque(tasks)
        self.workers = workers
        self.attempts: Counter[str] = Counter()
        self.alone: set[str] = set()

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(worker.tasks for worker in self.workers)

    def hand_out(self) -> None:
        """A task for every idle worker, then one to read ahead, as long as none goes idle for it."""
        for worker in self.workers:
            if self.waiting and not worker.tasks:
                worker.give(self.waiting.popleft())
        for worker in self.workers:
            if len(self.waiting) < len(self.workers):
                break
            if len(worker.tasks) == 1 and self.alone.isdisjoint(
                {self.waiting[0].pair.case, *(task.pair.case for task in worker.tasks.values())}
            ):
                worker.give(self.waiting.popleft())

    def listen(self) -> list[Outcome]:
        """The outcomes since the last call, without waiting."""
        outcomes = []
        for worker in self.workers:
            events = worker.client.poll()
            outcomes += [self._done(worker, event) for event in events if event["event"] == "done"]
            if died := [event for event in events if event["event"] == "died"]:
                outcomes += self._after_death(worker, died[0])
        return outcomes

    def _done(self, worker: _Worker, event: dict[str, Any]) -> Outcome:
        del worker.tasks[event["id"]]
        return Outcome(**event["outcome"])

    def _after_death(self, worker: _Worker, event: dict[str, Any]) -> list[Outcome]:
        """Try again what the worker had, each alone: either of the two may have brought it down."""
        first, *ahead = worker.tasks.values()
        worker.tasks.clear()
        again = [first, *ahead]
        outcomes = []
        self.alone |= {task.pair.case for task in again}
        if not ahead:
            self.attempts[first.pair.case] += 1
            if self.attempts[first.pair.case] == ATTEMPTS:
                again = []
                outcomes = [Outcome(first.pair.case, FAILED, _cause(event), "internal", event["message"])]
        self.waiting.extendleft(reversed(again))
        return outcomes

    def close(self) -> None:
        for worker in self.workers:
            if worker.tasks:
                worker.client.kill()
            worker.client.close()


def compute(
    tasks: Iterable[Task], workers: int | None = None, command: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """Register the tasks in processes of their own; yields the outcomes as they come, in any order.

    There is one process per graphics card, or as many as ``workers`` says, which share the cards and cores.
    ``command`` is what to start instead of this Python with `batch_worker`.

    Closing the iterator ends the processes at once, and nothing half is left but hidden folders.
    """
    cards = graphics_cards()
    count = workers or cards or 1
    threads = max(usable_cores() // count, 1)
    command = command or [python_executable(), "-m", "GradProjIOLib.batch.worker"]
    crew = _Crew(tasks, [_Worker(command, threads, number % cards if cards else None) for number in range(count)])
    try:
        while crew.busy:
            crew.hand_out()
            outcomes = crew.listen()
            yield from outcomes
            if not outcomes:
                time.sleep(POLL_SECONDS)
    finally:
        crew.close()


def _cause(event: dict[str, Any]) -> str:
    code = event["code"]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    hint = "; there may be too little memory for so many workers" if code == -getattr(signal, "SIGKILL", 9) else ""
    said = f" ({event['message']})" if code > 0 and event["message"] else ""
    return f"The process that registered it {how}{said}, {ATTEMPTS} times in a row{hint}."


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal; one started in here does not hear it: its parent decides."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

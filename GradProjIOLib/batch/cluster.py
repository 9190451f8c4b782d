"""The workers of a batch on a cluster, through a `dask.distributed` scheduler that is there already.

Every worker must see the files and the folder of the results at the same paths, and have this package. A worker
that announces the resource GPU computes one pair per GPU at a time. Reading is a task of its own without that
resource, so a worker with a second thread reads the next pair meanwhile. When a worker dies, the scheduler gives
its pairs to others.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from GradProjIOLib.batch.tasks import FAILED, Outcome, Task, finish, read_inputs
from GradProjIOLib.errors import InputError

if TYPE_CHECKING:
    from distributed import Client, Future

GPU = "GPU"
CONNECTION_SECONDS = 30
RETRIES = 3


def compute(tasks: Sequence[Task], scheduler: str) -> Generator[Outcome, None, None]:
    """Do the tasks on the workers of ``scheduler``; yields the outcomes as they come, in any order.

    scheduler: an address (tcp://host:8786) or the path of a scheduler file. Waits for the first worker. Closing the
    iterator withdraws the tasks. Raises InputError where Dask is not installed or the scheduler does not answer.
    """
    with _connect(scheduler) as client:
        client.wait_for_workers(1)
        yield from _Queue(client, tasks).outcomes()


def _connect(scheduler: str) -> Client:
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError('Dask is not installed; install it with: pip install "GradProjIO[dask]"') from error
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        return Client(**where, timeout=CONNECTION_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"There is no Dask scheduler at {scheduler} ({error}); check the address.") from error


class _Queue:
    """Keeps twice as many pairs on their way as can be computed at a time, so that few are in memory."""

    def __init__(self, client: Client, tasks: Sequence[Task]) -> None:
        self.client = client
        self.waiting = list(reversed(tasks))
        self.cases: dict[Future, str] = {}

    def outcomes(self) -> Iterator[Outcome]:
        from distributed import as_completed

        completed = as_completed(loop=self.client.loop)
        try:
            self._fill(completed)
            for future in completed:
                yield self._outcome(future)
                self._fill(completed)
        finally:
            self.client.cancel(list(self.cases))

    def _fill(self, completed: Any) -> None:
        workers = self._workers()
        gpus = sum(worker["resources"].get(GPU, 0) for worker in workers)
        room = 2 * math.ceil(gpus or len(workers) or 1)
        while self.waiting and len(self.cases) < room:
            completed.add(self._submit(self.waiting.pop(), bool(gpus)))

    def _submit(self, task: Task, gpu: bool) -> Future:
        name = f"{task.pair.case}-{uuid4().hex}"
        inputs = self.client.submit(read_inputs, task, key=f"read-{name}", pure=False, retries=RETRIES)
        needed = {GPU: 1} if gpu and task.pair.settings.device != "cpu" else None
        future = self.client.submit(
            finish, task, inputs, key=f"compute-{name}", pure=False, retries=RETRIES, resources=needed
        )
        self.cases[future] = task.pair.case
        return future

    def _outcome(self, future: Future) -> Outcome:
        case = self.cases.pop(future)
        error = future.exception()
        if error is None:
            return future.result()
        return Outcome(case, FAILED, f"{type(error).__name__}: {error}", "internal")

    def _workers(self) -> list[dict[str, Any]]:
        try:
            # Without the argument, newer versions list the first five only.
            known = self.client.scheduler_info(n_workers=-1)
        except TypeError:
            known = self.client.scheduler_info()
        return list(known["workers"].values())

"""The workers of a batch on a cluster, through a `dask.distributed` scheduler that is there already.

Every worker must see the files and the folder of the results at the same paths, and have this package. A worker
that announces the resource GPU computes one pair per GPU at a time. When a worker dies, the scheduler gives its
pairs to others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from GradProjIOLib.batch.tasks import Outcome, Task, do, failure
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
    waiting = deque(tasks)
    cases: dict[Future, str] = {}
    with _connect(scheduler) as client:
        from distributed import as_completed

        client.wait_for_workers(1)
        completed = as_completed(loop=client.loop)

        def fill() -> None:
            """Keep twice as many pairs on their way as can be computed at a time.

            So no worker waits for a pair, and one that dies brings few pairs nearer to the limit of their retries.
            """
            workers = _workers(client)
            gpus = sum(worker["resources"].get(GPU, 0) for worker in workers)
            while waiting and len(cases) < 2 * math.ceil(gpus or len(workers) or 1):
                task = waiting.popleft()
                case = task.pair.case
                needed = {GPU: 1} if gpus and task.pair.settings.device != "cpu" else None
                key = f"compute-{case}-{uuid4().hex}"
                future = client.submit(do, task, key=key, retries=RETRIES, resources=needed)
                cases[future] = case
                completed.add(future)

        try:
            fill()
            for future in completed:
                case, error = cases.pop(future), future.exception()
                yield future.result() if error is None else failure(case, error)
                fill()
        finally:
            client.cancel(list(cases))


def _connect(scheduler: str) -> Client:
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError("Dask is not installed; install it with: pip install distributed") from error
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        return Client(**where, timeout=CONNECTION_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"There is no Dask scheduler at {scheduler} ({error}); check the address.") from error


def _workers(client: Client) -> list[dict[str, Any]]:
    try:
        # Without the argument, newer versions list the first five only.
        known = client.scheduler_info(n_workers=-1)
    except TypeError:
        known = client.scheduler_info()
    return list(known["workers"].values())

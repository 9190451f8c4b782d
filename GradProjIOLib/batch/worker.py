"""A process that registers the pairs of a batch: `python -m GradProjIOLib.batch.worker`.

It reads tasks and writes outcomes, one JSON object per line, on its standard input and output, as `worker` does
for a graphical application. The next pair is read while the current one is computed, and the model stays in
memory. The process ends at once when its input is closed, so it cannot outlive the one that started it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import Any

from GradProjIOLib.batch.pair import Task, finish, read_inputs
from GradProjIOLib.worker.server import Connection

LONG_SECONDS = 3600.0


def read_ahead(connection: Connection, loaded: queue.Queue[tuple[int, Task, Any] | None]) -> None:
    """Read the pairs that are asked for, in order, until the request to quit."""
    while True:
        message = connection.next_request(LONG_SECONDS)
        if message is None:
            continue
        if message["request"] == "quit":
            loaded.put(None)
            return
        task = Task.from_message(message)
        loaded.put((message["id"], task, read_inputs(task)))


def serve(connection: Connection) -> None:
    """Work off tasks until the request to quit."""
    connection.send("ready", pid=os.getpid())
    loaded: queue.Queue[tuple[int, Task, Any] | None] = queue.Queue(maxsize=1)
    threading.Thread(target=read_ahead, args=(connection, loaded), daemon=True).start()
    while (item := loaded.get()) is not None:
        number, task, inputs = item
        connection.send("started", id=number)
        connection.send("done", id=number, outcome=asdict(finish(task, inputs)))
        # Else this pair would stay in memory while the next one is waited for.
        del item, inputs


def main() -> int:
    """Entry point; returns the exit status."""
    serve(Connection.of_this_process())
    return 0


if __name__ == "__main__":
    sys.exit(main())

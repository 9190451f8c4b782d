"""The worker process, which computes for an application: `python -m GradProjIOLib.worker.server`.

It reads requests from its standard input and writes events to its standard output; see `protocol`. The model stays in
memory between requests. The process ends when its input is closed, also in the middle of a step; then it removes
the folder of the request under way. It also ends after a time without requests.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any

from GradProjIOLib.worker import protocol

if TYPE_CHECKING:
    from GradProjIOLib.worker.earlier import Kept

IDLE_SECONDS = 600.0
# Without this, computing on all processor cores would make the application sluggish.
NICENESS = 5


class Connection:
    """Reads the application's requests in a thread of its own, and sends it events.

    `canceled` has the numbers of the requests that the application has canceled. `folder` is that of the request under
    way, which is removed when the application ends. `kept`: see `earlier.Kept`.
    """

    def __init__(self) -> None:
        # What libraries print goes to standard error from now on.
        self._events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.canceled: set[int] = set()
        self.folder: str | None = None
        self.kept: Kept | None = None
        threading.Thread(target=self._read_requests, daemon=True).start()

    def next_request(self, seconds: float) -> dict[str, Any] | None:
        """The next request other than cancel; None after `seconds` without one."""
        try:
            return self._requests.get(timeout=seconds)
        except queue.Empty:
            return None

    def send(self, event: str, **content: Any) -> None:
        """Send an event to the application."""
        self._events.write(json.dumps({"event": event, **content}) + "\n")
        self._events.flush()

    def _read_requests(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if request["request"] == protocol.CANCEL:
                self.canceled.add(request["id"])
            else:
                self._requests.put(request)
        # The application has ended. Nobody needs the result any more, and a step can take minutes.
        if self.folder is not None:
            protocol.remove_folder(self.folder)
        os._exit(0)


def main(idle_seconds: float = IDLE_SECONDS) -> None:
    """Answer the requests of the application until there are none for `idle_seconds`."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    connection = Connection()
    connection.send(protocol.READY, pid=os.getpid())
    # Only now, because what it imports takes seconds.
    from GradProjIOLib.worker.answers import answer, devices, published_models

    connection.send(protocol.DEVICES, devices=devices(), models=published_models())
    while (message := connection.next_request(idle_seconds)) is not None:
        answer(message, connection)


if __name__ == "__main__":
    main()

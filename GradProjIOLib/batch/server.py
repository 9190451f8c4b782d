"""A batch as a process of its own, for Slicer's Python console: ``python -m GradProjIOLib.batch.server``.

It reads one request from standard input and writes events to standard output, one JSON object per line:

    {"request": "batch", "id": n, "folder": …, "pairs": [{"case", "fixed", "moving"}, …], "settings": {…},
     "allow_download": false}

    {"event": "ready", "pid"}, {"event": "outcome", "id", "case", "state", "message"},
    {"event": "done" | "canceled", "id"}, {"event": "failed", "id", "message"}

Paths are those of files. The batch is canceled by another line, or when standard input is closed, so that the process
does not outlive the application that started it.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading
from typing import Any

from GradProjIOLib.batch.run import run
from GradProjIOLib.batch.tasks import Outcome
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.pairs import Pair
from GradProjIOLib.models import registry, weights
from GradProjIOLib.settings import Settings


def main() -> int:
    """Entry point; returns the exit status."""
    # Only events may go to standard output; what libraries print goes where errors go.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(event: str, **content: Any) -> None:
        events.write(json.dumps({"event": event, **content}) + "\n")
        events.flush()

    # Without a buffer, because a thread that waits for a buffer would be in the way at the end of the process.
    incoming = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115 - as long as the process
    # The application may have been started with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    send("ready", pid=os.getpid())
    line = incoming.readline()
    if not line:
        return 0
    request = json.loads(line)
    number = request["id"]

    def interrupt_after_next_line() -> None:
        incoming.readline()
        _thread.interrupt_main()

    def show(outcome: Outcome) -> None:
        send("outcome", id=number, case=outcome.case, state=outcome.state, message=outcome.message)

    try:
        threading.Thread(target=interrupt_after_next_line, daemon=True).start()
        settings = Settings.from_mapping(request["settings"])
        if request["allow_download"]:
            _fetch_weights(settings)
        run([Pair(**pair, settings=settings) for pair in request["pairs"]], request["folder"], on_outcome=show)
        send("done", id=number)
    except KeyboardInterrupt:
        send("canceled", id=number)
    except InputError as error:
        send("failed", id=number, message=str(error))
    return 0


def _fetch_weights(settings: Settings) -> None:
    url = None if settings.weights else registry.missing_url(settings.model)
    if url is not None:
        weights.download(settings.model, url)


if __name__ == "__main__":
    # The application may have closed the other end already.
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(1)

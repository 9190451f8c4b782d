"""A batch as a process of its own, for Slicer's Python console: ``python -m GradProjIOLib.batch.server``.

It reads one request from standard input and writes events to standard output, one JSON object per line:

    {"request": "batch", "id": n, "folder": …, "pairs": [{"case", "fixed", "moving"}, …], "settings": {…},
     "allow_download": false}

    {"event": "ready", "id", "pid"}, {"event": "outcome", "id", "case", "message"},
    {"event": "done" | "canceled", "id"}, {"event": "failed", "id", "message"}

The message of an outcome is empty where the pair is done. Paths are those of files. The batch is canceled by another
line, or when standard input is closed, so that the process does not outlive the application that started it.
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
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.pairs import Pair
from GradProjIOLib.models import registry, weights
from GradProjIOLib.settings import Settings


def main() -> None:
    """Do the batch of the request."""
    # Only events may go to standard output; what libraries print goes where errors go.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Without a buffer, because a thread that waits for a buffer would be in the way at the end of the process.
    incoming = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115 - as long as the process
    # The application may have been started with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    line = incoming.readline()
    if not line:
        return
    request = json.loads(line)

    def send(event: str, **content: Any) -> None:
        events.write(json.dumps({"event": event, "id": request["id"], **content}) + "\n")
        events.flush()

    def interrupt_after_next_line() -> None:
        incoming.readline()
        _thread.interrupt_main()

    send("ready", pid=os.getpid())
    try:
        threading.Thread(target=interrupt_after_next_line, daemon=True).start()
        settings = Settings.from_mapping(request["settings"])
        if request["allow_download"] and not settings.weights and (url := registry.missing_url(settings.model)):
            weights.download(settings.model, url)
        pairs = [Pair(**pair, settings=settings) for pair in request["pairs"]]
        run(pairs, request["folder"], on_outcome=lambda one: send("outcome", case=one.case, message=one.message))
        send("done")
    except KeyboardInterrupt:
        send("canceled")
    except InputError as error:
        send("failed", message=str(error))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        # The application has ended.
        sys.exit(1)

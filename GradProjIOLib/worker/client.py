"""The application's end of a worker process: starts it, sends requests, collects events, ends it.

Nothing here waits, and there are no threads: call `WorkerClient.poll` from a timer. The worker ends when its standard
input is closed, so it cannot outlive the process that holds the client, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from GradProjIOLib.errors import InputError
from GradProjIOLib.worker.protocol import CANCEL, DIED, LAST_EVENTS, READY

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
EXIT_SECONDS = 5.0


class WorkerClient:
    """A worker process, started when it is first needed and again when it has ended.

    `command` is what to start, `environment` what to add to the environment of this process. `pid` is the process
    number of the worker, once it has reported that it is ready.
    """

    def __init__(self, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.pid: int | None = None
        self._command = list(command) if command else [python_executable(), "-m", "GradProjIOLib.worker.server"]
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: BinaryIO | None = None
        self._unread = b""
        self._last_number = 0
        self._pending: dict[int, dict[str, Any]] = {}
        self._sent_again: set[int] = set()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process where it is not running. Raises InputError where that fails."""
        if not self.running:
            self._end()
            self._launch()

    def submit(self, request: Mapping[str, Any]) -> int:
        """Send a request; return the number that its events carry. Raises InputError as `start` does."""
        self.start()
        self._last_number += 1
        numbered = {**request, "id": self._last_number}
        self._pending[self._last_number] = numbered
        self._send(numbered)
        return self._last_number

    def cancel(self, number: int) -> None:
        """Ask the worker to end request `number` after the current step and keep what it has."""
        self._send({"request": CANCEL, "id": number})

    def poll(self) -> list[dict[str, Any]]:
        """The events since the last call, without waiting.

        Where the process has ended, there is a `died` event for each request that is lost. A process ends with
        status 0 when it was not used for some time. A request that reached it only then is sent once more, to a new
        process.
        """
        if self._process is None:
            return []
        ended = self._process.poll() is not None
        events = self._read_events()
        for event in events:
            if event["event"] == READY:
                self.pid = event["pid"]
            elif event["event"] in LAST_EVENTS:
                self._pending.pop(event["id"], None)
        return events + self._after_exit() if ended else events

    def kill(self) -> None:
        """End the process at once. What was under way is lost; the next request starts a new process."""
        self._pending.clear()
        if self.running:
            # A launcher may stand between this process and the worker; ending only the launcher would leave the worker.
            if self.pid is not None:
                with contextlib.suppress(OSError):
                    os.kill(self.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            self._process.kill()
        self._end()

    def close(self) -> None:
        """End the process: a busy one at once, an idle one by closing its input."""
        if self._pending:
            self.kill()
        self._end()

    def _launch(self) -> None:
        path = os.pathsep.join(filter(None, (str(PACKAGE_FOLDER.parent), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment | self._environment,
                bufsize=0,
                # Without this Windows opens a console window.
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            self._errors.close()
            raise InputError(f"The worker process could not be started ({error}); reinstall GradProjIO.") from error
        os.set_blocking(self._process.stdout.fileno(), False)
        # Who forgets to close the client leaves no process.
        self._release = weakref.finalize(self, _release, self._process, self._errors)

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process is None:
            return
        # A broken pipe means that the process has ended; `poll` reports that.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _read_events(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError):  # BlockingIOError: nothing more to read now
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        # A library or a launcher may have printed other lines.
        return [json.loads(line) for line in lines if line.startswith(b'{"event"')]

    def _after_exit(self) -> list[dict[str, Any]]:
        """The `died` events of the pending requests; none where these are sent again."""
        code, message = self._process.returncode, self._last_error_line()
        self._end()
        if self._pending and code == 0 and not self._sent_again & self._pending.keys():
            self._sent_again |= self._pending.keys()
            try:
                self._launch()
            except InputError as error:
                message = str(error)
            else:
                for request in self._pending.values():
                    self._send(request)
                return []
        lost, self._pending = self._pending, {}
        return [{"event": DIED, "id": number, "code": code, "message": message} for number in lost]

    def _last_error_line(self) -> str:
        """The last line on the standard error of the process, empty where there is none."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def _end(self) -> None:
        """End the process, where there is one."""
        if self._process is not None:
            self._release()
            self._process = self.pid = None
            self._unread = b""


def _release(process: subprocess.Popen[bytes], errors: BinaryIO) -> None:
    """Close the process's input, which ends it; wait until it is gone."""
    for pipe in (process.stdin, process.stdout, errors):
        with contextlib.suppress(OSError):
            pipe.close()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_SECONDS)
    finally:
        # Also where the wait was interrupted. It does nothing to a process that is gone.
        process.kill()
        process.wait()


def python_executable() -> str:
    """The Python to start the worker with: PythonSlicer inside Slicer, else the one that runs this."""
    if "python" in Path(sys.executable or "").name.lower():
        return sys.executable
    return shutil.which("PythonSlicer") or sys.executable or "python3"

"""Slicer's end of the worker process: starts it, asks it, listens to it, ends it. Standard library only.

Nothing here waits, and there are no threads: call `WorkerClient.poll` from a timer. The worker itself ends
when its standard input is closed, so it cannot outlive the process that holds the client, however that ends.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
ERROR_TAIL_BYTES = 4000
ENDING_SECONDS = 5.0


class WorkerClient:
    """A worker process, started when it is first needed and again when it has ended.

    `command` is what to start, `environment` what to add to the environment of this process.
    """

    def __init__(self, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._command = list(command) if command else [python_executable(), "-m", "GradProjIOLib.worker.server"]
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._worker_pid: int | None = None
        self._errors: BinaryIO | None = None
        self._unread = b""
        self._numbers = 0
        self._pending: dict[int, dict[str, Any]] = {}
        self._heard_of: set[int] = set()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def busy(self) -> bool:
        """Whether a request is waiting for its result."""
        return bool(self._pending)

    @property
    def pid(self) -> int | None:
        """The process number of the worker once it has reported, for looking at it."""
        return self._worker_pid

    def start(self) -> None:
        """Start the process where it is not running, so that the first request finds it warm."""
        if not self.running:
            self._forget_process()
            self._launch()

    def submit(self, request: Mapping[str, Any]) -> int:
        """Send a request; return the number that its events carry.

        Raises OSError where the process cannot be started.
        """
        self._numbers += 1
        numbered = {**request, "id": self._numbers}
        self._pending[self._numbers] = numbered
        try:
            self.start()
        except OSError:
            del self._pending[self._numbers]
            raise
        self._send(numbered)
        return self._numbers

    def cancel(self, number: int) -> None:
        """Ask the worker to end request `number` after the current step and keep what it has."""
        self._send({"request": "cancel", "id": number})

    def poll(self) -> list[dict[str, Any]]:
        """The events since the last call, without waiting.

        To those of the worker one is added: {"event": "died", "id", "message"} for every request that was
        under way when the process ended. A worker that went idle just before a request came is started again
        without a word.
        """
        if self._process is None:
            return []
        ended = self._process.poll() is not None
        events = [self._note(event) for event in self._read_events()]
        if ended:
            events += self._bury()
        return events

    def kill(self) -> None:
        """End the process at once. What was under way is lost; the next request starts a new one."""
        self._pending.clear()
        if self._process is None:
            return
        # A launcher may stand between us and the worker; ending only the launcher would leave the worker.
        if self._worker_pid is not None and self._worker_pid != self._process.pid and self.running:
            with contextlib.suppress(OSError):
                os.kill(self._worker_pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        self._process.kill()
        self._close_pipes()
        self._wait()
        self._forget_process()

    def close(self) -> None:
        """End the process in good order: a busy one at once, an idle one by closing its input."""
        if self._pending:
            self.kill()
        if self._process is not None:
            self._close_pipes()
            self._wait()
            self._forget_process()

    def _launch(self) -> None:
        inherited = os.environ.get("PYTHONPATH")
        folders = [str(PACKAGE_FOLDER.parent), *([inherited] if inherited else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONIOENCODING": "utf-8"}
        environment.update(self._environment)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            bufsize=0,
            # Without this Windows opens a console window.
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        os.set_blocking(self._process.stdout.fileno(), False)

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process is None:
            return
        # A broken pipe means that the process has ended; `poll` reports that.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _read_events(self) -> list[dict[str, Any]]:
        while True:
            try:
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            if not chunk:
                break
            self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        return [event for line in lines if (event := _parse(line)) is not None]

    def _note(self, event: dict[str, Any]) -> dict[str, Any]:
        number = event.get("id")
        if event["event"] == "ready":
            self._worker_pid = event.get("pid")
        elif number is not None:
            self._heard_of.add(number)
        if event["event"] in ("done", "failed", "cancelled", "evaluated"):
            self._pending.pop(number, None)
        return event

    def _bury(self) -> list[dict[str, Any]]:
        """The process has ended: say so for what was under way, send again what it never took up."""
        code, message = self._process.returncode, self._last_words()
        lost = [number for number in self._pending if code != 0 or number in self._heard_of]
        for number in lost:
            del self._pending[number]
        self._forget_process()
        if self._pending:
            self._launch()
            for request in self._pending.values():
                self._send(request)
        return [{"event": "died", "id": number, "code": code, "message": message} for number in lost]

    def _last_words(self) -> str:
        """The last line on the standard error of the process, empty where there is none."""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - ERROR_TAIL_BYTES))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _wait(self) -> None:
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _forget_process(self) -> None:
        if self._process is not None:
            self._close_pipes()
        if self._errors is not None:
            self._errors.close()
        self._process = self._worker_pid = self._errors = None
        self._unread = b""


def python_executable() -> str:
    """The Python to start the worker with: PythonSlicer inside Slicer, else the one that runs this."""
    if "python" in Path(sys.executable or "").name.lower():
        return sys.executable
    return shutil.which("PythonSlicer") or sys.executable or "python3"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None for anything else a library may have printed."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None

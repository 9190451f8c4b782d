"""A process that registers for a graphical application: `python -m GradProjIOLib.worker.server`.

It reads requests and writes events, one JSON object per line, on its standard input and output:

    {"request": "register", "id": n, "fixed": …, "moving": …, "output": folder, "settings": {…}}
    {"request": "evaluate", "id": n, "transform": …, "reference": …, "output": folder}
    {"request": "cancel", "id": n}
    {"request": "quit"}

An image is a path, or the record of an array (see exchange.py). `fixed_mask`, `moving_mask`,
`moving_labels` and `initial_transform` may be added; the last is a path, a field's record, or {"matrix": 4x4,
RAS mm, fixed to moving}. `settings` are those of registration.Settings. `format` "files" (unless given) writes
what the command `gradprojio register` writes, "arrays" raw arrays for Slicer. `allow_download` permits to fetch the
model's weights. To be measured is a field's record on the lattice of `reference`, with `fixed_labels` and
`moving_labels`, or `fixed_points` and `moving_points` ({"names", "positions" in RAS mm, "source"}).

    {"event": "ready", "pid"}, {"event": "devices", "devices"},
    {"event": "started", "id", "total"}, {"event": "download", "id", "received", "total"},
    {"event": "step", "id", "index", "similarity", "regularity", "cosine", "projected", "seconds",
     "remaining_seconds"},
    {"event": "evaluated", "id", "row"},
    {"event": "done" | "cancelled", "id", "output", "report", "result"},
    {"event": "failed", "id", "message", "kind": "input" | "weights" | "internal"}

After a cancel the result is that of the steps done so far. The process ends when its input is closed, also in
the middle of a step; then it removes the folder of the request it was at. It also ends after a time without
requests. The model stays in memory between requests.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.worker import exchange

IDLE_SECONDS = 600.0
# Without this, computing on all processor cores would make the application sluggish.
NICENESS = 5
DOWNLOAD_EVENT_SECONDS = 0.2


class Connection:
    """The two lines to the application, and what it wants now."""

    def __init__(self, incoming: TextIO, outgoing: TextIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self._canceled: set[int] = set()
        self._folder: str | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def next_request(self, seconds: float) -> dict[str, Any] | None:
        """The next request but cancel; None after `seconds` without one."""
        try:
            return self._requests.get(timeout=seconds)
        except queue.Empty:
            return None

    def send(self, event: str, **content: Any) -> None:
        """Tell the application."""
        self._outgoing.write(json.dumps({"event": event, **content}) + "\n")
        self._outgoing.flush()

    def canceled(self, number: int) -> bool:
        """Whether the application has canceled request `number`."""
        return number in self._canceled

    def work_in(self, folder: str | None) -> None:
        """From now on `folder` belongs to the request under way; it goes if the application does."""
        self._folder = folder

    def _listen(self) -> None:
        for line in self._incoming:
            try:
                request = json.loads(line)
            except ValueError:
                continue
            if request.get("request") == "cancel":
                self._canceled.add(request.get("id"))
            else:
                self._requests.put(request)
        # The application has gone. Nothing it could want is left, and a step can take minutes.
        if self._folder is not None:
            exchange.remove_folder(self._folder)
        os._exit(0)


class Job:
    """One registration request."""

    def __init__(self, request: Mapping[str, Any], connection: Connection) -> None:
        self.request, self.connection = request, connection
        self.number = request["id"]
        self.folder = Path(request["output"])
        self.step_seconds: list[float] = []

    def run(self) -> None:
        """Register and report; errors become an event."""
        self.connection.work_in(str(self.folder))
        try:
            self._register()
        except WeightsMissing as error:
            self._send("failed", message=str(error), kind="weights")
        except (InputError, MemoryError) as error:
            self._send("failed", message=str(error) or "There is not enough memory.", kind="input")
        except Exception as error:
            traceback.print_exc()
            self._send("failed", message=f"{type(error).__name__}: {error}", kind="internal")
        finally:
            self.connection.work_in(None)
            free_memory()

    def _send(self, event: str, **content: Any) -> None:
        self.connection.send(event, id=self.number, **content)

    def _register(self) -> None:
        from GradProjIOLib.registration.register import register
        from GradProjIOLib.settings import Settings

        settings = make(Settings, self.request.get("settings", {}))
        self.total = 0 if settings.method == "direct" else settings.steps
        self._send("started", total=self.total)
        if not self._fetch_weights(settings):
            self._send("cancelled")
            return
        fixed = read_image(self.request["fixed"])
        registration = register(
            fixed,
            read_image(self.request["moving"]),
            settings,
            initial_transform=read_initial(self.request.get("initial_transform"), fixed),
            fixed_mask=read_image(self.request.get("fixed_mask")),
            moving_mask=read_image(self.request.get("moving_mask")),
            on_step=self._on_step,
        )
        result = self._write(registration)
        event = "cancelled" if self.connection.canceled(self.number) else "done"
        self._send(event, output=str(self.folder), report=registration.report, result=result)

    def _on_step(self, step: Any) -> bool:
        self.step_seconds.append(step.seconds)
        recent = self.step_seconds[-5:]
        remaining = (self.total - len(self.step_seconds)) * sum(recent) / len(recent)
        self._send("step", **asdict(step), remaining_seconds=remaining)
        return not self.connection.canceled(self.number)

    def _fetch_weights(self, settings: Any) -> bool:
        """Download the model's weights where they are missing and may be fetched; False where canceled."""
        from GradProjIOLib.models import weights
        from GradProjIOLib.models.registry import MODELS

        url = None if settings.model == "auto" or settings.weights else MODELS[settings.model].url
        if url is None or weights.cached_path(settings.model, url).exists():
            return True
        if not self.request.get("allow_download"):
            raise WeightsMissing(
                f"The weights of {settings.model} are not on this computer yet. They are about 283 MB, come "
                f"from {url}, and are kept in {weights.cache_directory()}. Download them now?"
            )
        last = [0.0]

        def on_progress(received: int, total: int | None) -> bool:
            if time.monotonic() - last[0] > DOWNLOAD_EVENT_SECONDS:
                last[0] = time.monotonic()
                self._send("download", received=received, total=total)
            return not self.connection.canceled(self.number)

        try:
            weights.download(settings.model, url, on_progress=on_progress)
        except weights.DownloadCancelled:
            return False
        return True

    def _write(self, registration: Any) -> dict[str, Any] | None:
        labels = read_image(self.request.get("moving_labels"))
        mask = read_image(self.request.get("fixed_mask"))
        if mask is not None:
            registration.report["jacobian_in_mask"] = figures_in_mask(registration, mask)
        if self.request.get("format", "files") == "files":
            registration.write(self.folder, labels=labels)
            return None
        return write_arrays(registration, labels, self.folder)


def evaluate(request: Mapping[str, Any], connection: Connection) -> None:
    """Measure a deformation and report; errors become an event."""
    number = request["id"]
    connection.work_in(request["output"])
    try:
        connection.send("evaluated", id=number, row=measured(request))
    except (InputError, MemoryError) as error:
        connection.send("failed", id=number, message=str(error) or "There is not enough memory.", kind="input")
    except Exception as error:
        traceback.print_exc()
        connection.send("failed", id=number, message=f"{type(error).__name__}: {error}", kind="internal")
    finally:
        connection.work_in(None)


def measured(request: Mapping[str, Any]) -> dict[str, Any]:
    """The row of `evaluate.measure_result` for a request."""
    import numpy as np

    from GradProjIOLib.evaluation.cases import measure_result
    from GradProjIOLib.geometry.landmarks import Landmarks
    from GradProjIOLib.spatial.deformation import Deformation

    def pair(kind: str, read: Callable[[Any], Any]) -> Any:
        if f"fixed_{kind}" not in request:
            return None
        return tuple(read(request[f"{role}_{kind}"]) for role in ("fixed", "moving"))

    def landmarks(record: Mapping[str, Any]) -> Landmarks:
        return Landmarks(record["names"], np.array(record["positions"]), record["source"])

    deformation = Deformation(*exchange.read_field(request["transform"]))
    reference = exchange.read_volume(request["reference"])
    return measure_result(deformation, reference, pair("labels", read_image), pair("points", landmarks))


class WeightsMissing(Exception):  # noqa: N818 - nothing went wrong
    """The model's weights have to be fetched first, for which the user must be asked."""


def make(settings_class: Callable[..., Any], keywords: Mapping[str, Any]) -> Any:
    """The settings with these keywords. Raises InputError for one that does not exist."""
    try:
        return settings_class(**keywords)
    except TypeError as error:
        raise InputError(f"A setting is not known ({error}); see GradProjIOLib.settings.Settings.") from error


def read_image(source: str | Mapping[str, Any] | None) -> Volume | None:
    """The volume a request names, None for none."""
    if source is None:
        return None
    if isinstance(source, str):
        from GradProjIOLib.geometry.image_files import read_volume

        return read_volume(source)
    return exchange.read_volume(source)


def read_initial(source: str | Mapping[str, Any] | None, fixed: Volume) -> Any:
    """The initial transform a request names, for the `fixed` image: 4x4 matrix, Deformation, or None."""
    import numpy as np

    from GradProjIOLib.spatial.deformation import Deformation

    if source is None:
        return None
    if isinstance(source, str):
        from GradProjIOLib.geometry.transform_files import read_linear

        matrix = read_linear(source)
        return Deformation.read(source, fixed.shape, fixed.affine) if matrix is None else matrix
    if "matrix" in source:
        return np.array(source["matrix"], dtype=np.float64)
    return Deformation(*exchange.read_field(source))


def figures_in_mask(registration: Any, mask: Volume) -> dict[str, float]:
    """The figures of report["jacobian"] for the fixed image's voxels inside `mask` (on any lattice)."""
    import numpy as np

    from GradProjIOLib.registration.result import describe_jacobian
    from GradProjIOLib.spatial.deformation import Deformation

    fixed = registration.fixed
    still = Deformation(np.zeros((2, 2, 2, 3), np.float32), fixed.affine)
    region = still.warp(mask, fixed, "nearest").array != 0
    return describe_jacobian(registration.forward, fixed, region)


def write_arrays(registration: Any, labels: Volume | None, folder: Path) -> dict[str, Any]:
    """Write the result to `folder` as raw arrays; return their records by role."""
    forward, inverse = registration.forward, registration.inverse
    result = {
        "transform": exchange.write_field(forward.displacement, forward.affine, folder, "transform"),
        "inverse": exchange.write_field(inverse.displacement, inverse.affine, folder, "inverse"),
    }
    volumes = {
        "warped": registration.warped(),
        "jacobian": registration.determinant(),
        "folding": registration.folding_mask(),
    }
    if labels is not None:
        volumes["warped_labels"] = forward.warp(labels, registration.fixed, "nearest")
    for role, volume in volumes.items():
        result[role] = exchange.write_volume(volume, folder, role)
    return result


def devices() -> list[dict[str, Any]]:
    """What can compute: name for the settings, and a label with the memory for the user."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GB free"
        found.append({"name": f"cuda:{index}", "label": f"{torch.cuda.get_device_name(index)}, {memory}"})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "label": "Apple graphics"})
    found.append({"name": "cpu", "label": f"processor, {torch.get_num_threads()} threads"})
    return found


def free_memory() -> None:
    """Give memory of the graphics card that is not in use back to other programs."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def serve(connection: Connection, idle_seconds: float) -> None:
    """Work off requests until there are none for `idle_seconds`, or the application says quit."""
    connection.send("ready", pid=os.getpid())
    connection.send("devices", devices=devices())
    while (request := connection.next_request(idle_seconds)) is not None:
        if request.get("request") == "quit":
            return
        if request.get("request") == "register":
            Job(request, connection).run()
        if request.get("request") == "evaluate":
            evaluate(request, connection)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="Registers pairs of images on request.")
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS, help="end after this long unused")
    options = parser.parse_args(arguments)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    # Only events may go to standard output; what libraries print goes where errors go.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(Connection(sys.stdin, events), options.idle_seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

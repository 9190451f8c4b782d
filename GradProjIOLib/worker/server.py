"""The worker process, which computes for an application: `python -m GradProjIOLib.worker.server`.

It reads requests from its standard input and writes events to its standard output; see `protocol`. The model stays in
memory between requests. The process ends when its input is closed, also in the middle of a step; then it removes
the folder of the request under way. It also ends after a time without requests.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.settings import Settings
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import DownloadRequest, EvaluateRequest, Record, RegisterRequest

if TYPE_CHECKING:
    from GradProjIOLib.worker.so_far import SoFar

IDLE_SECONDS = 600.0
# Without this, computing on all processor cores would make the application sluggish.
NICENESS = 5
DOWNLOAD_EVENT_SECONDS = 0.2
WEIGHTS_BYTES = 283_000_000
LEAST_VOLUME = 1e-4
"""Folded volume in voxels; less is the rounding of the numbers."""


class Connection:
    """Reads the application's requests in a thread of its own, and sends it events.

    `canceled` has the numbers of the requests that the application has canceled. `folder` is that of the request under
    way, which is removed when the application ends. `kept` has the optimizer state of the latest result: only the
    worker has it, and continuing exactly needs it.
    """

    def __init__(self) -> None:
        # What libraries print goes to standard error from now on.
        self._events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.canceled: set[int] = set()
        self.folder: str | None = None
        self.kept: Any = None
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


def answer(message: Mapping[str, Any], connection: Connection) -> None:
    """Do what a request asks for. An error becomes an event."""
    number = message["id"]
    try:
        request = protocol.from_message(message)
        connection.folder = request.folder
        if isinstance(request, RegisterRequest):
            _Registration(request, number, connection).run()
        elif isinstance(request, DownloadRequest):
            if _fetch(request.model, number, connection):
                connection.send(protocol.DOWNLOADED, id=number)
        else:
            connection.send(protocol.EVALUATED, id=number, row=evaluate(request))
    except (InputError, MemoryError) as error:
        problem = str(error) or "There is not enough memory."
        connection.send(protocol.FAILED, id=number, message=problem, kind=protocol.INPUT_PROBLEM)
    except Exception as error:
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
        connection.send(protocol.FAILED, id=number, message=problem, kind=protocol.INTERNAL_PROBLEM)
    finally:
        connection.folder = None
        free_memory()


class _Registration:
    """One registration: reports its steps and ends when the application cancels it."""

    def __init__(self, request: RegisterRequest, number: int, connection: Connection) -> None:
        self.request, self.number, self.connection = request, number, connection
        self.so_far: SoFar | None = None

    def run(self) -> None:
        from GradProjIOLib.worker.earlier import Kept
        from GradProjIOLib.worker.so_far import SoFar

        request = self.request
        fixed, moving = protocol.read_volume(request.fixed), protocol.read_volume(request.moving)
        initial = read_initial(request.initial_transform)
        masks = {"fixed_mask": read_optional(request.fixed_mask), "moving_mask": read_optional(request.moving_mask)}
        if request.so_far_seconds is not None:
            self.so_far = SoFar(request.so_far_seconds, Path(request.folder), self._send_so_far)
        begin = self._register if request.earlier is None else self._go_on
        registration = begin(fixed, moving, initial, masks, read_guides(request))
        if registration is None:
            return
        if masks["fixed_mask"] is not None:
            registration.report["jacobian_in_mask"] = figures_in_mask(registration, masks["fixed_mask"])
        self.connection.kept = Kept.of(registration)
        result = write_arrays(registration, read_optional(request.moving_labels), Path(request.folder))
        event = protocol.DONE if self._wanted() else protocol.CANCELED
        self._send(event, report=registration.report, result=result)

    def _register(
        self, fixed: Volume, moving: Volume, initial: Any, masks: dict[str, Any], guides: dict[str, Any]
    ) -> Any:
        """The registration; None where the model's weights are missing, of which the application has been told."""
        from GradProjIOLib.registration.network import network_steps
        from GradProjIOLib.registration.refinement import plan_levels
        from GradProjIOLib.registration.register import register

        self.connection.kept = None
        settings = Settings.from_mapping(self.request.settings)
        levels = list(plan_levels(fixed, settings).values())
        self._send(protocol.STARTED, total=network_steps(settings) + sum(levels), levels=levels, before=0)
        if not self._fetch_weights(settings):
            return None
        watched = {"on_step": self._on_step, "on_start": self._on_start()}
        return register(fixed, moving, settings, initial_transform=initial, **watched, **masks, **guides)

    def _go_on(self, fixed: Volume, moving: Volume, initial: Any, masks: dict[str, Any], guides: dict[str, Any]) -> Any:
        """The registration that goes on with the request's earlier result."""
        from GradProjIOLib.worker.earlier import run_that_goes_on

        run = run_that_goes_on(self.request, self.connection.kept, fixed, moving, initial, masks, guides)
        before = run.earlier.network_steps if run.network is not None else 0
        self._send(protocol.STARTED, total=run.total, levels=run.steps_of_levels, before=before)
        return run.result(self._on_step, self._on_start(), progress=False)

    def _send(self, event: str, **content: Any) -> None:
        self.connection.send(event, id=self.number, **content)

    def _wanted(self) -> bool:
        return self.number not in self.connection.canceled

    def _on_start(self) -> Any:
        return None if self.so_far is None else self.so_far.start

    def _on_step(self, step: Any) -> bool:
        self._send(protocol.STEP, **asdict(step))
        wanted = self._wanted()
        if self.so_far is not None:
            self.so_far.step(last=not wanted)
        return wanted

    def _send_so_far(self, transform: Record) -> None:
        self._send(protocol.SO_FAR, transform=transform)

    def _fetch_weights(self, settings: Settings) -> bool:
        """Download the model's weights where they are missing and the user has agreed; whether they are there now."""
        from GradProjIOLib.models import weights
        from GradProjIOLib.models.registry import missing_url

        url = None if settings.weights else missing_url(settings.model)
        if url is None:
            return True
        if not self.request.allow_download:
            question = (
                f"The weights of {settings.model} are not on this computer yet. They are about 283 MB, come "
                f"from {url}, and are kept in {weights.cache_directory()}. Download them now?"
            )
            self._send(protocol.FAILED, message=question, kind=protocol.WEIGHTS_MISSING)
            return False
        return _fetch(settings.model, self.number, self.connection)


def _fetch(model: str, number: int, connection: Connection) -> bool:
    """Fetch the weights of a model and report the progress; False, and an event, where the application cancels it."""
    from GradProjIOLib.models import weights
    from GradProjIOLib.models.registry import find

    last_event = 0.0

    def on_progress(received: int, total: int | None) -> bool:
        nonlocal last_event
        if time.monotonic() - last_event > DOWNLOAD_EVENT_SECONDS:
            last_event = time.monotonic()
            connection.send(protocol.DOWNLOAD, id=number, received=received, total=total)
        return number not in connection.canceled

    url = find(model).url
    if url is None:
        raise InputError(f"There is nothing to download for the model {model}.")
    try:
        weights.download(model, url, on_progress=on_progress)
    except weights.DownloadCancelled:
        connection.send(protocol.CANCELED, id=number)
        return False
    return True


def evaluate(request: EvaluateRequest) -> dict[str, Any]:
    """The row of `measure_result` for a request."""
    from GradProjIOLib.evaluation.cases import measure_result
    from GradProjIOLib.spatial.deformation import Deformation

    def pair(fixed: Record | None, moving: Record | None, read: Callable[[Record], Any]) -> Any:
        return None if fixed is None or moving is None else (read(fixed), read(moving))

    return measure_result(
        Deformation(*protocol.read_field(request.transform)),
        protocol.read_volume(request.reference),
        pair(request.fixed_labels, request.moving_labels, protocol.read_volume),
        pair(request.fixed_points, request.moving_points, protocol.read_points),
    )


def read_guides(request: RegisterRequest) -> dict[str, Any]:
    """What guides the registration of a request, as `register` takes it."""
    readers = {
        "fixed_points": (request.fixed_points, protocol.read_points),
        "moving_points": (request.moving_points, protocol.read_points),
        "fixed_labels": (request.fixed_guide, protocol.read_labels),
        "moving_labels": (request.moving_guide, protocol.read_labels),
    }
    guides: dict[str, Any] = {name: record and read(record) for name, (record, read) in readers.items()}
    return guides | {"guiding_labels": request.guiding_labels}


def read_optional(source: Record | None) -> Volume | None:
    """The volume of a record; None where there is none."""
    return None if source is None else protocol.read_volume(source)


def read_initial(source: Record | None) -> Any:
    """The initial transform that a request names: a 4x4 matrix or a Deformation, or None."""
    import numpy as np

    from GradProjIOLib.spatial.deformation import Deformation

    if source is None:
        return None
    if "array" not in source:
        return np.array(source["matrix"], dtype=np.float64)
    return Deformation(*protocol.read_field(source))


def figures_in_mask(registration: Any, mask: Volume) -> dict[str, float]:
    """The figures of report["jacobian"] for the fixed image's voxels inside `mask` (on any lattice)."""
    from GradProjIOLib.evaluation.metrics import IDENTITY
    from GradProjIOLib.registration.result import describe_jacobian

    region = IDENTITY.warp(mask, registration.fixed, "nearest").array != 0
    return describe_jacobian(registration.forward, registration.fixed, region)


def write_arrays(registration: Any, labels: Volume | None, folder: Path) -> dict[str, Any]:
    """Write the result to `folder` as raw arrays; return their records by the names in `protocol`."""
    forward, inverse = registration.forward, registration.inverse
    volumes = {
        protocol.WARPED: registration.warped(),
        protocol.JACOBIAN: registration.determinant(),
        protocol.FOLDING: registration.folding_mask(),
    }
    if registration.report["jacobian"]["ndv_percent"] > 0:
        volumes[protocol.BETWEEN] = folded_between(registration, volumes[protocol.FOLDING])
    if labels is not None:
        volumes[protocol.WARPED_LABELS] = forward.warp(labels, registration.fixed, "nearest")
    result = {role: protocol.write_volume(volume, folder, role) for role, volume in volumes.items()}
    for role, deformation in ((protocol.TRANSFORM, forward), (protocol.INVERSE, inverse)):
        result[role] = protocol.write_field(
            deformation.displacement, deformation.affine, deformation.matrix, folder, role
        )
    return result


def folded_between(registration: Any, folding: Volume) -> Volume:
    """1 where the deformation folds between the voxels only: there is a non-diffeomorphic volume, but no voxel of the
    mask `folding` near it (uint8)."""
    import numpy as np
    from scipy import ndimage

    from GradProjIOLib.spatial.jacobian import non_diffeomorphic_volume, voxel_displacement

    fixed = registration.fixed
    forward = registration.forward.sample(fixed.shape, fixed.affine)
    volume = non_diffeomorphic_volume(voxel_displacement(forward)).numpy()
    near = ndimage.binary_dilation(folding.array > 0, np.ones((3, 3, 3), bool))
    return Volume(((volume > LEAST_VOLUME) & ~near).astype(np.uint8), fixed.affine)


def devices() -> list[dict[str, Any]]:
    """What can compute: name for the settings, a label with the memory for the user, and the free memory in bytes."""
    import torch

    from GradProjIOLib.engine.devices import describe_device, usable_devices
    from GradProjIOLib.engine.memory import available_memory

    found = []
    for device in usable_devices():
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            label = f"{describe_device(device)}, {free / 2**30:.0f} of {total / 2**30:.0f} GB free"
        elif device.type == "mps":
            label = "Apple graphics"
        else:
            label = f"processor, {torch.get_num_threads()} threads"
        found.append({"name": str(device), "label": label, "memory": available_memory(device)})
    return found


def published_models() -> dict[str, dict[str, Any]]:
    """Whether the weights of the models that are fetched are there, and the memory in bytes that IO steps need."""
    from GradProjIOLib.engine.memory import BYTES_PER_SAMPLE, COPIES_OF_PARAMETERS
    from GradProjIOLib.models.registry import MODELS, missing_url

    found = {}
    for name, model in MODELS.items():
        if model.url is not None and model.lattice is not None:
            samples = math.prod(model.lattice)
            needed = COPIES_OF_PARAMETERS * WEIGHTS_BYTES + samples * BYTES_PER_SAMPLE["cuda"]["lean"]
            found[name] = {"there": missing_url(name) is None, "memory": needed}
    return found


def free_memory() -> None:
    """Give memory of the graphics card that is not in use back to other programs."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def main(idle_seconds: float = IDLE_SECONDS) -> None:
    """Answer the requests of the application until there are none for `idle_seconds`."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    connection = Connection()
    connection.send(protocol.READY, pid=os.getpid())
    connection.send(protocol.DEVICES, devices=devices(), models=published_models())
    while (message := connection.next_request(idle_seconds)) is not None:
        answer(message, connection)


if __name__ == "__main__":
    main()

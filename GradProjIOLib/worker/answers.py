"""What the worker process does for the requests of the application; see `protocol`."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage

from GradProjIOLib.engine.devices import describe_device, usable_devices
from GradProjIOLib.engine.memory import BYTES_PER_SAMPLE, COPIES_OF_PARAMETERS, available_memory
from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.cases import measure_result
from GradProjIOLib.evaluation.metrics import IDENTITY
from GradProjIOLib.geometry.files import json_text
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import registry, weights
from GradProjIOLib.registration.network import network_steps
from GradProjIOLib.registration.refinement import plan_levels
from GradProjIOLib.registration.register import register
from GradProjIOLib.registration.result import Registration, describe_jacobian
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.spatial.jacobian import non_diffeomorphic_volume, voxel_displacement
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.earlier import run_that_goes_on
from GradProjIOLib.worker.protocol import DownloadRequest, EvaluateRequest, RegisterRequest
from GradProjIOLib.worker.so_far import SoFar

if TYPE_CHECKING:
    from GradProjIOLib.worker.server import Connection

DOWNLOAD_EVENT_SECONDS = 0.2
WEIGHTS_BYTES = 283_000_000
LEAST_VOLUME = 1e-4
"""Folded volume in voxels; less is the rounding of the numbers."""


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
        # Other programs may need what is not in use. This does nothing where no graphics card is.
        torch.cuda.empty_cache()


class _Registration:
    """One registration: reports its steps and ends when the application cancels it."""

    def __init__(self, request: RegisterRequest, number: int, connection: Connection) -> None:
        self.request, self.number, self.connection = request, number, connection
        self.so_far = SoFar(request.so_far_seconds, Path(request.folder), partial(self._send, protocol.SO_FAR))

    def run(self) -> None:
        request = self.request
        inputs = read_inputs(request)
        found = self._register(inputs) if request.earlier is None else self._go_on(inputs)
        if found is None:
            return
        if "fixed_mask" in inputs:
            region = IDENTITY.warp(inputs["fixed_mask"], found.fixed, "nearest").array != 0
            found.report["jacobian_in_mask"] = describe_jacobian(found.forward, found.fixed, region)
        self.connection.kept = json_text(found.report, sort_keys=True), found.reached.optimizer
        result = write_arrays(found, request)
        event = protocol.DONE if self._wanted() else protocol.CANCELED
        self._send(event, report=found.report, result=result)

    def _register(self, inputs: Mapping[str, Any]) -> Registration | None:
        """The registration; None where the model's weights are missing, of which the application has been told."""
        self.connection.kept = None
        settings = Settings.from_mapping(self.request.settings)
        levels = list(plan_levels(inputs["fixed"], settings).values())
        self._send(protocol.STARTED, total=network_steps(settings) + sum(levels), levels=levels, before=0)
        if not self._fetch_weights(settings):
            return None
        return register(settings=settings, on_step=self._on_step, on_start=self.so_far.start, **inputs)

    def _go_on(self, inputs: Mapping[str, Any]) -> Registration:
        """The registration that goes on with the request's earlier result."""
        run = run_that_goes_on(self.request, self.connection.kept, inputs)
        levels = [run.levels.get(lattice, 0) for lattice in run.lattices]
        self._send(protocol.STARTED, total=run.total, levels=levels, before=run.taken_before)
        return run.result(self._on_step, self.so_far.start, progress=False)

    def _send(self, event: str, **content: Any) -> None:
        self.connection.send(event, id=self.number, **content)

    def _wanted(self) -> bool:
        return self.number not in self.connection.canceled

    def _on_step(self, step: Step) -> bool:
        self._send(protocol.STEP, **asdict(step))
        wanted = self._wanted()
        self.so_far.step(last=not wanted)
        return wanted

    def _fetch_weights(self, settings: Settings) -> bool:
        """Download the model's weights where they are missing and the user has agreed; whether they are there now."""
        url = None if settings.weights else registry.missing_url(settings.model)
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
    last_event = 0.0

    def on_progress(received: int, total: int | None) -> bool:
        nonlocal last_event
        if time.monotonic() - last_event > DOWNLOAD_EVENT_SECONDS:
            last_event = time.monotonic()
            connection.send(protocol.DOWNLOAD, id=number, received=received, total=total)
        return number not in connection.canceled

    url = registry.find(model).url
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
    labels, points = (tuple(map(protocol.read, records)) or None for records in (request.labels, request.points))
    return measure_result(
        Deformation(*protocol.read(request.transform)), protocol.read(request.reference), labels, points
    )


def read_inputs(request: RegisterRequest) -> dict[str, Any]:
    """The images of a request and what else it has for them, as `register` takes it."""
    inputs = {name: protocol.read(record) for name, record in request.inputs.items()}
    if isinstance(inputs.get("initial_transform"), tuple):
        inputs["initial_transform"] = Deformation(*inputs["initial_transform"])
    return inputs | {"guiding_labels": request.guiding_labels}


def write_arrays(registration: Registration, request: RegisterRequest) -> dict[str, Any]:
    """Write the result to the request's folder as raw arrays; return their records by the names in `protocol`."""
    folder = Path(request.folder)
    forward, inverse = registration.forward, registration.inverse
    volumes = {
        protocol.WARPED: registration.warped(),
        protocol.JACOBIAN: registration.determinant(),
        protocol.FOLDING: registration.folding_mask(),
    }
    if registration.report["jacobian"]["ndv_percent"] > 0:
        volumes[protocol.BETWEEN] = folded_between(registration, volumes[protocol.FOLDING])
    if request.labels_to_warp is not None:
        labels = protocol.read(request.labels_to_warp)
        volumes[protocol.WARPED_LABELS] = forward.warp(labels, registration.fixed, "nearest")
    result = {role: protocol.write_volume(volume, folder, role) for role, volume in volumes.items()}
    for role, deformation in ((protocol.TRANSFORM, forward), (protocol.INVERSE, inverse)):
        result[role] = protocol.write_field(
            deformation.displacement, deformation.affine, deformation.matrix, folder, role
        )
    return result


def folded_between(registration: Registration, folding: Volume) -> Volume:
    """1 where the deformation folds between the voxels only: there is a non-diffeomorphic volume, but no voxel of the
    mask `folding` near it (uint8)."""
    fixed = registration.fixed
    forward = registration.forward.sample(fixed.shape, fixed.affine)
    volume = non_diffeomorphic_volume(voxel_displacement(forward)).numpy()
    near = ndimage.binary_dilation(folding.array > 0, np.ones((3, 3, 3), bool))
    return Volume(((volume > LEAST_VOLUME) & ~near).astype(np.uint8), fixed.affine)


def devices() -> list[dict[str, Any]]:
    """What can compute: name for the settings, a label with the memory for the user, and the free memory in bytes."""
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
    found = {}
    for name, model in registry.MODELS.items():
        if model.url is not None and model.lattice is not None:
            samples = math.prod(model.lattice)
            needed = COPIES_OF_PARAMETERS * WEIGHTS_BYTES + samples * BYTES_PER_SAMPLE["cuda"]["lean"]
            found[name] = {"there": registry.missing_url(name) is None, "memory": needed}
    return found

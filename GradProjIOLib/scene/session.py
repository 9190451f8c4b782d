"""A registration from nodes to nodes: hands the inputs to the worker, follows it, puts the results into the
scene. Needs slicer and vtk, no Qt; the widget, a script and the tests all drive the same object.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import lattice_affine
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import folding, nodes
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.plots import LossPlot
from GradProjIOLib.worker import exchange
from GradProjIOLib.worker.client import WorkerClient

POLL_SECONDS = 0.02
# Initial transforms that bend are sampled on a lattice of at most this many points along an axis.
LARGEST_INITIAL_LATTICE = 175

TRANSFORM, INVERSE, WARPED, WARPED_LABELS, JACOBIAN = (
    "transform",
    "inverse",
    "warped",
    "warped_labels",
    "jacobian",
)
FOLDING, TABLE, CHART, FIXED, MOVING = "folding", "table", "chart", "fixed", "moving"
ROLE = "role"
NEW_NODES = {
    TRANSFORM: ("vtkMRMLGridTransformNode", "{moving} to {fixed}"),
    INVERSE: ("vtkMRMLGridTransformNode", "{moving} to {fixed} inverse"),
    WARPED: ("vtkMRMLScalarVolumeNode", "{moving} registered to {fixed}"),
    WARPED_LABELS: ("vtkMRMLSegmentationNode", "{labels} registered to {fixed}"),
    JACOBIAN: ("vtkMRMLScalarVolumeNode", "{moving} to {fixed} Jacobian"),
    FOLDING: ("vtkMRMLSegmentationNode", "{moving} to {fixed} folding"),
    TABLE: ("vtkMRMLTableNode", "{moving} to {fixed} folding figures"),
}


class State(Enum):
    """What a SceneRegistration is doing; OFFERED is a canceled run whose result so far may be kept."""

    IDLE = "idle"
    STARTING = "starting"
    RUNNING = "running"
    CANCELING = "canceling"
    OFFERED = "offered"


@dataclass(frozen=True)
class Inputs:
    """The nodes to register. Masks and labels are label maps or segmentations."""

    fixed: slicer.vtkMRMLScalarVolumeNode
    moving: slicer.vtkMRMLScalarVolumeNode
    initial_transform: slicer.vtkMRMLTransformNode | None = None
    fixed_mask: slicer.vtkMRMLNode | None = None
    moving_mask: slicer.vtkMRMLNode | None = None
    moving_labels: slicer.vtkMRMLNode | None = None

    def check(self) -> None:
        """Raise InputError, naming the node, where the choice cannot work. Looks at no voxels."""
        nodes.check_image_node(self.fixed, "fixed image")
        nodes.check_image_node(self.moving, "moving image")
        if self.fixed is self.moving:
            raise InputError(f"{self.fixed.GetName()} is both fixed and moving image; choose two volumes.")
        initial = self.initial_transform
        if initial is not None and nodes.is_under(self.moving, initial):
            raise InputError(
                f"{self.moving.GetName()} already lies under {initial.GetName()}, which would count twice; "
                "choose no initial transform."
            )


@dataclass
class Progress:
    """How far a run has come."""

    total: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    remaining_seconds: float | None = None

    @property
    def conflicts(self) -> int:
        """In how many steps the two gradients pointed against each other."""
        return sum(step.get("cosine") is not None and step["cosine"] < 0 for step in self.steps)


@dataclass
class _Run:
    """What must be known about a run when its events arrive, by node ID: nodes can vanish meanwhile."""

    number: int
    folder: Path
    names: dict[str, str]
    fixed_id: str
    moving_id: str
    labels_id: str | None
    mask_name: str | None
    outputs: dict[str, str | None]
    settings: dict[str, Any]
    started: float = field(default_factory=time.monotonic)


class SceneRegistration:
    """Registers one pair of nodes of `scene` at a time. Call `poll` from a timer while `active`.

    After each change `message` says in one sentence what happened (empty while all is well), and `failed`
    whether it went wrong. Where the weights of the model have to be downloaded first, `question` asks for it.
    `results` holds the nodes of the last finished run by their role.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, client: WorkerClient | None = None) -> None:
        self.scene = scene
        self.client = client or WorkerClient()
        self.state = State.IDLE
        self.message = ""
        self.failed = False
        self.progress = Progress(0)
        self.question = ""
        self.devices: list[dict[str, Any]] = []
        self.results: dict[str, slicer.vtkMRMLNode] = {}
        self._title = ""
        self._plot: LossPlot | None = None
        self._run: _Run | None = None
        self._offer: dict[str, Any] | None = None

    @property
    def active(self) -> bool:
        """Whether a run is under way."""
        return self.state in (State.STARTING, State.RUNNING, State.CANCELING)

    @property
    def chart(self) -> slicer.vtkMRMLPlotChartNode | None:
        """The chart of the losses of the current or last run, where it was shown and is still in the scene."""
        chart = self._plot.chart if self._plot is not None else None
        return chart if chart is not None and chart.GetScene() is self.scene else None

    def start(
        self,
        inputs: Inputs,
        settings: Mapping[str, Any] | None = None,
        outputs: Mapping[str, slicer.vtkMRMLNode | None] | None = None,
        allow_download: bool = False,
    ) -> None:
        """Copy the inputs and hand them to the worker; returns as soon as they are copied.

        `settings` are those of `registration.Settings`. `outputs` names what is wanted, each with the node
        to fill or None for a new one; without it everything is made, new. `allow_download` says that the
        user has agreed to download the model's weights. Raises InputError.
        """
        if self.active:
            raise InputError("A registration is running already; wait for it or cancel it.")
        inputs.check()
        self.discard()
        self.question, self.results = "", {}
        settings = dict(settings or {})
        folder = exchange.new_folder()
        try:
            request = self._request(inputs, settings, folder) | {"allow_download": allow_download}
            wanted = dict.fromkeys((TRANSFORM, INVERSE, WARPED, JACOBIAN)) if outputs is None else outputs
            if outputs is None and inputs.moving_labels is not None:
                wanted[WARPED_LABELS] = None
            run = _Run(
                number=self._submit(request),
                folder=folder,
                names=_names(inputs),
                fixed_id=inputs.fixed.GetID(),
                moving_id=inputs.moving.GetID(),
                labels_id=inputs.moving_labels.GetID() if inputs.moving_labels else None,
                mask_name=inputs.fixed_mask.GetName() if inputs.fixed_mask else None,
                outputs={role: node.GetID() if node is not None else None for role, node in wanted.items()},
                settings=settings,
            )
        except BaseException:
            exchange.remove_folder(folder)
            raise
        self._plot = None
        self._run, self._title = run, "{moving} to {fixed}".format(**run.names)
        self.progress = Progress(int(settings.get("steps", 50)))
        self._become(State.STARTING)

    def try_start(self, *arguments: Any, **keywords: Any) -> None:
        """`start`, with `message` instead of an InputError."""
        try:
            self.start(*arguments, **keywords)
        except InputError as error:
            self._become(State.IDLE, str(error), failed=True)

    def run(
        self,
        inputs: Inputs,
        settings: Mapping[str, Any],
        outputs: Mapping[str, slicer.vtkMRMLNode | None] | None = None,
        allow_download: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, slicer.vtkMRMLNode]:
        """`start` and `wait`; return the nodes of the result. Raises RuntimeError where there is none."""
        self.start(inputs, settings, outputs, allow_download)
        self.wait(meanwhile)
        if self.question or not self.results:
            raise RuntimeError(self.question or self.message)
        return self.results

    def poll(self) -> bool:
        """Take in what the worker has said, without waiting. True where something changed."""
        events = self.client.poll()
        steps = []
        for event in events:
            kind = event["event"]
            if kind == "devices":
                self.devices = event["devices"]
            elif kind == "download":
                self._note_download(event)
            if self._run is None or event.get("id") != self._run.number:
                continue
            if kind == "step":
                steps.append(event)
            elif kind in ("done", "cancelled"):
                self._take_steps(steps)
                steps = []
            self._handle(kind, event)
        self._take_steps(steps)
        return bool(events)

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Poll until the run has ended, calling `meanwhile` (Slicer's processEvents) in between."""
        while self.active:
            if not self.poll():
                time.sleep(POLL_SECONDS)
            if meanwhile is not None:
                meanwhile()

    def cancel(self) -> None:
        """End the run after the current step; the result so far is then offered. A second call ends it now.

        Before the first step there is no result to offer, so the run ends at once.
        """
        if self.state is State.RUNNING:
            self.client.cancel(self._run.number)
            self._become(State.CANCELING)
        elif self.active:
            self.stop_now()

    def stop_now(self, message: str = "") -> None:
        """End the run at once, with the worker, and keep nothing of it."""
        if self.active:
            self.client.kill()
        self._drop_run()
        self._become(State.IDLE, message or _("Registration canceled."))

    def abandon(self, message: str) -> None:
        """The scene goes: end a run at once, and forget the nodes of the last one."""
        if self.active or self.state is State.OFFERED:
            self.stop_now(message)
        self.results, self.progress, self._title, self._plot = {}, Progress(0), "", None

    def warm_up(self) -> None:
        """Start the worker before it is needed; where that fails, `start` says so."""
        with contextlib.suppress(OSError):
            self.client.start()

    def status(self) -> str:
        """One sentence for the panel: what is going on, or what happened."""
        progress = self.progress
        if self.state is State.STARTING:
            return self.message or _("Loading the model …")
        if self.state is State.CANCELING:
            return _("Canceling after this step …")
        if not self.active:
            return self.message
        if self.message and not progress.steps:
            return self.message
        if len(progress.steps) >= progress.total:
            return _("Computing the results …")
        if not progress.steps:
            return _("Computing the first step …")
        last = progress.steps[-1]
        sentence = _(
            "Similarity loss {similarity:.4f}, regularity loss {regularity:.3g}; "
            "the gradients conflicted in {conflicts} of {done} steps."
        ).format(
            similarity=last["similarity"],
            regularity=last["regularity"],
            conflicts=progress.conflicts,
            done=len(progress.steps),
        )
        if progress.remaining_seconds is not None:
            sentence += " " + _("About {time} left.").format(time=duration(progress.remaining_seconds))
        return sentence

    def keep(self) -> None:
        """Put the offered result so far into the scene."""
        if self.state is State.OFFERED:
            self._place(self._offer)

    def discard(self) -> None:
        """Forget the offered result so far."""
        if self.state is State.OFFERED:
            self._drop_run()
            self._become(State.IDLE)

    def close(self) -> None:
        """End the run and the worker; nothing is left behind."""
        self._drop_run()
        self.client.close()
        self._become(State.IDLE)

    def show_plot(self) -> slicer.vtkMRMLPlotChartNode | None:
        """The chart of the losses, which from now on follows the run; None before there is a first run."""
        if self.chart is None and self._title:
            self._plot = LossPlot(self.scene, self._title)
            self._plot.add(self.progress.steps)
        return self.chart

    def _request(self, inputs: Inputs, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write the input volumes to `folder`; the request that names them."""
        fixed = nodes.volume_from_node(inputs.fixed, "fixed image")
        moving = nodes.volume_from_node(inputs.moving, "moving image")
        request = {
            "request": "register",
            "format": "arrays",
            "output": str(folder),
            "settings": dict(settings),
            "fixed": exchange.write_volume(fixed, folder, "fixed"),
            "moving": exchange.write_volume(moving, folder, "moving"),
        }
        masks = (
            ("fixed_mask", inputs.fixed_mask, inputs.fixed),
            ("moving_mask", inputs.moving_mask, inputs.moving),
            ("moving_labels", inputs.moving_labels, inputs.moving),
        )
        for key, node, image in masks:
            if node is not None:
                labels = nodes.labels_from_node(node, image, key.replace("_", " "))
                request[key] = exchange.write_volume(labels, folder, key)
        if inputs.initial_transform is not None:
            request["initial_transform"] = _initial(inputs.initial_transform, fixed, folder)
        return request

    def _submit(self, request: Mapping[str, Any]) -> int:
        try:
            return self.client.submit(request)
        except OSError as error:
            raise InputError(
                f"The registration process could not be started ({error}); reinstall the extension."
            ) from error

    def _handle(self, kind: str, event: Mapping[str, Any]) -> None:
        if kind == "started" and self.state is State.STARTING:
            self.progress.total = int(event.get("total", self.progress.total))
            self._become(State.RUNNING)
        elif kind == "done":
            self._place(event)
        elif kind == "cancelled" and event.get("result"):
            self._offer = dict(event)
            self._become(State.OFFERED, _("Canceled. The result so far can be kept."))
        elif kind == "cancelled":
            self._drop_run()
            self._become(State.IDLE, _("Registration canceled before there was a result."))
        elif kind == "failed" and event.get("kind") == "weights":
            self._drop_run()
            self.question = event["message"]
            self._become(State.IDLE, _("The weights of the model are not on this computer yet."))
        elif kind == "failed":
            self._fail(event["message"])
        elif kind == "died":
            # A process that was killed had no last words; what it printed before tells nothing.
            crashed = event["code"] > 0 and event["message"]
            reason = event["message"] if crashed else f"exit status {event['code']}"
            self._fail(
                _(
                    "The registration process ended unexpectedly ({reason}); press Register to try again, on "
                    "the processor if the memory of the graphics card was short."
                ).format(reason=reason)
            )

    def _note_download(self, event: Mapping[str, Any]) -> None:
        received, total = event["received"] / 1e6, (event.get("total") or 0) / 1e6
        sentence = _("Downloading the model: {received:.0f} of {total:.0f} MB.")
        self.message = sentence.format(received=received, total=total)

    def _take_steps(self, steps: list[dict[str, Any]]) -> None:
        if not steps:
            return
        self.progress.steps += steps
        self.progress.remaining_seconds = steps[-1].get("remaining_seconds")
        if self.chart is not None and self._plot.table.GetScene() is self.scene:
            self._plot.add(steps)

    def _become(self, state: State, message: str = "", failed: bool = False) -> None:
        self.state, self.message, self.failed = state, message, failed

    def _fail(self, message: str) -> None:
        self._drop_run()
        self._become(State.IDLE, message, failed=True)

    def _drop_run(self) -> None:
        if self._run is not None:
            exchange.remove_folder(self._run.folder)
        self._run = self._offer = None

    def _place(self, event: Mapping[str, Any]) -> None:
        """Read the result and put it into the scene: everything, or where reading fails nothing."""
        run = self._run
        try:
            result = {
                role: exchange.read_field(record) if role in (TRANSFORM, INVERSE) else exchange.read_volume(record)
                for role, record in event["result"].items()
            }
        except (OSError, ValueError, KeyError) as error:
            self._fail(f"The result could not be read ({error}); press Register to try again.")
            return
        self.results = _Placement(self.scene, run, result, event["report"], self.chart).nodes
        self._drop_run()
        report = event["report"]
        done = _("Done in {time} with the model {model}.").format(
            time=duration(time.monotonic() - run.started), model=report["model"]["name"]
        )
        self._become(State.IDLE, " ".join([done, *report["warnings"]]))


class _Placement:
    """The nodes of one result in the scene, by role."""

    def __init__(
        self,
        scene: slicer.vtkMRMLScene,
        run: _Run,
        result: Mapping[str, Any],
        report: Mapping[str, Any],
        chart: slicer.vtkMRMLPlotChartNode | None,
    ) -> None:
        self.scene, self.run, self.result, self.report = scene, run, result, report
        self.fixed = scene.GetNodeByID(run.fixed_id)
        self.nodes: dict[str, slicer.vtkMRMLNode] = {}
        for role in (TRANSFORM, INVERSE):
            self._place_transform(role)
        self._place_warped()
        self._place_labels()
        if JACOBIAN in run.outputs:
            self._place_jacobian()
        if chart is not None:
            self.nodes[CHART] = chart
        self._record()

    def _node(self, role: str) -> slicer.vtkMRMLNode:
        """The node chosen for `role`, a new one where none is chosen or it has vanished."""
        kind, name = NEW_NODES[role]
        chosen = self.run.outputs.get(role)
        node = self.scene.GetNodeByID(chosen) if chosen else None
        if node is None:
            node = nodes.add_node(self.scene, kind, name.format(**self.run.names))
        self.nodes[role] = node
        return node

    def _place_transform(self, role: str) -> None:
        if role in self.run.outputs and role in self.result:
            displacement, affine = self.result[role]
            deformation = SimpleNamespace(displacement=displacement, affine=affine)
            nodes.deformation_to_node(deformation, self._node(role))

    def _place_warped(self) -> None:
        if WARPED not in self.run.outputs:
            return
        node = nodes.volume_to_node(self.result[WARPED], self._node(WARPED), self.fixed)
        moving = self.scene.GetNodeByID(self.run.moving_id)
        if moving is not None and moving.GetDisplayNode() is not None:
            display = node.GetDisplayNode()
            display.AutoWindowLevelOff()
            display.SetWindowLevel(moving.GetDisplayNode().GetWindow(), moving.GetDisplayNode().GetLevel())
            display.SetAndObserveColorNodeID(moving.GetDisplayNode().GetColorNodeID())

    def _place_labels(self) -> None:
        if WARPED_LABELS in self.run.outputs and WARPED_LABELS in self.result:
            source = self.scene.GetNodeByID(self.run.labels_id)
            node = self._node(WARPED_LABELS)
            nodes.labels_to_segmentation(self.result[WARPED_LABELS], node, self.fixed, source)

    def _place_jacobian(self) -> None:
        jacobian = nodes.volume_to_node(self.result[JACOBIAN], self._node(JACOBIAN), self.fixed)
        folding.color_jacobian(jacobian)
        like = self.fixed if self.fixed is not None else jacobian
        previous = {role: jacobian.GetNodeReference(nodes.ATTRIBUTE_PREFIX + role) for role in (FOLDING, TABLE)}
        for role, node in previous.items():
            if node is not None:
                self.run.outputs[role] = node.GetID()
        folding.folding_to_segmentation(self.result[FOLDING], self._node(FOLDING), like)
        folding.fill_table(
            self._node(TABLE),
            self.report["jacobian"],
            self.report.get("jacobian_in_mask"),
            self.run.mask_name or "the mask",
        )

    def _record(self) -> None:
        """Keep settings and report at every node, and links between them."""
        links = {role: node.GetID() for role, node in self.nodes.items()}
        links |= {FIXED: self.run.fixed_id, MOVING: self.run.moving_id}
        for role, node in self.nodes.items():
            nodes.remember(node, settings=self.report.get("settings", self.run.settings), report=self.report)
            node.SetAttribute(nodes.ATTRIBUTE_PREFIX + ROLE, role)
            for other, identifier in links.items():
                if other != role and self.scene.GetNodeByID(identifier) is not None:
                    node.SetNodeReferenceID(nodes.ATTRIBUTE_PREFIX + other, identifier)


def linked(node: slicer.vtkMRMLNode, role: str) -> slicer.vtkMRMLNode | None:
    """The node of the same result as `node` that has `role`, where it is still there."""
    return node.GetNodeReference(nodes.ATTRIBUTE_PREFIX + role)


def duration(seconds: float) -> str:
    """Seconds in words that fit the eye: 40 s, 3 min, 2 h 5 min."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _names(inputs: Inputs) -> dict[str, str]:
    labels = inputs.moving_labels
    return {
        "fixed": inputs.fixed.GetName(),
        "moving": inputs.moving.GetName(),
        "labels": labels.GetName() if labels is not None else "labels",
    }


def _initial(node: slicer.vtkMRMLTransformNode, fixed: Volume, folder: Path) -> dict[str, Any]:
    """The record of an initial transform: a matrix where it is linear, else a field over the fixed image."""
    matrix = nodes.matrix_from_node(node)
    if matrix is not None:
        return {"matrix": matrix.tolist()}
    lattice = tuple(int(min(size, LARGEST_INITIAL_LATTICE)) for size in fixed.shape)
    affine = lattice_affine(fixed.affine, fixed.shape, lattice)
    displacement = nodes.displacement_from_node(node, lattice, affine)
    if not np.isfinite(displacement).all():
        raise InputError(f"{node.GetName()} cannot be evaluated over the fixed image; choose another one.")
    return exchange.write_field(displacement, affine, folder, "initial_transform")

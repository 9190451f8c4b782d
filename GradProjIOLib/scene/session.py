"""A registration from nodes to nodes: hands the images to the worker, follows its steps, places the result. No Qt."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import slicer

from GradProjIOLib.errors import InputError, suggestion
from GradProjIOLib.report.line import duration, is_worse, summary_line
from GradProjIOLib.scene.going_on import ResultToGoOn
from GradProjIOLib.scene.guidance import NO_GUIDES, Guides
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.inputs import ALL_NEW, Inputs, Outputs
from GradProjIOLib.scene.placement import place
from GradProjIOLib.scene.plots import LossPlot
from GradProjIOLib.scene.so_far import SECONDS, ShownSoFar
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.client import WorkerClient
from GradProjIOLib.worker.protocol import RegisterRequest

POLL_SECONDS = 0.02
GUIDE_LOSSES = {"landmarks": _("landmarks' loss {landmarks:.3g}"), "labels": _("segments' loss {labels:.3g}")}


class Tone(Enum):
    """How to show a message: a result that needs a look is a WARNING, no result an ERROR."""

    PLAIN = "plain"
    WARNING = "warning"
    ERROR = "error"


class State(Enum):
    """What a SceneRegistration is doing. OFFERED: the run was canceled, and its result so far may be kept."""

    IDLE = "idle"
    STARTING = "starting"
    RUNNING = "running"
    CANCELING = "canceling"
    OFFERED = "offered"


@dataclass
class _Run:
    """A registration that the worker has been asked for."""

    number: int
    folder: Path
    inputs: Inputs
    outputs: Outputs
    started: float = field(default_factory=time.monotonic)


class SceneRegistration:
    """Registers one pair of nodes of `scene` at a time. Call `poll` from a timer while `active`.

    After each change `message` says in one sentence what happened (empty while all is well), and `tone` how to show it.
    Where the weights of the model have to be downloaded first, `question` asks for it. `steps` are those done so far,
    of `total`; `levels` says how many of these the refinement takes at each level, `before` how many the network took
    in a registration that goes on. `so_far` is what the scene shows of a run on its way, where that was asked for; who
    has shown it removes it after the run. `devices` and `models` are what the
    worker has found on this computer. `results` holds the nodes of the last finished run by their role.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, client: WorkerClient | None = None) -> None:
        self.scene = scene
        self.client = client or WorkerClient()
        self.state = State.IDLE
        self.message, self.tone = "", Tone.PLAIN
        self.total = self.before = 0
        self.levels: list[int] = []
        self.steps: list[dict[str, Any]] = []
        self.question = ""
        self.devices: list[dict[str, Any]] = []
        self.models: dict[str, dict[str, Any]] = {}
        self.results: dict[str, slicer.vtkMRMLNode] = {}
        self.so_far: ShownSoFar | None = None
        self._title = ""
        self._plot: LossPlot | None = None
        self._run: _Run | None = None
        self._offer: dict[str, Any] | None = None

    @property
    def active(self) -> bool:
        """Whether a run is under way."""
        return self.state in (State.STARTING, State.RUNNING, State.CANCELING)

    @property
    def finishing(self) -> bool:
        """Whether all steps are done and the worker is computing the results."""
        return self.state is State.RUNNING and len(self.steps) >= self.total

    def check_idle(self) -> None:
        """Raise InputError where a run is under way."""
        if self.active:
            raise InputError("A registration is running already; wait for it or cancel it.")

    @property
    def chart(self) -> slicer.vtkMRMLPlotChartNode | None:
        """The chart of the losses of the current or last run, where it was shown and is still in the scene."""
        chart = self._plot.chart if self._plot is not None else None
        return chart if chart is not None and chart.GetScene() is self.scene else None

    def start(
        self,
        inputs: Inputs,
        settings: Mapping[str, Any],
        outputs: Outputs | None = None,
        allow_download: bool = False,
        so_far: bool = False,
    ) -> None:
        """Copy the inputs and hand them to the worker; returns as soon as they are copied.

        `settings` are names and values of `settings.Settings`. Without `outputs` everything is made, new.
        `allow_download` says that the user has agreed to download the model's weights, `so_far` that the scene shows
        what is reached while it runs. Raises InputError.
        """
        self.check_idle()
        inputs.check()
        for name in outputs or ():
            if name not in ALL_NEW:
                raise InputError(f"The output {name!r} is not known; {suggestion(name, tuple(ALL_NEW))}")
        request = partial(inputs.request, settings=settings, allow_download=allow_download)
        self._submit(inputs, ALL_NEW if outputs is None else outputs, request, so_far)

    def go_on(
        self, result: slicer.vtkMRMLNode | None, steps: int, guides: Guides = NO_GUIDES, so_far: bool = False
    ) -> None:
        """Take so many more steps from a result, known by one of its nodes, which are filled anew at the end.

        `guides` take the place of what guided it; `so_far` as for `start`. Returns as soon as it is handed to the
        worker. Raises InputError.
        """
        self.check_idle()
        earlier = ResultToGoOn(result, guides)
        earlier.check()
        self._submit(earlier.inputs, earlier.outputs, partial(earlier.request, steps=steps), so_far)

    def _submit(
        self, inputs: Inputs, outputs: Outputs, prepare: Callable[[Path], RegisterRequest], so_far: bool
    ) -> None:
        """Hand to the worker what `prepare` makes in a folder."""
        self.discard()
        self.question, self.results = "", {}
        folder = protocol.new_folder()
        try:
            request = replace(prepare(folder), so_far_seconds=SECONDS if so_far else None)
            number = self.client.submit(protocol.to_message(request))
        except BaseException:
            protocol.remove_folder(folder)
            raise
        self._plot, self._run = None, _Run(number, folder, inputs, outputs)
        self.forget_so_far()
        self.so_far = ShownSoFar(self.scene, inputs) if so_far else None
        self._title = f"{inputs.moving.GetName()} to {inputs.fixed.GetName()}"
        self.total, self.before, self.levels, self.steps = 0, 0, [], []
        self._become(State.STARTING)

    def attempt(self, begin: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
        """Call `start` or `go_on`; an InputError becomes the `message`."""
        try:
            begin(*arguments, **keywords)
        except InputError as error:
            self.fail(str(error))

    def forget_message(self) -> None:
        """Say nothing more about what happened."""
        self.message, self.tone = "", Tone.PLAIN

    def forget_so_far(self) -> None:
        """Remove from the scene what a run had reached on its way."""
        if self.so_far is not None:
            self.so_far.remove()
        self.so_far = None

    def fail(self, message: str) -> None:
        """Say why there is no run."""
        self._become(State.IDLE, message, Tone.ERROR)

    def take_question(self) -> str:
        """The question, which is not asked again; empty where there is none."""
        question, self.question = self.question, ""
        return question

    def run(self, *arguments: Any, meanwhile: Callable[[], object] = lambda: None) -> dict[str, slicer.vtkMRMLNode]:
        """`start` and `wait`; return the nodes of the result. Raises RuntimeError where there is none."""
        return self._whole(self.start, *arguments, meanwhile=meanwhile)

    def run_on(self, *arguments: Any, meanwhile: Callable[[], object] = lambda: None) -> dict[str, slicer.vtkMRMLNode]:
        """`go_on` and `wait`; as `run`."""
        return self._whole(self.go_on, *arguments, meanwhile=meanwhile)

    def _whole(
        self, begin: Callable[..., None], *arguments: Any, meanwhile: Callable[[], object]
    ) -> dict[str, slicer.vtkMRMLNode]:
        try:
            begin(*arguments)
        except InputError as error:
            raise RuntimeError(str(error)) from error
        self.wait(meanwhile)
        if not self.results:
            raise RuntimeError(self.take_question() or self.message)
        return self.results

    def poll(self) -> bool:
        """Handle the worker's events since the last call, without waiting. True where something changed."""
        events = self.client.poll()
        for event in events:
            if event["event"] == protocol.DEVICES:
                self.devices, self.models = event["devices"], event.get("models", {})
            elif self._run is not None and event.get("id") == self._run.number:
                self._handle(event["event"], event)
        return bool(events)

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Poll until the run has ended, calling `meanwhile` (Slicer's processEvents) in between."""
        while self.active:
            if not self.poll():
                time.sleep(POLL_SECONDS)
            meanwhile()

    def cancel(self) -> None:
        """End the run after the current step and offer the result so far; before the first step, or again, at once."""
        if self.state is State.RUNNING:
            self.client.cancel(self._run.number)
            self._become(State.CANCELING)
        elif self.active:
            self.stop_now()

    def stop_now(self, message: str = "") -> None:
        """End the run at once, with the worker, and keep nothing of it."""
        if self.active:
            self.client.kill()
        self._end_run(message or _("Registration canceled."))

    def abandon(self, message: str) -> None:
        """End a run at once because its scene is closed, and forget the nodes of the last one."""
        if self.active or self.state is State.OFFERED:
            self.stop_now(message)
        self.results, self.steps, self._title, self._plot = {}, [], "", None

    def start_worker(self) -> None:
        """Start the worker before it is needed; where that fails, `start` says so."""
        with contextlib.suppress(InputError):
            self.client.start()

    def status(self) -> str:
        """One sentence for the panel: what is going on, or what happened."""
        steps = self.steps
        if self.state is State.STARTING:
            return self.message or _("Loading the model …")
        if self.state is State.CANCELING:
            return _("Canceling after this step …")
        if not self.active or (self.message and not steps):
            return self.message
        if self.finishing:
            return _("Computing the results …")
        if not steps:
            return _("Computing the first step …")
        conflicts = sum(bool(step["conflicts"]) for step in steps)
        shown = [
            _("Similarity loss {similarity:.4f}, regularity loss {regularity:.3g}"),
            *(text for guide, text in GUIDE_LOSSES.items() if steps[-1].get(guide) is not None),
        ]
        sentence = ", ".join(shown) + _("; the gradients conflicted in {conflicts} of {done} steps.")
        losses = sentence.format(**steps[-1] | {"conflicts": conflicts}, done=len(steps))
        remaining = _("About {time} left.").format(time=duration(steps[-1]["remaining_seconds"]))
        return f"{self.progress()}. {losses} {remaining}"

    def progress(self) -> str:
        """The stage, level and step that is done, in short words; empty before the first step."""
        if not self.steps:
            return ""
        step = self.steps[-1]
        number, level = step["index"] + 1, step["level"]
        if step["stage"] == "network":
            steps = self.before + self.total - sum(self.levels)
            return _("Network, step {number} of {steps}").format(number=number, steps=steps)
        return _("Refinement, level {level} of {levels}, step {number} of {steps}").format(
            level=level + 1, levels=len(self.levels), number=number, steps=self.levels[level]
        )

    def keep(self) -> None:
        """Put the offered result so far into the scene."""
        if self._offer is not None:
            self._place(self._offer)

    def discard(self) -> None:
        """Forget the offered result so far."""
        if self.state is State.OFFERED:
            self._end_run("")

    def close(self) -> None:
        """End the run and the worker; nothing is left behind."""
        self.client.close()
        self._end_run("")

    def show_plot(self) -> slicer.vtkMRMLPlotChartNode | None:
        """The chart of the losses, which from now on follows the run; None before there is a first run."""
        if self.chart is None and self._title:
            self._plot = LossPlot(self.scene, self._title)
            self._plot.show(self.steps, self.total)
        return self.chart

    def _handle(self, kind: str, event: dict[str, Any]) -> None:
        if kind == protocol.STEP:
            self.steps.append(event)
            if self.chart is not None and self._plot.table.GetScene() is self.scene:
                self._plot.show(self.steps, self.total)
        elif kind == protocol.STARTED and self.state is State.STARTING:
            self.total, self.levels, self.before = event["total"], event["levels"], event.get("before", 0)
            self._become(State.RUNNING)
        elif kind == protocol.DOWNLOAD:
            received, total = event["received"] / 1e6, (event["total"] or 0) / 1e6
            sentence = _("Downloading the model: {received:.0f} of {total:.0f} MB.")
            self.message = sentence.format(received=received, total=total)
        elif kind == protocol.SO_FAR and self.so_far is not None:
            self.so_far.show(event["transform"])
        elif kind == protocol.DONE:
            self._place(event)
        elif kind == protocol.CANCELED and event.get("result"):
            self._offer = event
            self._become(State.OFFERED, _("Canceled. The result so far can be kept."))
        elif kind == protocol.CANCELED:
            self._end_run(_("Registration canceled before there was a result."))
        elif kind == protocol.FAILED and event["kind"] == protocol.WEIGHTS_MISSING:
            self.question = event["message"]
            self._end_run(_("The weights of the model are not on this computer yet."), Tone.WARNING)
        elif kind == protocol.FAILED:
            self._end_run(event["message"], Tone.ERROR)
        elif kind == protocol.DIED:
            # A process that was killed could not say why; what it printed before is about something else.
            says_why = event["code"] >= 0 and event["message"]
            reason = event["message"] if says_why else f"exit status {event['code']}"
            sentence = _(
                "The registration process ended unexpectedly ({reason}); press Register to try again, on "
                "the processor if the memory of the graphics card was short."
            )
            self._end_run(sentence.format(reason=reason), Tone.ERROR)

    def _become(self, state: State, message: str = "", tone: Tone = Tone.PLAIN) -> None:
        self.state, self.message, self.tone = state, message, tone

    def _end_run(self, message: str, tone: Tone = Tone.PLAIN) -> None:
        if self._run is not None:
            protocol.remove_folder(self._run.folder)
        self._run = self._offer = None
        self._become(State.IDLE, message, tone)

    def _place(self, event: Mapping[str, Any]) -> None:
        """Read the result and put it into the scene: everything, or where something goes wrong nothing."""
        run, report = self._run, event["report"]
        try:
            result = {role: protocol.read(record) for role, record in event["result"].items()}
            self.results = place(self.scene, run.inputs, run.outputs, result, report, self.chart)
        except Exception as error:
            # Whatever it was, the run has ended, and the panel must say so.
            logging.getLogger(__name__).exception("The result could not be put into the scene.")
            sentence = _("The result could not be put into the scene ({error}); press Register to try again.")
            self._end_run(sentence.format(error=f"{type(error).__name__}: {error}"), Tone.ERROR)
            return
        # The seconds of the report are those of the worker; the user has waited for the copies, too.
        line = summary_line({**report, "seconds": time.monotonic() - run.started}, _)
        if report["stopped"] == "finished":
            line = _("Done: {summary}.").format(summary=line)
        else:
            sentence = _("Stopped after {done} of {total} steps: {summary}.")
            done = len(report["steps"]) - (report.get("continued_after") or [0])[-1]
            line = sentence.format(done=done, total=self.total, summary=line)
        doubtful = report["jacobian"]["folded_voxels"] > 0 or is_worse(report) or bool(report["warnings"])
        # The warnings say also where the refinement began without the network's deformation.
        self._end_run(" ".join([line, *report["warnings"]]), Tone.WARNING if doubtful else Tone.PLAIN)

"""Many registrations from Slicer's console, one after the other: of nodes or files, to nodes or files.

Like SceneRegistration this needs slicer and vtk, no Qt, and nothing here waits unless asked to: call `poll`
from a timer, or `wait`. The worker process and the model in it stay from pair to pair.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slicer
import vtk

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import IMAGE_SUFFIXES, read_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.session import POLL_SECONDS, SceneRegistration
from GradProjIOLib.worker import protocol

Image = slicer.vtkMRMLScalarVolumeNode | str | Path
Source = slicer.vtkMRMLSequenceNode | str | Path | int | Iterable[Any]


@dataclass
class Result:
    """What became of one pair: its `nodes` by role, or its `folder`, or the `message` that says why neither."""

    fixed: str
    moving: str
    nodes: dict[str, slicer.vtkMRMLNode] = field(default_factory=dict)
    folder: Path | None = None
    message: str = ""


class SceneBatch:
    """Registers `pairs` (fixed, moving), each a volume node or a file, with `session`, which does nothing else.

    `settings` are names and values of `settings.Settings`. Without `folder` every result becomes nodes of the session's
    scene, also the images where they are files. With it every pair gets a folder of its own in there with what
    `gradprojio register` writes, and the scene stays as it is. `results` has one entry for every pair so far; a
    failed one does not stop the rest. Raises InputError where the session is busy or there is no pair.
    """

    def __init__(
        self,
        session: SceneRegistration,
        pairs: Sequence[tuple[Image, Image]],
        settings: Mapping[str, Any] | None = None,
        folder: str | Path | None = None,
        allow_download: bool = False,
    ) -> None:
        if session.active:
            raise InputError("A registration is running already; wait for it or cancel it.")
        if not pairs:
            raise InputError("There are no pairs to register; give at least one.")
        self.results: list[Result] = []
        self.total = len(pairs)
        self._session = session
        self._settings = dict(settings or {})
        self._folder = Path(folder).absolute() if folder is not None else None
        self._allow_download = allow_download
        self._waiting = deque(pairs)
        self._current: Result | None = None
        self._request: tuple[int, Path] | None = None
        self._steps = 0

    @property
    def active(self) -> bool:
        """Whether there is something left to do."""
        return self._current is not None or bool(self._waiting)

    @property
    def failed(self) -> list[Result]:
        """The pairs without a result."""
        return [result for result in self.results if result.message]

    def status(self) -> str:
        """One sentence for the status bar."""
        done, failed = len(self.results), len(self.failed)
        text = _("{done} of {total} pairs registered").format(done=done - failed, total=self.total)
        if failed:
            text += _(", {failed} failed").format(failed=failed)
        if self._current is not None:
            steps = self._steps if self._request else len(self._session.progress.steps)
            text += _("; {moving} to {fixed}, step {steps}").format(
                moving=self._current.moving, fixed=self._current.fixed, steps=steps
            )
        return text

    def poll(self) -> bool:
        """Handle the worker's events and go on to the next pair, without waiting. True while active."""
        if self._current is None and self._waiting:
            self._begin(*self._waiting.popleft())
        elif self._request is not None:
            self._poll_request(self._request[0])
        elif self._current is not None:
            self._session.poll()
            if not self._session.active:
                problem = self._session.question or ("" if self._session.results else self._session.message)
                self._end(problem, self._session.results)
        return self.active

    def wait(self, meanwhile: Callable[[], None] | None = None) -> list[Result]:
        """Poll until all pairs are done, calling `meanwhile` in between; return the results."""
        while self.poll():
            time.sleep(POLL_SECONDS)
            if meanwhile is not None:
                meanwhile()
        return self.results

    def cancel(self) -> None:
        """End at once. The pairs that are done keep their results; nothing is left of the one under way."""
        self._waiting.clear()
        if self._request is not None:
            self._session.client.kill()
        elif self._current is not None:
            self._session.stop_now()
        if self._current is not None:
            self._end(_("Canceled."))

    def _begin(self, fixed: Image, moving: Image) -> None:
        self._current, self._steps = Result(_name(fixed), _name(moving)), 0
        try:
            if self._folder is not None:
                self._begin_files(fixed, moving)
            else:
                inputs = Inputs(self._as_node(fixed), self._as_node(moving))
                self._session.start(inputs, self._settings, allow_download=self._allow_download)
        except (InputError, OSError) as error:
            self._end(str(error))

    def _begin_files(self, fixed: Image, moving: Image) -> None:
        """Hand files or nodes to the worker, which writes the results itself."""
        self._current.folder = self._new_name(f"{self._current.moving} to {self._current.fixed}")
        copies = protocol.new_folder()
        sources: dict[str, Any] = {}
        try:
            for role, image in (("fixed", fixed), ("moving", moving)):
                if isinstance(image, (str, Path)):
                    sources[role] = str(Path(image).absolute())
                else:
                    mrml.check_image_node(image, f"{role} image")
                    sources[role] = protocol.write_volume(mrml.volume_from_node(image), copies, role)
            request = protocol.RegisterRequest(
                folder=str(copies),
                settings=self._settings,
                allow_download=self._allow_download,
                output=str(self._current.folder),
                **sources,
            )
            self._request = self._session.client.submit(protocol.to_message(request)), copies
        except BaseException:
            protocol.remove_folder(copies)
            raise

    def _poll_request(self, number: int) -> None:
        for event in self._session.client.poll():
            if event.get("id") != number:
                continue
            kind = event["event"]
            self._steps += kind == protocol.STEP
            if kind in protocol.LAST_EVENTS:
                died = _("The registration process ended unexpectedly.") if kind == protocol.DIED else ""
                self._end(died or event.get("message", ""))
                return

    def _end(self, problem: str, nodes: Mapping[str, slicer.vtkMRMLNode] | None = None) -> None:
        if self._request is not None:
            protocol.remove_folder(self._request[1])
        result, self._current, self._request = self._current, None, None
        if problem:
            result.message, result.folder = problem, None
        else:
            result.nodes = dict(nodes or {})
        self.results.append(result)

    def _as_node(self, image: Image) -> slicer.vtkMRMLScalarVolumeNode:
        if not isinstance(image, (str, Path)):
            return image
        node = mrml.add_node(self._session.scene, "vtkMRMLScalarVolumeNode", _name(image))
        try:
            return mrml.volume_to_node(read_volume(image), node)
        except BaseException:
            self._session.scene.RemoveNode(node)
            raise

    def _new_name(self, name: str) -> Path:
        """A folder that no other pair of this batch has."""
        name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name).strip(". ") or "pair"
        used = {result.folder for result in self.results}
        number, folder = 1, self._folder / name
        while folder in used:
            number += 1
            folder = self._folder / f"{name} {number}"
        return folder


def wait_with_bar(batch: SceneBatch) -> None:
    """Wait until all pairs are done, with a progress bar on the terminal."""
    import tqdm

    with tqdm.tqdm(total=batch.total, unit="pair") as bar:

        def show() -> None:
            bar.set_postfix_str(batch.status(), refresh=False)
            bar.update(len(batch.results) - bar.n)

        batch.wait(show)
        show()


def pairs_of(source: Source, fixed: Image | int | None, scene: slicer.vtkMRMLScene) -> list[tuple[Image, Image]]:
    """The pairs (fixed, moving) that `source` stands for.

    Without `fixed` it is a list of pairs. With it, everything in `source` is registered to `fixed`: a list of nodes
    or files, a folder with image files, the number of a subject hierarchy item (its volumes, also those deeper
    down), or a sequence of volumes, of which `fixed` may be the number of a frame. Frames become nodes of `scene`.
    Raises InputError where there is nothing to register.
    """
    if fixed is None:
        return _checked_pairs(source)
    if isinstance(source, slicer.vtkMRMLSequenceNode):
        images = _frames(source, scene)
        fixed = images[fixed] if isinstance(fixed, int) else fixed
    elif isinstance(source, int):
        images = _volumes_below(source, scene)
    elif isinstance(source, (str, Path)):
        images = _files_in(Path(source))
    else:
        images = list(source)
    moving = [image for image in images if not _same(image, fixed)]
    if not moving:
        raise InputError(f"There is nothing to register to {_name(fixed)}; choose another folder, item or sequence.")
    return [(fixed, image) for image in moving]


def _checked_pairs(source: Source) -> list[tuple[Image, Image]]:
    pairs = [] if isinstance(source, (str, Path, int)) else [tuple(pair) for pair in source]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError("Give a list of pairs (fixed, moving), or the fixed image that all others are registered to.")
    return pairs


def _frames(sequence: slicer.vtkMRMLSequenceNode, scene: slicer.vtkMRMLScene) -> list[slicer.vtkMRMLScalarVolumeNode]:
    """Copies of the frames: those in a sequence are in a scene of their own, under IDs that others may have here."""
    copies = []
    for index in range(sequence.GetNumberOfDataNodes()):
        frame = sequence.GetNthDataNode(index)
        name = f"{sequence.GetName()} {sequence.GetIndexName()} {sequence.GetNthIndexValue(index)}"
        mrml.check_image_node(frame, "moving image")
        volume = mrml.volume_from_node(frame)
        node = mrml.add_node(scene, "vtkMRMLScalarVolumeNode", name)
        copies.append(mrml.volume_to_node(Volume(volume.array, volume.affine, name), node))
    return copies


def _volumes_below(item: int, scene: slicer.vtkMRMLScene) -> list[slicer.vtkMRMLScalarVolumeNode]:
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    children = vtk.vtkIdList()
    hierarchy.GetItemChildren(item, children, True)
    nodes = (hierarchy.GetItemDataNode(children.GetId(index)) for index in range(children.GetNumberOfIds()))
    return [
        node
        for node in nodes
        if node is not None and node.IsA("vtkMRMLScalarVolumeNode") and not node.IsA("vtkMRMLLabelMapVolumeNode")
    ]


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; choose one with image files.")
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(IMAGE_SUFFIXES))


def _same(image: Image, fixed: Image) -> bool:
    if isinstance(image, (str, Path)) and isinstance(fixed, (str, Path)):
        return Path(image).absolute() == Path(fixed).absolute()
    return image is fixed


def _name(image: Image) -> str:
    if not isinstance(image, (str, Path)):
        return image.GetName() if image is not None else _("none")
    name = Path(image).name
    return next((name[: -len(suffix)] for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True)
                 if name.lower().endswith(suffix)), name)  # fmt: skip

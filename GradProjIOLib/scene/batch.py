"""Many registrations from Slicer's console: of nodes or files, to nodes or files. No Qt."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import slicer
import vtk

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import IMAGE_SUFFIXES, read_volume, write_volume
from GradProjIOLib.geometry.pairs import image_stem
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.session import POLL_SECONDS, SceneRegistration
from GradProjIOLib.settings import Settings
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.client import WorkerClient, python_executable

Image: TypeAlias = "slicer.vtkMRMLScalarVolumeNode | str | Path"
Pairs = Sequence[tuple[Image, Image]]
Source: TypeAlias = "slicer.vtkMRMLSequenceNode | str | Path | int | Iterable[Any]"


@dataclass
class Result:
    """The outcome of a pair: its `nodes` by role or its `folder`; `message` says why it failed."""

    fixed: str
    moving: str
    nodes: dict[str, slicer.vtkMRMLNode] = field(default_factory=dict)
    folder: Path | None = None
    message: str = ""


class Batch:
    """Many registrations under way. `results` has an entry for each pair that has ended; a failed one stops nothing.

    Call `poll` from a timer while `active`, or `wait`. Raises InputError where a setting makes no sense.
    """

    def __init__(self, pairs: Pairs, settings: Mapping[str, Any]) -> None:
        Settings.from_mapping(settings)
        self.total = len(pairs)
        self.results: list[Result] = []
        self.active = True
        self._work = self._register()

    @property
    def failed(self) -> list[Result]:
        """The pairs without a result."""
        return [result for result in self.results if result.message]

    def status(self) -> str:
        """One sentence for the status bar."""
        done, failed = len(self.results), len(self.failed)
        text = _("{done} of {total} pairs registered").format(done=done - failed, total=self.total)
        return text + (_(", {failed} failed").format(failed=failed) if failed else "")

    def poll(self) -> bool:
        """Handle the events of the process and begin what comes next, without waiting. True while there is work."""
        self.active = self.active and next(self._work, False) is None
        return self.active

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> list[Result]:
        """Poll until all pairs are done, calling `meanwhile` in between; return the results."""
        while self.poll():
            time.sleep(POLL_SECONDS)
            meanwhile()
        return self.results

    def _register(self) -> Generator[None, None, None]:
        """Register all pairs; yields whenever it would have to wait."""
        raise NotImplementedError


class NodeBatch(Batch):
    """Registers `pairs` (fixed, moving), each a volume node or a file, one after the other with `session`.

    Every result becomes nodes of the session's scene, also the images where they are files.
    """

    def __init__(
        self, session: SceneRegistration, pairs: Pairs, settings: Mapping[str, Any], allow_download: bool = False
    ) -> None:
        session.check_idle()
        super().__init__(pairs, settings)
        self._session, self._pairs = session, pairs
        self._settings, self._allow_download = settings, allow_download
        self._current: Result | None = None

    def status(self) -> str:
        """One sentence for the status bar."""
        if self._current is None:
            return super().status()
        pair = _("; {moving} to {fixed}").format(moving=self._current.moving, fixed=self._current.fixed)
        progress = self._session.progress()
        return super().status() + pair + (f": {progress}" if progress else "")

    def cancel(self) -> None:
        """End at once. The pairs that are done keep their results; nothing is left of the one under way."""
        self._work.close()
        self.active = False

    def _register(self) -> Generator[None, None, None]:
        session = self._session
        for fixed, moving in self._pairs:
            result = self._current = Result(_name(fixed), _name(moving))
            try:
                inputs = Inputs(self._as_node(fixed), self._as_node(moving))
                session.start(inputs, self._settings, allow_download=self._allow_download)
                while session.active:
                    yield
                    session.poll()
                result.message = session.question or ("" if session.results else session.message)
                result.nodes = {} if result.message else session.results
            except (InputError, OSError) as error:
                result.message = str(error)
            except GeneratorExit:
                session.stop_now()
                result.message = _("Canceled.")
                raise
            finally:
                self._current = None
                self.results.append(result)

    def _as_node(self, image: Image) -> slicer.vtkMRMLScalarVolumeNode:
        if not isinstance(image, (str, Path)):
            return image
        volume = read_volume(image)
        return mrml.volume_to_node(volume, mrml.add_node(self._session.scene, "vtkMRMLScalarVolumeNode", _name(image)))


class FolderBatch(Batch):
    """Registers `pairs` (fixed, moving), each a volume node or a file, into folders of their own in `folder`.

    A separate process runs the same batch as ``gradprojio batch``. It skips pairs that are done, writes a summary, and
    uses all graphics cards. The scene stays as it is. A node that cannot be copied is an InputError.
    """

    def __init__(
        self, pairs: Pairs, settings: Mapping[str, Any], folder: str | Path, allow_download: bool = False
    ) -> None:
        super().__init__(pairs, settings)
        self._folder = Path(folder).absolute()
        self._open: dict[str, Result] = {}
        self._client = WorkerClient([python_executable(), "-m", "GradProjIOLib.batch.server"])
        self._copies = protocol.new_folder()
        try:
            request = {
                "request": "batch",
                "folder": str(self._folder),
                "pairs": self._as_files(pairs),
                "settings": dict(settings),
                "allow_download": allow_download,
            }
            self._number = self._client.submit(request)
        except BaseException:
            protocol.remove_folder(self._copies)
            raise

    def cancel(self) -> None:
        """Ask the process to end, which takes a moment: poll, or wait. Pairs that are done keep their results."""
        self._client.cancel(self._number)

    def _register(self) -> Generator[None, None, None]:
        endings = {
            protocol.CANCELED: _("Canceled."),
            protocol.DIED: _("The registration process ended unexpectedly."),
        }
        try:
            while True:
                yield
                for event in self._client.poll():
                    if event["event"] == "outcome":
                        self._end(event["case"], event["message"])
                    elif event["event"] in protocol.LAST_EVENTS:
                        for case in list(self._open):
                            self._end(case, endings.get(event["event"]) or event["message"])
                        return
        finally:
            self._client.close()
            protocol.remove_folder(self._copies)

    def _end(self, case: str, problem: str) -> None:
        result = self._open.pop(case)
        result.message = problem
        result.folder = None if problem else self._folder / case
        self.results.append(result)

    def _as_files(self, pairs: Pairs) -> list[dict[str, str]]:
        """The pairs as the process wants them; images of nodes are copied to files, each once."""
        images = dict.fromkeys(itertools.chain(*pairs))
        paths = {image: str(self._as_file(image, self._copies / str(number))) for number, image in enumerate(images)}
        found = []
        for fixed, moving in pairs:
            name = _file_name(f"{_name(moving)} to {_name(fixed)}")
            names = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
            case = next(name for name in names if name not in self._open)
            self._open[case] = Result(_name(fixed), _name(moving))
            found.append({"case": case, "fixed": paths[fixed], "moving": paths[moving]})
        return found

    def _as_file(self, image: Image, own: Path) -> Path:
        if isinstance(image, (str, Path)):
            return Path(image).absolute()
        mrml.check_image_node(image, "image")
        own.mkdir()
        path = own / f"{_file_name(image.GetName())}.nrrd"
        write_volume(mrml.volume_from_node(image), path)
        return path


def _file_name(name: str) -> str:
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name).strip(". ") or "pair"


def wait_with_bar(batch: Batch) -> None:
    """Wait until all pairs are done, with a progress bar on the terminal."""
    import tqdm

    with tqdm.tqdm(total=batch.total, unit="pair") as bar:

        def show() -> None:
            bar.set_postfix_str(batch.status(), refresh=False)
            bar.update(len(batch.results) - bar.n)

        batch.wait(show)
        show()


def pairs_of(source: Source, fixed: Image | int | None, scene: slicer.vtkMRMLScene) -> Pairs:
    """The pairs (fixed, moving) that `source` stands for.

    Without `fixed` it is a list of pairs. With it, everything in `source` is registered to `fixed`: a list of nodes
    or files, a folder with image files, the number of a subject hierarchy item (its volumes, also those deeper
    down), or a sequence of volumes, of which `fixed` may be the number of a frame. Frames become nodes of `scene`.
    Raises InputError where there is nothing to register.
    """
    if fixed is None:
        pairs = [] if isinstance(source, (str, Path, int)) else [tuple(pair) for pair in source]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise InputError("Give a list of pairs (fixed, moving), or the fixed image that all others go to.")
        return pairs
    if isinstance(source, slicer.vtkMRMLSequenceNode):
        images = _frames(source, scene)
        fixed = images[fixed] if isinstance(fixed, int) else fixed
    elif isinstance(source, int):
        images = _volumes_below(source, scene)
    elif isinstance(source, (str, Path)):
        images = _files_in(Path(source))
    else:
        images = list(source)
    moving = [image for image in images if _identity(image) != _identity(fixed)]
    if not moving:
        raise InputError(f"There is nothing to register to {_name(fixed)}; choose another folder, item or sequence.")
    return [(fixed, image) for image in moving]


def _frames(sequence: slicer.vtkMRMLSequenceNode, scene: slicer.vtkMRMLScene) -> list[slicer.vtkMRMLScalarVolumeNode]:
    """Copies of the frames. A sequence keeps its frames in its own scene, where their IDs may equal IDs in this one."""
    copies = []
    for index in range(sequence.GetNumberOfDataNodes()):
        frame = sequence.GetNthDataNode(index)
        name = f"{sequence.GetName()} {sequence.GetIndexName()} {sequence.GetNthIndexValue(index)}"
        mrml.check_image_node(frame, "moving image")
        volume = mrml.volume_from_node(frame)
        copies.append(mrml.volume_to_node(volume, mrml.add_node(scene, "vtkMRMLScalarVolumeNode", name)))
    return copies


def _volumes_below(item: int, scene: slicer.vtkMRMLScene) -> list[slicer.vtkMRMLScalarVolumeNode]:
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    below = vtk.vtkCollection()
    hierarchy.GetDataNodesInBranch(item, below, "vtkMRMLScalarVolumeNode")
    return [node for node in mrml.image_nodes(scene) if below.IsItemPresent(node)]


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; choose a folder with image files.")
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(IMAGE_SUFFIXES))


def _identity(image: Image) -> Image:
    return Path(image).absolute() if isinstance(image, (str, Path)) else image


def _name(image: Image) -> str:
    if isinstance(image, (str, Path)):
        return image_stem(image)
    return image.GetName() if image is not None else _("none")

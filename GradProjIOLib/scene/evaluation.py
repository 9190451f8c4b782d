"""Evaluate a registration result of the scene with labels and landmarks; the worker does it. No Qt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import folding, nodes, transforms
from GradProjIOLib.scene.guidance import check_both, common_segments, landmarks_from_node
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.labels import labels_from_node, segment_names
from GradProjIOLib.scene.nodes import linked
from GradProjIOLib.scene.placement import FIXED, MOVING
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.client import WorkerClient
from GradProjIOLib.worker.protocol import TRANSFORM, EvaluateRequest

# Keys of the row that the worker sends (see evaluation.cases), with the titles in the table.
FIGURES = (
    ("dice", "Dice"),
    ("dice_before", "Dice before registration"),
    ("hd95_mm", "HD95 [mm]"),
    ("tre_mm", "TRE [mm]"),
    ("tre_before_mm", "TRE before registration [mm]"),
    ("ndv_percent", "Non-diffeomorphic volume [%]"),
    ("folded_voxels", "Folded voxels"),
    ("std_log_jacobian", "Standard deviation of log|J|"),
)


@dataclass(frozen=True)
class EvaluationInputs:
    """What to evaluate: the Jacobian map of a result, with labels or landmarks (or both) of its two images.

    Labels are two label maps, whose equal values correspond, or two segmentations, whose segments of equal name do.
    Landmarks are point lists; points of equal name correspond, or of equal place in the list where names differ.
    """

    jacobian: slicer.vtkMRMLScalarVolumeNode | None
    fixed_labels: slicer.vtkMRMLNode | None = None
    moving_labels: slicer.vtkMRMLNode | None = None
    fixed_points: slicer.vtkMRMLMarkupsFiducialNode | None = None
    moving_points: slicer.vtkMRMLMarkupsFiducialNode | None = None

    def check(self) -> None:
        """Raise InputError where the choice cannot be evaluated. Looks at no voxels."""
        transform = linked(self.jacobian, TRANSFORM)
        if transform is None:
            raise InputError("There is no result with a transform; register two images, or choose a result.")
        self._check_place(transform)
        check_both(self.fixed_labels, self.moving_labels, "labels")
        check_both(self.fixed_points, self.moving_points, "landmarks")
        if self.fixed_labels is None and self.fixed_points is None:
            raise InputError("No labels or landmarks are chosen; choose some of both images.")

    def _check_place(self, transform: slicer.vtkMRMLTransformNode) -> None:
        """Raise InputError where something lies elsewhere than when the images were registered."""
        moving = linked(self.jacobian, MOVING) if self.moving_labels is not None else None
        for node in (self.moving_labels, self.moving_points, moving):
            if node is not None and transforms.is_under(node, transform):
                raise InputError(
                    f"{node.GetName()} lies under {transform.GetName()}, which would count twice; take it out of there."
                )
        affine = (nodes.recall(self.jacobian, "report") or {}).get("inputs", {}).get("fixed", {}).get("affine")
        now = nodes.world_affine(self.jacobian)
        if affine is not None and (now is None or not np.allclose(now, affine, atol=nodes.MOVED_MM)):
            raise InputError(
                f"{self.jacobian.GetName()} has been moved since the registration; undo that, or register again."
            )


class SceneEvaluation:
    """Evaluates one result at a time. Call `poll` from a timer while `active`; `message` then says what happened.

    `table` is the node with the figures of the last one.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, client: WorkerClient | None = None) -> None:
        self.scene = scene
        # An evaluation needs no graphics card, and a registration may need all of its memory.
        self.client = client or WorkerClient(environment={"CUDA_VISIBLE_DEVICES": ""})
        self.message = ""
        self.table: slicer.vtkMRMLTableNode | None = None
        self._number: int | None = None
        self._folder: Path | None = None
        self._names: dict[int, str] = {}
        self._title = ""
        # The result under way or last asked for, and the one whose figures are in the table.
        self._jacobian = self._measured = None

    @property
    def active(self) -> bool:
        """Whether an evaluation is under way."""
        return self._number is not None

    def start(self, inputs: EvaluationInputs) -> None:
        """Copy the inputs and hand them to the worker. Where that cannot be done, `message` says why."""
        if self.active:
            return
        self._jacobian = inputs.jacobian
        self._end("")  # An earlier call that failed unexpectedly may have left its folder.
        try:
            inputs.check()
            self._folder = protocol.new_folder()
            request = self._request(inputs, self._folder)
            self._title = _("{result} evaluation").format(result=linked(inputs.jacobian, TRANSFORM).GetName())
            self._number = self.client.submit(protocol.to_message(request))
            self.message = _("Measuring …")
        except InputError as error:
            self._end(str(error))

    def poll(self) -> bool:
        """Handle the worker's events since the last call, without waiting. True where the evaluation has ended."""
        ends = [event for event in self.client.poll() if event["event"] in protocol.LAST_EVENTS]
        for event in ends:
            if event["event"] == protocol.EVALUATED:
                self._fill_table(event["row"])
                self._measured = self._jacobian
                self._end(_("Measured."))
            elif event["event"] == protocol.DIED:
                self._end(_("The process that measures ended unexpectedly; try again."))
            else:
                self._end(event["message"])
        return bool(ends)

    def message_about(self, jacobian: slicer.vtkMRMLScalarVolumeNode | None) -> str:
        """The message, where it is about this result."""
        return self.message if jacobian is self._jacobian else ""

    def table_about(self, jacobian: slicer.vtkMRMLScalarVolumeNode | None) -> slicer.vtkMRMLTableNode | None:
        """The table, where it is about this result, and has been filled."""
        known = self.table is not None and self.table.GetScene() is self.scene
        return self.table if known and self._measured is jacobian is not None else None

    def abandon(self) -> None:
        """Forget what was under way, and end the process: the scene or the panel is closed."""
        self.client.close()
        self._end("")
        self.table = self._jacobian = self._measured = None

    def _end(self, message: str) -> None:
        if self._folder is not None:
            protocol.remove_folder(self._folder)
        self._number, self._folder, self.message = None, None, message

    def _request(self, inputs: EvaluationInputs, folder: Path) -> EvaluateRequest:
        jacobian, labels = inputs.jacobian, []
        if inputs.fixed_labels is not None:
            images = [linked(jacobian, role) or jacobian for role in (FIXED, MOVING)]
            volumes, self._names = _labels((inputs.fixed_labels, inputs.moving_labels), images)
            for role, volume in zip(("fixed_labels", "moving_labels"), volumes, strict=True):
                labels.append(protocol.write_volume(volume, folder, role))
        lists = filter(None, (inputs.fixed_points, inputs.moving_points))
        points = [protocol.write_points(landmarks_from_node(node)) for node in lists]
        field = transforms.deformation_from_result(linked(jacobian, TRANSFORM))
        return EvaluateRequest(
            folder=str(folder),
            transform=protocol.write_field(*field, folder, "transform"),
            reference=protocol.write_volume(nodes.volume_from_node(jacobian, "result"), folder, "reference"),
            labels=labels,
            points=points,
        )

    def _fill_table(self, row: Mapping[str, Any]) -> None:
        rows = [(title, row[key]) for key, title in FIGURES if key in row]
        for structure in row.get("structures", []):
            name = self._names.get(structure["structure"], str(structure["structure"]))
            rows += [(f"Dice, {name}", structure["dice"]), (f"HD95 [mm], {name}", structure["hd95_mm"])]
        for landmark in row.get("landmarks", []):
            rows.append((f"TRE [mm], {landmark['name']}", landmark["after_mm"]))
        titles, values = zip(*rows, strict=True)
        if self.table is None or self.table.GetScene() is not self.scene:
            self.table = nodes.add_node(self.scene, "vtkMRMLTableNode", self._title)
        self.table.SetName(self._title)
        folding.fill_columns(self.table, _("Measure"), titles, {_("Value"): values})
        nodes.remember(self.table, evaluation=row)


def _labels(
    label_nodes: Sequence[slicer.vtkMRMLNode], images: Sequence[slicer.vtkMRMLScalarVolumeNode]
) -> tuple[list[Volume], dict[int, str]]:
    """Fixed and moving labels with equal values for what corresponds, and the structures' names by value.

    Segmentations are sampled on the voxels of their images.
    """
    roles = ("fixed labels", "moving labels")
    volumes = [labels_from_node(*given) for given in zip(label_nodes, images, roles, strict=True)]
    if not label_nodes[0].IsA("vtkMRMLSegmentationNode"):
        return volumes, {}
    common = common_segments(*label_nodes)
    matched = []
    for volume, segments in zip(volumes, map(segment_names, label_nodes), strict=True):
        values = np.zeros(len(segments) + 1, np.uint16)
        for value, name in enumerate(common, start=1):
            values[segments.index(name) + 1] = value
        matched.append(Volume(values[volume.array.astype(np.int64)], volume.affine, volume.name))
    return matched, dict(enumerate(common, start=1))

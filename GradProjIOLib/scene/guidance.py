"""What guides a registration in Slicer: landmarks and segments of both images, made ready for the worker. No Qt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.landmarks import Landmarks, match_landmarks
from GradProjIOLib.scene import transforms
from GradProjIOLib.scene.labels import labels_from_node, name_and_color, segment_names
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import Record

ROLES = ("fixed_points", "moving_points", "fixed_guide", "moving_guide")
"""The members of `Guides` that are nodes."""


@dataclass(frozen=True)
class Guides:
    """The nodes that guide a registration; each kind comes for both images or for none.

    Landmarks are point lists; points of equal name correspond, or of equal place in the list where all names differ.
    Guides are two segmentations, whose segments of equal name correspond, or two label maps, whose equal values do.
    `weights` says which of these guide, by name or value, and how much (1 is usual); all do where it is None.
    `tolerance` is the landmark_tolerance of a registration that continues; None keeps the earlier value.
    """

    fixed_points: slicer.vtkMRMLMarkupsFiducialNode | None = None
    moving_points: slicer.vtkMRMLMarkupsFiducialNode | None = None
    fixed_guide: slicer.vtkMRMLNode | None = None
    moving_guide: slicer.vtkMRMLNode | None = None
    weights: Mapping[str, float] | None = None
    tolerance: float | None = None

    @property
    def has_landmarks(self) -> bool:
        """Whether there is a pair of landmarks."""
        return bool(self.fixed_points and self.moving_points and placed_points(self.fixed_points))

    def check(self, initial_transform: slicer.vtkMRMLTransformNode | None = None) -> None:
        """Raise InputError where the choice cannot guide a registration. Looks at no voxels."""
        for fixed, moving, what in (
            (self.fixed_points, self.moving_points, "landmarks"),
            (self.fixed_guide, self.moving_guide, "guiding segments"),
        ):
            check_both(fixed, moving, what)
            if fixed is not None and fixed is moving:
                raise InputError(f"{fixed.GetName()} is chosen as fixed and as moving {what}; choose one for each.")
            if moving is not None and initial_transform is not None and transforms.is_under(moving, initial_transform):
                raise InputError(
                    f"{moving.GetName()} lies under {initial_transform.GetName()}, which would count twice; "
                    "take it out of there."
                )
        if self.fixed_points is not None:
            match_landmarks(point_names(self.fixed_points), point_names(self.moving_points))
        if self.fixed_guide is None:
            return
        if self.fixed_guide.IsA("vtkMRMLSegmentationNode"):
            common_segments(self.fixed_guide, self.moving_guide)
        if self.weights is not None and not self.weights:
            raise InputError("No segment is chosen to guide the registration; choose one, or no segmentations.")

    def records(
        self, fixed: slicer.vtkMRMLScalarVolumeNode, moving: slicer.vtkMRMLScalarVolumeNode, folder: Path
    ) -> dict[str, Any]:
        """The `inputs` of a `RegisterRequest`, in the world (RAS mm), where `check` finds no fault.

        Segmentations are sampled on the voxels of their images. Raises InputError.
        """
        found: dict[str, Any] = {}
        if self.has_landmarks:
            found["fixed_points"] = protocol.write_points(landmarks_from_node(self.fixed_points))
            found["moving_points"] = protocol.write_points(landmarks_from_node(self.moving_points))
        if self.fixed_guide is not None:
            found["fixed_labels"] = self._labels(self.fixed_guide, fixed, folder, "fixed_guide")
            found["moving_labels"] = self._labels(self.moving_guide, moving, folder, "moving_guide")
        return found

    def _labels(
        self, node: slicer.vtkMRMLNode, image: slicer.vtkMRMLScalarVolumeNode, folder: Path, role: str
    ) -> Record:
        if not node.IsA("vtkMRMLSegmentationNode"):
            return protocol.write_labels(Labels(labels_from_node(node, image, "guiding labels")), folder, role)
        # A segment that does not guide must not hide one that does.
        common = common_segments(self.fixed_guide, self.moving_guide)
        wanted = [name for name in common if self.weights is None or name in self.weights]
        volume = labels_from_node(node, image, "guiding segments", wanted)
        names = [name for name in segment_names(node) if name in wanted]
        return protocol.write_labels(Labels(volume, dict(enumerate(names, start=1))), folder, role)


NO_GUIDES = Guides()


def check_both(fixed: slicer.vtkMRMLNode | None, moving: slicer.vtkMRMLNode | None, what: str) -> None:
    """Raise InputError where one of two nodes is missing, or only one of them is a segmentation."""
    if (fixed is None) != (moving is None):
        missing = "fixed" if fixed is None else "moving"
        raise InputError(f"Only one of the {what} is chosen; choose the {missing} {what}, too.")
    if len({node.IsA("vtkMRMLSegmentationNode") for node in (fixed, moving) if node}) > 1:
        raise InputError(f"One of the {what} is a segmentation, the other a label map; choose two of one kind.")


def common_segments(fixed: slicer.vtkMRMLSegmentationNode, moving: slicer.vtkMRMLSegmentationNode) -> list[str]:
    """The names of the segments that both have, in the order of the fixed ones. Raises InputError for none."""
    names = list(structures(fixed, moving))
    if not names:
        raise InputError(
            f"{fixed.GetName()} and {moving.GetName()} have no segment name in common; name the segments alike."
        )
    return names


def structures(fixed: slicer.vtkMRMLNode | None, moving: slicer.vtkMRMLNode | None) -> dict[str, str]:
    """The structures that both nodes have: their titles by segment name, or by label value.

    Nothing where one of them is missing or of the other kind, or is empty.
    """
    if fixed is None or moving is None:
        return {}
    if fixed.IsA("vtkMRMLSegmentationNode") != moving.IsA("vtkMRMLSegmentationNode"):
        return {}
    if fixed.IsA("vtkMRMLSegmentationNode"):
        there = set(segment_names(moving))
        return {name: name for name in segment_names(fixed) if name in there}
    values = np.intersect1d(_values(fixed), _values(moving))
    return {str(value): name_and_color(fixed, value)[0] for value in values.tolist()}


def _values(node: slicer.vtkMRMLLabelMapVolumeNode) -> np.ndarray:
    """The values above 0 in a label map."""
    scalars = node.GetImageData().GetPointData().GetScalars() if node.GetImageData() is not None else None
    if scalars is None:
        return np.zeros(0, np.int64)
    # The panel asks often. Each modification time of VTK is unique, so it identifies the array.
    time = scalars.GetMTime()
    if time not in _known_values:
        while len(_known_values) >= MOST_KNOWN:
            del _known_values[next(iter(_known_values))]
        found = np.unique(slicer.util.arrayFromVolume(node))
        _known_values[time] = found[found > 0].astype(np.int64)
    return _known_values[time]


MOST_KNOWN = 4
_known_values: dict[int, np.ndarray] = {}


def placed_points(node: slicer.vtkMRMLMarkupsFiducialNode) -> list[int]:
    """The numbers of the control points that have been placed."""
    numbers = range(node.GetNumberOfControlPoints())
    return [number for number in numbers if node.GetNthControlPointPositionStatus(number) == node.PositionDefined]


def landmarks_from_node(node: slicer.vtkMRMLMarkupsFiducialNode) -> Landmarks:
    """The points that were placed, in the world (RAS mm). Raises InputError for none."""
    placed = placed_points(node)
    if not placed:
        raise InputError(f"{node.GetName()} has no point; place some, or choose another list.")
    positions = slicer.util.arrayFromMarkupsControlPoints(node, world=True)[placed]
    return Landmarks(point_names(node), positions, node.GetName())


def point_names(node: slicer.vtkMRMLMarkupsFiducialNode) -> list[str]:
    """The names of the points that have been placed."""
    return [node.GetNthControlPointLabel(number) for number in placed_points(node)]

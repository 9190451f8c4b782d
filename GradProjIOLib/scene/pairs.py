"""Pairs of landmarks in the scene: placing them, proposing partners, and how far they are apart. No Qt."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import slicer
import vtk

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.landmarks import match_landmarks
from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.guidance import landmarks_from_node, placed_points, point_names
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.nodes import mapped
from GradProjIOLib.settings import Settings
from GradProjIOLib.worker.protocol import TRANSFORM

POINTS = "vtkMRMLMarkupsFiducialNode"
# Colors that also readers without red or green cones tell apart.
COLORS = {"fixed": (0.0, 0.62, 0.92), "moving": (0.95, 0.6, 0.0)}

PointMap = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Maps:
    """Where points [n, 3] of the fixed image lie in the moving one, in the world: `before` the deformable registration,
    and `now`, after it. `report` is that of the result. Where there is no result, now is None and the report empty.
    """

    before: PointMap
    now: PointMap | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def proposing(self) -> PointMap:
        """The best of them."""
        return self.now or self.before


def maps_of(
    fixed: slicer.vtkMRMLScalarVolumeNode | None,
    moving: slicer.vtkMRMLScalarVolumeNode | None,
    initial_transform: slicer.vtkMRMLTransformNode | None = None,
    result: slicer.vtkMRMLNode | None = None,
) -> Maps:
    """The maps for two images. A result, known by one of its nodes, counts where it is one of these images."""
    transform = nodes.member(result, TRANSFORM)
    report = nodes.recall(result, "report")
    if transform is None or not report or not _is_of(transform, report, {"fixed": fixed, "moving": moving}):
        return Maps(_map_of(initial_transform))
    matrix = report.get("initial_transform")
    before = (
        _map_of(nodes.linked(result, "initial_transform"))
        if matrix is None
        else partial(apply_matrix, np.array(matrix))
    )
    return Maps(before, _map_of(transform), report)


def _is_of(
    transform: slicer.vtkMRMLTransformNode, report: dict[str, Any], images: dict[str, slicer.vtkMRMLVolumeNode | None]
) -> bool:
    """Whether a result is one of these images, and they lie where they did then."""
    for role, image in images.items():
        if image is None or nodes.linked(transform, role) is not image:
            return False
        then, now = report.get("inputs", {}).get(role, {}).get("affine"), nodes.world_affine(image)
        if then is not None and now is not None and not np.allclose(now, then, atol=nodes.MOVED_MM):
            return False
    return True


def _map_of(node: slicer.vtkMRMLTransformNode | None) -> PointMap:
    """A transform node that moves things onto the fixed image, as point map fixed → moving in the world."""
    if node is None:
        return lambda points: points
    transform = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(transform)
    return lambda points: mapped(transform, points)


@dataclass(frozen=True)
class Pair:
    """A pair of landmarks: its name, both points in the world, and their distance in mm under `Maps`.

    `conflicted` says whether it guided the result, which nevertheless left it farther apart than the tolerance while
    the landmarks' gradient conflicted with another one.
    """

    name: str
    fixed: np.ndarray
    moving: np.ndarray
    before_mm: float
    now_mm: float | None
    conflicted: bool


def pairs_of(
    fixed: slicer.vtkMRMLMarkupsFiducialNode | None, moving: slicer.vtkMRMLMarkupsFiducialNode | None, maps: Maps
) -> list[Pair]:
    """The pairs of two point lists; none where there are none. Raises InputError where they do not match."""
    if fixed is None or moving is None or not (placed_points(fixed) or placed_points(moving)):
        return []
    order = match_landmarks(point_names(fixed), point_names(moving))
    first, partners = landmarks_from_node(fixed), landmarks_from_node(moving).points[order]

    def distances(point_map: PointMap) -> list[float]:
        return np.linalg.norm(point_map(first.points) - partners, axis=1).tolist()

    before = distances(maps.before)
    now = [None] * len(before) if maps.now is None else distances(maps.now)
    conflicted = _conflicted(maps.report, first.points, partners)
    return [Pair(*row) for row in zip(first.names, first.points, partners, before, now, conflicted, strict=True)]


def _conflicted(report: dict[str, Any], fixed: np.ndarray, moving: np.ndarray) -> list[bool]:
    tolerance = report.get("settings", {}).get("landmark_tolerance", Settings.landmark_tolerance)
    pulled = conflicts(report, "landmarks")
    apart = [
        one for one in report.get("landmarks") or [] if pulled and one["after_mm"] > one.get("tolerance_mm", tolerance)
    ]
    known = np.array([[*one["fixed"], *one["moving"]] for one in apart]).reshape(-1, 6)
    return [bool(np.isclose(known, both, atol=nodes.MOVED_MM).all(axis=1).any()) for both in np.hstack([fixed, moving])]


def points_in(node: slicer.vtkMRMLMarkupsFiducialNode | None) -> list[tuple[str, tuple[float, float, float]]]:
    """The names and places in the world of the points that have been placed."""
    placed = [] if node is None else placed_points(node)
    return [(node.GetNthControlPointLabel(one), tuple(node.GetNthControlPointPositionWorld(one))) for one in placed]


def age(result: slicer.vtkMRMLNode | None) -> tuple[str, int]:
    """Which result it is, and when it was last filled."""
    transform = nodes.member(result, TRANSFORM)
    return ("", 0) if transform is None else (transform.GetID(), transform.GetTransformToWorldMTime())


def conflicts(report: dict[str, Any], guide: str) -> dict[str, int]:
    """For each other objective, in how many of the latest steps its gradient conflicted with that of `guide`.

    guide: "landmarks" or "labels".
    """
    pairs = [one.split("–") for step in latest_steps(report) for one in step.get("conflicts", [])]
    return Counter(other for pair in pairs if guide in pair for other in pair if other != guide)


def latest_steps(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a registration, without those before it went on."""
    return report.get("steps", [])[(report.get("continued_after") or [0])[-1] :]


def conflict_sentence(report: dict[str, Any]) -> str:
    """What guided a result and conflicted with what, for the panel; empty where nothing did."""
    count = len(latest_steps(report))
    words = {"landmarks": _("landmarks"), "labels": _("segments"), "similarity": _("the images"),
             "regularity": _("smoothness"), "folding": _("folding")}  # fmt: skip
    sentences = []
    for guide in ("landmarks", "labels"):
        for other, times in conflicts(report, guide).items():
            sentence = _("The {guide} conflicted with {other} in {times} of {count} steps.")
            named = {"guide": words[guide], "other": words.get(other, other)}
            sentences.append(sentence.format(**named, times=times, count=count))
    return " ".join(dict.fromkeys(sentences))


def add_list(scene: slicer.vtkMRMLScene, side: str, image: slicer.vtkMRMLVolumeNode) -> Any:
    """A new, empty list of landmarks for the "fixed" or "moving" image, with which it moves."""
    name = {"fixed": _("Fixed landmarks"), "moving": _("Moving landmarks")}[side]
    node = nodes.add_node(scene, POINTS, name)
    # Partners have the same name.
    node.SetControlPointLabelFormat("%d")
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetSelectedColor(*COLORS[side])
    display.SetActiveColor(*COLORS[side])
    # A partner hardly ever lies in the same slice.
    display.SetSliceProjection(True)
    nodes.place_like(node, image)
    return node


class PairPlacing:
    """Lets the user place a landmark in a view, and puts its partner where the map says. Call `poll` from a timer."""

    def __init__(self, scene: slicer.vtkMRMLScene) -> None:
        self.scene = scene
        # The fixed and the moving list while a pair is placed, and how many points the fixed one had.
        self._lists: tuple[slicer.vtkMRMLMarkupsFiducialNode, ...] = ()
        self._known = 0

    @property
    def active(self) -> bool:
        """Whether the next click in a view places a landmark."""
        if not self._there():
            return False
        interaction, selection = self._node("Interaction"), self._node("Selection")
        placing = interaction.GetCurrentInteractionMode() == interaction.Place
        return placing and selection.GetActivePlaceNodeID() == self._lists[0].GetID()

    def start(self, fixed: slicer.vtkMRMLMarkupsFiducialNode, moving: slicer.vtkMRMLMarkupsFiducialNode) -> None:
        """Place the next landmark of `fixed`, and its partner in `moving`."""
        self._lists, self._known = (fixed, moving), len(placed_points(fixed))
        selection = self._node("Selection")
        selection.SetReferenceActivePlaceNodeClassName(POINTS)
        selection.SetActivePlaceNodeID(fixed.GetID())
        self._node("Interaction").SwitchToSinglePlaceMode()

    def stop(self) -> None:
        """Place nothing after all."""
        if self.active:
            self._node("Interaction").SwitchToViewTransformMode()
        self._lists = ()

    def poll(self, maps: Callable[[], Maps]) -> bool:
        """Propose the partner of a landmark that has been placed. True where that happened, or placing has ended."""
        if not self._lists:
            return False
        placed = placed_points(self._lists[0]) if self._there() else []
        new = placed[self._known :]
        for number in new:
            self._propose(number, maps().proposing)
        self._known = len(placed)
        if not self.active:
            self._lists = ()
        return bool(new) or not self._lists

    def _there(self) -> bool:
        """Whether there are lists, and both are still in the scene."""
        return bool(self._lists) and all(node.GetScene() is self.scene for node in self._lists)

    def _propose(self, number: int, point_map: PointMap) -> None:
        """Add the partner of a control point of the fixed list, under the same name, where the map puts it."""
        fixed, moving = self._lists
        point = np.array(fixed.GetNthControlPointPositionWorld(number))
        others = {fixed.GetNthControlPointLabel(one) for one in placed_points(fixed) if one != number}
        # Where the lists are paired by their order, a single equal name would break that; MRML makes up another one.
        by_order = bool(others) and others != set(point_names(moving))
        label = "" if by_order else fixed.GetNthControlPointLabel(number)
        moving.AddControlPointWorld(point_map(point[None])[0], label)

    def _node(self, kind: str) -> Any:
        name = f"vtkMRML{kind}Node"
        return self.scene.GetFirstNodeByClass(name) or self.scene.AddNewNodeByClass(name)


def remove_pair(fixed: slicer.vtkMRMLMarkupsFiducialNode, moving: slicer.vtkMRMLMarkupsFiducialNode, row: int) -> None:
    """Remove a pair, known by its place among those of `pairs_of`; -1 is the last one."""
    with contextlib.suppress(InputError, IndexError):
        partner = placed_points(moving)[match_landmarks(point_names(fixed), point_names(moving))[row]]
        fixed.RemoveNthControlPoint(placed_points(fixed)[row])
        moving.RemoveNthControlPoint(partner)

"""What the panel says about the folding of one result, and how the views move from fold to fold. No Qt."""

from __future__ import annotations

import numpy as np
import slicer
import vtk

from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.folds import Fold, body_of, find_folds
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.placement import FIXED
from GradProjIOLib.worker.protocol import FOLDING, JACOBIAN, TRANSFORM

GRID_COLOR = (0.9, 0.25, 0.9)
GRID_SPACING_MM = 8.0
MARKER_NAME = "GradProjIO fold"
MARKER_COLOR = (1.0, 0.2, 1.0)
# The ring is this much wider than a fold would be as a ball, and at least so many voxels wide; a view shows ten rings.
RING_WIDER, RING_VOXELS, RINGS_SHOWN = 1.6, 4, 10


class FoldingView:
    """Shows the folding of one registration result, known by one of its nodes.

    `folds` are in the order of the table. `number` is that of the fold on which the views are centered, counted from
    0; -1 before the first.
    """

    def __init__(self, scene: slicer.vtkMRMLScene) -> None:
        self.scene = scene
        self.result: slicer.vtkMRMLNode | None = None
        self.folds: list[Fold] = []
        self.number = -1
        # Whether grid and folds shall be shown of the next result.
        self._grid_wanted, self._folds_wanted = False, True
        # The figures of the Jacobian in the result's report.
        self._figures: dict[str, float] = {}

    def show(self, result: slicer.vtkMRMLNode | None, structures: Labels | None = None) -> None:
        """Show a result, also again after it was refilled, or none. Remove the marks of other results.

        Grid and folds stay on or off; a first result keeps what it has, as when a scene was loaded.
        """
        if self.result is None:
            self.result = result
        if self.linked(TRANSFORM) is not None:
            self._grid_wanted = self.grid_visible
        if self.linked(FOLDING) is not None:
            self._folds_wanted = self.folds_visible
        self._hide_all()
        self.result, self.number = result, -1
        self._figures = (nodes.recall(result, "report") or {}).get("jacobian", {})
        jacobian = self.linked(JACOBIAN)
        usable = jacobian is not None and jacobian.GetImageData() is not None
        self.folds = find_folds(jacobian, self.linked(FOLDING), self._body, structures) if usable else []
        self.show_grid(self._grid_wanted)
        self.show_folds(self._folds_wanted)

    def linked(self, role: str) -> slicer.vtkMRMLNode | None:
        """The result's node with `role`, where it is still there."""
        return nodes.member(self.result, role)

    @property
    def summary(self) -> str:
        """One sentence about how much folds."""
        if self.linked(JACOBIAN) is None:
            return _("Register two images, or choose the Jacobian map of an earlier registration.")
        groups = [fold for fold in self.folds if not fold.between]
        if not groups:
            sentence = _("No voxel folds")
        else:
            voxels, regions = sum(fold.voxels for fold in groups), len(groups)
            where = _("in one region") if regions == 1 else _("in {regions} regions").format(regions=regions)
            sentence = _("{voxels} voxels fold, {where}").format(voxels=voxels, where=where)
        if between := len(self.folds) - len(groups):
            sentence += _("; between voxels it folds in {count} places").format(count=between)
        if outside := sum(not fold.inside for fold in self.folds):
            sentence += _("; {outside} of the {total} lie outside the body").format(
                outside=outside, total=len(self.folds)
            )
        if "ndv_percent" in self._figures:
            share = f"{self._figures['ndv_percent']:.3g}"
            sentence += "; " + _("non-diffeomorphic volume {percent} %").format(percent=share)
        return sentence + "."

    @property
    def position(self) -> str:
        """Which fold the views are centered on."""
        if self.number < 0:
            return ""
        fold = self.folds[self.number]
        place = ", ".join(f"{value:.0f}" for value in fold.position)
        sentence = _("Fold {number} of {total}: {volume} mm³, smallest determinant {determinant}, at ({place}) mm.")
        return sentence.format(
            number=self.number + 1,
            total=len(self.folds),
            volume=rounded(fold.volume_mm3),
            determinant=f"{fold.determinant:.3g}",
            place=place,
        )

    def go_to(self, number: int) -> None:
        """Center the slice views on fold `number`, counted from 0, come close, and put a ring around it."""
        self.number, fold = number, self.folds[number]
        voxel = max(self.linked(JACOBIAN).GetSpacing())
        radius = max(RING_WIDER * (3 * fold.volume_mm3 / (4 * vtk.vtkMath.Pi())) ** (1 / 3), RING_VOXELS * voxel / 2)
        for node in nodes.nodes_of_class(self.scene, "vtkMRMLSliceNode"):
            node.JumpSliceByCentering(*fold.position)
            width, height, depth = node.GetFieldOfView()
            shown = min(2 * radius * RINGS_SHOWN, width, height)
            if shown > 0:
                scale = shown / min(width, height)
                node.SetFieldOfView(scale * width, scale * height, depth)
        self._mark(fold.position, radius)

    def _mark(self, position: tuple[float, float, float], radius: float) -> None:
        """A ball around `position`, of which the slice views show the outline."""
        marker = self.scene.GetFirstNode(MARKER_NAME, "vtkMRMLModelNode")
        if marker is None:
            marker = self.scene.AddNewNodeByClass("vtkMRMLModelNode", MARKER_NAME)
            marker.CreateDefaultDisplayNodes()
            marker.SetHideFromEditors(True)
            for node in (marker, marker.GetDisplayNode()):
                node.SetSaveWithScene(False)
            display = marker.GetDisplayNode()
            display.SetColor(*MARKER_COLOR)
            display.SetOpacity(0.3)
            display.SetVisibility2D(True)
            display.SetSliceIntersectionThickness(3)
        ball = vtk.vtkSphereSource()
        ball.SetCenter(position)
        ball.SetRadius(radius)
        ball.SetThetaResolution(48)
        ball.SetPhiResolution(48)
        ball.Update()
        marker.SetAndObservePolyData(ball.GetOutput())

    @property
    def grid_visible(self) -> bool:
        """Whether the slice views draw the deformation as grid lines."""
        transform = self.linked(TRANSFORM)
        display = transform.GetDisplayNode() if transform is not None else None
        return display is not None and bool(display.GetVisibility() and display.GetVisibility2D())

    def show_grid(self, visible: bool) -> None:
        """Show or hide the deformation as grid lines in the slice views."""
        transform = self.linked(TRANSFORM)
        if transform is None or visible == self.grid_visible:
            return
        transform.CreateDefaultDisplayNodes()
        display = transform.GetDisplayNode()
        display.SetVisualizationMode(slicer.vtkMRMLTransformDisplayNode.VIS_MODE_GRID)
        display.SetGridSpacingMm(GRID_SPACING_MM)
        display.SetGridResolutionMm(GRID_SPACING_MM / 5)
        display.SetGridScalePercent(100)
        # Slicer's own scale for displacements has yellow in it, which stands for folds here.
        colors = vtk.vtkColorTransferFunction()
        colors.AddRGBPoint(0, *GRID_COLOR)
        display.SetColorMap(colors)
        display.SetVisibility(visible)
        display.SetVisibility2D(visible)
        display.SetVisibility3D(False)

    @property
    def folds_visible(self) -> bool:
        """Whether the views mark the folded voxels."""
        folding = self.linked(FOLDING)
        display = folding.GetDisplayNode() if folding is not None else None
        return display is not None and bool(display.GetVisibility())

    def show_folds(self, visible: bool) -> None:
        """Mark the folded voxels in the views, or do not."""
        folding = self.linked(FOLDING)
        if folding is not None:
            folding.SetDisplayVisibility(visible)

    @property
    def folds_in_3d(self) -> bool:
        """Whether the 3-D views show the folds as surfaces."""
        folding = self.linked(FOLDING)
        surface = slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()
        if not self.folds_visible or not folding.GetSegmentation().ContainsRepresentation(surface):
            return False
        return bool(folding.GetDisplayNode().GetVisibility3D())

    def show_folds_in_3d(self, visible: bool) -> None:
        """Show the folds as closed surfaces in the 3-D views, or do not."""
        folding = self.linked(FOLDING)
        if folding is None:
            return
        if visible:
            folding.CreateClosedSurfaceRepresentation()
            self.show_folds(True)
        else:
            folding.RemoveClosedSurfaceRepresentation()
        folding.GetDisplayNode().SetVisibility3D(visible)

    def _body(self) -> np.ndarray | None:
        """Which voxels of the map lie in the body; None where the fixed image is missing or has another lattice."""
        fixed, jacobian = self.linked(FIXED), self.linked(JACOBIAN)
        if fixed is None or fixed.GetImageData() is None:
            return None
        if fixed.GetImageData().GetDimensions() != jacobian.GetImageData().GetDimensions():
            return None
        return body_of(slicer.util.arrayFromVolume(fixed))

    def _hide_all(self) -> None:
        """Remove the marker; hide what is shown of any result."""
        marker = self.scene.GetFirstNode(MARKER_NAME, "vtkMRMLModelNode")
        if marker is not None:
            self.scene.RemoveNode(marker)
        for node in nodes.nodes_of_class(self.scene, "vtkMRMLDisplayableNode"):
            if node.GetAttribute(nodes.ATTRIBUTE_PREFIX + "role") in (FOLDING, TRANSFORM):
                node.SetDisplayVisibility(False)


def rounded(volume: float) -> str:
    """A volume with three digits, the larger ones in whole numbers."""
    return f"{volume:,.0f}" if volume >= 100 else f"{volume:.3g}"

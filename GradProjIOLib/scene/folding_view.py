"""What the folding section of the panel shows of one result, and how the views move from fold to fold. No Qt."""

from __future__ import annotations

import slicer
import vtk

from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.folding import Fold, find_folds
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.placement import FIXED, MOVING
from GradProjIOLib.worker.protocol import FOLDING, TRANSFORM, WARPED

COMPARE_OPACITY = 0.5
GRID_COLOR = (0.9, 0.25, 0.9)
GRID_SPACING_MM = 8.0
MARKER_NAME = "GradProjIO fold"


class FoldingView:
    """Shows the folding of one registration result, known by its Jacobian map node.

    `number` is that of the fold on which the views are centered, counted from 0; -1 before the first.
    """

    def __init__(self) -> None:
        self.jacobian: slicer.vtkMRMLScalarVolumeNode | None = None
        self.folds: list[Fold] = []
        self.number = -1

    def show(self, jacobian: slicer.vtkMRMLScalarVolumeNode | None) -> None:
        """Show another result; None for none."""
        self.jacobian, self.number = jacobian, -1
        usable = jacobian is not None and jacobian.GetImageData() is not None
        self.folds = find_folds(jacobian, self.linked(FOLDING)) if usable else []

    @property
    def summary(self) -> str:
        """One sentence about how much folds."""
        if self.jacobian is None:
            return _("Register two images, or choose the Jacobian map of an earlier registration.")
        figures = (nodes.recall(self.jacobian, "report") or {}).get("jacobian", {})
        if not self.folds:
            sentence = _("No voxel folds")
        else:
            voxels, places = sum(fold.voxels for fold in self.folds), len(self.folds)
            where = _("in one place") if places == 1 else _("in {places} places").format(places=places)
            sentence = _("{voxels} voxels fold, {where}").format(voxels=voxels, where=where)
        if "ndv_percent" in figures:
            share = f"{figures['ndv_percent']:.3g}"
            sentence += "; " + _("non-diffeomorphic volume {percent} %").format(percent=share)
        return sentence + "."

    @property
    def position(self) -> str:
        """Which fold the views are centered on."""
        if self.number < 0:
            return ""
        fold = self.folds[self.number]
        place = ", ".join(f"{value:.0f}" for value in fold.position)
        sentence = _("Fold {number} of {total}: smallest determinant {determinant}, {voxels} voxels, at ({place}) mm.")
        number, determinant = self.number + 1, f"{fold.determinant:.3g}"
        return sentence.format(
            number=number, total=len(self.folds), determinant=determinant, voxels=fold.voxels, place=place
        )

    def go_to(self, number: int) -> None:
        """Center the slice views on fold `number`, counted from 0, and mark it with a point."""
        self.number = number
        position, scene = self.folds[number].position, self.jacobian.GetScene()
        for node in nodes.nodes_of_class(scene, "vtkMRMLSliceNode"):
            node.JumpSliceByCentering(*position)
        kind = "vtkMRMLMarkupsFiducialNode"
        marker = scene.GetFirstNode(MARKER_NAME, kind) or scene.AddNewNodeByClass(kind, MARKER_NAME)
        marker.CreateDefaultDisplayNodes()
        marker.SetLocked(True)
        marker.RemoveAllControlPoints()
        label = _("fold {number} of {total}").format(number=number + 1, total=len(self.folds))
        marker.AddControlPointWorld(vtk.vtkVector3d(*position), label)

    def overlay(self, visible: bool, opacity: float) -> None:
        """Show the map over the fixed image with `opacity` (0 to 1), or hide it."""
        self._show(self.linked(FIXED) or self.jacobian, self.jacobian if visible else None, opacity)

    def compare(self, after: bool) -> None:
        """Show the moving image over the fixed one, before or after registration."""
        fixed, other = self.linked(FIXED), self.linked(WARPED if after else MOVING)
        if fixed is not None and other is not None:
            self._show(fixed, other, COMPARE_OPACITY)

    def _show(
        self, background: slicer.vtkMRMLVolumeNode, foreground: slicer.vtkMRMLVolumeNode | None, opacity: float
    ) -> None:
        """Show `foreground` over `background` in all slice views."""
        scene = self.jacobian.GetScene()
        for composite in nodes.nodes_of_class(scene, "vtkMRMLSliceCompositeNode"):
            composite.SetBackgroundVolumeID(background.GetID())
            composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
            composite.SetForegroundOpacity(opacity)
        # Slice views look at a legend only when it changes, not when its volume is shown or hidden.
        for legend in nodes.nodes_of_class(scene, "vtkMRMLColorLegendDisplayNode"):
            legend.Modified()

    def linked(self, role: str) -> slicer.vtkMRMLNode | None:
        """The result's node with `role`, where it is still there."""
        return nodes.linked(self.jacobian, role)

    def grid(self, visible: bool) -> None:
        """Show or hide the deformation as grid lines in the slice views."""
        transform = self.linked(TRANSFORM)
        if transform is None:
            return
        transform.CreateDefaultDisplayNodes()
        display = transform.GetDisplayNode()
        display.SetVisualizationMode(slicer.vtkMRMLTransformDisplayNode.VIS_MODE_GRID)
        display.SetGridSpacingMm(GRID_SPACING_MM)
        display.SetGridResolutionMm(GRID_SPACING_MM / 5)
        display.SetGridScalePercent(100)
        # Slicer's own scale for displacements has green in it, which stands for folds here.
        colors = vtk.vtkColorTransferFunction()
        colors.AddRGBPoint(0, *GRID_COLOR)
        display.SetColorMap(colors)
        display.SetVisibility(visible)
        display.SetVisibility2D(visible)
        display.SetVisibility3D(False)

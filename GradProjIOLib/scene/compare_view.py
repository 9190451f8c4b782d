"""What of a registration result the slice views show over its fixed image. No Qt.

What is shown is read from the views, so that a panel that asks here cannot contradict them.
"""

from __future__ import annotations

from collections.abc import Callable

import slicer

from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.placement import FIXED, MOVING
from GradProjIOLib.worker.protocol import JACOBIAN, WARPED

# The images that can lie over the fixed one, by their roles in the result.
ROLES = (MOVING, WARPED, JACOBIAN)
OPACITY = 0.5

# Background, foreground, opacity of the foreground, and whether the views are linked.
Layers = tuple[str | None, str | None, float, bool]
# Field of view and center of a slice view, and the slice's place in RAS.
Place = tuple[tuple[float, ...], ...]


class CompareView:
    """Shows the images of a result, known by one of its nodes, one at a time; the user's own layers come back after.

    `result` is that node, or None.
    """

    def __init__(self, scene: slicer.vtkMRMLScene) -> None:
        self.scene = scene
        self.result: slicer.vtkMRMLNode | None = None
        # The layers that the user had, by the ID of the composite node.
        self._own: dict[str, Layers] = {}
        # Where the user's own views were and where they were put instead, by the ID of the slice node.
        self._fitted: dict[str, tuple[Place, Place]] = {}

    @property
    def role(self) -> str:
        """Which image all views show over the fixed one; empty where they show something else."""
        shown = {_layers(node)[:2] for node in self._composites()}
        return next((role for role in ROLES if shown == {self._pair(role)}), "")

    @property
    def opacity(self) -> float:
        """The opacity of what lies over the fixed image."""
        composites = self._composites()
        return composites[0].GetForegroundOpacity() if composites else OPACITY

    def can_show(self, role: str) -> bool:
        """Whether the result has what it takes."""
        return self._pair(role) is not None

    def choose(self, result: slicer.vtkMRMLNode | None) -> None:
        """Switch to another result, or to none. The views then show the same image of it, where it has one."""
        role = self.role
        self.result = result
        if not role:
            return
        pair = self._pair(role)
        if pair is None:
            self._give_back()
            return
        for node in self._composites():
            _set_layers(node, (*pair, node.GetForegroundOpacity(), True))
        self._refresh_legends()

    def show(self, role: str, opacity: float | None = None, fit: Callable[[], None] | None = None) -> None:
        """Show another image in all slice views; an empty `role` gives the user's own layers back.

        opacity: by default the current one, or 0.5 where the user's own layers were shown. fit: fits the views to the
        image. At the end, views that the user has not moved return to their old place.
        """
        before = self.role
        if not role:
            if before:
                self._give_back()
            return
        pair = self._pair(role)
        if pair is None:
            return
        if not before:
            self._own = {node.GetID(): _layers(node) for node in self._composites(empty=True)}
            self._fitted = {}
            opacity = OPACITY if opacity is None else opacity
        for node in self._composites(empty=True):
            _set_layers(node, (*pair, node.GetForegroundOpacity() if opacity is None else opacity, True))
        self._refresh_legends()
        if fit is not None:
            places = {node.GetID(): self._own_place(node) for node in self._slices()}
            fit()
            self._fitted = {node.GetID(): (places[node.GetID()], _place(node)) for node in self._slices()}

    def fade(self, opacity: float) -> None:
        """Change the opacity of what is shown."""
        if self.role:
            for node in self._composites():
                node.SetForegroundOpacity(opacity)

    def _give_back(self) -> None:
        for node in self._composites():
            background, foreground, opacity, linked = self._own.get(node.GetID(), (None, None, OPACITY, False))
            there = [volume if self.scene.GetNodeByID(volume or "") else None for volume in (background, foreground)]
            _set_layers(node, (there[0] or node.GetBackgroundVolumeID(), there[1], opacity, linked))
        for node in self._slices():
            _set_place(node, self._own_place(node))
        self._own, self._fitted = {}, {}
        self._refresh_legends()

    def _own_place(self, node: slicer.vtkMRMLSliceNode) -> Place:
        """Where a view was before it was fitted; if the user has moved it since, where it is now."""
        now = _place(node)
        own, fitted = self._fitted.get(node.GetID(), (now, now))
        return own if now == fitted else now

    def _slices(self) -> list[slicer.vtkMRMLSliceNode]:
        return nodes.nodes_of_class(self.scene, "vtkMRMLSliceNode")

    def _pair(self, role: str) -> tuple[str, str] | None:
        """The IDs of background and foreground; None where one of them is not there."""
        fixed, over = nodes.member(self.result, FIXED), nodes.member(self.result, role)
        return (fixed.GetID(), over.GetID()) if fixed and over else None

    def _composites(self, empty: bool = False) -> list[slicer.vtkMRMLSliceCompositeNode]:
        """Those of the slice views; those that show nothing only where `empty`."""
        found = nodes.nodes_of_class(self.scene, "vtkMRMLSliceCompositeNode")
        return [node for node in found if empty or node.GetBackgroundVolumeID()]

    def _refresh_legends(self) -> None:
        # Slice views look at a legend only when it changes, not when its volume is shown or hidden.
        for legend in nodes.nodes_of_class(self.scene, "vtkMRMLColorLegendDisplayNode"):
            legend.Modified()


def _layers(node: slicer.vtkMRMLSliceCompositeNode) -> Layers:
    linked = bool(node.GetLinkedControl())
    return node.GetBackgroundVolumeID(), node.GetForegroundVolumeID(), node.GetForegroundOpacity(), linked


def _set_layers(node: slicer.vtkMRMLSliceCompositeNode, layers: Layers) -> None:
    with slicer.util.NodeModify(node):
        node.SetBackgroundVolumeID(layers[0])
        node.SetForegroundVolumeID(layers[1])
        node.SetForegroundOpacity(layers[2])
        node.SetLinkedControl(layers[3])


def _place(node: slicer.vtkMRMLSliceNode) -> Place:
    elements = slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS()).ravel()
    return node.GetFieldOfView(), node.GetXYZOrigin(), tuple(elements)


def _set_place(node: slicer.vtkMRMLSliceNode, place: Place) -> None:
    if place == _place(node):
        return
    field_of_view, origin, elements = place
    with slicer.util.NodeModify(node):
        node.SetFieldOfView(*field_of_view)
        node.SetXYZOrigin(*origin)
        node.GetSliceToRAS().DeepCopy(elements)
        node.UpdateMatrices()

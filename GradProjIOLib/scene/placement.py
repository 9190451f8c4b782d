"""Put the results of a registration into the scene: which nodes there are, and how they belong together.

Needs slicer and vtk, no Qt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import slicer

from GradProjIOLib.scene import folding, labels, nodes, transforms
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import FOLDING, INVERSE, JACOBIAN, TRANSFORM, WARPED, WARPED_LABELS, Record

TABLE, CHART, FIXED, MOVING = "table", "chart", "fixed", "moving"
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


@dataclass
class Destination:
    """The nodes that a result is put into, by their IDs, since nodes can vanish while the worker computes.

    `outputs` has the wanted results by role, each with the ID of the node to fill, or None for a new one. `names` are
    what the names of new nodes are made of: fixed, moving and labels.
    """

    names: dict[str, str]
    fixed_id: str
    moving_id: str
    labels_id: str | None
    mask_name: str
    outputs: dict[str, str | None]

    @property
    def title(self) -> str:
        """The name of the registration."""
        return NEW_NODES[TRANSFORM][1].format(**self.names)


def read_result(records: Mapping[str, Record]) -> dict[str, Any]:
    """The volumes and (displacement, affine) of a result by role. Raises OSError, ValueError or KeyError."""
    return {
        role: protocol.read_field(record) if role in (TRANSFORM, INVERSE) else protocol.read_volume(record)
        for role, record in records.items()
    }


def place(
    scene: slicer.vtkMRMLScene,
    destination: Destination,
    result: Mapping[str, Any],
    report: Mapping[str, Any],
    chart: slicer.vtkMRMLPlotChartNode | None = None,
) -> dict[str, slicer.vtkMRMLNode]:
    """Put a result, as read_result gives it, into the scene; return its nodes by role.

    Each node keeps the settings and the report, and links to the others, to the images and to the `chart` of the run.
    """
    return _Placement(scene, destination, result, report, chart).nodes


class _Placement:
    """The nodes of one result, which are made one after the other."""

    def __init__(
        self,
        scene: slicer.vtkMRMLScene,
        destination: Destination,
        result: Mapping[str, Any],
        report: Mapping[str, Any],
        chart: slicer.vtkMRMLPlotChartNode | None,
    ) -> None:
        self.scene, self.destination, self.result, self.report = scene, destination, result, report
        self.fixed = scene.GetNodeByID(destination.fixed_id)
        self.nodes: dict[str, slicer.vtkMRMLNode] = {}
        wanted = [role for role in destination.outputs if role in result]
        for role in (TRANSFORM, INVERSE):
            if role in wanted:
                displacement, affine = result[role]
                transforms.displacement_to_node(displacement, affine, self._node(role))
        if WARPED in wanted:
            self._place_warped()
        if WARPED_LABELS in wanted:
            source = scene.GetNodeByID(destination.labels_id)
            labels.labels_to_segmentation(result[WARPED_LABELS], self._node(WARPED_LABELS), self.fixed, source)
        if JACOBIAN in wanted:
            self._place_jacobian()
        if chart is not None:
            self.nodes[CHART] = chart
        self._link()

    def _node(self, role: str, chosen: slicer.vtkMRMLNode | None = None) -> slicer.vtkMRMLNode:
        """The node chosen for `role`, a new one where none is chosen or it has vanished."""
        kind, name = NEW_NODES[role]
        if chosen is None and self.destination.outputs.get(role):
            chosen = self.scene.GetNodeByID(self.destination.outputs[role])
        self.nodes[role] = chosen or nodes.add_node(self.scene, kind, name.format(**self.destination.names))
        return self.nodes[role]

    def _place_warped(self) -> None:
        node = nodes.volume_to_node(self.result[WARPED], self._node(WARPED), self.fixed)
        moving = self.scene.GetNodeByID(self.destination.moving_id)
        if moving is not None and moving.GetDisplayNode() is not None:
            display, like = node.GetDisplayNode(), moving.GetDisplayNode()
            display.AutoWindowLevelOff()
            display.SetWindowLevel(like.GetWindow(), like.GetLevel())
            display.SetAndObserveColorNodeID(like.GetColorNodeID())

    def _place_jacobian(self) -> None:
        """The map, and with it the folded voxels and the table; an old map's own are filled again."""
        jacobian = nodes.volume_to_node(self.result[JACOBIAN], self._node(JACOBIAN), self.fixed)
        folding.color_jacobian(jacobian)
        segmentation = self._node(FOLDING, nodes.linked(jacobian, FOLDING))
        folding.folding_to_segmentation(self.result[FOLDING], segmentation, self.fixed or jacobian)
        table = self._node(TABLE, nodes.linked(jacobian, TABLE))
        in_mask = self.report.get("jacobian_in_mask")
        folding.fill_table(table, self.report["jacobian"], in_mask, self.destination.mask_name)

    def _link(self) -> None:
        links = {role: node.GetID() for role, node in self.nodes.items()}
        links |= {FIXED: self.destination.fixed_id, MOVING: self.destination.moving_id}
        for role, node in self.nodes.items():
            nodes.remember(node, settings=self.report["settings"], report=self.report)
            node.SetAttribute(nodes.ATTRIBUTE_PREFIX + ROLE, role)
            for other, identifier in links.items():
                if other != role and self.scene.GetNodeByID(identifier) is not None:
                    node.SetNodeReferenceID(nodes.ATTRIBUTE_PREFIX + other, identifier)

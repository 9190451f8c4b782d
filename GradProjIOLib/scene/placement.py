"""Put the results of a registration into the scene: which nodes there are, and how they belong together. No Qt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import slicer

from GradProjIOLib.scene import folding, labels, nodes, transforms
from GradProjIOLib.scene.inputs import Inputs, Outputs
from GradProjIOLib.scene.jacobian_colors import color_jacobian
from GradProjIOLib.worker.protocol import BETWEEN, FOLDING, INVERSE, JACOBIAN, TRANSFORM, WARPED, WARPED_LABELS

TABLE, CHART, FIXED, MOVING = "table", "chart", "fixed", "moving"
NEW_NODES = {
    TRANSFORM: ("vtkMRMLGridTransformNode", "Transform {moving} to {fixed}"),
    INVERSE: ("vtkMRMLGridTransformNode", "Inverse transform {moving} to {fixed}"),
    WARPED: ("vtkMRMLScalarVolumeNode", "Registered {moving} to {fixed}"),
    WARPED_LABELS: ("vtkMRMLSegmentationNode", "Registered {labels} to {fixed}"),
    JACOBIAN: ("vtkMRMLScalarVolumeNode", "Jacobian {moving} to {fixed}"),
    FOLDING: ("vtkMRMLSegmentationNode", "Folding {moving} to {fixed}"),
    TABLE: ("vtkMRMLTableNode", "Figures {moving} to {fixed}"),
}


def place(
    scene: slicer.vtkMRMLScene,
    inputs: Inputs,
    outputs: Outputs,
    result: Mapping[str, Any],
    report: Mapping[str, Any],
    chart: slicer.vtkMRMLPlotChartNode | None = None,
) -> dict[str, slicer.vtkMRMLNode]:
    """Put the `outputs` of a result into the scene; return its nodes by role.

    `result` has the volumes, and (displacement, affine, matrix) of the transforms, by role.

    Nodes can have been removed while the worker computed: an output is then made anew, an input not linked to. Each
    node keeps the settings and the report, and links to the others, to the inputs and to the `chart` of the run.
    Where something fails, the scene is as it was before, and the exception goes on.
    """
    fixed = inputs.fixed if inputs.fixed.GetScene() is scene else None
    source = inputs.moving_labels
    names = {"fixed": inputs.fixed.GetName(), "moving": inputs.moving.GetName(), "labels": source and source.GetName()}
    placed: dict[str, slicer.vtkMRMLNode] = {}

    def node_for(role: str, chosen: slicer.vtkMRMLNode | None = None) -> slicer.vtkMRMLNode:
        if chosen is None or chosen.GetScene() is not scene:
            kind, name = NEW_NODES[role]
            chosen = nodes.add_node(scene, kind, name.format(**names))
        placed[role] = chosen
        return chosen

    chosen = [node for node in outputs.values() if node is not None and node.GetScene() is scene]
    belonging = [nodes.linked(node, role) for node in chosen for role in (FOLDING, TABLE)]
    with all_or_nothing(scene, {*chosen, *filter(None, belonging)}):
        for role in outputs:
            if role not in result:
                continue
            node = node_for(role, outputs[role])
            if role in (TRANSFORM, INVERSE):
                displacement, affine, matrix = result[role]
                transforms.deformation_to_node(displacement, affine, matrix, node)
            elif role == WARPED_LABELS:
                labels.labels_to_segmentation(result[role], node, fixed, source)
            else:
                nodes.volume_to_node(result[role], node, fixed)
        if WARPED in placed:
            show_like(inputs.moving, placed[WARPED])
        if JACOBIAN in placed:
            # The folded voxels and the table belong to the map; those of an old map are filled again.
            jacobian = placed[JACOBIAN]
            color_jacobian(jacobian)
            segmentation = node_for(FOLDING, nodes.linked(jacobian, FOLDING))
            folding.folding_to_segmentation(result[FOLDING], segmentation, fixed or jacobian, result.get(BETWEEN))
            mask_name = inputs.fixed_mask.GetName() if inputs.fixed_mask else "mask"
            table = node_for(TABLE, nodes.linked(jacobian, TABLE))
            folding.fill_table(table, report["jacobian"], report.get("jacobian_in_mask"), mask_name)
        if chart is not None:
            placed[CHART] = chart
        _link(placed, inputs, report)
    return placed


@contextmanager
def all_or_nothing(scene: slicer.vtkMRMLScene, filled: Iterable[slicer.vtkMRMLNode]) -> Iterator[None]:
    """If the block fails, remove the nodes that it added and restore the content of `filled`."""
    before = set(nodes.nodes_of_class(scene, "vtkMRMLNode"))
    undo = [_restorer(node) for node in filled]
    try:
        yield
    except BaseException:
        for node in set(nodes.nodes_of_class(scene, "vtkMRMLNode")) - before:
            scene.RemoveNode(node)
        for restore in undo:
            restore()
        raise


def _restorer(node: slicer.vtkMRMLNode) -> Callable[[], None]:
    """A function that gives `node` the content and the place that it has now."""
    parent = node.GetTransformNodeID() if node.IsA("vtkMRMLTransformableNode") else None
    copy, segments = None, []
    if node.IsA("vtkMRMLSegmentationNode"):
        # Its segments stay the objects that they are when it is emptied.
        segmentation = node.GetSegmentation()
        segments = [(segmentation.GetSegment(name), name) for name in segmentation.GetSegmentIDs()]
    else:
        # Tables are filled in place; the others get new voxels, so that to share the old ones is enough.
        copy = type(node)()
        copy.CopyContent(node, node.IsA("vtkMRMLTableNode"))

    def restore() -> None:
        if copy is None:
            node.GetSegmentation().RemoveAllSegments()
            for segment, name in segments:
                node.GetSegmentation().AddSegment(segment, name)
        else:
            node.CopyContent(copy)
        if node.IsA("vtkMRMLTransformableNode"):
            node.SetAndObserveTransformNodeID(parent)

    return restore


def show_like(moving: slicer.vtkMRMLScalarVolumeNode, warped: slicer.vtkMRMLScalarVolumeNode) -> None:
    """Give `warped` the window and the colors of the moving image."""
    like, display = moving.GetDisplayNode(), warped.GetDisplayNode()
    if like is not None:
        display.AutoWindowLevelOff()
        display.SetWindowLevel(like.GetWindow(), like.GetLevel())
        display.SetAndObserveColorNodeID(like.GetColorNodeID())


def _link(placed: Mapping[str, slicer.vtkMRMLNode], inputs: Inputs, report: Mapping[str, Any]) -> None:
    # With the inputs' own names, so that the result can go on with them.
    linked = {**placed, **{role: node for role, node in inputs.nodes.items() if node is not None}}
    for role, node in placed.items():
        nodes.remember(node, settings=report["settings"], report=report)
        node.SetAttribute(nodes.ATTRIBUTE_PREFIX + "role", role)
        for other, target in linked.items():
            if other != role and target.GetScene() is node.GetScene():
                node.SetNodeReferenceID(nodes.ATTRIBUTE_PREFIX + other, target.GetID())
    # Slicer's own names for what a transform carries where; the inverse carries the fixed image.
    for role, (fixed, moving) in {TRANSFORM: (FIXED, MOVING), INVERSE: (MOVING, FIXED)}.items():
        for reference, image in (("Fixed", linked[fixed]), ("Moving", linked[moving])):
            if role in placed and image.GetScene() is placed[role].GetScene():
                placed[role].SetNodeReferenceID(f"spatialRegistration{reference}", image.GetID())

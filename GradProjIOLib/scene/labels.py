"""Label maps and segmentation nodes of a MRML scene as Volumes of whole numbers, and back. No Qt."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import slicer
from vtk.util.numpy_support import numpy_to_vtk

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import whole_numbers_of
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes

Color = tuple[float, float, float]

GOLDEN_RATIO = 0.618034


def labels_from_node(
    node: slicer.vtkMRMLNode | None,
    reference: slicer.vtkMRMLScalarVolumeNode,
    role: str = "labels",
    only: Sequence[str] | None = None,
) -> Volume:
    """A label map, or a segmentation sampled on the lattice of `reference`, as a Volume of whole numbers in the world.

    Segments become 1, 2, … in their order, the later over the earlier; with `only` those of these names. Raises
    InputError where nothing is drawn.
    """
    if node is None:
        raise InputError(f"No {role} are chosen; choose a label map or a segmentation.")
    if node.IsA("vtkMRMLSegmentationNode"):
        labels = _labels_of_segmentation(node, reference, only)
    else:
        labels = whole_numbers_of(nodes.volume_from_node(node, role))
    if not labels.array.any():
        raise InputError(f"{node.GetName()} is empty; draw something in it or choose none as {role}.")
    return labels


def segment_names(node: slicer.vtkMRMLSegmentationNode) -> list[str]:
    """The names of the segments, in their order."""
    segmentation = node.GetSegmentation()
    return [segmentation.GetSegment(identifier).GetName() for identifier in segmentation.GetSegmentIDs()]


def _labels_of_segmentation(
    node: slicer.vtkMRMLSegmentationNode, reference: slicer.vtkMRMLScalarVolumeNode, only: Sequence[str] | None
) -> Volume:
    """`node` on the lattice of `reference`, both in the world."""
    names = zip(node.GetSegmentation().GetSegmentIDs(), segment_names(node), strict=True)
    segments = [identifier for identifier, name in names if only is None or name in only]
    if not segments:
        raise InputError(f"{node.GetName()} has no segments; draw one or choose another node.")
    if not node.CreateBinaryLabelmapRepresentation():
        raise InputError(f"{node.GetName()} cannot be converted to voxels; repair its surfaces.")
    scene = node.GetScene()
    before = set(nodes.nodes_of_class(scene, "vtkMRMLNode"))
    exported = nodes.add_node(scene, "vtkMRMLLabelMapVolumeNode", "exported labels")
    try:
        logic = slicer.vtkSlicerSegmentationsModuleLogic
        if not logic.ExportSegmentsToLabelmapNode(node, segments, exported, reference):
            raise InputError(f"{node.GetName()} could not be sampled on the voxels of {reference.GetName()}.")
        # The exported node lies below the parent of the reference or of the segmentation; both are the world.
        labels = nodes.volume_from_node(exported)
        return Volume(labels.array.copy(), labels.affine, node.GetName())
    finally:
        # The export leaves display nodes and a color table behind.
        for left in set(nodes.nodes_of_class(scene, "vtkMRMLNode")) - before:
            scene.RemoveNode(left)


def labels_to_segmentation(
    labels: Volume,
    node: slicer.vtkMRMLSegmentationNode,
    like: slicer.vtkMRMLVolumeNode | None = None,
    source: slicer.vtkMRMLNode | None = None,
) -> None:
    """Put whole-number `labels` (in the world) into `node`, one segment for each value above 0.

    Names and colors come from `source`, which labels_from_node read. `like` is the fixed image, see nodes.place_like.
    """
    clear_segmentation(node, like)
    for value in np.unique(labels.array[labels.array > 0]).tolist():
        name, color = name_and_color(source, int(value))
        add_segment(node, Volume(labels.array == value, labels.affine, name), color)


def clear_segmentation(node: slicer.vtkMRMLSegmentationNode, like: slicer.vtkMRMLVolumeNode | None) -> None:
    """Remove all segments of `node` and prepare it for segments on the lattice of `like`."""
    node.GetSegmentation().RemoveAllSegments()
    node.SetSourceRepresentationToBinaryLabelmap()
    nodes.place_like(node, like)
    if like is not None:
        node.SetReferenceImageGeometryParameterFromVolumeNode(like)
    node.CreateDefaultDisplayNodes()


def add_segment(node: slicer.vtkMRMLSegmentationNode, mask: Volume, color: Color) -> str:
    """Add the voxels of `mask` (in the world) that are not 0 as a segment named after it; return its ID."""
    voxels = np.ascontiguousarray(mask.array != 0, dtype=np.uint8)
    image = slicer.vtkOrientedImageData()
    image.SetDimensions(*mask.shape[::-1])
    image.GetPointData().SetScalars(numpy_to_vtk(voxels.ravel(), deep=True))
    image.SetGeometryFromImageToWorldMatrix(nodes.local_matrix(node, mask.affine))
    return node.AddSegmentFromBinaryLabelmapRepresentation(image, mask.name, color)


def name_and_color(source: slicer.vtkMRMLNode | None, value: int) -> tuple[str, Color]:
    """Name and color of the label `value` in the node it came from; generic ones where that has none."""
    if source is not None and source.IsA("vtkMRMLSegmentationNode"):
        segment = source.GetSegmentation().GetNthSegment(value - 1)
        return segment.GetName(), segment.GetColor()
    display = source.GetDisplayNode() if source is not None else None
    table = display.GetColorNode() if display is not None else None
    color = [0.0, 0.0, 0.0, 0.0]
    if table is not None and table.GetColor(value, color) and table.GetColorName(value):
        return table.GetColorName(value), (color[0], color[1], color[2])
    # Steps of the golden ratio around the color circle: neighbors differ however many there are.
    return f"Label {value}", colorsys.hsv_to_rgb(value * GOLDEN_RATIO % 1.0, 0.6, 0.9)

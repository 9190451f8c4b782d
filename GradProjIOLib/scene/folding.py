"""Where a deformation folds: the folds as a segmentation, and the figures of the determinant as a table. No Qt.

The Jacobian determinant says by how much a voxel of the fixed image grows on its way to the moving image: 1
keeps its volume, 2 doubles it, 0.5 halves it, and where it is 0 or less the deformation folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import slicer
import vtk

from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.report.colors import FOLD_COLOR
from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.labels import add_segment, clear_segmentation

SEGMENT_NAME = "Folded voxels"
BETWEEN_NAME = "Folded between voxels"
OUTLINE_NAME = "fold outline"
OUTLINE_THICKNESS = 3
TABLE_ROWS = (
    ("Smallest determinant", "min"),
    ("1st percentile", "percentile_1"),
    ("99th percentile", "percentile_99"),
    ("Largest determinant", "max"),
    ("Standard deviation of the logarithm", "std_log"),
    ("Folded voxels", "folded_voxels"),
    ("Folded voxels, %", "folded_percent"),
    ("Folded regions", "folded_regions"),
    ("Non-diffeomorphic volume (NDV), %", "ndv_percent"),
)


def folding_to_segmentation(
    mask: Volume,
    node: slicer.vtkMRMLSegmentationNode,
    like: slicer.vtkMRMLVolumeNode,
    between: Volume | None = None,
) -> None:
    """Put the folded voxels `mask` (in the world) into `node` as one segment, which is empty where there are none.

    What folds `between` the voxels only becomes a second segment, where there is something. They are filled with
    the color of folds and, by a display node of their own, outlined in black.
    """
    clear_segmentation(node, like)
    segments = [add_segment(node, Volume(mask.array, mask.affine, SEGMENT_NAME), FOLD_COLOR)]
    if between is not None and between.array.any():
        segments.append(add_segment(node, Volume(between.array, between.affine, BETWEEN_NAME), FOLD_COLOR))
    if node.GetNumberOfDisplayNodes() < 2:
        second = nodes.add_node(node.GetScene(), "vtkMRMLSegmentationDisplayNode", OUTLINE_NAME)
        node.AddAndObserveDisplayNodeID(second.GetID())
    fill, outline = node.GetNthDisplayNode(0), node.GetNthDisplayNode(1)
    fill.SetVisibility2DOutline(False)
    fill.SetOpacity2DFill(1)
    outline.SetVisibility2DFill(False)
    outline.SetOpacity2DOutline(1)
    outline.SetVisibility3D(False)
    outline.SetSliceIntersectionThickness(OUTLINE_THICKNESS)
    for segment in segments:
        outline.SetSegmentOverrideColor(segment, 0, 0, 0)


def fill_table(
    node: slicer.vtkMRMLTableNode,
    figures: Mapping[str, float],
    masked: Mapping[str, float] | None = None,
    mask_name: str = "mask",
) -> None:
    """Write the figures of the Jacobian (keys as in report.json) into `node`, in the mask beside them."""
    rows = [(label, key) for label, key in TABLE_ROWS if key in figures]
    columns = {"In the fixed image": figures} | ({f"In {mask_name}": masked} if masked else {})
    values = {title: [source.get(key) for _, key in rows] for title, source in columns.items()}
    fill_columns(node, "Jacobian determinant", [label for label, _ in rows], values)


def fill_columns(
    node: slicer.vtkMRMLTableNode, title: str, labels: Sequence[str], columns: Mapping[str, Sequence[float | None]]
) -> None:
    """Write a column of `labels` and columns of numbers by their titles into `node`; None becomes NaN."""
    node.RemoveAllColumns()
    for name, values in {title: labels, **columns}.items():
        column = vtk.vtkStringArray() if name == title else vtk.vtkDoubleArray()
        column.SetName(name)
        for value in values:
            column.InsertNextValue(math.nan if value is None else value)
        node.AddColumn(column)
    node.SetUseColumnTitleAsColumnHeader(True)
    node.SetLocked(True)

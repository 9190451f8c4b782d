"""Where a deformation folds: colors of the Jacobian map, the folds as a segmentation and as a list, the figures.

The Jacobian determinant says by how much a voxel of the fixed image grows on its way to the moving image: 1
keeps its volume, 2 doubles it, 0.5 halves it, and where it is 0 or less the deformation folds. No Qt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene.labels import add_segment, clear_segmentation
from GradProjIOLib.scene.nodes import local_affine, volume_from_node

LARGEST_SHOWN = 4.0
FOLD_COLOR = (0.1, 1.0, 0.1)
# Dark blue, blue, white, orange, brown.
SCALE = ((0.03, 0.11, 0.42), (0.27, 0.56, 0.85), (0.97, 0.97, 0.97), (0.95, 0.62, 0.22), (0.50, 0.16, 0.02))
COLOR_TABLE_NAME = "GradProjIO Jacobian determinant"
SEGMENT_NAME = "Folded voxels"
# Slicer's slice views reduce a volume to this many levels before they look up a color.
LEVELS = 256
TABLE_ROWS = (
    ("Smallest determinant", "min"),
    ("1st percentile", "percentile_1"),
    ("99th percentile", "percentile_99"),
    ("Largest determinant", "max"),
    ("Standard deviation of the logarithm", "std_log"),
    ("Folded voxels", "folded_voxels"),
    ("Folded voxels, %", "folded_percent"),
    ("Non-diffeomorphic volume (NDV), %", "ndv_percent"),
)


@dataclass(frozen=True)
class Fold:
    """A connected group of folded voxels; `position` (RAS mm, world) is where its `determinant` is smallest."""

    position: tuple[float, float, float]
    voxels: int
    determinant: float


def jacobian_window() -> tuple[float, float]:
    """Lower and upper end of the window that puts 0 exactly between the two lowest of Slicer's levels.

    The lowest level then holds the folded voxels and nothing else.
    """
    step = LARGEST_SHOWN / (LEVELS - 2)
    return -step * (1 - 1e-6), LARGEST_SHOWN


def jacobian_colors() -> np.ndarray:
    """RGB [256, 3] for determinants from 0 to LARGEST_SHOWN, diverging from 1 with the logarithm.

    The first is FOLD_COLOR. Halving a volume is as far from white as doubling it is.
    """
    lower, upper = jacobian_window()
    determinant = lower + (np.arange(LEVELS) + 0.5) * (upper - lower) / (LEVELS - 1)
    shade = np.clip(np.log(np.maximum(determinant, 1e-9)) / np.log(LARGEST_SHOWN), -1, 1)
    colors = np.stack(
        [np.interp(shade, np.linspace(-1, 1, len(SCALE)), channel) for channel in zip(*SCALE, strict=True)], axis=1
    )
    colors[0] = FOLD_COLOR
    return colors


def jacobian_color_node(scene: slicer.vtkMRMLScene) -> slicer.vtkMRMLColorTableNode:
    """The scene's color table for Jacobian maps; made where there is none yet."""
    node = scene.GetFirstNode(COLOR_TABLE_NAME, "vtkMRMLColorTableNode")
    if node is not None:
        return node
    node = scene.AddNewNodeByClass("vtkMRMLColorTableNode", COLOR_TABLE_NAME)
    node.SetTypeToUser()
    node.SetNumberOfColors(LEVELS)
    node.GetLookupTable().SetRange(*jacobian_window())
    for index, color in enumerate(jacobian_colors()):
        node.SetColor(index, "folded" if index == 0 else f"level {index}", *color, 1.0)
    return node


def color_jacobian(node: slicer.vtkMRMLScalarVolumeNode) -> None:
    """Show the volume `node` in the colors of jacobian_colors with a legend of numbers."""
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(*jacobian_window())
    display.SetAndObserveColorNodeID(jacobian_color_node(node.GetScene()).GetID())
    display.InterpolateOff()
    logic = slicer.vtkSlicerColorLogic
    legend = logic.GetColorLegendDisplayNode(node) or logic.AddDefaultColorLegendDisplayNode(node)
    if legend is not None:
        legend.SetTitleText("Jacobian\n(green: folded)")
        legend.SetLabelFormat("%.1f")
        legend.SetNumberOfLabels(5)
        legend.SetMaxNumberOfColors(LEVELS)


def folding_to_segmentation(mask: Volume, node: slicer.vtkMRMLSegmentationNode, like: slicer.vtkMRMLVolumeNode) -> None:
    """Put the folded voxels `mask` (in the world) into `node` as one segment, which is empty where there are none."""
    clear_segmentation(node, like)
    add_segment(node, Volume(mask.array, mask.affine, SEGMENT_NAME), FOLD_COLOR)


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


def find_folds(
    jacobian: slicer.vtkMRMLScalarVolumeNode, folding: slicer.vtkMRMLSegmentationNode | None = None
) -> list[Fold]:
    """The folds of a Jacobian map node, the deepest first.

    The folded voxels are those of the segmentation `folding`, or without it those whose determinant is not positive.
    The two differ at the border of the image, where the map takes one-sided differences.
    """
    determinant = volume_from_node(jacobian, "Jacobian map")
    folded = determinant.array <= 0 if folding is None else _segments_on(folding, jacobian)
    if not folded.any():
        return []
    from scipy import ndimage

    # Voxels that touch, also at a corner, belong to one fold.
    regions, count = ndimage.label(folded, structure=np.ones((3, 3, 3)))
    inside = np.flatnonzero(folded)
    depths, numbers = determinant.array.ravel()[inside], regions.ravel()[inside]
    deepest = np.ravel(ndimage.minimum_position(depths, numbers, np.arange(1, count + 1)))
    k, j, i = np.unravel_index(inside[deepest], determinant.shape)
    world = apply_matrix(determinant.affine, np.stack([i, j, k], axis=1))
    folds = [
        Fold(tuple(position), int(voxels), float(depth))
        for position, voxels, depth in zip(world.tolist(), np.bincount(numbers)[1:], depths[deepest], strict=True)
    ]
    return sorted(folds, key=lambda fold: (fold.determinant, -fold.voxels))


def _segments_on(folding: slicer.vtkMRMLSegmentationNode, reference: slicer.vtkMRMLScalarVolumeNode) -> np.ndarray:
    """Which voxels [k, j, i] of `reference` a segment covers. Both nodes lie below the same parent transform."""
    lattice, merged = slicer.vtkOrientedImageData(), slicer.vtkOrientedImageData()
    lattice.SetDimensions(*reference.GetImageData().GetDimensions())
    lattice.SetGeometryFromImageToWorldMatrix(slicer.util.vtkMatrixFromArray(local_affine(reference)))
    folding.GenerateMergedLabelmapForAllSegments(merged, slicer.vtkSegmentation.EXTENT_REFERENCE_GEOMETRY, lattice)
    voxels = vtk_to_numpy(merged.GetPointData().GetScalars())
    return voxels.reshape(lattice.GetDimensions()[::-1]) != 0

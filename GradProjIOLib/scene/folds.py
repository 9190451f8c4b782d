"""The folds of a deformation as a list: where, how large, in which structure. No Qt.

Folds are groups of voxels that touch. Some fold between the voxels only: the determinant, which looks at neighbors
two voxels apart, is positive there, but the volume between next neighbors is not (see Docs/metrics.md on the NDV).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import slicer
from vtk.util.numpy_support import vtk_to_numpy

from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.scene.folding import BETWEEN_NAME
from GradProjIOLib.scene.labels import segment_names
from GradProjIOLib.scene.nodes import local_affine, volume_from_node

# What is darker than this part of the image's usual range is not the body.
DARKEST_BODY = 0.08


@dataclass(frozen=True)
class Fold:
    """A connected group of folded voxels; `position` (RAS mm, world) is where its `determinant` is smallest.

    `inside` says whether that lies in the body, `segment` names the structure there, where one is known, and `between`
    whether it folds between the voxels only.
    """

    position: tuple[float, float, float]
    voxels: int
    volume_mm3: float
    determinant: float
    inside: bool
    segment: str
    between: bool


def find_folds(
    jacobian: slicer.vtkMRMLScalarVolumeNode,
    folding: slicer.vtkMRMLSegmentationNode | None = None,
    body: Callable[[], np.ndarray | None] = lambda: None,
    structures: Labels | None = None,
) -> list[Fold]:
    """The folds of a Jacobian map node: those inside the `body` first, those between voxels last, the largest first.

    The folded voxels are those of the segmentation `folding`, or without it those whose determinant is not positive.
    The two differ at the border of the image, where the map takes one-sided differences, and between voxels. `body` is
    asked for the voxels of the body (bool [k, j, i]) where something folds; without it everything counts as inside. It
    and `structures` are on the lattice of the map.
    """
    determinant = volume_from_node(jacobian, "Jacobian map")
    folded = determinant.array <= 0
    between = np.zeros(folded.shape, bool)
    if folding is not None:
        folded, between = _segments_on(folding, jacobian)
    if not folded.any():
        return []
    import SimpleITK as sitk

    regions = sitk.ConnectedComponent(sitk.GetImageFromArray(folded.astype(np.uint8)), True)
    measured = sitk.LabelIntensityStatisticsImageFilter()
    measured.ComputePerimeterOff()
    measured.Execute(regions, sitk.GetImageFromArray(determinant.array))
    mask, voxel = body(), float(np.prod(determinant.spacing))
    folds = []
    for region in measured.GetLabels():
        i, j, k = measured.GetMinimumIndex(region)
        voxels = measured.GetNumberOfPixels(region)
        structure = 0 if structures is None else int(structures.volume.array[k, j, i])
        folds.append(
            Fold(
                tuple(apply_matrix(determinant.affine, np.array([i, j, k])).tolist()),
                voxels,
                voxels * voxel,
                float(determinant.array[k, j, i]),
                mask is None or bool(mask[k, j, i]),
                structures.names.get(structure, str(structure)) if structure else "",
                bool(between[k, j, i]),
            )
        )
    return sorted(folds, key=lambda fold: (not fold.inside, fold.between, -fold.voxels, fold.determinant))


def body_of(image: np.ndarray) -> np.ndarray:
    """Which voxels of an image [k, j, i] belong to the body: what is not dark, and what that encloses."""
    import SimpleITK as sitk

    sample = image[::2, ::2, ::2]
    low = float(sample.min())
    threshold = low + DARKEST_BODY * (float(np.percentile(sample, 99.5)) - low)
    # One dark layer around the image joins what is outside. BinaryFillhole takes long where there are many holes.
    dark = np.pad(~(image > threshold), 1, constant_values=True)
    regions = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(dark.astype(np.uint8))))
    return (regions != regions[0, 0, 0])[1:-1, 1:-1, 1:-1]


def _segments_on(
    folding: slicer.vtkMRMLSegmentationNode, reference: slicer.vtkMRMLScalarVolumeNode
) -> tuple[np.ndarray, np.ndarray]:
    """Which voxels [k, j, i] of `reference` a segment covers, and which the one of folds between voxels.

    Both nodes lie below the same parent transform.
    """
    lattice, merged = slicer.vtkOrientedImageData(), slicer.vtkOrientedImageData()
    lattice.SetDimensions(*reference.GetImageData().GetDimensions())
    lattice.SetGeometryFromImageToWorldMatrix(slicer.util.vtkMatrixFromArray(local_affine(reference)))
    folding.GenerateMergedLabelmapForAllSegments(merged, slicer.vtkSegmentation.EXTENT_REFERENCE_GEOMETRY, lattice)
    scalars = merged.GetPointData().GetScalars()
    shape = lattice.GetDimensions()[::-1]
    # Without scalars no segment is left.
    values = np.zeros(shape, np.uint8) if scalars is None else vtk_to_numpy(scalars).reshape(shape)
    names = segment_names(folding)
    between = names.index(BETWEEN_NAME) + 1 if BETWEEN_NAME in names else -1
    return values != 0, values == between

"""Structures of the fixed image on the lattice of a Jacobian map: which lies where, and how each changes. No Qt."""

from __future__ import annotations

import math

import numpy as np
import slicer

from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.volume import Volume, to_sitk
from GradProjIOLib.scene.folding import fill_columns
from GradProjIOLib.scene.labels import labels_from_node, name_and_color
from GradProjIOLib.scene.nodes import volume_from_node

COLUMNS = (
    "Voxels",
    "Mean determinant",
    "Smallest determinant",
    "1st percentile",
    "Median",
    "99th percentile",
    "Largest determinant",
    "Folded voxels",
)


def structures_on(node: slicer.vtkMRMLNode, jacobian: slicer.vtkMRMLScalarVolumeNode) -> Labels:
    """The segments or labels of `node`, with their names, at the voxels of a map. Raises InputError for none."""
    labels, target = labels_from_node(node, jacobian, "segmentation"), volume_from_node(jacobian, "Jacobian map")
    array = labels.array
    if array.shape != target.shape or not np.allclose(labels.affine, target.affine, atol=1e-4):
        import SimpleITK as sitk

        found = sitk.Resample(to_sitk(labels), to_sitk(target), sitk.Transform(), sitk.sitkNearestNeighbor)
        array = sitk.GetArrayFromImage(found)
    values = np.unique(array[array > 0]).tolist()
    return Labels(Volume(array, target.affine), {value: name_and_color(node, value)[0] for value in values})


def fill_statistics(
    node: slicer.vtkMRMLTableNode, structures: Labels, jacobian: slicer.vtkMRMLScalarVolumeNode
) -> None:
    """Write the distribution of the determinant in each structure into the table `node`."""
    determinant = volume_from_node(jacobian, "Jacobian map").array
    rows = []
    for value in structures.names:
        inside = determinant[(structures.volume.array == value) & np.isfinite(determinant)]
        if not inside.size:
            rows.append((0, *[math.nan] * (len(COLUMNS) - 2), 0))
            continue
        percentiles = np.percentile(inside, [0, 1, 50, 99, 100])
        rows.append((inside.size, inside.mean(dtype=float), *percentiles, (inside <= 0).sum()))
    columns = {title: [float(row[number]) for row in rows] for number, title in enumerate(COLUMNS)}
    fill_columns(node, "Segment", list(structures.names.values()), columns)

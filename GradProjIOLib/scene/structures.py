"""Structures of the fixed image on the lattice of a Jacobian map: which lies where, and how each changes. No Qt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import slicer

from GradProjIOLib.geometry.volume import to_sitk
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


@dataclass(frozen=True)
class Structures:
    """Labels [k, j, i] on the lattice of a Jacobian map, and the names of their values."""

    labels: np.ndarray
    names: Mapping[int, str]

    def name(self, value: int) -> str:
        """The structure with this value; empty for none."""
        return self.names.get(value, str(value)) if value else ""


def structures_on(node: slicer.vtkMRMLNode, jacobian: slicer.vtkMRMLScalarVolumeNode) -> Structures:
    """The segments or labels of `node` at the voxels of the map `jacobian`. Raises InputError where there are none."""
    labels, target = labels_from_node(node, jacobian, "segmentation"), volume_from_node(jacobian, "Jacobian map")
    array = labels.array
    if array.shape != target.shape or not np.allclose(labels.affine, target.affine, atol=1e-4):
        import SimpleITK as sitk

        found = sitk.Resample(to_sitk(labels), to_sitk(target), sitk.Transform(), sitk.sitkNearestNeighbor)
        array = sitk.GetArrayFromImage(found)
    values = np.unique(array[array > 0]).tolist()
    return Structures(array, {value: name_and_color(node, value)[0] for value in values})


def fill_statistics(
    node: slicer.vtkMRMLTableNode, structures: Structures, jacobian: slicer.vtkMRMLScalarVolumeNode
) -> None:
    """Write the distribution of the determinant in each structure into the table `node`."""
    determinant = volume_from_node(jacobian, "Jacobian map").array
    rows = []
    for value in structures.names:
        inside = determinant[(structures.labels == value) & np.isfinite(determinant)]
        if not inside.size:
            rows.append((0, *[math.nan] * (len(COLUMNS) - 2), 0))
            continue
        percentiles = np.percentile(inside, [0, 1, 50, 99, 100])
        rows.append((inside.size, inside.mean(dtype=float), *percentiles, (inside <= 0).sum()))
    columns = {title: [float(row[number]) for row in rows] for number, title in enumerate(COLUMNS)}
    fill_columns(node, "Segment", list(structures.names.values()), columns)

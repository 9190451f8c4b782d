"""Volume nodes of a MRML scene as the package's Volumes, and back. No Qt.

Everything that leaves a node is in the world (RAS mm), so parent transforms are respected: a linear parent
that keeps right angles only changes the affine, any other parent (a grid, a B-spline, a shear) resamples the
voxels onto a lattice with right angles in the world, linearly for images and to the nearest voxel for labels.
What comes back is placed so that it lies where it was computed, whatever node it is put under.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import json_text
from GradProjIOLib.geometry.lattice import apply_matrix, check_affine, is_rectangular
from GradProjIOLib.geometry.volume import Volume

ATTRIBUTE_PREFIX = "GradProjIO."
# What lies no farther from its place than this has not been moved.
MOVED_MM = 1e-3
# vtkImageData in Slicer has no 64-bit integers or booleans that every module can read.
STORED_TYPES = {"bool": np.uint8, "int64": np.int32, "uint64": np.uint32, "float16": np.float32}


def add_node(scene: slicer.vtkMRMLScene, kind: str, name: str) -> slicer.vtkMRMLNode:
    """A new node of the class `kind` with a name that is not taken yet."""
    return scene.AddNewNodeByClass(kind, scene.GenerateUniqueName(name))


def nodes_of_class(scene: slicer.vtkMRMLScene, kind: str) -> list[slicer.vtkMRMLNode]:
    """The nodes of `scene` of the class `kind`. slicer.util.getNodesByClass looks only at the application's scene."""
    return [scene.GetNthNodeByClass(index, kind) for index in range(scene.GetNumberOfNodesByClass(kind))]


def volume_from_node(node: slicer.vtkMRMLScalarVolumeNode | None, role: str = "volume") -> Volume:
    """The scalar volume node `node` as a Volume in the world; `role` names it in messages ("fixed image").

    The array is a view of the node's memory unless a parent transform forces resampling. Raises InputError as
    check_volume_node does.
    """
    check_volume_node(node, role)
    check_affine(local_affine(node), node.GetName())
    affine = world_affine(node)
    if affine is None:
        return _resampled_in_world(node)
    return Volume(slicer.util.arrayFromVolume(node), affine, node.GetName())


def check_volume_node(node: slicer.vtkMRMLScalarVolumeNode | None, role: str) -> None:
    """Raise InputError, naming the node and what to do, unless `node` holds one value for voxels in 3-D."""
    if node is None:
        raise InputError(f"No {role} is chosen; choose one.")
    name, image = node.GetName(), node.GetImageData()
    if image is None or image.GetNumberOfPoints() == 0 or image.GetPointData().GetScalars() is None:
        raise InputError(f"{name} holds no voxels; load the volume again or choose another {role}.")
    if image.GetNumberOfScalarComponents() != 1:
        raise InputError(
            f"{name} has {image.GetNumberOfScalarComponents()} components per voxel; choose a volume with "
            f"one gray value per voxel as {role} (the module Vector to Scalar Volume makes one)."
        )
    if min(image.GetDimensions()) < 2:
        raise InputError(f"{name} is flat (2-D); choose a 3-D volume as {role}.")


def check_image_node(node: slicer.vtkMRMLScalarVolumeNode | None, role: str) -> None:
    """As check_volume_node; a label map is refused as well."""
    check_volume_node(node, role)
    if node.IsA("vtkMRMLLabelMapVolumeNode"):
        raise InputError(f"{node.GetName()} is a label map; choose the image it was drawn on as {role}.")


def image_nodes(scene: slicer.vtkMRMLScene) -> list[slicer.vtkMRMLScalarVolumeNode]:
    """The volumes of the scene that are images, in contrast to label maps."""
    nodes = nodes_of_class(scene, "vtkMRMLScalarVolumeNode")
    return [node for node in nodes if not node.IsA("vtkMRMLLabelMapVolumeNode")]


def local_affine(node: slicer.vtkMRMLVolumeNode) -> np.ndarray:
    """The 4x4 matrix from the voxel index (i, j, k, 1) to RAS mm below the node's parent transform."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def parent_matrix(node: slicer.vtkMRMLTransformableNode) -> np.ndarray | None:
    """The 4x4 matrix from below the node's parent transforms to the world; None where they are not linear."""
    parent = node.GetParentTransformNode()
    if parent is None:
        return np.eye(4)
    return slicer.util.arrayFromTransformMatrix(parent, toWorld=True) if parent.IsTransformToWorldLinear() else None


def world_affine(node: slicer.vtkMRMLVolumeNode) -> np.ndarray | None:
    """The 4x4 matrix from the voxel index to the world; None where the lattice there is bent or sheared."""
    parent = parent_matrix(node)
    affine = None if parent is None else parent @ local_affine(node)
    return affine if affine is not None and is_rectangular(affine) else None


def place_like(node: slicer.vtkMRMLTransformableNode, like: slicer.vtkMRMLVolumeNode | None) -> None:
    """Give `node` the parent transform of `like`, so that they move together; no parent where it is not linear."""
    linear = like is not None and parent_matrix(like) is not None
    node.SetAndObserveTransformNodeID(like.GetTransformNodeID() if linear else None)


def local_matrix(node: slicer.vtkMRMLTransformableNode, affine: np.ndarray) -> vtk.vtkMatrix4x4:
    """The IJK-to-RAS matrix of `node` below its linear parent that gives it `affine` in the world."""
    parent = parent_matrix(node)
    assert parent is not None
    return slicer.util.vtkMatrixFromArray(np.linalg.inv(parent) @ affine)


def volume_to_node(
    volume: Volume, node: slicer.vtkMRMLScalarVolumeNode, like: slicer.vtkMRMLVolumeNode | None = None
) -> slicer.vtkMRMLScalarVolumeNode:
    """Put a copy of `volume` (in the world) into `node`, below the parent transform of `like` as place_like says."""
    stored = STORED_TYPES.get(volume.array.dtype.name, volume.array.dtype)
    place_like(node, like)
    node.SetIJKToRASMatrix(local_matrix(node, volume.affine))
    node.SetAndObserveImageData(vtk.vtkImageData())
    slicer.util.updateVolumeFromArray(node, volume.array.astype(stored, copy=False))
    node.CreateDefaultDisplayNodes()
    return node


def mapped(transform: vtk.vtkAbstractTransform, points: np.ndarray) -> np.ndarray:
    """`points` [n, 3] mapped by a VTK transform."""
    before, after = vtk.vtkPoints(), vtk.vtkPoints()
    after.SetDataTypeToDouble()
    before.SetData(numpy_to_vtk(np.ascontiguousarray(points, dtype=np.float64), deep=True))
    transform.TransformPoints(before, after)
    return vtk_to_numpy(after.GetData()).copy()


def _resampled_in_world(node: slicer.vtkMRMLVolumeNode) -> Volume:
    """The volume under parents that bend or shear it, resampled where the world shows it.

    The new lattice has the node's spacing and the nearest right-angled directions, and covers the whole
    transformed volume; outside of that lies the lowest value (0 for labels).
    """
    to_world = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(node.GetParentTransformNode(), None, to_world)
    affine, shape = _covering_lattice(node, to_world)
    pull = vtk.vtkGeneralTransform()
    pull.PostMultiply()
    pull.Concatenate(slicer.util.vtkMatrixFromArray(affine))
    pull.Concatenate(to_world.GetInverse())
    pull.Concatenate(slicer.util.vtkMatrixFromArray(np.linalg.inv(local_affine(node))))

    labels = node.IsA("vtkMRMLLabelMapVolumeNode")
    reslice = vtk.vtkImageReslice()
    reslice.SetInputData(node.GetImageData())
    reslice.SetResliceTransform(pull)
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputSpacing(1, 1, 1)
    reslice.SetOutputExtent(0, shape[2] - 1, 0, shape[1] - 1, 0, shape[0] - 1)
    reslice.SetInterpolationModeToNearestNeighbor() if labels else reslice.SetInterpolationModeToLinear()
    reslice.SetBackgroundLevel(0 if labels else node.GetImageData().GetScalarRange()[0])
    reslice.Update()
    array = vtk_to_numpy(reslice.GetOutput().GetPointData().GetScalars()).reshape(shape).copy()
    return Volume(array, affine, node.GetName())


def _covering_lattice(
    node: slicer.vtkMRMLVolumeNode, to_world: vtk.vtkAbstractTransform
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Right-angled affine and shape (K, J, I) that cover the transformed volume with its own spacing."""
    size = np.array(node.GetImageData().GetDimensions())
    steps = [np.linspace(-0.5, n - 0.5, 9) for n in size]
    index = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
    corners = mapped(to_world, apply_matrix(local_affine(node), index))
    # Least squares: the affine map that comes closest to the bent lattice, then its nearest rotation.
    fitted = np.linalg.lstsq(np.c_[index, np.ones(len(index))], corners, rcond=None)[0][:3].T
    spacing = np.linalg.norm(fitted, axis=0)
    left, _, right = np.linalg.svd(fitted / spacing)
    directions = left @ right
    along = corners @ directions
    shape = np.ceil((along.max(axis=0) - along.min(axis=0)) / spacing).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = directions @ (along.min(axis=0) + 0.5 * spacing)
    return affine, (int(shape[2]), int(shape[1]), int(shape[0]))


def remember(node: slicer.vtkMRMLNode, **records: Any) -> None:
    """Keep JSON records (settings, report) as attributes of `node`, so that they are saved with the scene."""
    for key, record in records.items():
        node.SetAttribute(ATTRIBUTE_PREFIX + key, json_text(record, sort_keys=True))


def recall(node: slicer.vtkMRMLNode | None, key: str) -> Any:
    """The record `key` that `remember` kept at `node`; None where there is none, or no `node`."""
    text = node.GetAttribute(ATTRIBUTE_PREFIX + key) if node is not None else None
    return None if text is None else json.loads(text)


def linked(node: slicer.vtkMRMLNode | None, role: str) -> slicer.vtkMRMLNode | None:
    """The node of the same result as `node` that has `role`; None where it is gone, or there is no `node`."""
    return node.GetNodeReference(ATTRIBUTE_PREFIX + role) if node is not None else None


def member(node: slicer.vtkMRMLNode | None, role: str) -> slicer.vtkMRMLNode | None:
    """As `linked`; `node` itself where it has that role."""
    if node is not None and node.GetAttribute(ATTRIBUTE_PREFIX + "role") == role:
        return node
    return linked(node, role)

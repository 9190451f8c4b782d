"""Between MRML nodes and the package's own objects. Needs slicer and vtk, no Qt; runs on slicer-core, too.

Everything that leaves a node is in the world (RAS mm), so parent transforms are respected: a linear parent
that keeps right angles only changes the affine, any other parent (a grid, a B-spline, a shear) resamples the
voxels onto a lattice with right angles in the world, linearly for images and to the nearest voxel for labels.
What comes back is placed so that it lies where it was computed, whatever node it is put under.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import get_vtk_array_type, numpy_to_vtk, vtk_to_numpy

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import check_affine
from GradProjIOLib.geometry.volume import Volume

if TYPE_CHECKING:
    from GradProjIOLib.spatial.deformation import Deformation

ATTRIBUTE_PREFIX = "GradProjIO."
RIGHT_ANGLE_TOLERANCE = 1e-4
# vtkImageData in Slicer has no 64-bit integers or booleans that every module can read.
STORED_TYPES = {"bool": np.uint8, "int64": np.int32, "uint64": np.uint32, "float16": np.float32}


def volume_from_node(node: slicer.vtkMRMLScalarVolumeNode | None, role: str = "volume") -> Volume:
    """The scalar volume node `node` as a Volume in the world, with the node's name.

    `role` stands for a missing node in messages ("fixed image"). The array is a view of the node's memory
    unless a parent transform forces resampling. Raises InputError for a missing node, one without voxels, one
    with several components per voxel, and a flat one.
    """
    check_volume_node(node, role)
    check_affine(local_affine(node), node.GetName())
    placed = world_affine(node)
    if placed is None:
        return _resampled_in_world(node)
    return Volume(slicer.util.arrayFromVolume(node), placed, node.GetName())


def check_volume_node(node: slicer.vtkMRMLScalarVolumeNode | None, role: str = "volume") -> None:
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
    if not parent.IsTransformToWorldLinear():
        return None
    matrix = vtk.vtkMatrix4x4()
    parent.GetMatrixTransformToWorld(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def world_affine(node: slicer.vtkMRMLVolumeNode) -> np.ndarray | None:
    """The 4x4 matrix from the voxel index to the world; None where the lattice there is bent or sheared."""
    parent = parent_matrix(node)
    if parent is None:
        return None
    affine = parent @ local_affine(node)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return affine if np.abs(axes.T @ axes - np.eye(3)).max() < RIGHT_ANGLE_TOLERANCE else None


def labels_from_node(
    node: slicer.vtkMRMLNode | None, reference: slicer.vtkMRMLScalarVolumeNode, role: str = "labels"
) -> Volume:
    """A label map or segmentation node as a Volume of whole numbers in the world.

    A label map keeps its own lattice. A segmentation is sampled on the lattice of the volume node
    `reference`; its segments become 1, 2, … in their order, the later over the earlier. Raises InputError for
    other nodes and where nothing is drawn.
    """
    if node is None:
        raise InputError(f"No {role} are chosen; choose a label map or a segmentation.")
    if node.IsA("vtkMRMLSegmentationNode"):
        labels = _labels_of_segmentation(node, reference)
    else:
        check_volume_node(node, role)
        labels = volume_from_node(node, role)
        if labels.array.dtype.kind == "f" and not np.array_equal(labels.array, np.rint(labels.array)):
            raise InputError(f"{node.GetName()} is no label map: its values are not all whole numbers.")
        if labels.array.dtype.kind == "f":
            labels = Volume(labels.array.astype(np.int32), labels.affine, labels.name)
    if not labels.array.any():
        raise InputError(f"{node.GetName()} is empty; draw something in it or choose none as {role}.")
    return labels


def _labels_of_segmentation(node: slicer.vtkMRMLSegmentationNode, reference: slicer.vtkMRMLScalarVolumeNode) -> Volume:
    """`node` on the lattice of `reference`, both in the world."""
    identifiers = list(node.GetSegmentation().GetSegmentIDs())
    if not identifiers:
        raise InputError(f"{node.GetName()} has no segments; draw one or choose another node.")
    if not node.CreateBinaryLabelmapRepresentation():
        raise InputError(f"{node.GetName()} cannot be converted to voxels; repair its surfaces.")
    scene = node.GetScene()
    before = _node_ids(scene)
    exported = add_node(scene, "vtkMRMLLabelMapVolumeNode", "exported labels")
    try:
        chosen = vtk.vtkStringArray()
        for identifier in identifiers:
            chosen.InsertNextValue(identifier)
        logic = slicer.vtkSlicerSegmentationsModuleLogic
        if not logic.ExportSegmentsToLabelmapNode(node, chosen, exported, reference):
            raise InputError(f"{node.GetName()} could not be sampled on the voxels of {reference.GetName()}.")
        # The exported node lies below the parent of the reference or of the segmentation; both are the world.
        labels = volume_from_node(exported)
        return Volume(labels.array.copy(), labels.affine, node.GetName())
    finally:
        # The export leaves display nodes and a color table behind.
        for identifier in _node_ids(scene) - before:
            scene.RemoveNode(scene.GetNodeByID(identifier))


def _node_ids(scene: slicer.vtkMRMLScene) -> set[str]:
    return {scene.GetNthNode(index).GetID() for index in range(scene.GetNumberOfNodes())}


def matrix_from_node(node: slicer.vtkMRMLTransformNode) -> np.ndarray | None:
    """A transform node that moves things onto the fixed image, as 4x4 point map fixed → moving in the world.

    None where it is not linear; see displacement_from_node then.
    """
    if not node.IsTransformToWorldLinear():
        return None
    matrix = vtk.vtkMatrix4x4()
    node.GetMatrixTransformFromWorld(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def displacement_from_node(
    node: slicer.vtkMRMLTransformNode, shape: tuple[int, int, int], affine: np.ndarray
) -> np.ndarray:
    """Displacement fixed → moving [k, j, i, 3] in RAS mm of any transform node, on a lattice in the world.

    The inverse of a transform that is given in the other direction is computed by VTK.
    """
    transform = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(transform)
    points = lattice_points(shape, affine)
    return (_transformed(transform, points) - points).astype(np.float32).reshape(*shape, 3)


def lattice_points(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """World positions [n, 3] of the voxels of a lattice (K, J, I), i fastest."""
    k, j, i = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij")
    index = np.stack([i.ravel(), j.ravel(), k.ravel()], axis=1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def _transformed(transform: vtk.vtkAbstractTransform, points: np.ndarray) -> np.ndarray:
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
    if node.GetParentTransformNode() is not None:
        node.GetParentTransformNode().GetTransformToWorld(to_world)
    affine, shape = _covering_lattice(node, to_world)
    scale_to_index = np.linalg.inv(local_affine(node))
    pull = vtk.vtkGeneralTransform()
    pull.PostMultiply()
    pull.Concatenate(slicer.util.vtkMatrixFromArray(affine))
    pull.Concatenate(to_world.GetInverse())
    pull.Concatenate(slicer.util.vtkMatrixFromArray(scale_to_index))

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
    affine = local_affine(node)
    steps = [np.linspace(-0.5, n - 0.5, 9) for n in size]
    index = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
    corners = _transformed(to_world, index @ affine[:3, :3].T + affine[:3, 3])
    # Least squares: the affine map that comes closest to the bent lattice, then its nearest rotation.
    fitted = np.linalg.lstsq(np.c_[index, np.ones(len(index))], corners, rcond=None)[0][:3].T
    spacing = np.linalg.norm(fitted, axis=0)
    left, _, right = np.linalg.svd(fitted / spacing)
    directions = left @ right
    along = corners @ directions
    shape = np.ceil((along.max(axis=0) - along.min(axis=0)) / spacing).astype(int)
    placed = np.eye(4)
    placed[:3, :3] = directions * spacing
    placed[:3, 3] = directions @ (along.min(axis=0) + 0.5 * spacing)
    return placed, (int(shape[2]), int(shape[1]), int(shape[0]))


def add_node(scene: slicer.vtkMRMLScene, kind: str, name: str) -> slicer.vtkMRMLNode:
    """A new node of the class `kind` with a name that is not taken yet."""
    return scene.AddNewNodeByClass(kind, scene.GenerateUniqueName(name))


def volume_to_node(
    volume: Volume,
    node: slicer.vtkMRMLScalarVolumeNode,
    like: slicer.vtkMRMLVolumeNode | None = None,
) -> slicer.vtkMRMLScalarVolumeNode:
    """Put `volume` (in the world) into the volume node `node`, copying the voxels.

    `like` is the node whose frame the result lives in, usually the fixed image: `node` then goes below the
    same parent where that is linear, so both keep moving together; else it goes below none. In both cases it
    lies where `volume` says.
    """
    stored = STORED_TYPES.get(volume.array.dtype.name, volume.array.dtype)
    array = np.ascontiguousarray(volume.array, dtype=stored)
    image = vtk.vtkImageData()
    image.SetDimensions(*volume.shape[::-1])
    scalars = numpy_to_vtk(array.ravel(), deep=True, array_type=get_vtk_array_type(array.dtype))
    scalars.SetName("ImageScalars")
    image.GetPointData().SetScalars(scalars)
    was_modifying = node.StartModify()
    parent = parent_matrix(like) if like is not None else None
    node.SetAndObserveTransformNodeID(like.GetTransformNodeID() if parent is not None else None)
    below = np.linalg.inv(parent) @ volume.affine if parent is not None else volume.affine
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(below))
    node.SetAndObserveImageData(image)
    node.EndModify(was_modifying)
    if node.GetDisplayNode() is None and node.GetScene() is not None:
        node.CreateDefaultDisplayNodes()
    return node


def deformation_to_node(deformation: Deformation, node: slicer.vtkMRMLTransformNode) -> slicer.vtkMRMLTransformNode:
    """Put `deformation` (fixed → moving, RAS mm, in the world) into the transform node `node`.

    MRML wants the displacement as the transform *from* parent: a volume put below the node then lands on the
    fixed image, and Slicer writes the node as ITK's fixed → moving file. The node lies below no transform.
    """
    node.SetAndObserveTransformNodeID(None)
    node.SetAndObserveTransformFromParent(grid_transform(deformation.displacement, deformation.affine))
    return node


def grid_transform(displacement: np.ndarray, affine: np.ndarray) -> slicer.vtkOrientedGridTransform:
    """x → x + u(x) with u [k, j, i, 3] in RAS mm on the lattice `affine` (4x4, right-angled)."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = np.eye(4)
    directions[:3, :3] = affine[:3, :3] / spacing
    grid = vtk.vtkImageData()
    grid.SetDimensions(*displacement.shape[2::-1])
    grid.SetSpacing(*spacing)
    grid.SetOrigin(*affine[:3, 3])
    vectors = np.ascontiguousarray(displacement, dtype=np.float32).reshape(-1, 3)
    grid.GetPointData().SetScalars(numpy_to_vtk(vectors, deep=True, array_type=vtk.VTK_FLOAT))
    transform = slicer.vtkOrientedGridTransform()
    transform.SetDisplacementGridData(grid)
    transform.SetGridDirectionMatrix(slicer.util.vtkMatrixFromArray(directions))
    transform.SetInterpolationModeToLinear()
    return transform


def grid_from_node(node: slicer.vtkMRMLTransformNode) -> tuple[np.ndarray, np.ndarray]:
    """Displacement [k, j, i, 3] in RAS mm and affine of a node that `deformation_to_node` filled.

    Raises InputError where it has become something else since, or lies below another transform.
    """
    transform = node.GetTransformFromParent()
    is_grid = isinstance(transform, slicer.vtkOrientedGridTransform) and transform.GetDisplacementGrid() is not None
    if node.GetParentTransformNode() is not None or not is_grid or transform.GetGridDirectionMatrix() is None:
        raise InputError(
            f"{node.GetName()} is not as the registration left it; take it out of its parent transform, "
            "or register again."
        )
    grid = transform.GetDisplacementGrid()
    affine = np.eye(4)
    directions = slicer.util.arrayFromVTKMatrix(transform.GetGridDirectionMatrix())
    affine[:3, :3] = directions[:3, :3] * np.array(grid.GetSpacing())
    affine[:3, 3] = grid.GetOrigin()
    values = vtk_to_numpy(grid.GetPointData().GetScalars())
    displacement = values * transform.GetDisplacementScale() + transform.GetDisplacementShift()
    return displacement.astype(np.float32).reshape(*grid.GetDimensions()[::-1], 3), affine


def put_under(node: slicer.vtkMRMLTransformableNode, transform: slicer.vtkMRMLTransformNode) -> None:
    """Apply `transform` in the world to `node`: its outermost parent, if it has one, goes below `transform`.

    So the parents a moving image already had stay in force. Where other nodes, perhaps the fixed image, lie
    below the same parents, those stay where they are and `node` gets a copy of its parents. Does nothing
    where `node` lies below `transform` already.
    """
    if is_under(node, transform):
        return
    chain = [node]
    while (parent := chain[-1].GetParentTransformNode()) is not None:
        chain.append(parent)
    if _has_other_children(chain):
        copy = add_node(node.GetScene(), "vtkMRMLTransformNode", f"{chain[1].GetName()} of {node.GetName()}")
        to_world = vtk.vtkGeneralTransform()
        chain[1].GetTransformToWorld(to_world)
        slicer.vtkMRMLTransformNode.DeepCopyTransform(copied := vtk.vtkGeneralTransform(), to_world)
        copy.SetAndObserveTransformToParent(copied)
        node.SetAndObserveTransformNodeID(copy.GetID())
        chain = [node, copy]
    chain[-1].SetAndObserveTransformNodeID(transform.GetID())


def _has_other_children(chain: list[slicer.vtkMRMLTransformableNode]) -> bool:
    """Whether a node outside of `chain` (a node and its parents) lies below one of those parents."""
    scene = chain[0].GetScene()
    parents = {parent.GetID() for parent in chain[1:]}
    nodes = (scene.GetNthNode(index) for index in range(scene.GetNumberOfNodes()))
    return any(
        other.IsA("vtkMRMLTransformableNode") and other.GetTransformNodeID() in parents and other not in chain
        for other in nodes
    )


def is_under(node: slicer.vtkMRMLTransformableNode, transform: slicer.vtkMRMLTransformNode) -> bool:
    """Whether `transform` is among the parents of `node`."""
    parent = node.GetParentTransformNode()
    while parent is not None and parent is not transform:
        parent = parent.GetParentTransformNode()
    return parent is not None


def labels_to_segmentation(
    labels: Volume,
    node: slicer.vtkMRMLSegmentationNode,
    like: slicer.vtkMRMLVolumeNode | None = None,
    source: slicer.vtkMRMLNode | None = None,
) -> slicer.vtkMRMLSegmentationNode:
    """Put whole-number `labels` (in the world) into a segmentation node, one segment for each value above 0.

    Names and colors come from `source`, the segmentation or label map the labels were read from by
    labels_from_node. `like` is the fixed image's node, see volume_to_node.
    """
    node.GetSegmentation().RemoveAllSegments()
    node.SetSourceRepresentationToBinaryLabelmap()
    _lay_like(node, like)
    if like is not None:
        node.SetReferenceImageGeometryParameterFromVolumeNode(like)
    for value in np.unique(labels.array[labels.array > 0]).tolist():
        name, color = _segment_look(source, int(value))
        add_segment(node, Volume(labels.array == value, labels.affine, name), color, like)
    if node.GetDisplayNode() is None and node.GetScene() is not None:
        node.CreateDefaultDisplayNodes()
    return node


def add_segment(
    node: slicer.vtkMRMLSegmentationNode,
    mask: Volume,
    color: tuple[float, float, float],
    like: slicer.vtkMRMLVolumeNode | None = None,
) -> str:
    """Add the voxels of `mask` (in the world) that are not 0 as a segment named after it; return its ID."""
    parent = parent_matrix(like) if like is not None else None
    affine = np.linalg.inv(parent) @ mask.affine if parent is not None else mask.affine
    voxels = np.ascontiguousarray(mask.array != 0, dtype=np.uint8)
    image = slicer.vtkOrientedImageData()
    image.SetDimensions(*mask.shape[::-1])
    image.GetPointData().SetScalars(numpy_to_vtk(voxels.ravel(), deep=True))
    image.SetGeometryFromImageToWorldMatrix(slicer.util.vtkMatrixFromArray(affine))
    return node.AddSegmentFromBinaryLabelmapRepresentation(image, mask.name, color)


def _lay_like(node: slicer.vtkMRMLTransformableNode, like: slicer.vtkMRMLVolumeNode | None) -> None:
    linear = like is not None and parent_matrix(like) is not None
    node.SetAndObserveTransformNodeID(like.GetTransformNodeID() if linear else None)


def _segment_look(source: slicer.vtkMRMLNode | None, value: int) -> tuple[str, tuple[float, float, float]]:
    """Name and color of the label `value` in the node it came from; Slicer's generic colors without one."""
    if source is not None and source.IsA("vtkMRMLSegmentationNode"):
        segment = source.GetSegmentation().GetNthSegment(value - 1)
        return segment.GetName(), segment.GetColor()
    display = source.GetDisplayNode() if source is not None else None
    table = display.GetColorNode() if display is not None else None
    color = [0.0, 0.0, 0.0, 0.0]
    if table is not None and table.GetColor(value, color) and table.GetColorName(value):
        return table.GetColorName(value), tuple(color[:3])
    # Steps of the golden ratio around the color circle: neighbors differ however many there are.
    return f"Label {value}", tuple(vtk.vtkMath.HSVToRGB((value * 0.618034) % 1.0, 0.6, 0.9))


def remember(node: slicer.vtkMRMLNode, **records: Any) -> None:
    """Keep JSON records (settings, report) as attributes of `node`, so that a saved scene tells them."""
    for key, record in records.items():
        node.SetAttribute(ATTRIBUTE_PREFIX + key, json.dumps(record, sort_keys=True))


def recall(node: slicer.vtkMRMLNode, key: str) -> Any:
    """The record `key` that `remember` kept at `node`; None where there is none."""
    text = node.GetAttribute(ATTRIBUTE_PREFIX + key)
    return None if text is None else json.loads(text)

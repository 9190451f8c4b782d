"""Transform nodes of a MRML scene as point maps of the package, and back. No Qt."""

from __future__ import annotations

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.scene.nodes import mapped


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
    """Displacement fixed → moving [k, j, i, 3] in RAS mm of any transform node, on a lattice in the world."""
    transform = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(transform)
    points = lattice_points(shape, affine).reshape(-1, 3)
    return (mapped(transform, points) - points).astype(np.float32).reshape(*shape, 3)


def displacement_to_node(displacement: np.ndarray, affine: np.ndarray, node: slicer.vtkMRMLTransformNode) -> None:
    """Put the deformation x → x + u(x) in the world (fixed → moving) into the transform node `node`.

    `displacement` is u [k, j, i, 3] in RAS mm on the lattice `affine` (4x4, right-angled). MRML wants it as the
    transform *from* parent: a volume put below the node then lands on the fixed image, and Slicer writes the node as
    ITK's fixed → moving file. The node lies below no transform.
    """
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
    node.SetAndObserveTransformNodeID(None)
    node.SetAndObserveTransformFromParent(transform)


def grid_from_node(node: slicer.vtkMRMLTransformNode) -> tuple[np.ndarray, np.ndarray]:
    """Displacement [k, j, i, 3] in RAS mm and affine of a node that `displacement_to_node` filled.

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
    values = slicer.util.arrayFromGridTransform(node)
    displacement = values * transform.GetDisplacementScale() + transform.GetDisplacementShift()
    return displacement.astype(np.float32), affine


def is_under(node: slicer.vtkMRMLTransformableNode, transform: slicer.vtkMRMLTransformNode) -> bool:
    """Whether `transform` is among the parents of `node`."""
    parent = node.GetParentTransformNode()
    return parent is not None and (parent is transform or parent.IsTransformNodeMyParent(transform))

"""Transform nodes of a MRML scene as point maps of the package, and back. No Qt."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_points
from GradProjIOLib.scene.nodes import mapped


def deformation_from_node(
    node: slicer.vtkMRMLTransformNode, shape: tuple[int, int, int], affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The map fixed → moving of any transform node as x → matrix·(x + u(x)), in RAS mm.

    u [k, j, i, 3] is sampled on a lattice in the world; matrix (4x4) is the product of the linear parts, so that u
    vanishes where nothing else acts.
    """
    transform = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(transform)
    matrix = _product(part for part in _flat(transform) if isinstance(part, vtk.vtkLinearTransform))
    points = lattice_points(shape, affine).reshape(-1, 3)
    displacement = apply_matrix(np.linalg.inv(matrix), mapped(transform, points)) - points
    return displacement.astype(np.float32).reshape(*shape, 3), matrix


def deformation_to_node(
    displacement: np.ndarray, affine: np.ndarray, matrix: np.ndarray, node: slicer.vtkMRMLTransformNode
) -> None:
    """Put the map x → matrix·(x + u(x)) in the world (fixed → moving) into the transform node `node`.

    `displacement` is u [k, j, i, 3] in RAS mm on the lattice `affine` (4x4, right-angled). MRML wants it as the
    transform *from* parent: a volume put below the node then lands on the fixed image, and Slicer writes the node as
    ITK's fixed → moving file. It is a grid transform, and a composite of a grid and a linear one unless `matrix`
    (4x4) is the identity. The node lies below no transform.
    """
    grid = _grid_transform(displacement, affine)
    node.SetAndObserveTransformNodeID(None)
    if np.array_equal(matrix, np.eye(4)):
        node.SetAndObserveTransformFromParent(grid)
        return
    linear = vtk.vtkTransform()
    linear.SetMatrix(slicer.util.vtkMatrixFromArray(matrix))
    whole = vtk.vtkGeneralTransform()
    # The last one concatenated maps points first.
    whole.Concatenate(linear)
    whole.Concatenate(grid)
    node.SetAndObserveTransformFromParent(whole)


def deformation_from_result(node: slicer.vtkMRMLTransformNode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displacement [k, j, i, 3] in RAS mm, affine and matrix of a node that `deformation_to_node` filled.

    Raises InputError where it has become something else since, or lies below another transform.
    """
    parts = _flat(node.GetTransformFromParent())
    grid_transform = parts[-1] if parts else None
    is_grid = isinstance(grid_transform, slicer.vtkOrientedGridTransform)
    linear = all(isinstance(part, vtk.vtkLinearTransform) for part in parts[:-1])
    whole = is_grid and linear and grid_transform.GetDisplacementGrid() is not None
    if node.GetParentTransformNode() is not None or not whole or grid_transform.GetGridDirectionMatrix() is None:
        raise InputError(
            f"{node.GetName()} is not as the registration left it; take it out of its parent transform, "
            "or register again."
        )
    grid = grid_transform.GetDisplacementGrid()
    affine = np.eye(4)
    directions = slicer.util.arrayFromVTKMatrix(grid_transform.GetGridDirectionMatrix())
    affine[:3, :3] = directions[:3, :3] * np.array(grid.GetSpacing())
    affine[:3, 3] = grid.GetOrigin()
    values = vtk_to_numpy(grid.GetPointData().GetScalars()).reshape(*grid.GetDimensions()[::-1], 3)
    displacement = values * grid_transform.GetDisplacementScale() + grid_transform.GetDisplacementShift()
    return displacement.astype(np.float32), affine, _product(parts[:-1])


def _grid_transform(displacement: np.ndarray, affine: np.ndarray) -> slicer.vtkOrientedGridTransform:
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


def _flat(transform: vtk.vtkAbstractTransform | None) -> list[vtk.vtkAbstractTransform]:
    """The simple transforms that make up a transform, none where it is None; the last one maps points first."""
    parts = vtk.vtkCollection()
    slicer.vtkMRMLTransformNode.FlattenGeneralTransform(parts, transform)
    return list(parts)[::-1]


def _product(transforms: Iterable[vtk.vtkLinearTransform]) -> np.ndarray:
    matrices = (slicer.util.arrayFromVTKMatrix(transform.GetMatrix()) for transform in transforms)
    return functools.reduce(np.matmul, matrices, np.eye(4))


def is_under(node: slicer.vtkMRMLTransformableNode, transform: slicer.vtkMRMLTransformNode) -> bool:
    """Whether `transform` is among the parents of `node`."""
    parent = node.GetParentTransformNode()
    return parent is not None and (parent is transform or parent.IsTransformNodeMyParent(transform))

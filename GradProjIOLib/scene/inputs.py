"""What a registration in Slicer starts from: the nodes, checked and made ready for the worker. No Qt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import apply_matrix, coarse_lattice
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import labels, nodes, transforms
from GradProjIOLib.scene.guidance import NO_GUIDES, ROLES, Guides
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import INVERSE, JACOBIAN, TRANSFORM, WARPED, WARPED_LABELS, RegisterRequest

# Where less of the fixed image lies inside the moving one, an alignment is suggested.
GOOD_OVERLAP = 0.7
OVERLAP_SAMPLES = 16
SINGULAR = 1e-12

# The wanted results, each with the node to fill, or None for a new one.
Outputs = Mapping[str, slicer.vtkMRMLNode | None]
ALL_NEW: Outputs = dict.fromkeys((TRANSFORM, INVERSE, WARPED, JACOBIAN, WARPED_LABELS))


@dataclass(frozen=True)
class Inputs:
    """The nodes to register, and those that guide it. Masks and labels are label maps or segmentations."""

    fixed: slicer.vtkMRMLScalarVolumeNode
    moving: slicer.vtkMRMLScalarVolumeNode
    initial_transform: slicer.vtkMRMLTransformNode | None = None
    fixed_mask: slicer.vtkMRMLNode | None = None
    moving_mask: slicer.vtkMRMLNode | None = None
    moving_labels: slicer.vtkMRMLNode | None = None
    guides: Guides = NO_GUIDES

    @property
    def nodes(self) -> dict[str, slicer.vtkMRMLNode | None]:
        """All nodes by role."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "guides"}
        return own | {role: getattr(self.guides, role) for role in ROLES}

    def check(self) -> None:
        """Raise InputError, naming the node, where the choice cannot work. Looks at no voxels."""
        nodes.check_image_node(self.fixed, "fixed image")
        nodes.check_image_node(self.moving, "moving image")
        if self.fixed is self.moving:
            raise InputError(f"{self.fixed.GetName()} is both fixed and moving image; choose two volumes.")
        initial = self.initial_transform
        if initial is not None and transforms.is_under(self.moving, initial):
            raise InputError(
                f"{self.moving.GetName()} already lies under {initial.GetName()}, which would count twice; "
                "choose no initial transform."
            )
        self.guides.check(initial)

    def request(self, folder: Path, settings: Mapping[str, Any], allow_download: bool) -> RegisterRequest:
        """Write the images to `folder`; return the request for the worker. Raises InputError."""
        volumes = {
            "fixed": nodes.volume_from_node(self.fixed, "fixed image"),
            "moving": nodes.volume_from_node(self.moving, "moving image"),
        }
        for name, image in (("fixed_mask", self.fixed), ("moving_mask", self.moving), ("moving_labels", self.moving)):
            node = getattr(self, name)
            if node is not None:
                volumes[name] = labels.labels_from_node(node, image, name.replace("_", " "))
        records = {name: protocol.write_volume(volume, folder, name) for name, volume in volumes.items()}
        to_warp = records.pop("moving_labels", None)
        if self.initial_transform is not None:
            records["initial_transform"] = _initial(self.initial_transform, volumes["fixed"], folder)
        records |= self.guides.records(self.fixed, self.moving, folder)
        weights = self.guides.weights if self.guides.fixed_guide is not None else None
        return RegisterRequest(str(folder), records, settings, weights, to_warp, allow_download)


def _initial(node: slicer.vtkMRMLTransformNode, fixed: Volume, folder: Path) -> dict[str, Any]:
    """The record of an initial transform: a matrix where it is linear, else a field over the fixed image."""
    if node.IsTransformToWorldLinear():
        matrix = slicer.util.arrayFromTransformMatrix(node, toWorld=True)
        if abs(np.linalg.det(matrix)) < SINGULAR:
            raise InputError(f"{node.GetName()} maps everything into a plane; choose another initial transform.")
        return {"matrix": np.linalg.inv(matrix).tolist()}
    shape, affine = coarse_lattice(fixed.shape, fixed.affine)
    displacement, matrix = transforms.deformation_from_node(node, shape, affine)
    if not np.isfinite(displacement).all():
        raise InputError(f"{node.GetName()} cannot be evaluated over the fixed image; choose another one.")
    return protocol.write_field(displacement, affine, matrix, folder, "initial_transform")


def overlap(fixed: slicer.vtkMRMLVolumeNode | None, moving: slicer.vtkMRMLVolumeNode | None) -> float | None:
    """The part (0 to 1) of the fixed image's box that lies inside the moving image's, as the scene shows them.

    None where an image is missing or empty, or lies under a transform that bends.
    """
    affines = []
    for node in (fixed, moving):
        image = node.GetImageData() if node is not None else None
        if image is None or min(image.GetDimensions()) < 1:
            return None
        affines.append(nodes.world_affine(node))
    if affines[0] is None or affines[1] is None or abs(np.linalg.det(affines[1])) < SINGULAR:
        return None
    steps = [np.linspace(-0.5, size - 0.5, OVERLAP_SAMPLES) for size in fixed.GetImageData().GetDimensions()]
    index = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1)
    there = apply_matrix(np.linalg.inv(affines[1]) @ affines[0], index)
    size = np.array(moving.GetImageData().GetDimensions())
    return float(((there >= -0.5) & (there <= size - 0.5)).all(axis=-1).mean())

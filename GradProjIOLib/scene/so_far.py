"""What a registration has reached so far, in the scene while it runs. No Qt."""

from __future__ import annotations

from pathlib import Path

import slicer

from GradProjIOLib.scene import nodes, transforms
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.placement import FIXED, MOVING, show_like
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import TRANSFORM, WARPED, Record

SECONDS = 3.0
"""How often it is shown anew."""


class ShownSoFar:
    """The moving image below a transform node that is filled again and again; the views deform what they show of it.

    The voxels are those of the moving image, so that nothing is computed but the slices that are looked at. Both nodes
    are for looking at only: they are not saved, and `remove` takes them away. `node` is the image.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, inputs: Inputs) -> None:
        self.scene, self.inputs = scene, inputs
        self._transform: slicer.vtkMRMLGridTransformNode | None = None
        self._image: slicer.vtkMRMLScalarVolumeNode | None = None

    @property
    def node(self) -> slicer.vtkMRMLScalarVolumeNode | None:
        """The image, linked to fixed and moving image as a result is; None where it is not shown (any more)."""
        there = [node is not None and node.GetScene() is self.scene for node in (self._image, self._transform)]
        return self._image if all(there) else None

    def show(self, record: Record) -> None:
        """Take over a displacement field that the worker has sent. Raises OSError where its file is gone."""
        displacement, affine, matrix = protocol.read(record)
        Path(record["array"]).unlink()
        if self._image is None:
            self._add()
        if self.node is not None:
            transforms.deformation_to_node(displacement, affine, matrix, self._transform)

    def remove(self) -> None:
        """Take both nodes out of the scene."""
        display = self._image.GetDisplayNode() if self._image is not None else None
        for node in (self._image, display, self._transform):
            if node is not None and node.GetScene() is self.scene:
                self.scene.RemoveNode(node)

    def _add(self) -> None:
        fixed, moving = self.inputs.fixed, self.inputs.moving
        if any(image.GetScene() is not self.scene for image in (fixed, moving)):
            return
        name = _("{moving} so far").format(moving=moving.GetName())
        self._transform = nodes.add_node(self.scene, "vtkMRMLGridTransformNode", _("Transform so far"))
        self._image = nodes.add_node(self.scene, "vtkMRMLScalarVolumeNode", name)
        affine = nodes.world_affine(moving)
        if affine is None:
            nodes.volume_to_node(nodes.volume_from_node(moving), self._image)
        else:
            self._image.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(affine))
            self._image.SetAndObserveImageData(moving.GetImageData())
            self._image.CreateDefaultDisplayNodes()
        show_like(moving, self._image)
        self._image.SetAndObserveTransformNodeID(self._transform.GetID())
        for node in (self._transform, self._image):
            node.SetSaveWithScene(False)
        # As a result's nodes are linked, so that the same views can show it.
        self._image.SetAttribute(nodes.ATTRIBUTE_PREFIX + "role", WARPED)
        for role, node in ((FIXED, fixed), (MOVING, moving), (TRANSFORM, self._transform)):
            self._image.SetNodeReferenceID(nodes.ATTRIBUTE_PREFIX + role, node.GetID())

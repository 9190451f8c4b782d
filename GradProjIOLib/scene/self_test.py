"""The module's self-test inside Slicer: registers two small images and checks the result. No Qt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import slicer

from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes as mrml

SIZE = 24
SPACING_MM = 4.0


def add_images(
    scene: slicer.vtkMRMLScene,
) -> tuple[slicer.vtkMRMLScalarVolumeNode, slicer.vtkMRMLScalarVolumeNode]:
    """A fixed and a moving image node: a blob with an inner structure, and the same one wider."""
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    nodes = []
    for name, width in (("fixed", 7.0), ("moving", 8.5)):
        node = mrml.add_node(scene, "vtkMRMLScalarVolumeNode", name)
        mrml.volume_to_node(Volume(_blob(width), affine, name), node)
        nodes.append(node)
    return nodes[0], nodes[1]


def _blob(width: float) -> np.ndarray:
    k, j, i = np.meshgrid(*[np.arange(SIZE) - SIZE / 2] * 3, indexing="ij")
    radius = np.sqrt((i / width) ** 2 + (j / width) ** 2 + (k / (0.8 * width)) ** 2)
    body = 1 / (1 + np.exp(8 * (radius - 1)))
    ripples = 0.3 * np.cos(6 * radius) + 0.1 * np.sin(i / 2) * np.cos(j / 3)
    return (1000 * np.clip(body * (0.7 + ripples), 0, None)).astype(np.float32)


def run(logic: Any) -> list[str]:
    """Register two small images with the module's `logic`; return what is wrong with the result."""
    fixed, moving = add_images(slicer.mrmlScene)
    try:
        nodes = logic.register(fixed, moving, model="compact", steps=10, device="cpu")
    finally:
        logic.session.close()
    return problems(fixed, moving, nodes)


def problems(
    fixed: slicer.vtkMRMLScalarVolumeNode,
    moving: slicer.vtkMRMLScalarVolumeNode,
    nodes: Mapping[str, slicer.vtkMRMLNode],
) -> list[str]:
    """What is wrong with the result `nodes` of registering `moving` to `fixed`; empty where nothing is."""
    found = []
    absent = {"transform", "inverse", "warped", "jacobian", "folding", "table"} - set(nodes)
    if absent:
        return [f"nodes are missing: {sorted(absent)}"]
    images = [slicer.util.arrayFromVolume(node) for node in (fixed, moving, nodes["warped"])]
    before, after = (np.abs(images[0] - other).mean() for other in images[1:])
    if not after <= before:
        found.append(f"the images are farther apart than before: {after:.1f} instead of {before:.1f}")
    report = mrml.recall(nodes["transform"], "report")
    if not report or "steps" not in report:
        found.append("the transform does not hold how it was made")
    determinant = slicer.util.arrayFromVolume(nodes["jacobian"])
    if determinant.shape != images[0].shape or not np.isfinite(determinant).all():
        found.append("the Jacobian map does not fit the fixed image")
    return found

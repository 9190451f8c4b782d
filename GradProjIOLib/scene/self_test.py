"""The module's self-test inside Slicer: registers two small images and checks the result. No Qt."""

from __future__ import annotations

from typing import Any

import numpy as np
import slicer

from GradProjIOLib.scene import nodes as mrml

SIZE = 24
SPACING_MM = 4.0


def run(logic: Any) -> None:
    """Register two small images with the module's `logic`. Raises AssertionError where the result is wrong."""
    fixed, moving = _add_blob("fixed", 7.0), _add_blob("moving", 8.5)
    try:
        nodes = logic.register(fixed, moving, model="compact", steps=10, device="cpu")
    finally:
        logic.session.close()
    assert {"transform", "inverse", "warped", "jacobian", "folding", "table"} <= set(nodes)
    target, *others = (slicer.util.arrayFromVolume(node) for node in (fixed, moving, nodes["warped"]))
    before, after = (np.abs(target - other).mean() for other in others)
    assert after <= before, f"The images are farther apart than before: {after:.1f} instead of {before:.1f}."
    assert mrml.recall(nodes["transform"], "report")["steps"]
    determinant = slicer.util.arrayFromVolume(nodes["jacobian"])
    assert determinant.shape == target.shape
    assert np.isfinite(determinant).all()


def _add_blob(name: str, width: float) -> slicer.vtkMRMLScalarVolumeNode:
    """An image node with an ellipsoid that has an inner structure."""
    k, j, i = np.meshgrid(*[np.arange(SIZE) - SIZE / 2] * 3, indexing="ij")
    radius = np.sqrt((i / width) ** 2 + (j / width) ** 2 + (k / (0.8 * width)) ** 2)
    body = 1 / (1 + np.exp(8 * (radius - 1)))
    ripples = 0.3 * np.cos(6 * radius) + 0.1 * np.sin(i / 2) * np.cos(j / 3)
    array = (1000 * np.clip(body * (0.7 + ripples), 0, None)).astype(np.float32)
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    return slicer.util.addVolumeFromArray(array, affine, name)

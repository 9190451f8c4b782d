"""A result in the scene that a registration goes on with: what it was made from, and the nodes that it fills. No Qt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.scene import nodes, transforms
from GradProjIOLib.scene.guidance import NO_GUIDES, Guides
from GradProjIOLib.scene.inputs import ALL_NEW, Inputs, Outputs
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import INVERSE, TRANSFORM, WARPED_LABELS, RegisterRequest

GUIDES = {"fixed_labels": "fixed_guide", "moving_labels": "moving_guide"}
"""Roles of guiding labels in a report, with those of their nodes."""
WORDS = {
    "fixed": "fixed image",
    "moving": "moving image",
    "fixed_guide": "fixed guiding segmentation",
    "moving_guide": "moving guiding segmentation",
}


@dataclass(frozen=True)
class ResultToGoOn:
    """A result, known by one of its nodes. Its settings are those with which it was made.

    New landmarks in `guides` replace the earlier landmarks, new labels the earlier labels. A kind without new ones
    stays.
    """

    node: slicer.vtkMRMLNode | None
    guides: Guides = NO_GUIDES

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the result; empty where there is none."""
        return nodes.recall(self.node, "report") or {}

    @property
    def inputs(self) -> Inputs:
        """The nodes with which it was made."""
        linked = {role.name: nodes.linked(self.node, role.name) for role in fields(Inputs) if role.name != "guides"}
        if self.report.get("initial_transform") is not None:
            # The report has its matrix, and the node may have changed since.
            linked["initial_transform"] = None
        return Inputs(**linked, guides=self._guides())

    def _guides(self) -> Guides:
        """The new ones, and the earlier segments where there are no new ones; the report has the earlier landmarks."""
        earlier = self.report.get("labels")
        if self.guides.fixed_guide is not None or self.guides.moving_guide is not None or not earlier:
            return self.guides
        return replace(
            self.guides,
            fixed_guide=nodes.linked(self.node, "fixed_guide"),
            moving_guide=nodes.linked(self.node, "moving_guide"),
            weights={label["name"]: label["weight"] for label in earlier},
        )

    @property
    def outputs(self) -> Outputs:
        """The nodes to fill: its own."""
        found = {role: nodes.member(self.node, role) for role in ALL_NEW}
        return {role: node for role, node in found.items() if node is not None}

    def check(self) -> None:
        """Raise InputError where the result cannot go on. Looks at no voxels."""
        report, outputs = self.report, self.outputs
        if TRANSFORM not in outputs or INVERSE not in outputs:
            raise InputError("There is no result with both transforms to go on with; register first.")
        if "inputs" not in report or "initial_transform" not in report:
            raise InputError("The result does not say what it was made from; register again.")
        # The report has the landmarks themselves.
        needed = {GUIDES.get(role, role) for role in report["inputs"] if not role.endswith("_points")}
        if self.guides.fixed_guide is not None:
            needed -= set(GUIDES.values())
        if report["initial_transform"] is None:
            needed.add("initial_transform")
        if WARPED_LABELS in outputs:
            needed.add("moving_labels")
        for role in sorted(needed):
            if nodes.linked(self.node, role) is None:
                what = WORDS.get(role, role.replace("_", " "))
                raise InputError(f"The {what} of this result is not in the scene any more; register again.")
        self.inputs.check()

    def request(self, folder: Path, steps: int) -> RegisterRequest:
        """Write the images and the transforms to `folder`; return the request for the worker. Raises InputError."""
        report, inputs = self.report, self.inputs
        for role, node in (("fixed", inputs.fixed), ("moving", inputs.moving)):
            volume, described = nodes.volume_from_node(node, f"{role} image"), report["inputs"][role]
            same = list(volume.shape) == described["shape"]
            if not same or not np.allclose(volume.affine, described["affine"], atol=nodes.MOVED_MM):
                raise InputError(
                    f"{node.GetName()} has been moved since the registration; put it back, or register again."
                )
        earlier: dict[str, Any] = {"steps": steps, "report": report}
        for role in (TRANSFORM, INVERSE):
            field = transforms.deformation_from_result(nodes.member(self.node, role))
            earlier[role] = protocol.write_field(*field, folder, f"earlier {role}")
        changed = self.guides.has_landmarks and self.guides.tolerance is not None
        settings = {"landmark_tolerance": self.guides.tolerance} if changed else {}
        return replace(inputs.request(folder, settings, allow_download=False), earlier=earlier)

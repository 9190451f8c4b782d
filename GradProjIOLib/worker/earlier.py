"""The worker's part in going on with a result that the application sends back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from GradProjIOLib.geometry.files import json_text
from GradProjIOLib.registration.going_on import prepare
from GradProjIOLib.registration.labels import LabelPairs
from GradProjIOLib.registration.landmarks import LandmarkPairs
from GradProjIOLib.registration.preprocessing import Guides
from GradProjIOLib.registration.register import Run
from GradProjIOLib.registration.report import describe_image
from GradProjIOLib.registration.result import Reached, Registration
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import RegisterRequest

FORGOTTEN = (
    "The state of the network's optimizer is kept only until the next registration or until the process ends, so the "
    "registration went on by refinement."
)


Kept = tuple[str, dict[str, Any] | None]
"""The report of a result as text with sorted keys, by which it is known when it comes back, and the state of its
network's optimizer, if any: continuing exactly needs it, and it is too large to be sent."""


def run_that_goes_on(request: RegisterRequest, kept: Kept | None, inputs: Mapping[str, Any]) -> Run:
    """The run for a request with an `earlier` result, which has the same images, initial transform and masks.

    inputs: those of the request, as `register` takes them. Without an initial transform it is the matrix in the report.
    The landmarks of the report hold where there are none; the application sends the labels of the report again.
    Where the network's optimizer is not kept any more, it is a refinement, and its warnings say so. Raises InputError.
    """
    earlier = request.earlier
    assert earlier is not None
    report, steps, changes = dict(earlier["report"]), earlier["steps"], dict(request.settings)
    optimizer = kept[1] if kept is not None and kept[0] == json_text(report, sort_keys=True) else None
    forward, inverse = (Deformation(*protocol.read(earlier[role])) for role in ("transform", "inverse"))
    given = {name: one for name, one in inputs.items() if name not in ("fixed", "moving", "initial_transform")}
    guides = Guides.of(**given)
    settings = Settings.from_mapping(report["settings"])
    labels = guides.labels if guides.labels is not None and _are_in(report, guides.labels) else None
    before = replace(guides, landmarks=LandmarkPairs.from_report(report), labels=labels)
    initial = inputs.get("initial_transform")
    if initial is None:
        initial = np.array(report["initial_transform"])
    reached = Reached(optimizer=optimizer, guides=before)
    result = Registration(settings, inputs["fixed"], inputs["moving"], initial, forward, inverse, report, reached)
    # The masks are those from before.
    guides = replace(guides, fixed_mask=None, moving_mask=None)
    forgotten = optimizer is None and [step["stage"] for step in report["steps"][-1:]] == ["network"]
    if not forgotten:
        return prepare(result, steps, guides, **changes)
    run = prepare(result, None, guides, refine_steps=steps, **changes)
    run.warnings.append(FORGOTTEN)
    return run


def _are_in(report: Mapping[str, Any], labels: LabelPairs) -> bool:
    """Whether labels are those that guided the registration of a report."""
    reported = [(one["name"], one["value"], one["weight"]) for one in report.get("labels") or ()]
    checksums = [report["inputs"].get(role, {}).get("sha256") for role in ("fixed_labels", "moving_labels")]
    same = reported == [(pair.name, pair.fixed, pair.weight) for pair in labels.pairs]
    return same and checksums == [describe_image(volume)["sha256"] for volume in labels.sources]

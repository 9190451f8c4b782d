"""The worker's part in going on with a result that the application sends back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from GradProjIOLib.geometry.files import json_text
from GradProjIOLib.registration.going_on import prepare
from GradProjIOLib.registration.labels import label_pairs
from GradProjIOLib.registration.landmarks import LandmarkPairs, landmark_pairs
from GradProjIOLib.registration.register import Run
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
    """The run for a request with an `earlier` result; of the same images, initial transform and masks.

    inputs: those of the request, as `register` takes them. Without an initial transform it is the matrix in the report.
    The landmarks of the report hold where there are none; labels are taken for those of the report where it has some.
    Where the network's optimizer is not kept any more, it is a refinement, and its warnings say so. Raises InputError.
    """
    earlier = request.earlier
    assert earlier is not None
    report, steps, changes = dict(earlier["report"]), earlier["steps"], dict(request.settings)
    optimizer = kept[1] if kept is not None and kept[0] == json_text(report, sort_keys=True) else None
    forward, inverse = (Deformation(*protocol.read(earlier[role])) for role in ("transform", "inverse"))
    landmarks = landmark_pairs(inputs.get("fixed_points"), inputs.get("moving_points"))
    labels = label_pairs(inputs.get("fixed_labels"), inputs.get("moving_labels"), inputs["guiding_labels"])
    settings = Settings.from_mapping(report["settings"])
    reached = Reached(
        optimizer=optimizer,
        fixed_mask=inputs.get("fixed_mask"),
        moving_mask=inputs.get("moving_mask"),
        landmarks=LandmarkPairs.from_report(report),
        labels=labels if report.get("labels") else None,
    )
    initial = inputs.get("initial_transform")
    if initial is None:
        initial = np.array(report["initial_transform"])
    result = Registration(settings, inputs["fixed"], inputs["moving"], initial, forward, inverse, report, reached)
    forgotten = optimizer is None and [step["stage"] for step in report["steps"][-1:]] == ["network"]
    if not forgotten:
        return prepare(result, steps, landmarks=landmarks, labels=labels, **changes)
    run = prepare(result, landmarks=landmarks, labels=labels, refine_steps=steps, **changes)
    run.warnings.append(FORGOTTEN)
    return run

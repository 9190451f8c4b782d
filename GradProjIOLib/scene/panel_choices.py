"""From the choices of the panel to what a registration takes. No Qt.

`choices` is always the module's parameter node, a GradProjIOParameterNode of the module's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.scene import session as roles
from GradProjIOLib.scene.evaluation import Measured
from GradProjIOLib.scene.session import Inputs

LEARNING_RATE_UNIT = 1e-5
SETTINGS = {
    "fixedModality": "fixed_modality",
    "movingModality": "moving_modality",
    "model": "model",
    "steps": "steps",
    "method": "method",
    "similarity": "similarity",
    "regularityWeight": "regularity_weight",
    "projection": "projection",
    "seed": "seed",
    "device": "device",
}
OUTPUTS = {
    roles.TRANSFORM: ("makeTransform", "outputTransform"),
    roles.INVERSE: ("makeInverse", "outputInverse"),
    roles.WARPED: ("makeWarped", "outputWarped"),
    roles.WARPED_LABELS: ("makeWarpedLabels", "outputWarpedLabels"),
    roles.JACOBIAN: ("makeJacobian", "outputJacobian"),
}


def inputs(choices: Any) -> Inputs:
    """The chosen input nodes."""
    return Inputs(
        choices.fixedVolume,
        choices.movingVolume,
        choices.initialTransform,
        choices.fixedMask,
        choices.movingMask,
        choices.movingSegmentation,
    )


def settings(choices: Any) -> dict[str, Any]:
    """The keywords of registration.Settings."""
    result = {ours: getattr(choices, theirs) for theirs, ours in SETTINGS.items()}
    result["align"] = "none" if choices.initialTransform else choices.align
    if choices.learningRate > 0:
        result["learning_rate"] = choices.learningRate * LEARNING_RATE_UNIT
    if result["steps"] == 0:
        result["method"] = "direct"
    return result


def outputs(choices: Any) -> dict[str, slicer.vtkMRMLNode | None]:
    """The wanted results with the node each goes to; None stands for a new one."""
    wanted = {role: getattr(choices, node) for role, (make, node) in OUTPUTS.items() if getattr(choices, make)}
    if choices.movingSegmentation is None:
        wanted.pop(roles.WARPED_LABELS, None)
    return wanted


def measured(choices: Any) -> Measured:
    """The chosen result and what to measure it with."""
    return Measured(
        choices.result,
        choices.evaluationFixedLabels,
        choices.evaluationMovingLabels,
        choices.evaluationFixedPoints,
        choices.evaluationMovingPoints,
    )


def problem(choices: Any) -> str:
    """Why these choices cannot be registered, in one sentence; empty where they can."""
    return _complaint(lambda: (inputs(choices).check(), _check_outputs(choices)))


def evaluation_problem(choices: Any) -> str:
    """Why the chosen result cannot be measured, in one sentence; empty where it can."""
    return _complaint(measured(choices).check)


def _complaint(check: Callable[[], Any]) -> str:
    try:
        check()
    except InputError as error:
        return str(error)
    return ""


def _check_outputs(choices: Any) -> None:
    wanted = outputs(choices)
    if not wanted:
        raise InputError("No output is chosen; choose at least one under Outputs.")
    taken = {node.GetID() for node in vars(inputs(choices)).values() if node is not None}
    for node in wanted.values():
        if node is not None and node.GetID() in taken:
            raise InputError(
                f"{node.GetName()} is chosen twice, as output and as input or another output; "
                "choose Create new for the output."
            )
        if node is not None:
            taken.add(node.GetID())

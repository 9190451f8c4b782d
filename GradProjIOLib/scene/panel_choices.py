"""From the choices of the panel, the module's parameter node `parameters`, to what a registration takes. No Qt."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.scene.evaluation import EvaluationInputs
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.inputs import ALL_NEW, Inputs
from GradProjIOLib.settings import PRESET_SETTINGS, Settings, preset_of
from GradProjIOLib.worker.protocol import WARPED_LABELS

LEARNING_RATE_UNIT = 1e-5
NOT_ON_THE_PANEL = ("weights", "lattice", "precision", "memory")
AUTOMATIC = ("learning_rate", "resolution")
"""Settings that are None by default, for which the panel has a 0."""
SETTINGS = [one.name for one in fields(Settings) if one.name not in (*NOT_ON_THE_PANEL, *AUTOMATIC)]
CUSTOM = "custom"
"""What the panel shows as preset where the settings are those of none."""


def labels() -> dict[str, dict[str, str]]:
    """What the panel shows for the values of each setting that is a choice, in the user's language."""
    modalities = {"mri": _("MRI"), "ct": _("CT")}
    return {
        "fixed_modality": modalities,
        "moving_modality": modalities,
        "align": {"none": _("no"), "centers": _("centers"), "rigid": _("rigid"), "affine": _("affine")},
        "model": {
            "auto": _("automatic"),
            "unigradicon": "uniGradICON",
            "multigradicon": "multiGradICON",
            "compact": _("compact"),
            "none": _("none: refinement only"),
        },
        "method": {"projected": _("gradient projection"), "vanilla": _("weighted sum")},
        "similarity": {"lncc": "LNCC", "lncc2": _("LNCC, squared"), "mind": "MIND-SSC"},
        "projection": {
            "random": _("at random"),
            "both": _("both"),
            "similarity": _("similarity"),
            "regularity": _("smoothness"),
        },
    }


def preset_labels() -> dict[str, str]:
    """What the panel shows for each preset, in the user's language."""
    return {
        "quick": _("quick"),
        "standard": _("standard"),
        "thorough": _("thorough"),
        "paper": _("as in the paper"),
        CUSTOM: _("custom"),
    }


def preset(parameters: Any) -> str:
    """The preset that the parameters are; CUSTOM where they are none."""
    return preset_of(Settings.from_mapping(settings(parameters)))


def choose_preset(parameters: Any, name: str) -> None:
    """Set the parameters to those of a preset."""
    chosen = Settings.from_mapping({"preset": name})
    for setting in PRESET_SETTINGS:
        setattr(parameters, parameter_name(setting), getattr(chosen, setting) or 0)


def choices(setting: str) -> list[str]:
    """The values of a setting that the panel offers. Method "direct" is not among them: that is no steps at all."""
    return list(labels()[setting])


def parameter_name(setting: str) -> str:
    """The name of the parameter for a setting, in Slicer's spelling: `fixed_modality` is `fixedModality`."""
    first, *rest = setting.split("_")
    return first + "".join(word.capitalize() for word in rest)


def inputs(parameters: Any) -> Inputs:
    """The chosen input nodes."""
    return Inputs(
        parameters.fixedVolume,
        parameters.movingVolume,
        parameters.initialTransform,
        parameters.fixedMask,
        parameters.movingMask,
        parameters.movingSegmentation,
    )


def settings(parameters: Any) -> dict[str, Any]:
    """The chosen settings by their names in `settings.Settings`."""
    result = {name: getattr(parameters, parameter_name(name)) for name in SETTINGS}
    if parameters.initialTransform:
        result["align"] = "none"
    if parameters.learningRate > 0:
        result["learning_rate"] = parameters.learningRate * LEARNING_RATE_UNIT
    if parameters.resolution > 0:
        result["resolution"] = parameters.resolution
    if result["steps"] == result["refine_steps"] == 0:
        result["method"] = "direct"
    return result


def outputs(parameters: Any) -> dict[str, slicer.vtkMRMLNode | None]:
    """The wanted results with the node to fill for each; None stands for a new one."""
    return {
        role: getattr(parameters, parameter_name(f"output_{role}"))
        for role in ALL_NEW
        if getattr(parameters, parameter_name(f"make_{role}"))
        and (role != WARPED_LABELS or parameters.movingSegmentation is not None)
    }


def evaluation_inputs(parameters: Any) -> EvaluationInputs:
    """The chosen result and what to evaluate it with."""
    return EvaluationInputs(
        parameters.result,
        parameters.evaluationFixedLabels,
        parameters.evaluationMovingLabels,
        parameters.evaluationFixedPoints,
        parameters.evaluationMovingPoints,
    )


def problem(parameters: Any) -> str:
    """Why these choices cannot be registered, in one sentence; empty where they can."""
    try:
        inputs(parameters).check()
    except InputError as error:
        return str(error)
    wanted = outputs(parameters)
    if not wanted:
        return "No output is chosen; choose at least one under Outputs."
    taken = list(vars(inputs(parameters)).values())
    for node in filter(None, wanted.values()):
        if node in taken:
            return f"{node.GetName()} is chosen twice; choose Create new for the output, or another node."
        taken.append(node)
    return ""


def evaluation_problem(parameters: Any) -> str:
    """Why the chosen result cannot be evaluated, in one sentence; empty where it can."""
    try:
        evaluation_inputs(parameters).check()
    except InputError as error:
        return str(error)
    return ""

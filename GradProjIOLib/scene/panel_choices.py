"""From the choices of the panel, the module's parameter node `parameters`, to what a registration takes. No Qt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import slicer

from GradProjIOLib.errors import InputError
from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.evaluation import EvaluationInputs
from GradProjIOLib.scene.going_on import ResultToGoOn
from GradProjIOLib.scene.guidance import NO_GUIDES, Guides, structures
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.scene.inputs import ALL_NEW, Inputs
from GradProjIOLib.settings import LANDMARK_ALIGNMENTS, PRESET_SETTINGS, Settings, preset_of
from GradProjIOLib.worker.protocol import WARPED_LABELS

NOT_ON_THE_PANEL = ("weights", "lattice", "precision", "memory")
AUTOMATIC = {"learning_rate": "networkLearningRate", "resolution": "resolution"}
"""Settings that are None by default, with their parameters, which have a 0 for it."""
SETTINGS = [one.name for one in fields(Settings) if one.name not in (*NOT_ON_THE_PANEL, *AUTOMATIC)]
CUSTOM = "custom"
"""What the panel shows as preset where the settings are those of none."""


def labels() -> dict[str, dict[str, str]]:
    """What the panel shows for the values of each setting that is a choice, in the user's language.

    It does not offer the method "direct": that is no steps at all.
    """
    modalities = {"auto": _("auto"), "mri": _("MRI"), "ct": _("CT")}
    return {
        "fixed_modality": modalities,
        "moving_modality": modalities,
        "align": {
            "none": _("None"),
            "centers": _("Centers"),
            "rigid": _("Rigid"),
            "affine": _("Affine"),
            "landmarks_rigid": _("Rigid, from landmarks"),
            "landmarks_affine": _("Affine, from landmarks"),
        },
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


def parameter_name(setting: str) -> str:
    """The name of the parameter for a setting, in Slicer's spelling: `fixed_modality` is `fixedModality`."""
    first, *rest = setting.split("_")
    return first + "".join(word.capitalize() for word in rest)


def python_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under names in Python's spelling: `refineSteps` is `refine_steps`."""
    return {re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name): value for name, value in values.items()}


def inputs(parameters: Any) -> Inputs:
    """The chosen input nodes."""
    return Inputs(
        parameters.fixedVolume,
        parameters.movingVolume,
        parameters.initialTransform,
        parameters.fixedMask,
        parameters.movingMask,
        parameters.movingSegmentation,
        guides(parameters),
    )


def guides(parameters: Any) -> Guides:
    """The chosen landmarks and segments."""
    left_out = left_out_segments(parameters)
    chosen = structures(parameters.fixedGuide, parameters.movingGuide) if left_out else {}
    return Guides(
        parameters.fixedPoints,
        parameters.movingPoints,
        parameters.fixedGuide,
        parameters.movingGuide,
        {name: 1.0 for name in chosen if name not in left_out} if left_out else None,
        parameters.landmarkTolerance,
    )


def left_out_segments(parameters: Any) -> set[str]:
    """The names or values of segments that do not guide, although both images have them."""
    return set(json.loads(parameters.segmentsLeftOut or "[]"))


def guides_to_go_on(parameters: Any, result: slicer.vtkMRMLNode | None) -> Guides:
    """The chosen guides, where the result is one of the chosen images; else none, so that its own hold."""
    own = nodes.linked(result, "fixed"), nodes.linked(result, "moving")
    return guides(parameters) if (parameters.fixedVolume, parameters.movingVolume) == own else NO_GUIDES


def settings(parameters: Any) -> dict[str, Any]:
    """The chosen settings by their names in `settings.Settings`."""
    result = {name: getattr(parameters, parameter_name(name)) for name in SETTINGS}
    result |= {name: getattr(parameters, parameter) or None for name, parameter in AUTOMATIC.items()}
    if parameters.initialTransform:
        result["align"] = "none"
    if result["steps"] == result["refine_steps"] == 0:
        result["method"] = "direct"
    return result


def substitute(parameters: Any) -> str:
    """What is used where the weights of the automatic model are not there, in words."""
    name = Settings(**settings(parameters)).substitute
    return _("no network") if name == "none" else labels()["model"][name]


def outputs(parameters: Any) -> dict[str, slicer.vtkMRMLNode | None]:
    """The wanted results with the node to fill for each; None stands for a new one."""
    previous = parameters.result if parameters.overwrite else None
    return {
        role: getattr(parameters, parameter_name(f"output_{role}")) or nodes.member(previous, role)
        for role in ALL_NEW
        if getattr(parameters, parameter_name(f"make_{role}"))
        and (role != WARPED_LABELS or parameters.movingSegmentation is not None)
    }


def suggest_volumes(parameters: Any, arrived: bool = False) -> None:
    """Choose images of the scene that no registration made: the first two where none is chosen.

    Where new ones have `arrived`, also the newest one beside a single one that is chosen.
    """
    made = nodes.ATTRIBUTE_PREFIX + "role"
    taken = [parameters.fixedVolume, parameters.movingVolume]
    images = [node for node in nodes.image_nodes(slicer.mrmlScene) if node.GetImageData() is not None]
    free = [node for node in images if node not in taken and not node.GetAttribute(made)]
    if not any(taken) and len(free) > 1:
        parameters.fixedVolume, parameters.movingVolume = free[:2]
    elif arrived and free and not all(taken) and any(taken):
        parameters.fixedVolume = parameters.fixedVolume or free[-1]
        parameters.movingVolume = parameters.movingVolume or free[-1]


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
    chosen = inputs(parameters)
    if reason := refusal(chosen):
        return reason
    if settings(parameters)["align"] in LANDMARK_ALIGNMENTS and not chosen.guides.has_landmarks:
        return "The alignment from landmarks needs landmarks in both images; place pairs under Guidance."
    wanted = outputs(parameters)
    if not wanted:
        return "No output is chosen; choose at least one under Outputs."
    taken = list(chosen.nodes.values())
    for node in filter(None, wanted.values()):
        if node in taken:
            return f"{node.GetName()} is chosen twice; choose Create new for the output, or another node."
        taken.append(node)
    return ""


def go_on_problem(parameters: Any, result: slicer.vtkMRMLNode | None) -> str:
    """Why a registration cannot go on with a result, in one sentence; empty where it can."""
    return refusal(ResultToGoOn(result, guides_to_go_on(parameters, result)))


def refusal(chosen: Inputs | ResultToGoOn | EvaluationInputs) -> str:
    """Why these nodes cannot be used, in one sentence; empty where they can."""
    try:
        chosen.check()
    except InputError as error:
        return str(error)
    return ""

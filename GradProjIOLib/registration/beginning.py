"""What a registration begins with: settings that depend on the images, and the initial transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import registry
from GradProjIOLib.registration.landmarks import LandmarkPairs
from GradProjIOLib.registration.preprocessing import modality_of
from GradProjIOLib.settings import LANDMARK_ALIGNMENTS, Settings
from GradProjIOLib.spatial import alignment
from GradProjIOLib.spatial.deformation import Deformation

LEAST_OVERLAP = 0.01
GOOD_OVERLAP = 0.5


def with_model(settings: Settings, warnings: list[str]) -> Settings:
    """The settings with a model instead of "auto"."""
    if settings.model != "auto":
        return settings
    name = registry.chosen_model(settings)
    if name in registry.SUBSTITUTE_NOTES:
        warnings.append(registry.SUBSTITUTE_NOTES[name])
    return replace(settings, model=name)


def with_modalities(settings: Settings, fixed: Volume, moving: Volume, warnings: list[str]) -> Settings:
    """The settings with modalities instead of "auto"."""
    found: dict[str, Any] = {}
    for name, volume in (("fixed_modality", fixed), ("moving_modality", moving)):
        if getattr(settings, name) == "auto":
            found[name] = modality_of(volume)
            if found[name] == "ct":
                warnings.append(
                    f"{volume.name} looks like CT, so its intensities are taken as Hounsfield units; "
                    "choose the modality mri if they are something else."
                )
    return replace(settings, **found)


def initial_of(
    fixed: Volume,
    moving: Volume,
    settings: Settings,
    given: Deformation | np.ndarray | None,
    landmarks: LandmarkPairs | None,
    masks: Mapping[str, Volume | None],
    warnings: list[str],
) -> tuple[Deformation | np.ndarray, float]:
    """The initial transform, and which part of the fixed image's view it puts into the moving image's."""
    if isinstance(given, Deformation):
        initial: Deformation | np.ndarray = given
    elif given is not None:
        initial = np.asarray(given, dtype=np.float64)
    elif settings.align in LANDMARK_ALIGNMENTS:
        if landmarks is None:
            raise InputError(
                f"The alignment {settings.align} needs landmarks in both images; give them, or choose another one."
            )
        initial = alignment.align_landmarks(landmarks.fixed, landmarks.moving, settings.align)
    else:
        initial = alignment.align(fixed, moving, settings.align, settings.seed, **masks)
    shared = alignment.overlap(fixed, moving, initial)
    if shared < LEAST_OVERLAP:
        raise InputError(
            f"{fixed.name} and {moving.name} do not overlap in space; align them first "
            "(automatic alignment: centers, rigid or affine)."
        )
    if shared < GOOD_OVERLAP:
        warnings.append(
            f"Only {shared:.0%} of {fixed.name} overlaps with {moving.name}. That is right where one image shows a "
            "part of the other; else align them first (automatic alignment: centers, rigid or affine)."
        )
    return initial, shared

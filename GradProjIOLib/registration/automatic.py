"""What the settings "auto" stand for, for the images of a registration and on this computer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import registry
from GradProjIOLib.registration.preprocessing import modality_of
from GradProjIOLib.settings import Settings


def with_model(settings: Settings, warnings: list[str]) -> Settings:
    """The settings with a model instead of "auto"."""
    name = registry.chosen_model(settings)
    if settings.model == "auto" and name in registry.SUBSTITUTE_NOTES:
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

"""Label maps with the names of their values, and which values of two of them belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.conversion import Image, as_volume
from GradProjIOLib.geometry.files import library_path
from GradProjIOLib.geometry.image_files import whole_numbers_of
from GradProjIOLib.geometry.volume import Volume

Wanted = Sequence[int | str] | Mapping[int | str, float] | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map of whole numbers, 0 where nothing is, and the names of its values, where it has names."""

    volume: Volume
    names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelPair:
    """A structure that two label maps have: its name, its value in each, and how much it counts."""

    name: str
    fixed: int
    moving: int
    weight: float = 1.0


def as_labels(labels: Labels | Image, role: str) -> Labels:
    """``labels`` as Labels; see ``as_volume``. Slicer's files .seg.nrrd name their segments.

    Raises InputError where the image is no label map, or has nothing but 0.
    """
    if not isinstance(labels, Labels):
        volume = as_volume(labels, role)
        labels = Labels(volume, {} if volume.path is None else segment_names(volume.path))
    labels = replace(labels, volume=whole_numbers_of(labels.volume))
    if not labels.volume.array.any():
        raise InputError(f"{labels.volume.name} holds no label: all its values are 0; choose another label map.")
    return labels


def segment_names(path: Path) -> dict[int, str]:
    """The names of a label map's values in the header of an NRRD file that Slicer wrote; of other files none."""
    import SimpleITK as sitk

    if not path.name.lower().endswith((".nrrd", ".nhdr")):
        return {}
    reader = sitk.ImageFileReader()
    reader.SetFileName(library_path(path))
    reader.ReadImageInformation()
    names = {}
    for key in reader.GetMetaDataKeys():
        if (number := re.fullmatch(r"Segment(\d+)_Name", key)) and reader.HasMetaDataKey(
            value := f"Segment{number[1]}_LabelValue"
        ):
            names[int(reader.GetMetaData(value))] = reader.GetMetaData(key)
    return names


def match_labels(fixed: Labels, moving: Labels, wanted: Wanted | None = None) -> list[LabelPair]:
    """The structures that both label maps have: by name where both have names, else by value.

    wanted: the names or fixed values of the structures to take, or a mapping from them to weights; without it all are
    taken, with weight 1. Raises InputError where no structure is left, or a wanted one is missing in a map.
    """
    here, there = (set(np.unique(labels.volume.array).tolist()) - {0} for labels in (fixed, moving))
    if fixed.names and moving.names:
        partners = {name: value for value, name in moving.names.items() if value in there}
        pairs = [
            LabelPair(name, value, partners[name])
            for value, name in sorted(fixed.names.items())
            if value in here and name in partners
        ]
    else:
        names = {**moving.names, **fixed.names}
        pairs = [LabelPair(names.get(value, str(value)), value, value) for value in sorted(here & there)]
    if not pairs:
        kind = "name" if fixed.names and moving.names else "value"
        raise InputError(
            f"{fixed.volume.name} and {moving.volume.name} have no label of the same {kind}; rename or renumber them."
        )
    return pairs if wanted is None else _chosen(pairs, wanted, fixed, moving)


def _chosen(pairs: Sequence[LabelPair], wanted: Wanted, fixed: Labels, moving: Labels) -> list[LabelPair]:
    weights = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted, 1.0)
    chosen = []
    for key, weight in weights.items():
        pair = next((one for one in pairs if key in (one.name, one.fixed) or str(key) == str(one.fixed)), None)
        if pair is None:
            raise InputError(
                f"The label {key} is not in both {fixed.volume.name} and {moving.volume.name}; choose among "
                f"{', '.join(one.name for one in pairs)}."
            )
        if not (np.isfinite(weight) and weight > 0):
            raise InputError(f"The label {key} has the weight {weight}; it must be above 0.")
        chosen.append(replace(pair, weight=float(weight)))
    if not chosen:
        raise InputError("No label is chosen to guide the registration; choose one, or give no labels.")
    return chosen

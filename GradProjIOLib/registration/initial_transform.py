"""Where a registration starts: the given transform, or an alignment, and how much of the images then overlaps."""

from __future__ import annotations

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.preprocessing import Guides
from GradProjIOLib.settings import LANDMARK_ALIGNMENTS, Settings
from GradProjIOLib.spatial import alignment
from GradProjIOLib.spatial.deformation import Deformation

LEAST_OVERLAP = 0.01
GOOD_OVERLAP = 0.5


def initial_of(
    fixed: Volume,
    moving: Volume,
    settings: Settings,
    given: Deformation | np.ndarray | None,
    guides: Guides,
    warnings: list[str],
) -> tuple[Deformation | np.ndarray, float]:
    """The initial transform, and which part of the fixed image's view it puts into the moving image's."""
    if isinstance(given, Deformation):
        initial: Deformation | np.ndarray = given
    elif given is not None:
        initial = np.asarray(given, dtype=np.float64)
    elif settings.align in LANDMARK_ALIGNMENTS:
        if guides.landmarks is None:
            raise InputError(
                f"The alignment {settings.align} needs landmarks in both images; give them, or choose another one."
            )
        initial = alignment.align_landmarks(guides.landmarks.fixed, guides.landmarks.moving, settings.align)
    else:
        masks = guides.fixed_mask, guides.moving_mask
        initial = alignment.align(fixed, moving, settings.align, settings.seed, *masks)
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

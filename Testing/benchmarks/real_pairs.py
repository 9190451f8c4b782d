"""The pairs that benchmarks run on: those in ../shared/data, or a table's, and how a deformation of one is measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.evaluation.cases import measure_result
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.geometry.landmarks import Landmarks, read_landmarks
from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.geometry.tables import read_table
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation

BRAIN = {"model": "compact"}
OTHER = {"model": "none", "similarity": "mind"}
LANDMARK_LABELS = (2, 3)
"""In the prostates' label maps the gland is all labels, and the centroids of these two are landmarks."""
FILES = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_points", "moving_points")
SETTINGS = ("model", "similarity", "align", "fixed_modality", "moving_modality")
"""What else a table may have columns for."""


@dataclass(frozen=True)
class RealPair:
    """The files of a pair, and the settings with which it is registered.

    has_gland: whether the labels are those of a prostate, see LANDMARK_LABELS.
    """

    fixed: Path
    moving: Path
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_points: Path | None = None
    moving_points: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    has_gland: bool = False

    def images(self) -> tuple[Volume, Volume]:
        """The fixed and the moving image."""
        return read_volume(self.fixed), read_volume(self.moving)

    def labels(self) -> tuple[Volume, Volume] | None:
        """Those of the fixed and of the moving image, as they are in the files."""
        if self.fixed_labels is None or self.moving_labels is None:
            return None
        return read_labels(self.fixed_labels), read_labels(self.moving_labels)

    def points(self) -> tuple[Landmarks, Landmarks] | None:
        """The landmarks of both images; of a .csv file in RAS mm."""
        if self.fixed_points is None or self.moving_points is None:
            return None
        return read_landmarks(self.fixed_points, "RAS"), read_landmarks(self.moving_points, "RAS")

    def figures(self, deformation: Deformation) -> dict[str, Any]:
        """Overlap, distance of landmarks, and folding; see ``evaluation.cases.measure_result``."""
        labels, points = self.labels(), self.points()
        if self.has_gland:
            points = _centroids(labels[0]), _centroids(labels[1])
            labels = _gland(labels[0]), _gland(labels[1])
        reference = labels[0] if labels else read_volume(self.fixed)
        found = measure_result(deformation, reference, labels, points)
        return found | {"folded_percent": 100 * found["folded_voxels"] / reference.array.size}


def pairs_of(source: Path) -> dict[str, RealPair]:
    """The pairs of the folder of real data, or those of a table (.csv) with the columns case, FILES and SETTINGS."""
    if source.suffix != ".csv":
        return {
            "brain": _known(source, "aligned_subject_b", "aligned_subject_a", BRAIN),
            "brain back": _known(source, "aligned_subject_a", "aligned_subject_b", BRAIN),
            "native brain": _known(source, "native_subject_b", "native_subject_a", BRAIN | {"align": "affine"}),
            "prostate 0": _known(source, "prostate_0_us", "prostate_0_mr", OTHER, has_gland=True),
            "prostate 1": _known(source, "prostate_1_us", "prostate_1_mr", OTHER, has_gland=True),
            "spine": _known(source, "spine_t2", "spine_t1", OTHER),
        }
    rows = read_table(source, ("case", *FILES, *SETTINGS), ("case", "fixed", "moving"))
    return {
        row["case"]: RealPair(
            **{name: source.parent.absolute() / row[name] for name in FILES if row.get(name)},
            settings={name: row[name] for name in SETTINGS if row.get(name)},
        )
        for row in rows.values()
    }


def _known(folder: Path, fixed: str, moving: str, settings: dict[str, Any], has_gland: bool = False) -> RealPair:
    files = [folder.absolute() / f"{name}{kind}.nii.gz" for kind in ("", "_labels") for name in (fixed, moving)]
    return RealPair(*files, settings=settings, has_gland=has_gland)


def _centroids(labels: Volume) -> Landmarks:
    voxels = [np.argwhere(labels.array == label).mean(axis=0)[::-1] for label in LANDMARK_LABELS]
    return Landmarks([str(label) for label in LANDMARK_LABELS], apply_matrix(labels.affine, np.array(voxels)))


def _gland(labels: Volume) -> Volume:
    return replace(labels, array=(labels.array > 0).astype(np.uint8))

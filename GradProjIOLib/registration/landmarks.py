"""Landmarks that guide a registration: pairs of points in RAS mm, as files or arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from GradProjIOLib.engine.guidance import RADIUS, LandmarkDistance
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.landmarks import Landmarks, match_landmarks, read_landmarks, tolerances_of
from GradProjIOLib.geometry.lattice import apply_matrix, in_view
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation, as_deformation

Points = Landmarks | np.ndarray | Sequence[Sequence[float]] | str | os.PathLike


@dataclass(frozen=True, eq=False)
class LandmarkPairs:
    """Points of the fixed image and their partners in the moving one, [n, 3] each in RAS mm, and their files.

    tolerances: [n] in mm; NaN where the setting ``landmark_tolerance`` holds.
    """

    names: list[str]
    fixed: np.ndarray
    moving: np.ndarray
    tolerances: np.ndarray
    sources: tuple[str, str]

    @classmethod
    def of(cls, fixed: Points, moving: Points) -> LandmarkPairs:
        """From files, ``Landmarks``, or arrays [n, 3] in RAS mm; partners have the same name, else the same place.

        A .csv file is in RAS mm. Where both say how exact a landmark is, the larger tolerance holds. Raises InputError
        where the two do not match.
        """
        first, second = _as_landmarks(fixed, "fixed"), _as_landmarks(moving, "moving")
        order = match_landmarks(first.names, second.names)
        tolerances = np.fmax(tolerances_of(first), tolerances_of(second)[order])
        return cls(first.names, first.points, second.points[order], tolerances, (first.source, second.source))

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> LandmarkPairs | None:
        """The pairs that guided a registration, from its report; None where there were none."""
        reported = report.get("landmarks")
        if not reported:
            return None
        first, second = (
            report["inputs"].get(role, {}).get("name", "landmarks") for role in ("fixed_points", "moving_points")
        )
        fixed, moving = (np.array([pair[side] for pair in reported]) for side in ("fixed", "moving"))
        tolerances = np.array([pair.get("tolerance_mm") for pair in reported], dtype=np.float64)
        return cls([pair["name"] for pair in reported], fixed, moving, tolerances, (first, second))

    def same_as(self, other: LandmarkPairs | None) -> bool:
        """Whether they are the same points, known as exactly."""
        return other is not None and np.array_equal(self._numbers(), other._numbers(), equal_nan=True)

    def _numbers(self) -> np.ndarray:
        return np.column_stack([self.fixed, self.moving, self.tolerances])

    def placed(self, initial: Deformation | np.ndarray, fixed: Volume) -> LandmarkPairs:
        """The same with the moving points where the initial transform puts them, beside the fixed ones.

        Raises InputError for a pair with a point outside the fixed image's field of view.
        """
        moving = as_deformation(initial).source_points(self.moving)
        for name, pair in zip(self.names, np.stack([self.fixed, moving], axis=1), strict=True):
            if not in_view(apply_matrix(np.linalg.inv(fixed.affine), pair), fixed.shape).all():
                raise InputError(
                    f"The landmark {name} lies outside {fixed.name}, or its partner does under the initial transform; "
                    "correct it, or align the images first."
                )
        return replace(self, moving=moving)

    def on_lattice(
        self, lattice: tuple[int, int, int], affine: np.ndarray, tolerance: float, device: torch.device
    ) -> LandmarkDistance:
        """The objective for ``placed`` pairs on a lattice (K, J, I) with ``affine``.

        tolerance: mm, of landmarks that do not say theirs.
        """
        tolerances = np.where(np.isnan(self.tolerances), tolerance, self.tolerances)
        half = (np.array(lattice[::-1]) - 1) / 2
        to_index = np.linalg.inv(affine)
        fixed, moving = (apply_matrix(to_index, points) / half - 1 for points in (self.fixed, self.moving))
        tensor = partial(torch.tensor, dtype=torch.float32, device=device)
        view = abs(np.linalg.det(affine[:3, :3])) * math.prod(lattice)
        share = min(1.0, 4 / 3 * math.pi * RADIUS**3 / view)
        return LandmarkDistance(tensor(fixed), tensor(moving), tensor(affine[:3, :3] * half), tensor(tolerances), share)

    def report(self, before: Deformation | np.ndarray, after: Deformation) -> list[dict[str, Any]]:
        """For each pair its name, both points, its distance in mm under the initial transform and the result, and its
        own tolerance where it has one.
        """
        mapped = (one.map_points(self.fixed) for one in (as_deformation(before), after))
        distances = (np.linalg.norm(points - self.moving, axis=1).tolist() for points in mapped)
        return [
            {"name": name, "fixed": fixed, "moving": moving, "before_mm": before_mm, "after_mm": after_mm}
            | ({} if math.isnan(tolerance) else {"tolerance_mm": tolerance})
            for name, fixed, moving, before_mm, after_mm, tolerance in zip(
                self.names,
                self.fixed.tolist(),
                self.moving.tolist(),
                *distances,
                self.tolerances.tolist(),
                strict=True,
            )
        ]


def _as_landmarks(points: Points, role: str) -> Landmarks:
    if isinstance(points, Landmarks):
        return points
    if isinstance(points, (str, os.PathLike)):
        return read_landmarks(points, "RAS")
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 3 or not len(array) or not np.isfinite(array).all():
        raise InputError(f"The {role} landmarks must be points [n, 3] in RAS mm, or a file of landmarks.")
    return Landmarks([str(number) for number in range(1, len(array) + 1)], array)

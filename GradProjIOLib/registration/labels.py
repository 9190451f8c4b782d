"""Labels that guide a registration: structures of two label maps, each on any lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from GradProjIOLib.engine.guidance import RADIUS, LabelOverlap, Structure
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.conversion import Image
from GradProjIOLib.geometry.labels import LabelPair, Labels, Wanted, as_labels, match_labels
from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation, as_deformation

REACH = 20.0
"""How far around a structure, in mm, its distance is known; from farther away nothing finds it."""
MOST_SAMPLES = 3_000_000
"""The map of a structure has no more samples, whatever the label map's resolution."""
MOST_POINTS = 20_000
"""So many points at most stand for a structure's surface, and as many for what is inside."""
WEIGHT = 0.1
"""How much a structure weighs against the images within RADIUS around it."""


@dataclass(frozen=True, eq=False)
class Side:
    """One image's side of a structure, in RAS mm: what ``Structure`` has, for any lattice.

    image: [2, k, j, i] with its affine. points: [n, 3]. near: volume in mm³ of what lies within RADIUS around it.
    """

    image: np.ndarray
    affine: np.ndarray
    points: np.ndarray
    values: np.ndarray
    surface: np.ndarray
    volumes: np.ndarray
    near: float


@dataclass(frozen=True, eq=False)
class LabelPairs:
    """Structures that both label maps have. In the volumes (int32) structure n of ``pairs`` is n + 1, the rest 0.

    sources: the label maps as they were given.
    """

    pairs: list[LabelPair]
    fixed: Volume
    moving: Volume
    sources: tuple[Volume, Volume]

    @classmethod
    def of(cls, fixed: Labels | Image, moving: Labels | Image, wanted: Wanted | None = None) -> LabelPairs:
        """From label maps; see ``as_labels`` and ``match_labels``, also for errors."""
        first, second = as_labels(fixed, "the fixed labels"), as_labels(moving, "the moving labels")
        pairs = match_labels(first, second, wanted)
        return cls(
            pairs,
            _numbered(first.volume, [pair.fixed for pair in pairs]),
            _numbered(second.volume, [pair.moving for pair in pairs]),
            (first.volume, second.volume),
        )

    def placed(self, initial: Deformation | np.ndarray, fixed: Volume) -> PlacedLabels:
        """The structures where the initial transform puts those of the moving image, beside those of the fixed one.

        Raises InputError for a structure that has no part in the fixed image's field of view.
        """
        transforms = as_deformation(np.eye(4)), as_deformation(initial)
        boxes = ndimage.find_objects(self.fixed.array), ndimage.find_objects(self.moving.array)
        sides = []
        for number, pair in enumerate(self.pairs):
            both = []
            for labels, transform, found in zip((self.fixed, self.moving), transforms, boxes, strict=True):
                side = _side(labels, number + 1, found[number], transform, fixed)
                if side is None:
                    raise InputError(
                        f"The label {pair.name} of {labels.name} lies outside {fixed.name}; leave it out, or align "
                        "the images first."
                    )
                both.append(side)
            sides.append((both[0], both[1]))
        return PlacedLabels(sides, [pair.weight for pair in self.pairs])

    def same_as(self, other: LabelPairs | None) -> bool:
        """Whether they are the same structures with the same weights."""
        return (
            other is not None
            and self.pairs == other.pairs
            and all(
                np.array_equal(mine.array, its.array) and np.array_equal(mine.affine, its.affine)
                for mine, its in ((self.fixed, other.fixed), (self.moving, other.moving))
            )
        )

    def report(self, before: Deformation | np.ndarray, after: Deformation) -> list[dict[str, Any]]:
        """For each structure its name, value and weight, and its Dice under the initial transform and the result."""
        dice = [self._dice(as_deformation(before)), self._dice(after)]
        return [
            {"name": pair.name, "value": pair.fixed, "weight": pair.weight, "dice_before": first, "dice_after": second}
            for pair, first, second in zip(self.pairs, *dice, strict=True)
        ]

    def _dice(self, deformation: Deformation) -> list[float]:
        count = len(self.pairs) + 1
        fixed, warped = self.fixed.array, deformation.warp(self.moving, self.fixed, "nearest").array
        here, there, shared = (
            np.bincount(array.ravel(), minlength=count)[1:] for array in (fixed, warped, fixed[fixed == warped])
        )
        return (2 * shared / (here + there)).tolist()


@dataclass(frozen=True, eq=False)
class PlacedLabels:
    """Structures beside each other over the fixed image: both sides of each, and how much each counts."""

    sides: list[tuple[Side, Side]]
    weights: list[float]

    def on_lattice(self, lattice: tuple[int, int, int], affine: np.ndarray, device: torch.device) -> LabelOverlap:
        """The objective on a lattice (K, J, I) with ``affine``."""
        view = abs(np.linalg.det(affine[:3, :3])) * math.prod(lattice)
        weights = [
            WEIGHT * weight * min(1.0, (first.near + second.near) / 2 / view)
            for weight, (first, second) in zip(self.weights, self.sides, strict=True)
        ]
        structures = [
            (_structure(first, lattice, affine, device), _structure(second, lattice, affine, device))
            for first, second in self.sides
        ]
        return LabelOverlap(structures, weights)


def label_pairs(
    fixed: Labels | Image | None, moving: Labels | Image | None, wanted: Wanted | None
) -> LabelPairs | None:
    """The structures of two label maps that guide a registration. Raises InputError where one map is missing."""
    if (fixed is None) != (moving is None) or (fixed is None and wanted is not None):
        raise InputError("Labels guide a registration only in pairs; give those of both images, or none.")
    return None if fixed is None or moving is None else LabelPairs.of(fixed, moving, wanted)


def _numbered(labels: Volume, values: Sequence[int]) -> Volume:
    """The label map with each of the values as its place among them, counted from 1, and everything else 0."""
    order = np.argsort(values)
    known = np.asarray(values)[order]
    place = np.searchsorted(known, labels.array).clip(max=len(known) - 1)
    array = np.where(known[place] == labels.array, order[place] + 1, 0).astype(np.int32)
    return Volume(array, labels.affine, labels.name)


def _side(
    labels: Volume, number: int, box: tuple[slice, slice, slice], transform: Deformation, image: Volume
) -> Side | None:
    """A structure as ``transform`` (fixed → these labels) puts it beside the image; None where it is out of view."""
    part = tuple(slice(max(one.start - 1, 0), one.stop + 1) for one in box)
    shift = np.eye(4)
    shift[:3, 3] = [one.start for one in reversed(part)]
    mask = Volume((labels.array[part] == number).astype(np.float32), labels.affine @ shift)
    lattice, affine, spacing = _lattice_around(mask, transform, image)
    inside = transform.warp(mask, (lattice, affine), "linear", background=0.0).array
    if not inside.any():
        return None
    # A structure thinner than the samples reaches no half anywhere.
    distance = _signed_distance(inside >= min(0.5, inside.max() / 2), spacing)
    to_image = np.linalg.inv(image.affine) @ affine
    surface = np.abs(distance) <= spacing
    on, on_volume = _chosen(surface, to_image, image)
    within, within_volume = _chosen((inside > 0) & ~surface, to_image, image)
    if not len(on):
        return None
    index = np.concatenate([on, within])
    map_around = np.stack([inside, distance])
    i, j, k = index.T
    return Side(
        map_around,
        affine,
        apply_matrix(affine, index),
        map_around[:, k, j, i],
        np.arange(len(index)) < len(on),
        np.repeat([on_volume, within_volume], [len(on), len(within)]),
        float((distance < RADIUS).sum() * spacing**3),
    )


def _lattice_around(
    mask: Volume, transform: Deformation, image: Volume
) -> tuple[tuple[int, int, int], np.ndarray, float]:
    """A lattice along the image's axes, REACH around what ``transform`` puts there: shape, affine, spacing in mm."""
    voxels = np.argwhere(mask.array)[:, ::-1]
    some = apply_matrix(mask.affine, voxels[:: max(1, len(voxels) // MOST_POINTS)])
    index = apply_matrix(np.linalg.inv(image.affine), transform.source_points(some))
    margin = (REACH + np.linalg.norm(mask.spacing)) / image.spacing
    # From a whole number on, so that labels on the image's own lattice stay as they are.
    first, last = np.floor(index.min(axis=0) - margin), index.max(axis=0) + margin
    extent = (last - first) * image.spacing
    spacing = max(float(mask.spacing.min()), (extent.prod() / MOST_SAMPLES) ** (1 / 3))
    i, j, k = (np.ceil(extent / spacing) + 1).astype(int).tolist()
    to_index = np.diag([*(spacing / image.spacing), 1])
    to_index[:3, 3] = first
    return (k, j, i), image.affine @ to_index, spacing


def _chosen(where: np.ndarray, to_image: np.ndarray, image: Volume) -> tuple[np.ndarray, float]:
    """Samples (i, j, k) of a mask in the image's view, MOST_POINTS at most, and how many each of them stands for."""
    index = np.argwhere(where)[:, ::-1]
    at = apply_matrix(to_image, index)
    index = index[((at > -0.5) & (at < np.array(image.shape[::-1]) - 0.5)).all(axis=1)]
    kept = np.random.default_rng(0).permutation(len(index))[:MOST_POINTS]
    return index[np.sort(kept)], len(index) / max(len(kept), 1)


def _signed_distance(inside: np.ndarray, spacing: float) -> np.ndarray:
    """Distance in mm from the surface between voxels of a mask [k, j, i], negative inside, float32, REACH at most."""
    outward, inward = (ndimage.distance_transform_edt(mask) for mask in (~inside, inside))
    return (np.where(inside, 0.5 - inward, outward - 0.5) * spacing).clip(-REACH, REACH).astype(np.float32)


def _structure(side: Side, lattice: tuple[int, int, int], affine: np.ndarray, device: torch.device) -> Structure:
    tensor = partial(torch.tensor, dtype=torch.float32, device=device)
    half = (np.array(lattice[::-1]) - 1) / 2
    half_of_image = (np.array(side.image.shape[:0:-1]) - 1) / 2
    to_unit = np.linalg.inv(affine @ _from_unit(half))
    to_image = np.linalg.inv(side.affine @ _from_unit(half_of_image)) @ np.linalg.inv(to_unit)
    return Structure(
        tensor(apply_matrix(to_unit, side.points)),
        tensor(side.values),
        torch.tensor(side.surface, device=device),
        tensor(side.volumes),
        torch.from_numpy(side.image)[None].to(device),
        tensor(to_image[:3]),
    )


def _from_unit(half: np.ndarray) -> np.ndarray:
    """From the frame of ``spatial.maps`` to the index (i, j, k) of a lattice: 4x4."""
    return np.vstack([np.column_stack([np.diag(half), half]), [0, 0, 0, 1]])

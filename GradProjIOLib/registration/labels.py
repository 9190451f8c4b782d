"""Labels that guide a registration: structures of two label maps, each on any lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from GradProjIOLib.engine.guidance import RADIUS, LabelOverlap, Structure
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.conversion import Image
from GradProjIOLib.geometry.labels import LabelPair, Labels, Wanted, as_labels, match_labels
from GradProjIOLib.geometry.lattice import affine_of, apply_matrix
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
        structures = [
            [
                _structure(labels, number, found[number - 1], pair.name, transform, fixed)
                for labels, found, transform in zip((self.fixed, self.moving), boxes, transforms, strict=True)
            ]
            for number, pair in enumerate(self.pairs, start=1)
        ]
        return PlacedLabels(structures, [pair.weight for pair in self.pairs])

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
    """Structures beside each other over the fixed image, in RAS mm: both sides of each, and how much each counts."""

    structures: list[list[Structure]]
    weights: list[float]

    def on_lattice(self, lattice: tuple[int, int, int], affine: np.ndarray, device: torch.device) -> LabelOverlap:
        """The objective on a lattice (K, J, I) with ``affine``."""
        view = abs(np.linalg.det(affine[:3, :3])) * math.prod(lattice)
        weights = [
            WEIGHT * weight * min(1.0, (first.near + second.near) / 2 / view)
            for weight, (first, second) in zip(self.weights, self.structures, strict=True)
        ]
        to_unit = np.linalg.inv(affine @ _from_unit(lattice))
        return LabelOverlap([[_in_frame(side, to_unit, device) for side in both] for both in self.structures], weights)


def _numbered(labels: Volume, values: Sequence[int]) -> Volume:
    """The label map with each of the values as its place among them, counted from 1, and everything else 0."""
    order = np.argsort(values)
    known = np.asarray(values)[order]
    place = np.searchsorted(known, labels.array).clip(max=len(known) - 1)
    array = np.where(known[place] == labels.array, order[place] + 1, 0).astype(np.int32)
    return Volume(array, labels.affine, labels.name)


def _structure(
    labels: Volume, number: int, box: tuple[slice, slice, slice], name: str, transform: Deformation, image: Volume
) -> Structure:
    """A structure as ``transform`` (fixed → these labels) puts it beside the image; its frame is RAS mm.

    Raises InputError where it is out of view.
    """
    out_of_view = InputError(
        f"The label {name} of {labels.name} lies outside {image.name}; leave it out, or align the images first."
    )
    part = tuple(slice(max(one.start - 1, 0), one.stop + 1) for one in box)
    shift = affine_of(np.eye(3), [one.start for one in reversed(part)])
    mask = Volume((labels.array[part] == number).astype(np.float32), labels.affine @ shift)
    lattice, affine, spacing = _lattice_around(mask, transform, image)
    inside = transform.warp(mask, (lattice, affine), "linear", background=0.0).array
    if not inside.any():
        raise out_of_view
    # A structure thinner than the samples reaches no half anywhere.
    distance = _signed_distance(inside >= min(0.5, inside.max() / 2), spacing)
    to_image = np.linalg.inv(image.affine) @ affine
    surface = np.abs(distance) <= spacing
    on, on_volume = _chosen(surface, to_image, image)
    within, within_volume = _chosen((inside > 0) & ~surface, to_image, image)
    if not len(on):
        raise out_of_view
    index = np.concatenate([on, within])
    map_around = torch.from_numpy(np.stack([inside, distance]))
    i, j, k = index.T
    return Structure(
        torch.from_numpy(apply_matrix(affine, index)),
        map_around[:, k, j, i],
        torch.arange(len(index)) < len(on),
        torch.tensor(np.repeat([on_volume, within_volume], [len(on), len(within)]), dtype=torch.float32),
        map_around[None],
        torch.from_numpy(np.linalg.inv(affine @ _from_unit(lattice))),
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
    return (k, j, i), image.affine @ affine_of(np.diag(spacing / image.spacing), first), spacing


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


def _in_frame(structure: Structure, to_frame: np.ndarray, device: torch.device) -> Structure:
    """A structure whose frame is RAS mm in another one, to which ``to_frame`` (4x4) leads, in single precision."""
    tensor = partial(torch.tensor, dtype=torch.float32, device=device)
    return replace(
        structure,
        points=tensor(apply_matrix(to_frame, structure.points.numpy())),
        values=structure.values.to(device),
        surface=structure.surface.to(device),
        volumes=structure.volumes.to(device),
        image=structure.image.to(device),
        to_image=tensor(structure.to_image.numpy() @ np.linalg.inv(to_frame)),
    )


def _from_unit(lattice: tuple[int, int, int]) -> np.ndarray:
    """From the frame of ``spatial.maps`` to the index (i, j, k) of a lattice (K, J, I): 4x4."""
    half = (np.array(lattice[::-1]) - 1) / 2
    return affine_of(np.diag(half), half)

"""What an optimization sees: both images on its lattice, with intensities in [0, 1], and what guides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.conversion import Image, as_volume
from GradProjIOLib.geometry.labels import Labels, Wanted
from GradProjIOLib.geometry.lattice import lattice_affine
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.labels import LabelPairs
from GradProjIOLib.registration.landmarks import LandmarkPairs, Points
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation, as_deformation

CT_RANGE = (-1000.0, 1000.0)
CT_AIR = (-1100.0, -900.0)
CT_SOFT_TISSUE = (-200.0, 200.0)
LEAST_AIR = 0.03
LEAST_SOFT_TISSUE = 0.08
"""A CT image has at least these parts of its voxels in air, or below it, and in soft tissue."""
MRI_QUANTILE = 0.99
BRIGHTEST_TISSUE = 4.0
"""How many times as bright as the foreground's median tissue can be; what is brighter is metal or contrast agent."""
FEWEST_FACE_VOXELS = 0.01
"""Where a larger part of a view's faces shows more than background, the view cuts through something."""
FACE_BACKGROUND = 0.05
"""Normalized intensities up to that are background."""


@dataclass(frozen=True, eq=False)
class Guides:
    """What guides a registration besides the images: where they count, and what should meet; None where not given."""

    fixed_mask: Volume | None = None
    moving_mask: Volume | None = None
    landmarks: LandmarkPairs | None = None
    labels: LabelPairs | None = None

    @classmethod
    def of(
        cls,
        fixed_mask: Image | None = None,
        moving_mask: Image | None = None,
        fixed_points: Points | None = None,
        moving_points: Points | None = None,
        fixed_labels: Labels | Image | None = None,
        moving_labels: Labels | Image | None = None,
        guiding_labels: Wanted | None = None,
    ) -> Guides:
        """From what ``register`` takes. Raises InputError, also where landmarks or labels of one image are missing."""
        if (fixed_points is None) != (moving_points is None):
            raise InputError("Landmarks guide a registration only in pairs; give those of both images, or none.")
        if (fixed_labels is None) != (moving_labels is None) or (fixed_labels is None and guiding_labels is not None):
            raise InputError("Labels guide a registration only in pairs; give those of both images, or none.")
        return cls(
            None if fixed_mask is None else as_volume(fixed_mask, "the fixed mask"),
            None if moving_mask is None else as_volume(moving_mask, "the moving mask"),
            None if fixed_points is None or moving_points is None else LandmarkPairs.of(fixed_points, moving_points),
            None
            if fixed_labels is None or moving_labels is None
            else LabelPairs.of(fixed_labels, moving_labels, guiding_labels),
        )

    def after(self, earlier: Guides) -> Guides:
        """The earlier ones, and these in their place where they are given."""
        return replace(earlier, **{name: given for name, given in vars(self).items() if given is not None})

    def are_new(self, earlier: Guides) -> bool:
        """Whether something is given that is not among the earlier ones. Every mask counts as new."""
        return (
            self.fixed_mask is not None
            or self.moving_mask is not None
            or (self.landmarks is not None and not self.landmarks.same_as(earlier.landmarks))
            or (self.labels is not None and not self.labels.same_as(earlier.labels))
        )


def modality_of(volume: Volume) -> str:
    """ "ct" where intensities are those of CT in Hounsfield units, else "mri"."""
    sample = volume.array[::2, ::2, ::2]
    air = np.mean(sample <= CT_AIR[1])
    soft_tissue = np.mean((sample >= CT_SOFT_TISSUE[0]) & (sample <= CT_SOFT_TISSUE[1]))
    near_air = np.mean((sample >= CT_AIR[0]) & (sample <= CT_AIR[1]))
    return "ct" if near_air > 0 and air >= LEAST_AIR and soft_tissue >= LEAST_SOFT_TISSUE else "mri"


def normalize(volume: Volume, modality: str, region: np.ndarray | None = None) -> np.ndarray:
    """Intensities in [0, 1], float32 [k, j, i], as uniGradICON expects them.

    MRI: from the minimum to the 99th percentile, without what is many times brighter than tissue. CT: from −1000 to
    1000 HU. region: bool [k, j, i], the voxels whose range is looked at.
    """
    array = volume.array.astype(np.float32)
    low, high = CT_RANGE if modality == "ct" else _tissue_range(array if region is None else array[region])
    return (array.clip(low, high) - low) / (high - low)


def _tissue_range(values: np.ndarray) -> tuple[float, float]:
    """The minimum and the 99th percentile of intensities.

    Voxels that are far brighter than the median of the foreground do not count: metal or contrast agent in more than
    one voxel of a hundred would leave nothing of the contrast between tissues.
    """
    low, high = float(values.min()), _quantile(values)
    foreground = values[values > values.mean()]
    if foreground.size:
        brightest = low + BRIGHTEST_TISSUE * (float(np.median(foreground)) - low)
        if high > brightest:
            high = _quantile(values[values <= brightest])
    if high <= low:
        # Less than one voxel in a hundred differs from the background.
        high = float(values.max())
    return low, high


def _quantile(values: np.ndarray) -> float:
    # Where many values are the same, as in a background, this is many times faster than numpy's partition.
    rank = max(int(MRI_QUANTILE * values.size), 1)
    return torch.from_numpy(values).flatten().kthvalue(rank).values.item()


def fill_in(image: Tensor, known: Tensor) -> Tensor:
    """An image [1, 1, K, J, I] with its unknown samples filled in smoothly from the known ones around them.

    known: 1 or 0, of the same shape, not 0 everywhere. Coarser and coarser images of what is known fill larger and
    larger holes (pull and push: Gortler et al., "The Lumigraph", SIGGRAPH 1996).
    """
    if known.all():
        return image
    size = [min(2, n) for n in image.shape[2:]]
    weight = F.avg_pool3d(known, size, ceil_mode=True, count_include_pad=False)
    values = F.avg_pool3d(image * known, size, ceil_mode=True, count_include_pad=False)
    coarse = fill_in(values / weight.clamp(min=1e-6), (weight > 0).to(image.dtype))
    smooth = F.interpolate(coarse, size=image.shape[2:], mode="trilinear", align_corners=False)
    return torch.where(known > 0, image, smooth)


def cuts_through(volume: Volume) -> bool:
    """Whether the view of a volume with intensities in [0, 1] ends amid something, so that more may lie outside."""
    faces = [volume.array.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    return bool(np.mean(np.concatenate(faces) > FACE_BACKGROUND) > FEWEST_FACE_VOXELS)


class ImagePair:
    """The images of a registration, to be drawn on lattices over the fixed image's field of view.

    The moving image is drawn where ``initial`` (4x4 or a Deformation, fixed → moving, RAS mm) puts it. Masks are
    non-zero where an image counts; what lies outside the moving image's view does not count either, unless that view
    ends in background. What does not count is filled in. Landmarks and labels should meet.
    """

    def __init__(
        self, fixed: Volume, moving: Volume, initial: Deformation | np.ndarray, settings: Settings, guides: Guides
    ):
        self.landmarks = None if guides.landmarks is None else guides.landmarks.placed(initial, fixed)
        self.labels = None if guides.labels is None else guides.labels.placed(initial, fixed)
        self.initial, self.settings = initial, settings
        self.drawn: dict[tuple[int, ...], dict[str, Tensor | None]] = {}
        self.fixed_mask, self.moving_mask = map(_zeros_and_ones, (guides.fixed_mask, guides.moving_mask))
        self.fixed = _normalized(fixed, settings.fixed_modality, self.fixed_mask)
        self.moving = _normalized(moving, settings.moving_modality, self.moving_mask)
        # Ones where the moving image's view is.
        ones = np.ones(moving.shape, dtype=np.uint8)
        self.view = replace(self.moving, array=ones) if cuts_through(self.moving) else None

    def objective(
        self, model: nn.Module, lattice: tuple[int, int, int], device: torch.device, **options: Any
    ) -> Objective:
        """The losses of a deformation model on a lattice (K, J, I); options are those of ``Objective``."""
        drawn: dict[str, Any] = {
            name: tensor.to(device) for name, tensor in self.on_lattice(lattice).items() if tensor is not None
        }
        affine = lattice_affine(self.fixed.affine, self.fixed.shape, lattice)
        if self.landmarks is not None:
            tolerance = self.settings.landmark_tolerance
            options["landmarks"] = self.landmarks.on_lattice(lattice, affine, tolerance, device)
        if self.labels is not None:
            options["labels"] = self.labels.on_lattice(lattice, affine, device)
        return Objective(model, similarity=self.settings.similarity, **drawn, **options)

    def on_lattice(self, lattice: tuple[int, int, int]) -> dict[str, Tensor | None]:
        """Images and masks on a lattice (K, J, I) stretched over the fixed image; they are kept.

        Each is a tensor [1, 1, K, J, I], by its name in ``Objective``; a mask is None where everything counts.
        Raises InputError where a mask is empty.
        """
        if lattice not in self.drawn:
            self.drawn[lattice] = self._draw(lattice)
        return self.drawn[lattice]

    def _draw(self, lattice: tuple[int, int, int]) -> dict[str, Tensor | None]:
        affine = lattice_affine(self.fixed.affine, self.fixed.shape, lattice)
        still, placed = as_deformation(np.eye(4)), as_deformation(self.initial)

        def draw(volume: Volume, deformation: Deformation, interpolation: str) -> Tensor:
            drawn = deformation.warp(volume, (lattice, affine), interpolation, background=0)
            return torch.from_numpy(np.ascontiguousarray(drawn.array, dtype=np.float32))[None, None]

        def draw_image(
            volume: Volume, deformation: Deformation, masks: Sequence[Volume | None]
        ) -> tuple[Tensor, Tensor | None]:
            image, known = draw(volume, deformation, "linear"), None
            for mask in filter(None, masks):
                drawn = draw(mask, deformation, "nearest")
                if mask is not self.view:
                    drawn = _inner(drawn)
                known = drawn if known is None else known * drawn
                if not known.any():
                    raise InputError(f"{mask.name} is empty where the images overlap; choose a mask with voxels there.")
            if known is None or known.all():
                return image, None
            return fill_in(image, known), known

        fixed, fixed_mask = draw_image(self.fixed, still, [self.fixed_mask])
        moving, moving_mask = draw_image(self.moving, placed, [self.moving_mask, self.view])
        return {"fixed": fixed, "moving": moving, "fixed_mask": fixed_mask, "moving_mask": moving_mask}


def _inner(mask: Tensor) -> Tensor:
    """A mask [1, 1, K, J, I] without the samples beside its outside, which show a bit of what lies there.

    Where nothing would be left, it is the mask itself.
    """
    inner = mask.clone()
    for axis, size in enumerate(mask.shape[2:], start=2):
        inner.narrow(axis, 0, size - 1).mul_(mask.narrow(axis, 1, size - 1))
        inner.narrow(axis, 1, size - 1).mul_(mask.narrow(axis, 0, size - 1))
    return inner if inner.any() else mask


def _zeros_and_ones(mask: Volume | None) -> Volume | None:
    return None if mask is None else replace(mask, array=(mask.array != 0).astype(np.uint8))


def _normalized(volume: Volume, modality: str, mask: Volume | None) -> Volume:
    """The volume with intensities in [0, 1], as they are inside the mask."""
    region = None
    if mask is not None:
        region = as_deformation(np.eye(4)).warp(mask, volume, "nearest").array > 0
        if not region.any():
            raise InputError(f"{mask.name} is empty inside {volume.name}; choose a mask with voxels there.")
    return replace(volume, array=normalize(volume, modality, region))

"""Both images on the lattice of an optimization, with intensities in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import lattice_affine
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation

CT_RANGE = (-1000.0, 1000.0)
MRI_QUANTILE = 0.99


def normalize(volume: Volume, modality: str) -> np.ndarray:
    """Intensities in [0, 1], float32 [k, j, i], as uniGradICON expects them.

    MRI: from the minimum to the 99th percentile. CT: from −1000 to 1000 HU.
    """
    array = volume.array.astype(np.float32)
    low, high = CT_RANGE
    if modality == "mri":
        low = array.min()
        # Where many values are the same, as in a background, this is many times faster than numpy's partition.
        rank = max(int(MRI_QUANTILE * array.size), 1)
        high = torch.from_numpy(array).flatten().kthvalue(rank).values.item()
        if high <= low:
            # Less than one voxel in a hundred differs from the background.
            high = array.max()
    return (array.clip(low, high) - low) / (high - low)


@dataclass(frozen=True)
class LatticeImages:
    """Both images and masks on one lattice: tensors [1, 1, K, J, I], and the lattice's affine (index → RAS mm)."""

    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor | None
    moving_mask: Tensor | None
    affine: np.ndarray

    def to(self, device: torch.device) -> LatticeImages:
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def objective(self, model: nn.Module, settings: Settings, **options: Any) -> Objective:
        """The losses of a deformation model for these images; options are those of ``Objective``."""
        return Objective(
            model, self.fixed, self.moving, settings.similarity, self.fixed_mask, self.moving_mask, **options
        )


class ImagePair:
    """The images of a registration, to be drawn on lattices over the fixed image's field of view.

    The moving image is drawn where ``initial`` (4x4 or a Deformation, fixed → moving, RAS mm) puts it. Masks are
    non-zero where an image counts.
    """

    def __init__(
        self,
        fixed: Volume,
        moving: Volume,
        initial: Deformation | np.ndarray,
        settings: Settings,
        fixed_mask: Volume | None = None,
        moving_mask: Volume | None = None,
    ):
        self.fixed = replace(fixed, array=normalize(fixed, settings.fixed_modality))
        self.moving = replace(moving, array=normalize(moving, settings.moving_modality))
        self.initial = initial
        self.latest: LatticeImages | None = None
        self.masks = [
            None if mask is None else replace(mask, array=(mask.array != 0).astype(np.uint8))
            for mask in (fixed_mask, moving_mask)
        ]

    def on_lattice(self, lattice: Sequence[int]) -> LatticeImages:
        """Images and masks on a lattice (K, J, I) stretched over the fixed image; the latest one is kept.

        Raises InputError where a mask is empty.
        """
        if self.latest is None or self.latest.fixed.shape[2:] != tuple(lattice):
            self.latest = self._draw(lattice)
        return self.latest

    def _draw(self, lattice: Sequence[int]) -> LatticeImages:
        affine = lattice_affine(self.fixed.affine, self.fixed.shape, lattice)
        still, placed = (as_deformation(map_, lattice, affine) for map_ in (np.eye(4), self.initial))

        def draw(volume: Volume, deformation: Deformation, interpolation: str) -> Tensor:
            drawn = deformation.warp(volume, (tuple(lattice), affine), interpolation, background=0)
            return torch.from_numpy(np.ascontiguousarray(drawn.array, dtype=np.float32))[None, None]

        def draw_mask(mask: Volume | None, deformation: Deformation) -> Tensor | None:
            if mask is None:
                return None
            drawn = draw(mask, deformation, "nearest")
            if not drawn.any():
                raise InputError(f"{mask.name} is empty where the images overlap; choose a mask with voxels there.")
            return drawn

        return LatticeImages(
            draw(self.fixed, still, "linear"),
            draw(self.moving, placed, "linear"),
            draw_mask(self.masks[0], still),
            draw_mask(self.masks[1], placed),
            affine,
        )


def as_deformation(transform: Deformation | np.ndarray, shape: Sequence[int], affine: np.ndarray) -> Deformation:
    """A linear map (4x4, RAS mm) sampled on a lattice; a Deformation as it is."""
    if isinstance(transform, Deformation):
        return transform
    return Deformation.from_linear(transform, tuple(shape), affine)

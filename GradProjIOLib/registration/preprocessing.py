"""Both images on the lattice of the optimization, with intensities in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

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
        rank = max(int(MRI_QUANTILE * array.size) - 1, 0)
        high = np.partition(array, rank, axis=None)[rank]
        if high <= low:
            # Less than one voxel in a hundred differs from the background.
            high = array.max()
    return (array.clip(low, high) - low) / (high - low)


@dataclass(frozen=True)
class _Pair:
    """Both images on the network's lattice: tensors [1, 1, K, J, I] and the lattice's affine."""

    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor | None
    moving_mask: Tensor | None
    affine: np.ndarray

    @classmethod
    def on_lattice(
        cls,
        fixed: Volume,
        moving: Volume,
        initial: Deformation | np.ndarray,
        settings: Settings,
        fixed_mask: Volume | None,
        moving_mask: Volume | None,
    ) -> _Pair:
        affine = lattice_affine(fixed.affine, fixed.shape, settings.lattice)
        placed = _as_deformation(initial, settings.lattice, affine)
        still = _as_deformation(np.eye(4), settings.lattice, affine)

        def draw(volume: Volume, deformation: Deformation, interpolation: str = "linear") -> Tensor:
            drawn = deformation.warp(volume, (settings.lattice, affine), interpolation, background=0)
            return torch.from_numpy(np.ascontiguousarray(drawn.array, dtype=np.float32))[None, None]

        def draw_mask(mask: Volume | None, deformation: Deformation) -> Tensor | None:
            if mask is None:
                return None
            drawn = draw(replace(mask, array=(mask.array != 0).astype(np.uint8)), deformation, "nearest")
            if not drawn.any():
                raise InputError(f"{mask.name} is empty where the images overlap; choose a mask with voxels there.")
            return drawn

        def draw_image(volume: Volume, modality: str, deformation: Deformation) -> Tensor:
            return draw(replace(volume, array=normalize(volume, modality)), deformation)

        return cls(
            draw_image(fixed, settings.fixed_modality, still),
            draw_image(moving, settings.moving_modality, placed),
            draw_mask(fixed_mask, still),
            draw_mask(moving_mask, placed),
            affine,
        )


def _as_deformation(transform: Deformation | np.ndarray, shape: Sequence[int], affine: np.ndarray) -> Deformation:
    if isinstance(transform, Deformation):
        return transform
    return Deformation.from_linear(transform, tuple(shape), affine)

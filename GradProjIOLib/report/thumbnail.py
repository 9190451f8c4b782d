"""A small picture of a result, for a table of many."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.geometry.image_files import read_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.report.colors import determinant_colors
from GradProjIOLib.report.overview import canonical_order, orient

THUMBNAIL = "thumbnail.png"
THUMBNAIL_HEIGHT = 128
BRIGHTEST_PERCENTILE = 99.5


def write_thumbnail(folder: Path, fixed: Volume) -> None:
    """Draw the results in ``folder`` small: an axial slice of fixed image, warped image, Jacobian determinant.

    The slice goes through the worst fold, or through the middle. Raises WriteError.
    """
    from PIL import Image

    axes, reverse = canonical_order(fixed.affine)
    warped, determinant, folding = (
        orient(read_volume(folder / f"{name}.nii.gz").array, axes, reverse)
        for name in ("warped", "jacobian", "folding")
    )
    folded = (folding > 0) | (determinant <= 0)
    level = determinant.shape[2] // 2
    if folded.any():
        level = int(np.unravel_index(np.argmin(np.where(folded, determinant, np.inf)), folded.shape)[2])
    panels = [_gray(orient(fixed.array, axes, reverse), level), _gray(warped, level)]
    panels += [determinant_colors(determinant[:, :, level], folded[:, :, level])]
    spacing = fixed.spacing[[2 - axis for axis in axes]]
    # Radiological: the subject's right is on the left, anterior is up.
    upright = [_resized(panel[::-1, ::-1].swapaxes(0, 1), spacing[1], spacing[0]) for panel in panels]
    with atomic_path(folder / THUMBNAIL) as path:
        Image.fromarray(np.rint(255 * np.concatenate(upright, axis=1)).astype(np.uint8)).save(path)


def _gray(array: np.ndarray, level: int) -> np.ndarray:
    """A slice [right, anterior, 3] with the intensities of the whole image in [0, 1]."""
    low, high = float(array.min()), float(np.percentile(array[::2, ::2, ::2], BRIGHTEST_PERCENTILE))
    plane = (array[:, :, level].astype(np.float32) - low) / max(high - low, 1e-12)
    return np.repeat(plane.clip(0, 1)[..., None], 3, axis=-1)


def _resized(plane: np.ndarray, row_spacing: float, column_spacing: float) -> np.ndarray:
    """A plane [rows, columns, 3] with square pixels and THUMBNAIL_HEIGHT rows, by the nearest pixels."""
    rows, columns = plane.shape[:2]
    width = max(round(THUMBNAIL_HEIGHT * columns * column_spacing / (rows * row_spacing)), 1)
    row = (np.arange(THUMBNAIL_HEIGHT) * rows) // THUMBNAIL_HEIGHT
    column = (np.arange(width) * columns) // width
    return plane[row][:, column]

"""A small picture of a result, for a table of many."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from GradProjIOLib.geometry.volume import Volume, in_ras_order
from GradProjIOLib.report.colors import determinant_colors
from GradProjIOLib.report.orientation import to_anatomical, worst_fold

THUMBNAIL = "thumbnail.png"
THUMBNAIL_HEIGHT = 128
BRIGHTEST_PERCENTILE = 99.5


def write_thumbnail(folder: Path, fixed: Volume, warped: Volume, determinant: Volume, folding: Volume) -> None:
    """Draw a result small into ``folder``: an axial slice of fixed image, warped image, Jacobian determinant.

    folding: not 0 where it folds. All four lie on one lattice. The slice goes through the worst fold, or through the
    middle.
    """
    from PIL import Image

    results = fixed, warped, determinant, folding
    still, moved, change, mask = (to_anatomical(volume.array, fixed.affine) for volume in results)
    folded = (mask > 0) | (change <= 0)
    level = worst_fold(change, folded)[2] if folded.any() else change.shape[2] // 2
    panels = [_gray(still, level), _gray(moved, level), determinant_colors(change[:, :, level], folded[:, :, level])]
    # Radiological: the subject's right is on the left, anterior is up.
    row = np.concatenate([panel[::-1, ::-1].swapaxes(0, 1) for panel in panels], axis=1)
    right, front, _ = in_ras_order(fixed)[0].spacing
    height, width = row.shape[0] * front, row.shape[1] * right
    picture = Image.fromarray(np.rint(255 * row).astype(np.uint8))
    size = (max(round(THUMBNAIL_HEIGHT * width / height), 1), THUMBNAIL_HEIGHT)
    picture.resize(size, Image.Resampling.NEAREST).save(folder / THUMBNAIL)


def _gray(array: np.ndarray, level: int) -> np.ndarray:
    """A slice [right, anterior, 3] with the intensities of the whole image in [0, 1]."""
    low, high = float(array.min()), float(np.percentile(array[::2, ::2, ::2], BRIGHTEST_PERCENTILE))
    plane = (array[:, :, level].astype(np.float32) - low) / max(high - low, 1e-12)
    return np.repeat(plane.clip(0, 1)[..., None], 3, axis=-1)

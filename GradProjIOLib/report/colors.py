"""The one color map of the Jacobian determinant, and the color of folds."""

from __future__ import annotations

import numpy as np

FOLD_COLOR = (0.1, 1.0, 0.1)
"""Folded voxels. No other part of the picture is green."""

LARGEST_DETERMINANT = 4.0
"""The colors of the determinant map end here and at its reciprocal."""

SHRINK_TO_GROW = (
    (0.03, 0.11, 0.42),
    (0.27, 0.56, 0.85),
    (0.97, 0.97, 0.97),
    (0.95, 0.62, 0.22),
    (0.5, 0.16, 0.02),
)


def determinant_colors(determinant: np.ndarray, folded: np.ndarray) -> np.ndarray:
    """RGB [..., 3]: white at 1, blue where volume shrinks, orange where it grows, FOLD_COLOR where folded.

    Diverging with the logarithm, so that halving and doubling are equally far from white.
    """
    shade = np.log(np.maximum(determinant, 1e-9)) / np.log(LARGEST_DETERMINANT)
    stops = np.linspace(-1, 1, len(SHRINK_TO_GROW))
    colors = np.stack([np.interp(shade, stops, channel) for channel in zip(*SHRINK_TO_GROW, strict=True)], -1)
    colors[folded] = FOLD_COLOR
    return colors

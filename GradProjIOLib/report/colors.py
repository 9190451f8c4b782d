"""The one color map of the Jacobian determinant, for files and for Slicer, and the color of folds.

The determinant is the volume of a piece of tissue in the moving image divided by its volume in the fixed image. Blue
is smaller in the moving image, orange larger, and no reader takes the yellow of folds for a color of the scale: it
differs by at least 60 (CIE 1976) from each of them for deuteranopes and protanopes, too.
"""

from __future__ import annotations

import numpy as np

FOLD_COLOR = (1.0, 1.0, 0.0)
"""Folded voxels. No other part of a picture is yellow."""

NEARLY_COLOR = (0.8, 0.2, 0.8)
"""Voxels that nearly fold, where they are marked: determinants from 0 to NEARLY_FOLDED."""

NEARLY_FOLDED = 0.1

RANGES = (1.25, 2.0, 4.0)
"""Where the colors of the map may end, and at its reciprocal."""

LARGEST_DETERMINANT = RANGES[-1]
"""Where they end unless another range is chosen."""

SMALLER_TO_LARGER = (
    (0.03, 0.11, 0.42),
    (0.27, 0.56, 0.85),
    (0.97, 0.97, 0.97),
    (0.82, 0.46, 0.32),
    (0.45, 0.12, 0.02),
)


def scale_colors(place: np.ndarray) -> np.ndarray:
    """RGB [..., 3] for places on the scale: -1 its lower end, 0 white, 1 its upper end. Beyond it ends."""
    stops = np.linspace(-1, 1, len(SMALLER_TO_LARGER))
    return np.stack([np.interp(place, stops, channel) for channel in zip(*SMALLER_TO_LARGER, strict=True)], -1)


def scale_place(determinant: np.ndarray, largest: float = LARGEST_DETERMINANT) -> np.ndarray:
    """Where determinants lie on the scale that ends at `largest`: with the logarithm, so that half is -double."""
    return np.log(np.maximum(determinant, 1e-9)) / np.log(largest)


def determinant_colors(determinant: np.ndarray, folded: np.ndarray) -> np.ndarray:
    """RGB [..., 3]: white at 1, blue below, orange above, FOLD_COLOR where folded."""
    colors = scale_colors(scale_place(determinant))
    colors[folded] = FOLD_COLOR
    return colors


def tick_labels(largest: float = LARGEST_DETERMINANT) -> list[str]:
    """What the legend says at the places -1, -0.5, 0, 0.5 and 1 of the scale."""
    fractions = {0.25: "¼", 0.5: "½"}
    values = largest ** np.linspace(-1, 1, 5)
    return [fractions.get(round(float(value), 3), f"{value:.3g}") for value in values]

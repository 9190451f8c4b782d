"""What several test files share: images that are oblique, anisotropic, off-center and of different size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from GradProjIOLib.volume import Volume

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def oblique_affine(spacing, degrees, origin) -> np.ndarray:
    """Index → RAS mm of a lattice turned by `degrees` about x, y and z."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def smooth_noise(shape, seed: int, sigma: float = 2.0) -> np.ndarray:
    """Smooth random intensities between 0 and 200, float32 [k, j, i]."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return ((noise - noise.min()) / (noise.max() - noise.min()) * 200).astype(np.float32)


@pytest.fixture
def fixed_volume() -> Volume:
    affine = oblique_affine((1.3, 0.7, 2.1), (20, -12, 31), (-30, 12, 50))
    return Volume(smooth_noise((24, 34, 26), 1), affine, "fixed")


@pytest.fixture
def moving_volume() -> Volume:
    affine = oblique_affine((0.9, 1.1, 1.7), (-25, 9, -40), (10, -22, 33))
    return Volume(smooth_noise((28, 30, 36), 2), affine, "moving")


@pytest.fixture
def shared_data() -> Path:
    if not DATA.is_dir():
        pytest.skip("the shared data are not here")
    return DATA

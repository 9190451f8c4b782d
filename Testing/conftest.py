"""What several test files share: images that are oblique, anisotropic, off-center and of different size."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from GradProjIOLib.geometry.volume import Volume

# The same examples in every run, and no limit on the time of one: a busy machine fails no test.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def oblique_affine(spacing, degrees, origin) -> np.ndarray:
    """Index → RAS mm of a lattice turned by `degrees` about x, y and z; `origin` is its first voxel."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def oblique_volume(shape, spacing, degrees, center, seed: int, name: str) -> Volume:
    """Smooth noise on an oblique lattice whose middle lies at `center` (RAS mm)."""
    affine = oblique_affine(spacing, degrees, (0, 0, 0))
    affine[:3, 3] = center - affine[:3, :3] @ (np.array(shape[::-1]) - 1) / 2
    return Volume(smooth_noise(shape, seed), affine, name)


def smooth_noise(shape, seed: int, sigma: float = 2.0) -> np.ndarray:
    """Smooth random intensities between 0 and 200, float32 [k, j, i]."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return ((noise - noise.min()) / (noise.max() - noise.min()) * 200).astype(np.float32)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is where a shell started the tests in the background, and their processes could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fixed_volume() -> Volume:
    return oblique_volume((24, 34, 26), (1.3, 0.7, 2.1), (20, -12, 31), (-30, 42, 50), 1, "fixed")


@pytest.fixture
def moving_volume() -> Volume:
    return oblique_volume((28, 30, 36), (0.9, 1.1, 1.7), (-25, 9, -40), (-27, 38, 52), 2, "moving")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not DATA.is_dir():
        pytest.skip("the shared data are not here")
    return DATA


@pytest.fixture(scope="module")
def worker():
    """A client whose worker process serves all tests of a file."""
    from scene_tools import new_worker

    client = new_worker()
    yield client
    client.close()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where temporary files go during a test. No folder for a request may be left there."""
    from scene_tools import exchange_folders

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert exchange_folders(tmp_path) == []

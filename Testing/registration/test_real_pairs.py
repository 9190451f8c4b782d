"""What must hold on the real brain pair, with the settings that users get. Minutes each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from GradProjIOLib.evaluation.metrics import dice_of
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.registration.register import register

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def brains(shared_data):
    """Fixed image b, moving image a, and their labels."""
    names = [shared_data / f"aligned_subject_{subject}" for subject in "ba"]
    return (
        *(read_volume(f"{name}.nii.gz") for name in names),
        *(read_labels(f"{name}_labels.nii.gz") for name in names),
    )


def overlap(result, labels, moving_labels):
    warped = result.forward.warp(moving_labels, labels, "nearest")
    return np.nanmean(dice_of(labels.array, warped.array, [int(one) for one in np.unique(labels.array) if one]))


@pytest.mark.parametrize(("settings", "least"), [({"preset": "quick"}, 0.80), ({}, 0.805)])
def test_brains_of_one_contrast(brains, settings, least):
    fixed, moving, labels, moving_labels = brains
    result = register(fixed, moving, model="compact", device="cpu", **settings)
    assert overlap(result, labels, moving_labels) >= least
    assert result.report["jacobian"]["ndv_percent"] <= 1e-3


def test_inverted_contrast_with_mind(brains):
    """Dice is 0.54 before the registration."""
    fixed, moving, labels, moving_labels = brains
    inverted = replace(moving, array=moving.array.max() - moving.array.astype(np.float32))
    result = register(fixed, inverted, model="none", similarity="mind", device="cpu")
    found = overlap(result, labels, moving_labels)
    print(f"Dice {found:.4f}, {result.report['seconds']:.0f} s")
    assert found >= 0.70


def test_a_brain_registered_to_itself_stays_where_it_is(brains):
    result = register(brains[0], brains[0], model="none", device="cpu")
    moved = np.linalg.norm(result.forward.displacement, axis=-1)
    print(f"moved by {moved.mean():.4f} mm on average, {moved.max():.4f} mm at most")
    assert moved.mean() < 0.05

import itertools
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch

from GradProjIOLib.synthetic import pairs
from GradProjIOLib.synthetic.anatomy import T1_INTENSITIES
from GradProjIOLib.synthetic.pairs import TrainingPair
from GradProjIOLib.synthetic.random_fields import (
    identity_points,
    integrate,
    sample,
    smooth_noise,
    spline_weights,
)

LATTICE = (48, 56, 40)
SEEDS = range(16)
CORTEX, WHITE_MATTER, LEFT_VENTRICLE = 1, 2, 3


def pair_of(kind: str, seed: int, lattice: tuple[int, int, int]) -> TrainingPair:
    """The pair of a seed that makes pairs of one kind alone."""
    with patch.object(pairs, "HEADS", {"head": 1, "shapes": 0}[kind]):
        return pairs.synthetic_pair(seed, lattice)


@cache
def pair(seed: int, kind: str = "head") -> TrainingPair:
    return pair_of(kind, seed, LATTICE)


def dice(pair: TrainingPair, label: int) -> float:
    first, second = pair.fixed_labels == label, pair.moving_labels == label
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def shared_labels(pair: TrainingPair) -> list[int]:
    """Labels that have at least 20 voxels in both images."""
    found = [set(labels.unique().tolist()) for labels in (pair.fixed_labels, pair.moving_labels)]
    both = (found[0] & found[1]) - {0}
    return sorted(
        label for label in both
        if min((labels == label).sum() for labels in (pair.fixed_labels, pair.moving_labels)) >= 20
    )  # fmt: skip


def contrast(pair: TrainingPair) -> tuple[np.ndarray, np.ndarray]:
    """Median intensity of every shared label in either image."""
    images = ((pair.fixed, pair.fixed_labels), (pair.moving, pair.moving_labels))
    labels = shared_labels(pair)
    first, second = ([float(image[found == label].median()) for label in labels] for image, found in images)
    return np.array(first), np.array(second)


@pytest.mark.parametrize("kind", ["head", "shapes"])
def test_images_and_labels_are_what_a_network_takes(kind: str) -> None:
    for seed in range(4):
        made = pair(seed, kind)
        for image in (made.fixed, made.moving):
            assert image.shape == (1, *LATTICE)
            assert image.dtype == torch.float32
            assert float(image.min()) == 0
            assert float(image.max()) == 1
            assert 0.03 < float(image.std()) < 0.5
        for labels in (made.fixed_labels, made.moving_labels):
            assert labels.shape == (1, *LATTICE)
            assert labels.dtype == torch.uint8
            assert int(labels.max()) < len(T1_INTENSITIES)


@pytest.mark.parametrize("kind", ["head", "shapes"])
def test_the_seed_alone_decides(kind: str) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = pair_of(kind, 7, (24, 28, 20))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (pair_of(kind, seed, (24, 28, 20)) for seed in (7, 8))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(first.fixed, first.moving)


def test_heads_hold_the_structures() -> None:
    for seed in SEEDS:
        assert {*range(1, 14), 20, 22} <= {*pair(seed).fixed_labels.unique().tolist()}


def test_shapes_hold_many_labels() -> None:
    counts = [len(pair(seed, "shapes").fixed_labels.unique()) for seed in range(6)]
    assert min(counts) >= 8
    assert max(counts) >= 16


def test_the_subjects_of_a_pair_differ_like_people() -> None:
    """Roughly aligned, but not registered: about as similar as brains after an affine registration."""
    scores = np.array([np.mean([dice(pair(seed), label) for label in range(1, 14)]) for seed in SEEDS])
    assert 0.4 < scores.mean() < 0.7
    assert scores.max() < 0.9
    assert 0.4 < np.mean([dice(pair(seed), CORTEX) for seed in SEEDS]) < 0.75
    sizes = [
        [(labels == LEFT_VENTRICLE).sum() for labels in (pair(seed).fixed_labels, pair(seed).moving_labels)]
        for seed in SEEDS
    ]
    ratios = np.array([max(two) / max(min(two), 1) for two in sizes])
    assert ratios.max() > 2
    assert np.median(ratios) < 2.5


@pytest.mark.parametrize("kind", ["head", "shapes"])
def test_both_images_of_a_pair_have_the_same_contrast(kind: str) -> None:
    agreement = [np.corrcoef(*contrast(pair(seed, kind)))[0, 1] for seed in range(8)]
    assert np.median(agreement) > 0.95
    assert min(agreement) > 0.7


def test_contrasts_vary_and_most_are_like_t1() -> None:
    brighter = []
    for seed in SEEDS:
        image, labels = pair(seed).fixed, pair(seed).fixed_labels
        brighter.append(bool(image[labels == WHITE_MATTER].median() > image[labels == CORTEX].median()))
    assert len(SEEDS) / 2 < sum(brighter) < len(SEEDS)


def test_most_heads_are_brains_on_black() -> None:
    black = [float((pair(seed).fixed[pair(seed).fixed_labels == 0] == 0).float().mean()) for seed in SEEDS]
    assert np.mean(np.array(black) == 1) >= 0.6
    assert min(black) < 0.5


def test_the_axes_of_the_lattice_run_up_to_the_front_and_to_the_right() -> None:
    where = torch.stack(torch.meshgrid(*map(torch.arange, LATTICE), indexing="ij")).float()
    stem, left, right = (where[:, pair(2).fixed_labels[0] == label].mean(dim=1) for label in (12, 9, 10))
    assert (left - stem)[:2].min() > 5
    assert (right - left)[2] > 3


def test_noise_is_standard_and_smooth() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = smooth_noise((40, 50, 60), 5.0, generator, channels=4)
    assert noise.shape == (4, 40, 50, 60)
    assert abs(float(noise.mean())) < 0.1
    assert 0.9 < float(noise.std()) < 1.1
    for axis in (1, 2, 3):
        assert float(noise.diff(dim=axis).std()) < 0.35


def test_weights_keep_constants_and_lines() -> None:
    for size, knots in itertools.product((7, 20), (2, 5)):
        assert torch.allclose(spline_weights(size, knots).sum(1), torch.ones(size), atol=1e-6)
    line = spline_weights(20, 5) @ torch.arange(8.0)
    assert torch.allclose(line.diff(), torch.full((19,), 0.25), atol=1e-5)


def test_flows_of_opposite_velocities_are_inverse() -> None:
    generator = torch.Generator().manual_seed(3)
    velocity = 2.0 * smooth_noise((32, 32, 32), 12.0, generator, 3)
    forward, backward = integrate(velocity), integrate(-velocity)
    there_and_back = forward + sample(backward, identity_points((32, 32, 32)) + forward)
    # Away from the border, where the flow leaves the lattice.
    inner = there_and_back[:, 8:-8, 8:-8, 8:-8].norm(dim=0)
    assert float(forward.norm(dim=0).mean()) > 2
    assert float(inner.mean()) < 0.05
    assert float(inner.max()) < 0.2

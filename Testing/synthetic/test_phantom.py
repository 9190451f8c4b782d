import numpy as np
import pytest

from GradProjIOLib.errors import InputError
from GradProjIOLib.synthetic.phantom import LABELS, PhantomPair, make_pair


@pytest.fixture(scope="module")
def pair() -> PhantomPair:
    return make_pair(seed=0)


@pytest.fixture(scope="module")
def small_pair() -> PhantomPair:
    """The moving image on a lattice of its own, brains only."""
    return make_pair(seed=3, shape=(48, 56, 48), spacing=4.0, with_skull=False, common_lattice=False)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over all structures."""
    scores = []
    for label in LABELS:
        a, b = first == label, second == label
        scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean(scores))


def center(pair: PhantomPair, label: int) -> np.ndarray:
    index = np.argwhere(pair.fixed_labels.array == label).mean(axis=0)[::-1]
    return pair.fixed.affine[:3, :3] @ index + pair.fixed.affine[:3, 3]


def test_every_structure_is_there_in_both_images(pair: PhantomPair) -> None:
    for labels in (pair.fixed_labels, pair.moving_labels):
        values, counts = np.unique(labels.array, return_counts=True)
        assert set(values) == {0, *LABELS}
        assert counts.min() > 100


def test_the_deformation_is_the_truth(pair: PhantomPair) -> None:
    warped = pair.deformation.warp(pair.moving_labels, pair.fixed, "nearest")
    assert 0.55 < dice(pair.fixed_labels.array, pair.moving_labels.array) < 0.7
    assert dice(pair.fixed_labels.array, warped.array) > 0.9
    image = pair.deformation.warp(pair.moving, pair.fixed)
    head = pair.fixed.array > 20
    before = np.corrcoef(pair.fixed.array[head], pair.moving.array[head])[0, 1]
    after = np.corrcoef(pair.fixed.array[head], image.array[head])[0, 1]
    assert after > 0.93 > 0.85 > before


def test_the_deformation_is_the_truth_between_two_lattices(small_pair: PhantomPair) -> None:
    assert small_pair.moving.shape != small_pair.fixed.shape
    assert np.ptp(small_pair.moving.spacing) > 1
    warped = small_pair.deformation.warp(small_pair.moving_labels, small_pair.fixed, "nearest")
    assert dice(small_pair.fixed_labels.array, warped.array) > 0.75


def test_the_deformation_is_sizable_and_does_not_fold(pair: PhantomPair) -> None:
    displacement = pair.deformation.displacement.astype(float)
    length = np.linalg.norm(displacement, axis=-1)
    assert 3.5 < length[pair.fixed.array > 20].mean() < 4.5
    assert length.max() < 15
    assert length[[0, -1]].max() < 1
    slopes = np.stack(np.gradient(displacement, axis=(2, 1, 0)), axis=-1)
    determinant = np.linalg.det(np.eye(3) + slopes @ np.linalg.inv(pair.fixed.affine[:3, :3]))
    assert determinant.min() > 0.2
    assert determinant.max() > 1.3


def test_geometry_errors_would_show(pair: PhantomPair) -> None:
    direction = pair.fixed.affine[:3, :3] / pair.fixed.spacing
    assert (np.abs(np.diag(direction)) < 0.9999).all()
    middle = pair.fixed.affine @ [*((np.array(pair.fixed.shape[::-1]) - 1) / 2), 1]
    assert (np.abs(middle[:3]) > 10).all()
    labels = pair.fixed_labels.array
    for axis in range(3):
        assert dice(np.flip(labels, axis), labels) < 0.5


@pytest.mark.parametrize(("left", "right"), [(3, 4), (5, 6), (7, 8), (9, 10)])
def test_left_and_right_are_the_subjects(pair: PhantomPair, left: int, right: int) -> None:
    assert center(pair, right)[0] - center(pair, left)[0] > 10


def test_up_and_front(pair: PhantomPair) -> None:
    cerebellum, stem, caudate = (center(pair, label) for label in (11, 12, 9))
    assert cerebellum[1] < stem[1] < caudate[1]
    assert stem[2] < caudate[2]


def test_brains_only_are_zero_outside(small_pair: PhantomPair) -> None:
    fixed = (small_pair.fixed, small_pair.fixed_labels)
    moving = (small_pair.moving, small_pair.moving_labels)
    for image, labels in (fixed, moving):
        outside = image.array == 0
        assert 0.6 < outside.mean() < 0.95
        assert not labels.array[outside].any()


def test_same_seed_same_pair_other_seed_other_pair() -> None:
    arguments = {"shape": (24, 28, 24), "spacing": 8.0}
    first, again, other = (make_pair(seed, **arguments) for seed in (5, 5, 6))
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        assert np.array_equal(getattr(first, name).array, getattr(again, name).array)
        assert not np.array_equal(getattr(first, name).array, getattr(other, name).array)
    assert np.array_equal(first.deformation.displacement, again.deformation.displacement)
    assert not np.array_equal(first.fixed.array, first.moving.array)


def test_too_small_a_shape_is_refused() -> None:
    with pytest.raises(InputError, match="at least 16"):
        make_pair(shape=(96, 112, 12))

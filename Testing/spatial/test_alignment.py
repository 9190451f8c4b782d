"""Linear alignment: known maps are recovered, from far away, across contrasts, and bit for bit again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_affine, smooth_noise
from scipy import ndimage
from scipy.spatial.transform import Rotation

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import lattice_affine
from GradProjIOLib.geometry.transform_files import linear_from_sitk
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial import alignment
from GradProjIOLib.spatial.alignment import align, align_landmarks, mutual_information, overlap
from GradProjIOLib.spatial.deformation import Deformation

FIXED_AFFINE = oblique_affine((4.0, 3.5, 5.0), (6, -9, 12), (-60, -80, 10))


def head(shape=(34, 44, 38)) -> np.ndarray:
    """Something with an inside, an outside, and no symmetry: [k, j, i] between 0 and 300."""
    k, j, i = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = (k / 0.75) ** 2 + (j / 0.8) ** 2 + (i / 0.6) ** 2 < 1
    inside &= ~((k < -0.2) & (j > 0.3))
    return (ndimage.gaussian_filter(inside * (100 + smooth_noise(shape, 5, 2.5)), 0.5)).astype(np.float32)


def turned(degrees, shift, about, scales=(1, 1, 1)) -> np.ndarray:
    """Turn and stretch about a point (RAS mm), then shift."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(degrees, degrees=True).as_matrix() @ np.diag(scales)
    matrix[:3, 3] = about + np.array(shift) - matrix[:3, :3] @ about
    return matrix


@pytest.fixture(scope="module")
def fixed() -> Volume:
    return Volume(head(), FIXED_AFFINE, "fixed")


def middle(volume: Volume) -> np.ndarray:
    return (volume.affine @ [*((np.array(volume.shape[::-1]) - 1) / 2), 1])[:3]


def moved(fixed: Volume, matrix: np.ndarray) -> Volume:
    """What a scanner would have seen of the fixed image after `matrix`, on another lattice."""
    shape = (40, 42, 50)
    affine = oblique_affine((4.2, 4.6, 4.0), (-8, 3, -5), (0, 0, 0))
    affine[:3, 3] = (matrix @ [*middle(fixed), 1])[:3] - affine[:3, :3] @ (np.array(shape[::-1]) - 1) / 2
    affine[:3, 3] += (9, -7, 5)
    back = Deformation.from_linear(np.linalg.inv(matrix), shape, affine)
    return Volume(back.warp(fixed, (shape, affine)).array, affine, "moving")


def largest_error(fixed: Volume, found: np.ndarray, true: np.ndarray) -> float:
    """Largest distance (mm) between two maps over the object in the fixed image."""
    index = np.argwhere(fixed.array > 50)[:, ::-1]
    points = np.column_stack([index, np.ones(len(index))]) @ fixed.affine.T
    return float(np.linalg.norm(points @ (found - true).T, axis=1).max())


@pytest.mark.parametrize(
    ("degrees", "shift"), [((4, -3, 6), (5, -8, 3)), ((40, 0, 0), (50, 0, 0)), ((-20, 25, 22), (-30, 28, 30))]
)
def test_a_rigid_map_is_recovered(fixed, degrees, shift):
    true = turned(degrees, shift, middle(fixed))
    found = align(fixed, moved(fixed, true), "rigid")
    assert largest_error(fixed, found, true) < 1.5
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-6)


def test_an_affine_map_is_recovered(fixed):
    true = turned((12, -10, 15), (20, -15, 10), middle(fixed), (1.12, 0.9, 1.05))
    found = align(fixed, moved(fixed, true), "affine")
    assert largest_error(fixed, found, true) < 2.5


@pytest.mark.parametrize("role", ["fixed", "moving"])
def test_what_a_mask_hides_does_not_pull(fixed, role):
    """The lower half of the head has moved against the rest in one of the images, as a neck can."""
    true = turned((10, -8, 12), (9, -12, 7), middle(fixed))
    pair = {"fixed": fixed, "moving": moved(fixed, true)}
    array = pair[role].array.copy()
    hidden = len(array) // 2
    array[:hidden] = np.roll(array[:hidden], 4, axis=2)
    pair[role] = replace(pair[role], array=array)
    mask = np.ones((20, 3, 3), np.uint8)
    mask[:10] = 0
    masks = {f"{role}_mask": Volume(mask, lattice_affine(pair[role].affine, array.shape, mask.shape), "mask")}
    errors = [largest_error(fixed, align(**pair, kind="rigid", **given), true) for given in ({}, masks)]
    assert errors[1] < 3 < 15 < errors[0], errors


def test_an_empty_mask_is_refused(fixed):
    empty = Volume(np.zeros(fixed.shape, np.uint8), fixed.affine, "mask.nii")
    with pytest.raises(InputError, match=r"mask\.nii is empty"):
        align(fixed, fixed, "rigid", moving_mask=empty)


def test_another_contrast_is_aligned(fixed):
    true = turned((10, 5, -14), (12, 10, -20), middle(fixed))
    moving = moved(fixed, true)
    inverted = np.where(moving.array > 20, 400 - moving.array, 0)
    found = align(fixed, Volume(inverted, moving.affine), "rigid")
    assert largest_error(fixed, found, true) < 2


def test_centers_bring_the_objects_together(fixed):
    true = turned((0, 0, 0), (60, -45, 30), middle(fixed))
    found = align(fixed, moved(fixed, true), "centers")
    np.testing.assert_array_equal(found[:3, :3], np.eye(3))
    assert largest_error(fixed, found, true) < 3


def test_centers_of_images_without_background_are_those_of_their_fields_of_view():
    first = Volume(smooth_noise((20, 21, 22), 0), FIXED_AFFINE)
    second = Volume(smooth_noise((24, 18, 20), 1), oblique_affine((4, 4, 4), (5, 5, 5), (100, 0, 0)))
    found = align(first, second, "centers")
    np.testing.assert_allclose(found[:3, 3], middle(second) - middle(first), atol=1e-6)


def test_none_is_the_identity(fixed):
    np.testing.assert_array_equal(align(fixed, fixed, "none"), np.eye(4))


def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads():
    fixed = Volume(head((16, 20, 18)), FIXED_AFFINE @ np.diag([2, 2, 2, 1]))
    moving = moved(fixed, turned((8, -6, 10), (10, 5, -5), middle(fixed)))
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        results = []
        for threads in (1, 3):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            results.append(align(fixed, moving, "affine", seed=3))
            assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads
        np.testing.assert_array_equal(*results)
        assert not np.array_equal(results[0], align(fixed, moving, "affine", seed=4))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def test_what_cannot_be_aligned_is_said_in_one_sentence(fixed, monkeypatch):
    monkeypatch.setattr(alignment, "LARGEST_STRETCH", 1.0)
    with pytest.raises(InputError, match=r"^moving could not be aligned to fixed .*stretched.*centers\.$"):
        align(fixed, moved(fixed, np.eye(4)), "rigid")
    monkeypatch.setattr(alignment, "_optimized", lambda *arguments: None)
    with pytest.raises(InputError, match=r"do not overlap.*\.$"):
        align(fixed, moved(fixed, np.eye(4)), "rigid")


def test_unknown_kinds_are_refused(fixed):
    with pytest.raises(InputError, match="none, centers, rigid, affine"):
        align(fixed, fixed, "elastic")


def test_overlap_of_fields_of_view(fixed):
    assert overlap(fixed, fixed, np.eye(4)) == 1
    extent = fixed.affine[:3, 0] * fixed.shape[2]
    for part in (0.25, 0.5, 1.5):
        shifted = np.eye(4)
        shifted[:3, 3] = part * extent
        assert overlap(fixed, fixed, shifted) == pytest.approx(max(0, 1 - part), abs=0.03)


def test_mutual_information_of_known_joints():
    first = np.repeat(np.arange(4.0), 250)
    assert mutual_information(first, first**2) == pytest.approx(np.log(4))
    independent = np.tile(np.arange(5.0), 200)
    assert mutual_information(first, independent) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_the_real_pair_is_aligned(shared_data):
    from GradProjIOLib.geometry.image_files import read_labels, read_volume

    read = {name: read_volume(shared_data / f"native_subject_{name}.nii.gz") for name in "ab"}
    labels = {name: read_labels(shared_data / f"native_subject_{name}_labels.nii.gz") for name in "ab"}
    for kind, least in (("rigid", 0.46), ("affine", 0.56)):
        matrix = align(read["b"], read["a"], kind)
        linear = Deformation.from_linear(matrix, (8, 8, 8), _eighth(read["b"]))
        warped = linear.warp(labels["a"], labels["b"], "nearest").array
        found = [
            2
            * ((warped == label) & (labels["b"].array == label)).sum()
            / ((warped == label).sum() + (labels["b"].array == label).sum())
            for label in range(1, 14)
        ]
        assert np.mean(found) > least


def _eighth(volume: Volume) -> np.ndarray:
    """The affine of 8 samples per axis from the first voxel to beyond the last, where linear maps are exact."""
    return volume.affine @ np.diag([*(np.array(volume.shape[::-1]) / 7), 1.0])


def by_simpleitk(fixed, moving, transform):
    """The map (RAS mm) that SimpleITK finds for pairs of points."""
    lps = [((points * [-1, -1, 1]).ravel().tolist()) for points in (fixed, moving)]
    return linear_from_sitk(sitk.LandmarkBasedTransformInitializer(transform, *lps))


class TestLandmarks:
    """Pairs in an oblique, anisotropic image far from the origin, and where a scanner saw them after a map."""

    def pairs(self, fixed, count=7, noise=1.0, scales=(1.2, 0.9, 1.05)):
        rng = np.random.default_rng(0)
        index = rng.uniform(0.2, 0.8, (count, 3)) * np.array(fixed.shape[::-1])
        points = index @ fixed.affine[:3, :3].T + fixed.affine[:3, 3] + 300
        matrix = turned([30, -20, 70], (40, -10, 25), middle(fixed) + 300, scales)
        return points, points @ matrix[:3, :3].T + matrix[:3, 3] + rng.normal(0, noise, (count, 3)), matrix

    def test_the_true_map_is_found(self, fixed):
        for kind, scales in (("landmarks_rigid", (1, 1, 1)), ("landmarks_affine", (1.2, 0.9, 1.05))):
            points, partners, matrix = self.pairs(fixed, 4, 0.0, scales)
            np.testing.assert_allclose(align_landmarks(points, partners, kind), matrix, atol=1e-8)

    def test_it_is_the_one_that_simpleitk_finds(self, fixed):
        points, partners, _ = self.pairs(fixed)
        for kind, transform in (
            ("landmarks_rigid", sitk.VersorRigid3DTransform()),
            ("landmarks_affine", sitk.AffineTransform(3)),
        ):
            found = align_landmarks(points, partners, kind)
            expected = by_simpleitk(points, partners, transform)
            np.testing.assert_allclose(
                points @ found[:3, :3].T + found[:3, 3], points @ expected[:3, :3].T + expected[:3, 3], atol=1e-3
            )

    def test_three_pairs_are_enough_to_turn(self, fixed):
        points, partners, matrix = self.pairs(fixed, 3, 0.0, (1, 1, 1))
        np.testing.assert_allclose(align_landmarks(points, partners, "landmarks_rigid"), matrix, atol=1e-8)

    def test_too_few_or_flat_ones_are_refused(self, fixed):
        points, partners, _ = self.pairs(fixed, 8)
        line, plane = points * [1, 0, 0], points * [1, 1, 0]
        for first, second, kind, words in (
            (points[:2], partners[:2], "landmarks_rigid", "at least 3 pairs of landmarks, and there are 2"),
            (points[:3], partners[:3], "landmarks_affine", "at least 4 pairs"),
            (line, partners, "landmarks_rigid", "fixed landmarks lie on one line"),
            (points, plane, "landmarks_affine", "moving landmarks lie in one plane"),
            (points, -points, "landmarks_affine", "stretch or mirror"),
            (points, 5 * points, "landmarks_affine", "stretch or mirror"),
        ):
            with pytest.raises(InputError, match=words):
                align_landmarks(first, second, kind)

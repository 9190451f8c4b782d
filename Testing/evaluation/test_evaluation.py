"""Metrics against independent implementations, on random and on real labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import metrics as evaluation
from GradProjIOLib.evaluation import statistics
from GradProjIOLib.geometry.image_files import read_labels
from GradProjIOLib.geometry.landmarks import Landmarks, match_landmarks
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation

DATA = Path(__file__).parents[3] / "shared" / "data"
SPACING = (0.7, 1.3, 2.5)


def blobs(seed: int, structures: int = 4, shape: tuple[int, int, int] = (26, 31, 37)) -> np.ndarray:
    """Smooth random labels 0 … structures that touch one another and the border."""
    noise = np.random.default_rng(seed).normal(size=(structures + 1, *shape))
    return np.argmax([ndimage.gaussian_filter(channel, 2.5) for channel in noise], axis=0)


def monai_overlap(fixed: np.ndarray, warped: np.ndarray, spacing) -> tuple[float, float]:
    """Dice and HD95 of two masks by MONAI: its surface elements, their areas, distances by a KD-tree."""
    metrics = pytest.importorskip("monai.metrics")
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    masks = [torch.from_numpy(mask) for mask in (warped, fixed)]
    dice = metrics.compute_dice(*(mask[None, None].float() for mask in masks)).item()
    sampling = [float(step) for step in reversed(spacing)]
    warped_edges, fixed_edges, warped_area, fixed_area = get_mask_edges(*masks, spacing=sampling)
    percentiles = []
    directions = (warped_edges, fixed_edges, warped_area), (fixed_edges, warped_edges, fixed_area)
    for start, end, area in directions:
        distances = get_surface_distance(start, end, spacing=sampling).numpy()
        order = np.argsort(distances)
        share = np.cumsum(area[start].numpy()[order].astype(np.float64))
        percentiles.append(distances[order][np.searchsorted(share, 0.95 * share[-1])])
    return dice, max(percentiles)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_labels_match_monai(seed, spacing):
    fixed, warped = blobs(seed), blobs(seed + 100)
    found = evaluation.label_overlap(fixed, warped, spacing)
    assert [overlap["structure"] for overlap in found] == [1, 2, 3, 4]
    for overlap in found:
        structure, *values = overlap.values()
        expected = monai_overlap(fixed == structure, warped == structure, spacing)
        assert values == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(not DATA.exists(), reason="the real pair is not here")
def test_real_labels_match_monai():
    fixed, moving = (read_labels(DATA / f"aligned_subject_{subject}_labels.nii.gz") for subject in "ba")
    found = evaluation.label_overlap(fixed.array, moving.array, fixed.spacing)
    assert len(found) == 13
    for overlap in found:
        structure, *values = overlap.values()
        if structure in (2, 10):  # the two cortices alone would take longer than all others together
            continue
        expected = monai_overlap(fixed.array == structure, moving.array == structure, fixed.spacing)
        assert values == pytest.approx(expected, rel=1e-6)
    assert evaluation.label_columns(found, 0.0)["dice"] == pytest.approx(0.5384, abs=5e-5)


def test_maximum_distance_of_boxes():
    """Two boxes one of which is shifted: the distance is the shift, in mm, along the axis it is made on."""
    for axis, step in enumerate(reversed(SPACING)):
        first = np.zeros((20, 20, 20), bool)
        first[5:10, 5:10, 5:10] = True
        second = np.roll(first, 4, axis=axis)
        assert evaluation.hd95(first, second, SPACING) == pytest.approx(4 * step)


def test_identical_labels():
    labels = blobs(3)
    for overlap in evaluation.label_overlap(labels, labels, SPACING):
        assert (overlap["dice"], overlap["hd95_mm"]) == (1, 0)


def test_symmetry_and_order_of_structures():
    first, second = blobs(4), blobs(5)
    forward = evaluation.label_overlap(first, second, SPACING, [3, 1])
    backward = evaluation.label_overlap(second, first, SPACING, [3, 1])
    assert [overlap["structure"] for overlap in forward] == [3, 1]
    assert forward == backward


def test_absent_and_lost_structures():
    fixed, warped = blobs(6), blobs(7)
    moving = warped.copy()
    warped[warped == 2] = 0
    moving[moving == 3] = 0
    fixed[fixed == 4] = 0
    by_structure = {
        overlap["structure"]: overlap
        for overlap in evaluation.label_overlap(fixed, warped, SPACING, [1, 2, 3, 4, 9], moving)
    }
    assert by_structure[2]["dice"] == 0
    assert by_structure[2]["hd95_mm"] == np.inf
    for absent in (3, 4, 9):
        assert np.isnan([by_structure[absent]["dice"], by_structure[absent]["hd95_mm"]]).all()
    overlaps = list(by_structure.values())
    means = evaluation.label_columns(overlaps, 0.0)
    assert (means["dice"], means["hd95_mm"]) == (pytest.approx(by_structure[1]["dice"] / 2), np.inf)
    nothing = evaluation.label_columns(overlaps[2:], 0.0)
    assert np.isnan([nothing["dice"], nothing["hd95_mm"]]).all()


def test_background_and_negative_labels():
    """Label 0 can be asked for, as LUMIR does, and negative values are labels like others."""
    fixed, warped = blobs(8), blobs(9)
    zero, one = evaluation.label_overlap(fixed, warped, SPACING, [0, 1])
    expected = monai_overlap(fixed == 0, warped == 0, SPACING)
    assert (zero["dice"], zero["hd95_mm"]) == pytest.approx(expected, rel=1e-6)
    shifted = evaluation.label_overlap(fixed - 2, warped - 2, SPACING, [-1])
    assert shifted[0] == {**one, "structure": -1}


def test_empty_masks():
    mask = np.ones((9, 9, 9), bool)
    assert evaluation.hd95(mask, ~mask, SPACING) == np.inf
    assert np.isnan(evaluation.hd95(~mask, ~mask, SPACING))


def test_labels_that_cannot_be_compared():
    with pytest.raises(InputError, match="resample"):
        evaluation.label_overlap(blobs(0), blobs(0)[1:], SPACING)
    with pytest.raises(InputError, match="no structure"):
        evaluation.label_overlap(np.zeros((9, 9, 9), int), np.zeros((9, 9, 9), int), SPACING)


def test_label_centers():
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:5, 3, 4:6] = 7
    centers = evaluation.label_centers(labels, [7, 1])
    np.testing.assert_allclose(centers[0], [3, 3, 4.5])
    assert np.isnan(centers[1]).all()


def test_partners_of_landmarks():
    assert match_landmarks(["a", "b", "c"], ["c", "a", "b"]) == [1, 2, 0]
    assert match_landmarks(["F-1", "F-2"], ["M-1", "M-2"]) == [0, 1]
    assert match_landmarks(["a", "a"], ["a", "b"]) == [0, 1]
    with pytest.raises(InputError, match="landmark b has no moving one"):
        match_landmarks(["a", "b"], ["a", "c"])
    with pytest.raises(InputError, match="same number"):
        match_landmarks(["a", "b"], ["a"])


def test_summary():
    summary = statistics.summarize([1.0, 2.0, 4.0, np.nan])
    assert summary.count == 3
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.standard_deviation == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert statistics.summarize([]).count == 0
    assert np.isnan(statistics.summarize([5.0]).standard_deviation)
    assert statistics.summarize([1.0, np.inf]).mean == np.inf


def test_paired_comparison():
    generator = np.random.default_rng(0)
    reference = generator.normal(0.75, 0.03, 12)
    other = reference + generator.normal(0.002, 0.002, 12)
    found = statistics.compare_paired(reference, other)
    interval = stats.ttest_rel(other, reference).confidence_interval(0.95)
    assert found.count == 12
    assert found.mean_difference == pytest.approx((other - reference).mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # The exact distribution of the signed ranks, counted over all 2^12 signs.
    ranks = stats.rankdata(np.abs(other - reference))
    signs = (np.arange(2**12)[:, None] >> np.arange(12)) & 1
    positive = ranks[other > reference].sum()
    extreme = np.abs(signs @ ranks - ranks.sum() / 2) >= abs(positive - ranks.sum() / 2) - 1e-9
    assert found.p_value == pytest.approx(extreme.mean())


def test_paired_comparison_of_few_or_equal_cases():
    equal = statistics.compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (equal.mean_difference, equal.low, equal.high, equal.p_value) == (0, 0, 0, 1)
    single = statistics.compare_paired([1.0, np.nan, np.inf], [3.0, 2.0, np.inf])
    assert (single.count, single.mean_difference) == (1, 2)
    assert np.isnan(single.p_value)
    assert statistics.compare_paired([], []).count == 0


OBLIQUE = np.array([[1.1, 0.2, 0, -20], [-0.2, 1.1, 0, 5], [0, 0, 2.0, -15], [0, 0, 0, 1]])


def wave(shape: tuple[int, int, int] = (20, 24, 28), strength: float = 4.0) -> Deformation:
    """A smooth random deformation of `strength` mm on an oblique lattice."""
    noise = np.random.default_rng(0).normal(size=(3, *shape))
    smooth = np.stack([ndimage.gaussian_filter(channel, 3) for channel in noise], axis=-1)
    return Deformation(strength * smooth / smooth.std(), OBLIQUE)


def test_landmark_errors_match_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    deformation = wave()
    deformation.write(tmp_path / "transform.h5")
    transform = sitk.ReadTransform(str(tmp_path / "transform.h5"))
    generator = np.random.default_rng(1)
    index = generator.uniform(1, [26, 22, 18], size=(40, 3))
    fixed = index @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    moving = fixed + generator.normal(0, 5, fixed.shape)
    to_lps = np.array([-1.0, -1.0, 1.0])
    mapped = np.array([transform.TransformPoint(point) for point in (fixed * to_lps).tolist()]) * to_lps
    names = [str(number) for number in range(40)]
    found = evaluation.evaluate_landmarks(deformation, Landmarks(names, fixed), Landmarks(names, moving))
    assert [error["name"] for error in found["landmarks"]] == names
    expected = np.linalg.norm(mapped - moving, axis=1)
    np.testing.assert_allclose([error["after_mm"] for error in found["landmarks"]], expected, atol=1e-4)
    before = [error["before_mm"] for error in found["landmarks"]]
    np.testing.assert_allclose(before, np.linalg.norm(fixed - moving, axis=1))
    assert (found["tre_mm"], found["tre_before_mm"]) == pytest.approx((expected.mean(), np.mean(before)), abs=1e-4)


def test_landmarks_are_matched_by_name():
    fixed = np.array([[0.0, 0, 0], [5, 0, 0]])
    sides = Landmarks(["a", "b"], fixed), Landmarks(["b", "a"], fixed[::-1])
    found = evaluation.evaluate_landmarks(evaluation.IDENTITY, *sides)["landmarks"]
    assert [tuple(error.values()) for error in found] == [("a", 0, 0), ("b", 0, 0)]


def test_labels_on_different_lattices():
    """Labels that moved by whole millimetres, on a lattice of their own, come back exactly."""
    fixed = Volume(blobs(10), np.diag([1.0, 1, 1, 1]), "fixed labels")
    flipped = np.array([[1.0, 0, 0, 3], [0, -1, 0, 30 - 2], [0, 0, 1, 4], [0, 0, 0, 1]])
    moving = Volume(np.flip(fixed.array, axis=1), flipped)
    shift = Deformation(np.broadcast_to([3.0, -2.0, 4.0], (2, 2, 2, 3)), np.eye(4))
    found = evaluation.evaluate_labels(shift, fixed, moving)
    assert (found["dice"], found["hd95_mm"]) == (1, 0)
    assert 0 < found["dice_before"] < 0.7
    assert len(found["structures"]) == 4


def test_folding_inside_a_mask():
    """The fold of FACTS' second field lies inside a box; there it counts in full, elsewhere not at all."""
    x, y, z = np.meshgrid(np.arange(24), np.arange(28), np.arange(32), indexing="ij")
    along_x = -1.5 * (x - 11.5) * np.exp(-((x - 11.5) ** 2 + (y - 13.5) ** 2 + (z - 15.5) ** 2) / 32)
    displacement = np.stack([along_x, 0 * along_x, 0 * along_x], axis=-1).transpose(2, 1, 0, 3)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    deformation = Deformation(displacement, affine)
    reference = Volume(np.zeros(displacement.shape[:3]), affine)
    box = np.zeros((32 // 2, 28 // 2, 24 // 2), np.uint8)
    box[4:12, 3:11, 3:9] = 1
    coarse = np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] = 0.5
    found = evaluation.evaluate_folding(deformation, reference, Volume(box, coarse))
    outside = evaluation.evaluate_folding(deformation, reference, Volume(1 - box, coarse))
    voxels = 24 * 28 * 32
    assert found["ndv_percent"] * voxels / 100 == pytest.approx(18.774128, rel=1e-5)
    assert found["ndv_percent_in_mask"] * 8 * box.sum() / 100 == pytest.approx(18.774128, rel=1e-5)
    assert (found["folded_voxels"], found["folded_voxels_in_mask"]) == (96, 96)
    assert (outside["ndv_percent_in_mask"], outside["folded_voxels_in_mask"]) == (0, 0)
    spreads = found["std_log_jacobian_in_mask"], found["std_log_jacobian"], outside["std_log_jacobian_in_mask"]
    assert spreads[0] > spreads[1] > spreads[2] > 0


def test_mask_outside_of_the_image():
    far = np.array([[1.0, 0, 0, 900], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    mask = Volume(np.ones((4, 4, 4), np.uint8), far, "some mask")
    with pytest.raises(InputError, match="some mask marks no voxel"):
        evaluation.evaluate_folding(wave(), Volume(np.zeros((20, 24, 28)), OBLIQUE), mask)

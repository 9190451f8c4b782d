"""Landmarks that guide a registration."""

import json

import numpy as np
import pytest
import torch

from GradProjIOLib.commands.main import main
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.landmarks import Landmarks
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_affine, lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.landmarks import LandmarkPairs
from GradProjIOLib.registration.register import register
from GradProjIOLib.spatial.deformation import Deformation, as_deformation
from GradProjIOLib.synthetic.phantom import make_pair

QUICK = {"model": "none", "refine_steps": 30, "device": "cpu"}
CORNERS = np.array([[7.0, 0, -3], [-7, 3, -3], [0, -7, 4], [0, 4, 7]])


class UniformRegion:
    """Two images of one head that are of one value in a ball, and a displacement there that they cannot show."""

    def __init__(self):
        pair = make_pair(3, (48, 56, 48), 4.0, mean_displacement=2.8, noise=2)
        affine = pair.moving.affine
        brain = np.argwhere(pair.moving_labels.array > 0).mean(axis=0)[::-1]
        self.center = apply_matrix(affine, brain + np.array([9, 4, 6]))
        self.points = lattice_points(pair.moving.shape, affine)
        self.distance = np.linalg.norm(self.points - self.center, axis=-1)
        array = np.where(self.distance < 30, 100, pair.moving.array).astype(np.float32)
        noise = np.random.default_rng(1).normal(0, 1, array.shape).astype(np.float32)
        self.fixed, self.moving = Volume(array, affine, "fixed"), Volume(array + noise, affine, "moving")
        self.landmarks = self.center + CORNERS

    def truth(self, points):
        bump = np.exp(-((np.linalg.norm(points - self.center, axis=-1, keepdims=True) / 10) ** 2) / 2)
        return points + bump * np.array([5.0, -3, 4])

    def errors(self, result):
        """Mean errors in mm in the middle of the ball, and outside it."""
        off = np.linalg.norm(result.forward.map_points(self.points) - self.truth(self.points), axis=-1)
        return off[self.distance < 10].mean(), off[self.distance > 30].mean()


@pytest.fixture(scope="module")
def region():
    return UniformRegion()


@pytest.fixture(scope="module")
def unguided(region):
    return register(region.fixed, region.moving, **QUICK)


@pytest.mark.parametrize("method", ["projected", "vanilla"])
def test_landmarks_show_what_the_images_cannot(region, unguided, method):
    guided = register(region.fixed, region.moving, method=method, fixed_points=region.landmarks,
                      moving_points=region.truth(region.landmarks), **QUICK)  # fmt: skip
    inside, outside = region.errors(guided)
    before_inside, before_outside = region.errors(unguided)
    assert before_inside > 5
    assert inside < 1
    assert outside < before_outside + 0.05
    assert guided.report["jacobian"]["folded_voxels"] == 0
    assert [pair["name"] for pair in guided.report["landmarks"]] == ["1", "2", "3", "4"]
    assert all(pair["before_mm"] > 5 > 0.5 > pair["after_mm"] for pair in guided.report["landmarks"])
    assert guided.report["steps"][-1]["landmarks"] < 0.1


def test_a_wrong_landmark_changes_little_and_its_conflict_is_named(region, unguided):
    """It lies where the images show that nothing moves."""
    structure = region.points[(region.fixed.array > 60) & (region.distance > 34) & (region.distance < 40)][50]
    wrong = register(
        region.fixed, region.moving, fixed_points=[structure], moving_points=[structure + np.array([0, 5, 0])], **QUICK
    )
    assert wrong.report["similarity"] < unguided.report["similarity"] * 1.01 + 1e-3
    assert wrong.report["jacobian"]["folded_voxels"] == 0
    assert any("similarity–landmarks" in step["conflicts"] for step in wrong.report["steps"])


def test_distances_are_those_in_mm_whatever_the_lattice():
    pair = make_pair(1, (24, 28, 22), 8.0, common_lattice=False)
    fixed = pair.fixed
    initial = np.eye(4)
    shift = np.array([3.0, -2, 1])
    initial[:3, 3] = shift
    rng = np.random.default_rng(0)
    index = rng.uniform(6, 14, (5, 3))
    points = apply_matrix(fixed.affine, index)
    partners = points + shift + rng.normal(0, 4, (5, 3))
    placed = LandmarkPairs.of(points, partners).placed(initial, fixed)
    lattice = (17, 20, 13)
    affine = lattice_affine(fixed.affine, fixed.shape, lattice)
    objective = placed.on_lattice(lattice, affine, 2.0, torch.device("cpu"))
    found = objective.distances([torch.zeros(2, 3, *lattice)])
    expected = np.linalg.norm(points + shift - partners, axis=1)
    np.testing.assert_allclose(found.numpy(), [expected, expected], rtol=1e-4)
    # The field that moves the first landmark onto its partner.
    step = (partners[0] - shift - points[0]) @ np.linalg.inv(affine[:3, :3]).T
    field = torch.tensor(step / ((np.array(lattice[::-1]) - 1) / 2), dtype=torch.float32)
    both = torch.stack([field, -field]).view(2, 3, 1, 1, 1).expand(2, 3, *lattice)
    assert objective.distances([both])[:, 0].max() < 1e-3


def test_a_landmark_can_have_a_tolerance_of_its_own():
    fixed = Landmarks(
        ["a", "b", "c"], np.array([[3.0, 4, 2], [1, 2, 3], [2, 2, 2]]), tolerances=np.array([5, np.nan, 1])
    )
    moving = Landmarks(
        ["c", "b", "a"], np.array([[2.0, 2, 5], [1, 5, 3], [3, 4, 5]]), tolerances=np.array([3, np.nan, 1])
    )
    pairs = LandmarkPairs.of(fixed, moving)
    loss = pairs.on_lattice((6, 7, 8), np.eye(4), 2.0, torch.device("cpu"))([torch.zeros(2, 3, 6, 7, 8)])
    # All are 3 mm apart; the larger tolerance holds, and the setting's where none is said.
    expected = 2 * np.mean([np.sqrt(1 + (3 / tolerance) ** 2) - 1 for tolerance in (5, 2, 3)])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    reported = pairs.report(np.eye(4), as_deformation(np.eye(4)))
    assert [pair.get("tolerance_mm") for pair in reported] == [5, None, 3]
    assert LandmarkPairs.from_report({"landmarks": reported, "inputs": {}}).same_as(pairs)
    assert not LandmarkPairs.of(fixed.points, pairs.moving).same_as(pairs)


@pytest.mark.parametrize("tolerances", [[1], 1.0, [1, 0], [1, -1], [1, np.inf]])
def test_tolerances_that_are_none_are_refused(tolerances):
    points = np.array([[3.0, 4, 2], [1, 2, 3]])
    with pytest.raises(InputError, match="one positive number"):
        LandmarkPairs.of(points, Landmarks(["1", "2"], points, tolerances=tolerances))
    assert LandmarkPairs.of(points, Landmarks(["1", "2"], points, tolerances=[1, 2])).tolerances.tolist() == [1, 2]


def test_the_gradient_is_that_of_finite_differences():
    pairs = LandmarkPairs.of([[3.0, 4, 2], [1, 2, 3]], [[3.5, 3, 2], [2, 2, 3]])
    objective = pairs.on_lattice((6, 7, 8), np.eye(4), 2.0, torch.device("cpu"))
    objective.sides = tuple(side.double() for side in objective.sides)
    objective.mm_per_unit = objective.mm_per_unit.double()
    generator = torch.Generator().manual_seed(0)
    field = (0.1 * torch.randn(2, 3, 6, 7, 8, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: objective([one]), field)


def test_an_initial_deformation_places_the_moving_landmarks():
    pair = make_pair(1, (24, 28, 22), 8.0)
    points = apply_matrix(pair.fixed.affine, [[10.0, 12, 11], [8, 9, 14]])
    placed = LandmarkPairs.of(points, pair.deformation.map_points(points)).placed(pair.deformation, pair.fixed)
    np.testing.assert_allclose(placed.moving, points, atol=0.1)
    assert isinstance(pair.deformation, Deformation)


def test_landmarks_can_align_the_images_first(region):
    shift = np.array([200.0, -150, 90])
    apart = Volume(region.moving.array, region.moving.affine + np.pad(shift[:, None], ((0, 1), (3, 0))), "apart")
    points = {"fixed_points": region.landmarks, "moving_points": region.landmarks + shift}
    quick = {"model": "none", "refine_steps": 1, "samples": 10_000, "device": "cpu"}
    for align in ("landmarks_rigid", "landmarks_affine"):
        result = register(region.fixed, apart, align=align, **points, **quick)
        np.testing.assert_allclose(np.array(result.report["initial_transform"])[:3, 3], shift, atol=1e-6)
        assert all(pair["before_mm"] < 1e-6 for pair in result.report["landmarks"])
        with pytest.raises(InputError, match=f"{align} needs landmarks"):
            register(region.fixed, apart, align=align, **quick)


def test_landmarks_that_make_no_sense_are_refused(region):
    inside = region.landmarks
    for fixed, moving, words in (
        (inside, None, "in pairs"),
        (inside, inside[:2], "same number"),
        ([[0.0, 1]], [[0.0, 1]], r"\[n, 3\]"),
        (inside + 1000, inside + 1000, "lies outside"),
        ([[np.nan] * 3], [[0.0] * 3], r"\[n, 3\]"),
    ):
        with pytest.raises(InputError, match=words):
            register(region.fixed, region.moving, fixed_points=fixed, moving_points=moving, **QUICK)


def test_the_command_reads_them_from_files(region, tmp_path):
    images = [tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"]
    for volume, path in zip((region.fixed, region.moving), images, strict=True):
        write_volume(volume, path)
    files = [tmp_path / "fixed.csv", tmp_path / "moving.csv"]
    for points, path in zip((region.landmarks, region.truth(region.landmarks)[::-1]), files, strict=True):
        names = "abcd" if path is files[0] else "dcba"
        rows = (f"{x},{y},{z},{name}" for (x, y, z), name in zip(points.tolist(), names, strict=True))
        path.write_text("\n".join(["x,y,z,name", *rows]) + "\n", encoding="utf-8")
    code = main(["register", *map(str, images), "-o", str(tmp_path / "out"), "--model", "none", "--refine-steps", "8",
                 "--samples", "20000", "--device", "cpu", "--quiet", "--fixed-points", str(files[0]),
                 "--moving-points", str(files[1])])  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["landmarks"]
    assert [pair["name"] for pair in found] == list("abcd")
    assert all(pair["after_mm"] < pair["before_mm"] for pair in found)

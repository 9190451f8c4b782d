"""From two volumes to deformations: the right place in space, whatever the lattices."""

import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine, oblique_volume, smooth_noise
from scipy.spatial.transform import Rotation

from GradProjIOLib.engine import devices
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_affine, lattice_points
from GradProjIOLib.geometry.volume import Volume, to_sitk
from GradProjIOLib.models import registry
from GradProjIOLib.models.cascade import Cascade
from GradProjIOLib.registration.network import NetworkStage
from GradProjIOLib.registration.preprocessing import normalize
from GradProjIOLib.registration.register import register
from GradProjIOLib.registration.report import LARGE_SPREAD
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.synthetic import phantom

DIRECT = Settings(model="compact", method="direct", device="cpu")


def points_in(volume, count=200, seed=0):
    """Random points in RAS mm well inside a volume."""
    index = np.random.default_rng(seed).uniform(0.2, 0.8, (count, 3)) * (np.array(volume.shape[::-1]) - 1)
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def axes_of(codes):
    """The same letters with R, A and S for both directions of an axis."""
    return codes.translate(str.maketrans("LPI", "RAS"))


def stored_as(volume, codes):
    """The same image with its voxels stored along other axes, such as LPS."""
    image = nibabel.Nifti1Image(volume.array.T, volume.affine)
    wanted = nibabel.orientations.axcodes2ornt(codes)
    change = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), wanted)
    image = image.as_reoriented(change)
    return Volume(np.ascontiguousarray(np.asanyarray(image.dataobj).T), image.affine, volume.name)


def rigid(degrees, shift):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def untrained(name, weights, device):
    """In place of ``registry.load``: a network that starts as the identity."""
    model = registry.find(name)
    return registry.LoadedModel(model, registry.build(model), "untrained", "0" * 64)


@pytest.fixture
def moved_network(monkeypatch):
    """A compact network whose last layers are not zero, so that direct inference deforms."""

    def load(*arguments):
        loaded = untrained(*arguments)
        torch.manual_seed(0)
        for stage in loaded.network.stages:
            torch.nn.init.normal_(stage.head.weight, std=0.02)
        return loaded

    monkeypatch.setattr(registry, "load", load)


@pytest.fixture(scope="module")
def heads():
    """Small phantoms on two different oblique, anisotropic lattices, with the true deformation."""
    return phantom.make_pair(0, (28, 34, 30), spacing=6.4, with_skull=False, common_lattice=False)


class TestGeometry:
    def test_without_deformation_the_map_is_the_initial_transform(self, fixed_volume, moving_volume, identity_network):
        matrix = rigid((12, -7, 20), (3, -4, 5))
        found = register(fixed_volume, moving_volume, DIRECT, initial_transform=matrix)
        points = points_in(fixed_volume)
        expected = points @ matrix[:3, :3].T + matrix[:3, 3]
        np.testing.assert_allclose(found.forward.map_points(points), expected, atol=1e-3)
        points = points_in(moving_volume)
        expected = (points - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
        np.testing.assert_allclose(found.inverse.map_points(points), expected, atol=1e-3)

    def test_files_map_the_same_points_in_simpleitk(self, fixed_volume, moving_volume, moved_network, tmp_path):
        matrix = rigid((5, 3, -8), (2, 1, -3))
        found = register(fixed_volume, moving_volume, DIRECT, initial_transform=matrix)
        found.write(tmp_path / "result")
        flip = np.array([-1, -1, 1])
        for name, deformation, volume in (
            ("transform.h5", found.forward, fixed_volume),
            ("inverse_transform.h5", found.inverse, moving_volume),
        ):
            transform = sitk.ReadTransform(str(tmp_path / "result" / name))
            points = points_in(volume)
            expected = [flip * transform.TransformPoint((flip * point).tolist()) for point in points]
            mapped = deformation.map_points(points)
            np.testing.assert_allclose(mapped, expected, atol=1e-3)
            assert np.linalg.norm(mapped - points, axis=1).max() > 1

    def test_an_affine_alignment_goes_on_outside_the_fixed_image(self, heads, moved_network, tmp_path):
        matrix = rigid((10, -6, 15), (6, -9, 4))
        moving = replace(heads.moving, affine=matrix @ heads.moving.affine)
        found = register(heads.fixed, moving, DIRECT, initial_transform=matrix)
        points = points_in(heads.fixed)
        assert np.linalg.norm(found.forward.map_points(points) - apply_matrix(matrix, points), axis=1).max() > 1
        found.write(tmp_path / "result")
        flip = np.array([-1, -1, 1])
        outside = points + 2 * np.array(heads.fixed.shape[::-1]) * heads.fixed.spacing
        np.testing.assert_allclose(found.forward.map_points(outside), apply_matrix(matrix, outside), atol=1e-4)
        for name, linear in (("transform.h5", matrix), ("inverse_transform.h5", np.linalg.inv(matrix))):
            transform = sitk.ReadTransform(str(tmp_path / "result" / name))
            mapped = [flip * transform.TransformPoint((flip * point).tolist()) for point in outside]
            np.testing.assert_allclose(mapped, apply_matrix(linear, outside), atol=1e-4)

    @pytest.mark.parametrize("turned", [False, True])
    def test_the_way_back_is_the_inverse(self, identity_network, turned):
        lattice = (40, 44, 42)
        noise = smooth_noise((*lattice, 3), 0, (5, 5, 5, 0)) - 100
        affine = oblique_affine((2, 2, 2), (12, -20, 8), (-28, 4, 30))
        matrix = rigid((10, -6, 15), (6, -9, 4)) if turned else np.eye(4)
        initial = Deformation(noise / 15, affine, matrix)
        fixed = Volume(smooth_noise(lattice, 1), affine, "fixed")
        moving = Volume(smooth_noise(lattice, 2), matrix @ affine, "moving")
        found = register(fixed, moving, DIRECT, initial_transform=initial)
        points = points_in(fixed, 2000)
        mapped = found.forward.map_points(points)
        assert np.linalg.norm(mapped - apply_matrix(matrix, points), axis=1).max() > 4
        distance = np.linalg.norm(found.inverse.map_points(mapped) - points, axis=1)
        assert distance.mean() <= 0.05
        assert np.quantile(distance, 0.999) <= 0.5
        # The report looks at the edges of the image, too.
        error = found.report["inverse_error_mm"]
        assert distance.mean() < error["mean"] <= 0.05
        assert distance.max() < error["max"] < 1
        corner = lattice_affine(moving.affine, lattice, found.inverse.shape)
        np.testing.assert_allclose(found.inverse.affine, corner)

    def test_the_order_in_which_voxels_are_stored_changes_nothing(self, heads):
        """The network is not symmetric, so it always sees the images along the nearest of the axes R, A and S."""
        settings = replace(DIRECT, method="projected", steps=0, refine_steps=1, lattice=(18, 22, 20))
        first, again = (register(heads.fixed, heads.moving, settings) for _ in range(2))
        points = points_in(heads.fixed)
        moved = first.forward.map_points(points)
        noise = np.abs(again.forward.map_points(points) - moved).max()
        assert np.linalg.norm(moved - points, axis=1).max() > 2
        for codes in ("LPS", "LIA", "PIR"):
            fixed, moving = (stored_as(volume, codes) for volume in (heads.fixed, heads.moving))
            lattice = tuple(settings.lattice[2 - "RAS".index(axis)] for axis in reversed(axes_of(codes)))
            found = register(fixed, moving, replace(settings, lattice=lattice))
            np.testing.assert_allclose(found.forward.map_points(points), moved, atol=0.01 + noise)
            warped = found.warped()
            assert warped.shape == fixed.shape
            np.testing.assert_array_equal(warped.affine, fixed.affine)
            expected = stored_as(Volume(first.warped().array, heads.fixed.affine), codes).array
            np.testing.assert_allclose(warped.array, expected, atol=0.02 * np.ptp(expected))
            assert tuple(found.report["settings"]["lattice"]) == lattice
            for level, expected in zip(found.report["levels"], first.report["levels"], strict=True):
                assert level == [expected[2 - "RAS".index(axis)] for axis in reversed(axes_of(codes))]

    def test_warped_is_what_simpleitk_resamples(self, fixed_volume, moving_volume, moved_network, tmp_path):
        found = register(fixed_volume, moving_volume, DIRECT)
        found.write(tmp_path / "result")
        transform = sitk.ReadTransform(str(tmp_path / "result" / "transform.h5"))
        expected = sitk.Resample(to_sitk(moving_volume), to_sitk(fixed_volume), transform, sitk.sitkLinear,
                                 float(moving_volume.array.min()), sitk.sitkFloat32)  # fmt: skip
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "result" / "warped.nii.gz")))
        difference = np.abs(written - sitk.GetArrayFromImage(expected))
        # At the edge of the moving image the two may disagree on which side a point lies.
        assert np.quantile(difference, 0.99) < 0.1

    def test_the_network_sees_the_images_where_they_lie(self, fixed_volume, moving_volume, monkeypatch):
        """What reaches the network is what SimpleITK samples at the lattice's points."""
        seen = {}

        class Spy(Cascade):
            def forward(self, source, target):
                seen["moving"], seen["fixed"] = source[0, 0].clone(), target[0, 0].clone()
                return super().forward(source, target)

        monkeypatch.setattr(registry, "Cascade", Spy)
        matrix = rigid((10, 5, -12), (4, -2, 3))
        lattice = (18, 20, 22)
        register(fixed_volume, moving_volume, Settings(model="compact", method="direct", device="cpu", lattice=lattice),
                 initial_transform=matrix)  # fmt: skip
        points = lattice_points(lattice, lattice_affine(fixed_volume.affine, fixed_volume.shape, lattice))
        flip = np.array([-1, -1, 1])
        for role, volume, place in (("fixed", fixed_volume, np.eye(4)), ("moving", moving_volume, matrix)):
            image = to_sitk(Volume(normalize(volume, "mri"), volume.affine))
            mapped = (points @ place[:3, :3].T + place[:3, 3]).reshape(-1, 3)
            expected = np.array([sitk_value(image, (flip * point).tolist()) for point in mapped])
            index = (mapped - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T
            # What lies outside the moving image's view is filled in.
            inside = ((index > -0.49) & (index < np.array(volume.shape[::-1]) - 0.51)).all(axis=1)
            np.testing.assert_allclose(seen[role].numpy().ravel()[inside], expected[inside], atol=1e-3)

    def test_an_initial_deformation_is_kept(self, heads, identity_network):
        found = register(heads.fixed, heads.moving, DIRECT, initial_transform=heads.deformation)
        points = points_in(heads.fixed)
        np.testing.assert_allclose(found.forward.map_points(points), heads.deformation.map_points(points), atol=0.3)
        back = found.inverse.map_points(found.forward.map_points(points))
        assert np.linalg.norm(back - points, axis=1).mean() < 0.5


def sitk_value(image, point):
    """Linear interpolation in an image, 0 more than half a voxel outside, the border's value up to there."""
    index = np.array(image.TransformPhysicalPointToContinuousIndex(point))
    size = np.array(image.GetSize())
    if (index < -0.5).any() or (index > size - 0.5).any():
        return 0.0
    inside = image.TransformContinuousIndexToPhysicalPoint(np.clip(index, 0, size - 1 - 1e-9).tolist())
    return image.EvaluateAtPhysicalPoint(inside, sitk.sitkLinear)


@pytest.fixture
def identity_network(monkeypatch):
    monkeypatch.setattr(registry, "load", untrained)


class TestRecovery:
    def test_a_known_smooth_deformation_is_recovered(self, heads):
        settings = Settings(model="compact", refine_steps=0, steps=30, device="cpu")
        found = register(heads.fixed, heads.moving, settings)
        points = lattice_points(heads.fixed.shape, heads.fixed.affine)[heads.fixed_labels.array > 0]
        truth = heads.deformation.map_points(points)
        before = np.linalg.norm(points - truth, axis=1).mean()
        after = np.linalg.norm(found.forward.map_points(points) - truth, axis=1).mean()
        assert after < 0.8 * before
        assert found.report["jacobian"]["folded_percent"] < 0.1

    def test_a_known_rigid_motion_is_recovered(self, heads):
        motion = rigid((10, -6, 14), (18, -12, 9))
        moved = Volume(heads.fixed.array, motion @ heads.fixed.affine, "moved")
        found = register(heads.fixed, moved, Settings(model="compact", method="direct", align="rigid", device="cpu"))
        points = lattice_points(heads.fixed.shape, heads.fixed.affine)[heads.fixed_labels.array > 0]
        expected = points @ motion[:3, :3].T + motion[:3, 3]
        initial = np.array(found.report["initial_transform"])
        # A third of a voxel.
        distance = np.linalg.norm(points @ initial[:3, :3].T + initial[:3, 3] - expected, axis=1)
        assert distance.mean() < heads.fixed.spacing.mean() / 3


class TestReport:
    def test_everything_that_matters_is_in_it(self, fixed_volume, moving_volume, tmp_path):
        found = register(
            fixed_volume, moving_volume, Settings(model="compact", refine_steps=0, steps=2, device="cpu", seed=5)
        )
        found.write(tmp_path / "out", labels=Volume((moving_volume.array > 100).astype(np.uint8), moving_volume.affine))
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "folding.nii.gz", "inverse_transform.h5", "jacobian.nii.gz", "optimizer_state.pt", "overview.png",
            "report.json", "transform.h5", "warped.nii.gz", "warped_labels.nii.gz",
        ]  # fmt: skip
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        # What was warped belongs to the files.
        assert report["inputs"].pop("moving_labels")["name"] == "volume"
        assert report == found.report
        assert report["seed"] == 5
        assert [step["index"] for step in report["steps"]] == [0, 1]
        assert report["inputs"]["fixed"]["shape"] == list(fixed_volume.shape)
        assert report["peak_memory_bytes"] > 0
        assert report["stopped"] == "finished"
        determinant = found.determinant().array
        assert report["jacobian"]["min"] == pytest.approx(determinant.min())
        assert report["jacobian"]["folded_voxels"] == found.folding_mask().array.sum()

    def test_steps_can_be_stopped(self, fixed_volume, moving_volume):
        found = register(fixed_volume, moving_volume, Settings(model="compact", refine_steps=0, steps=9, device="cpu"),
                         on_step=lambda step: step.index < 1)  # fmt: skip
        assert len(found.report["steps"]) == 2
        assert found.report["stopped"] == "by request"

    def test_an_existing_folder_keeps_what_is_not_replaced(self, fixed_volume, moving_volume, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "report.json").write_text("old")
        register(fixed_volume, moving_volume, DIRECT).write(tmp_path)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert json.loads((tmp_path / "report.json").read_text())["version"]
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_little_overlap_is_warned_of(self, fixed_volume):
        shift = np.eye(4)
        shift[:3, 3] = fixed_volume.affine[:3, 0] * fixed_volume.shape[2] * 0.7
        moving = Volume(fixed_volume.array, shift @ fixed_volume.affine, "moving")
        found = register(fixed_volume, moving, DIRECT)
        assert any("overlaps" in warning for warning in found.report["warnings"])
        aligned = register(fixed_volume, moving, Settings(model="compact", method="direct", align="centers"))
        assert not any("overlaps" in warning for warning in aligned.report["warnings"])

    def test_the_model_that_was_taken_for_want_of_another_is_told(self, fixed_volume, monkeypatch, tmp_path):
        monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path))
        settings = Settings(steps=0, refine_steps=0, lattice=(16, 16, 16), device="cpu")
        report = register(fixed_volume, fixed_volume, settings).report
        assert report["model"]["name"] == "compact"
        assert report["warnings"] == [registry.SUBSTITUTE_NOTES["compact"]]

    def test_images_of_different_kinds_are_refined_without_the_compact_network(
        self, fixed_volume, monkeypatch, tmp_path
    ):
        monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path))
        quick = {"refine_steps": 1, "samples": 1000, "device": "cpu"}
        report = register(fixed_volume, fixed_volume, similarity="mind", **quick).report
        assert report["model"]["name"] == "none"
        assert registry.SUBSTITUTE_NOTES["none"] in report["warnings"]
        assert Settings(similarity="mind", steps=5).substitute == "compact"
        assert Settings(similarity="mind", method="direct").substitute == "compact"


class TestIntensities:
    def test_mri_goes_from_the_minimum_to_the_99th_percentile(self):
        array = np.arange(1000, dtype=np.int16).reshape(10, 10, 10) - 50
        found = normalize(Volume(array, np.eye(4)), "mri")
        assert found.min() == 0
        assert found.max() == 1
        assert (found == 1).sum() == 11
        assert found.dtype == np.float32

    def test_ct_is_in_hounsfield_units(self):
        array = np.array([-3000, -1000, 0, 500, 1000, 3000], dtype=np.int16).repeat(4).reshape(2, 3, 4)
        assert np.unique(normalize(Volume(array, np.eye(4)), "ct")).tolist() == [0, 0.5, 0.75, 1]

    def test_an_image_that_is_almost_all_background_still_has_contrast(self):
        array = np.zeros((10, 10, 10), np.float32)
        array[5, 5, 5] = 7
        assert normalize(Volume(array, np.eye(4)), "mri").max() == 1


class TestSettings:
    @pytest.mark.parametrize(("name", "value"), [
        ("steps", -1), ("steps", 1.5), ("method", "best"), ("model", "huge"), ("similarity", "ssd"), ("align", "magic"),
        ("regularity_weight", -1), ("regularity_weight", float("nan")), ("learning_rate", 0), ("lattice", (4, 4, 4)),
        ("fixed_modality", "pet"), ("precision", "wild"), ("memory", "none"), ("projection", "none"),
        ("seed", -1), ("seed", 2**32), ("seed", 1.5), ("regularity_weight", "much"),
    ])  # fmt: skip
    def test_senseless_values_are_refused_in_one_sentence(self, name, value):
        with pytest.raises(InputError) as error:
            Settings(**{name: value})
        assert str(error.value).count("\n") == 0

    def test_a_device_that_is_not_there(self):
        with pytest.raises(InputError, match="not there"):
            devices.find_device("cuda:7")

    def test_images_that_do_not_overlap(self, fixed_volume):
        far = oblique_volume((20, 20, 20), (1, 1, 1), (0, 0, 0), (900, 0, 0), 3, "far")
        with pytest.raises(InputError, match=r"fixed and far do not overlap.*align"):
            register(fixed_volume, far, DIRECT)

    def test_an_empty_mask(self, fixed_volume, moving_volume):
        empty = Volume(np.zeros(fixed_volume.shape, np.uint8), fixed_volume.affine, "nothing.nii")
        with pytest.raises(InputError, match=r"nothing\.nii is empty"):
            register(fixed_volume, moving_volume, DIRECT, fixed_mask=empty)


def test_a_mask_changes_what_counts(heads):
    mask = np.zeros(heads.fixed.shape, np.uint8)
    mask[: mask.shape[0] // 2] = 1
    settings = Settings(model="compact", refine_steps=0, steps=3, device="cpu")
    plain = register(heads.fixed, heads.moving, settings)
    masked = register(heads.fixed, heads.moving, settings, fixed_mask=Volume(mask, heads.fixed.affine, "mask"))
    assert masked.report["similarity"] != plain.report["similarity"]
    assert isinstance(masked.forward, Deformation)
    assert masked.report["inputs"]["fixed_mask"]["shape"] == list(mask.shape)


@pytest.mark.parametrize("memory", ["auto", "full", "lean"])
def test_running_out_of_memory_goes_one_mode_leaner_and_then_fails(fixed_volume, moving_volume, monkeypatch, memory):
    """The allocation fails in the first mode that is tried, or in all."""
    modes = []

    def optimize(stage, *arguments):
        modes.append("lean" if stage.loaded.network.checkpointed else "full")
        if modes[-1] in failing:
            raise torch.OutOfMemoryError("too little")
        return original(stage, *arguments)

    original = NetworkStage._optimize
    monkeypatch.setattr(NetworkStage, "_optimize", optimize)
    failing = {"full"}
    settings = Settings(model="compact", refine_steps=0, steps=1, device="cpu", memory=memory)
    if memory == "full":
        with pytest.raises(InputError, match="not enough memory on cpu: the model compact needs about"):
            register(fixed_volume, moving_volume, settings)
        return
    found = register(fixed_volume, moving_volume, settings)
    assert found.report["memory_mode"] == "lean"
    assert any("lean mode" in warning for warning in found.report["warnings"]) == (memory == "auto")
    assert modes == (["full", "lean"] if memory == "auto" else ["lean"])
    failing = {"full", "lean"}
    with pytest.raises(InputError, match="smaller lattice"):
        register(fixed_volume, moving_volume, settings)


@pytest.mark.parametrize("told", [True, False])
def test_large_changes_of_volume_are_told(told):
    if told:
        # Nothing in these images belongs together.
        images = [Volume(smooth_noise((24, 26, 28), seed), np.diag([2.0, 2, 2, 1])) for seed in (1, 2)]
    else:
        heads = phantom.make_pair(3, (40, 46, 42), spacing=4.0)
        images = [heads.fixed, heads.moving]
    report = register(*images, model="none", device="cpu", refine_steps=30).report
    assert (report["jacobian"]["std_log"] > LARGE_SPREAD) == told
    assert any("changes volumes a lot" in warning for warning in report["warnings"]) == told

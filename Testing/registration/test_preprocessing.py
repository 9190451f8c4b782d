"""What of two images counts: masks, partial views, and the range of intensities."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from GradProjIOLib.geometry.image_files import read_volume
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.preprocessing import Guides, ImagePair, cuts_through, fill_in, modality_of, normalize
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings
from GradProjIOLib.synthetic.phantom import make_pair

DATA = Path(__file__).parents[3] / "shared" / "data"
IMAGES = ("aligned_subject_a", "native_subject_b", "prostate_0_us", "prostate_1_mr", "spine_t1", "spine_t2")
QUICK = {"model": "none", "refine_steps": 30, "device": "cpu"}


def image_file(name):
    path = DATA / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def error(result, truth):
    """Distance in mm of every fixed voxel's image from where it belongs."""
    points = lattice_points(result.fixed.shape, result.fixed.affine)
    return np.linalg.norm(result.forward.map_points(points) - truth(points), axis=-1)


@pytest.fixture(scope="module")
def phantom():
    return make_pair(0, (48, 56, 48), 4.0)


class TestIntensities:
    @pytest.mark.parametrize("name", IMAGES)
    def test_a_clean_image_has_unigradicons_range(self, name):
        volume = read_volume(image_file(name))
        array = volume.array.astype(np.float32)
        expected = (array.clip(array.min(), np.quantile(array, 0.99)) - array.min()) / np.ptp(
            array.clip(array.min(), np.quantile(array, 0.99))
        )
        np.testing.assert_allclose(normalize(volume, "mri"), expected, atol=0.01)

    @pytest.mark.parametrize("part", [0.005, 0.016, 0.04])
    def test_metal_leaves_the_contrast_of_tissue(self, phantom, part):
        clean = normalize(phantom.fixed, "mri")
        tissue = np.flatnonzero(phantom.fixed.array > 20)
        array = phantom.fixed.array.copy()
        bright = np.random.default_rng(0).choice(tissue, int(part * array.size), replace=False)
        array.ravel()[bright] = 10 * np.median(array.ravel()[tissue])
        found = normalize(replace(phantom.fixed, array=array), "mri")
        rest = np.ones(array.size, bool)
        rest[bright] = False
        assert np.abs(found - clean).ravel()[rest].max() < 0.05

    def test_metal_hardly_changes_the_deformation(self):
        """Electrodes in the moving image, 1.6 % of its voxels; with the 99th percentile the error is 7 mm."""
        pair = make_pair(3, (48, 56, 48), 4.0, mean_displacement=2.8, noise=2)
        tissue = np.median(pair.moving.array[pair.moving.array > 20])
        array = pair.moving.array.copy()
        rng = np.random.default_rng(1)
        for center in rng.permutation(np.argwhere(array > 20)):
            where = [slice(max(n - 1, 0), n + 1) for n in center]
            axis = rng.integers(3)
            where[axis] = slice(max(center[axis] - 8, 0), center[axis] + 8)
            array[tuple(where)] = 10 * tissue
            if np.mean(array == 10 * tissue) > 0.016:
                break
        head = pair.fixed.array > 20
        clean, metal = (
            register(pair.fixed, moving, **QUICK) for moving in (pair.moving, replace(pair.moving, array=array))
        )
        errors = [error(result, pair.deformation.map_points)[head].mean() for result in (clean, metal)]
        assert errors[1] < errors[0] + 0.6, errors
        assert metal.report["jacobian"]["folded_voxels"] == 0

    def test_what_a_mask_hides_does_not_set_the_range(self, phantom):
        array = phantom.fixed.array.copy()
        hidden = np.zeros(array.shape, bool)
        hidden[:12] = True
        array[hidden] = 1e4
        found = normalize(replace(phantom.fixed, array=array), "mri", ~hidden)
        expected = normalize(phantom.fixed, "mri", ~hidden)
        np.testing.assert_allclose(found[~hidden], expected[~hidden], atol=1e-6)

    def test_ct_is_noticed_and_said(self):
        volume = read_volume(image_file("body_ct"))
        assert modality_of(volume) == "ct"
        padded = volume.array.astype(np.int16).copy()
        padded[:, :12] = -3024
        assert modality_of(replace(volume, array=padded)) == "ct"
        result = register(volume, volume, Settings(model="none", refine_steps=1, samples=20_000, device="cpu"))
        assert result.settings.fixed_modality == "ct"
        assert any("looks like CT" in warning for warning in result.report["warnings"])

    @pytest.mark.parametrize("name", IMAGES)
    def test_mri_and_ultrasound_are_not_taken_for_ct(self, name):
        assert modality_of(read_volume(image_file(name))) == "mri"

    def test_a_phase_image_is_not_taken_for_ct(self):
        phase = np.random.default_rng(0).integers(-4096, 4096, (40, 40, 40)).astype(np.int16)
        assert modality_of(Volume(phase, np.eye(4))) == "mri"


class TestFillIn:
    def test_what_is_known_stays_and_holes_are_between_their_neighbors(self):
        z = torch.linspace(0, 1, 20).view(1, 1, 20, 1, 1).expand(1, 1, 20, 18, 16).contiguous()
        known = torch.ones_like(z)
        known[:, :, 7:13, 5:12, 4:12] = 0
        found = fill_in(torch.where(known > 0, z, torch.tensor(9.0)), known)
        assert torch.equal(found[known > 0], z[known > 0])
        assert (found - z).abs().max() < 0.1

    def test_a_large_unknown_part_gets_what_is_nearest(self):
        image = torch.full((1, 1, 30, 9, 7), 0.4)
        known = torch.zeros_like(image)
        known[:, :, :4] = 1
        image[known == 0] = float("nan")
        torch.testing.assert_close(fill_in(image.nan_to_num(5.0), known), torch.full_like(image, 0.4))


class TestViews:
    def pair(self, phantom, moving, **masks):
        return ImagePair(phantom.fixed, moving, np.eye(4), Settings(), Guides(**masks))

    def test_a_head_in_air_has_no_unknown_surroundings(self, phantom):
        """The moving image's view is smaller, but ends in air on all sides."""
        skull_stripped = make_pair(1, (48, 56, 48), 4.0, with_skull=False, noise=0)
        assert not cuts_through(replace(skull_stripped.moving, array=normalize(skull_stripped.moving, "mri")))
        inner = skull_stripped.moving.array[2:-2, 2:-2, 2:-2]
        affine = skull_stripped.moving.affine.copy()
        affine[:3, 3] = apply_matrix(affine, np.full(3, 2.0))
        drawn = self.pair(skull_stripped, Volume(inner, affine)).on_lattice((24, 28, 24))
        assert drawn["moving_mask"] is None

    def test_what_a_cut_view_does_not_show_is_unknown(self, phantom):
        affine = phantom.moving.affine.copy()
        affine[:3, 3] = apply_matrix(affine, [0, 0, 16])
        upper = Volume(phantom.moving.array[16:], affine, "upper")
        drawn = self.pair(phantom, upper).on_lattice(phantom.fixed.shape)
        assert drawn["moving_mask"][0, 0, 17:].all()
        assert not drawn["moving_mask"][0, 0, :15].any()
        assert drawn["fixed_mask"] is None
        whole = self.pair(phantom, phantom.moving).on_lattice(phantom.fixed.shape)
        assert whole["moving_mask"] is None
        # The part has another 99th percentile than the whole.
        shown = torch.stack([one["moving"][0, 0, 17:].flatten() for one in (drawn, whole)])
        assert torch.corrcoef(shown)[0, 1] > 0.998

    @pytest.mark.parametrize("swapped", [False, True])
    def test_slices_of_a_trunk_lie_where_they_were_cut_out(self, swapped):
        whole = read_volume(image_file("body_ct"))
        affine = whole.affine.copy()
        affine[:3, 3] = apply_matrix(affine, [0, 0, 40])
        part = Volume(whole.array[40:80], affine, "part")
        fixed, moving = (part, whole) if swapped else (whole, part)
        result = register(fixed, moving, samples=60_000, **QUICK)
        assert error(result, lambda points: points).mean() < 0.7


class TestLesion:
    """A resection cavity in the moving image; the truth inside it is known because the deformation is."""

    @pytest.fixture(scope="class")
    @staticmethod
    def pair():
        return make_pair(3, (48, 56, 48), 4.0, mean_displacement=2.8, noise=2)

    @pytest.fixture(scope="class")
    @staticmethod
    def inside(pair):
        """Which fixed voxels belong into the cavity, and the same of the moving ones."""
        brain = np.argwhere(pair.moving_labels.array > 0).mean(axis=0)[::-1]
        center = apply_matrix(pair.moving.affine, brain + np.array([9, 4, 6]))
        places = [
            pair.deformation.map_points(lattice_points(pair.fixed.shape, pair.fixed.affine)),
            lattice_points(pair.moving.shape, pair.moving.affine),
        ]
        return [np.linalg.norm(points - center, axis=-1) < 16 for points in places]

    @staticmethod
    def errors(pair, inside, moving, masked=()):
        """Mean errors (mm) in the cavity and in the rest of the head."""
        masks = {
            f"{role}_mask": Volume((~hidden).astype(np.uint8), volume.affine, f"{role} mask")
            for role, hidden, volume in zip(("fixed", "moving"), inside, (pair.fixed, pair.moving), strict=True)
            if role in masked
        }
        off = error(register(pair.fixed, moving, **QUICK, **masks), pair.deformation.map_points)
        return off[inside[0]].mean(), off[~inside[0] & (pair.fixed.array > 20)].mean()

    @pytest.fixture(scope="class")
    @classmethod
    def clean(cls, pair, inside):
        return cls.errors(pair, inside, pair.moving)

    @pytest.mark.parametrize("masked", [("moving",), ("fixed",), ("fixed", "moving")])
    def test_the_cavity_counts_nowhere(self, pair, inside, clean, masked):
        """Without a mask the error in the cavity is 11 mm, without a cavity 0.5 mm."""
        noise = np.random.default_rng(0).normal(12, 4, pair.moving.shape)
        lesion = replace(pair.moving, array=np.where(inside[1], noise, pair.moving.array).astype(np.float32))
        in_cavity, elsewhere = self.errors(pair, inside, lesion, masked)
        assert in_cavity < 1
        assert elsewhere < clean[1] + 0.05

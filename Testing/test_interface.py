"""What `import GradProjIOLib` offers: lazy names, images of many kinds, settings as keywords, short reprs, a plot."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.figure
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_volume

import GradProjIOLib as gp
from GradProjIOLib.geometry.conversion import as_volume
from GradProjIOLib.geometry.volume import to_sitk
from GradProjIOLib.registration.progress import Progress
from GradProjIOLib.synthetic import phantom

ROOT = Path(__file__).resolve().parents[1]
SHORT = {"model": "compact", "refine_steps": 0, "device": "cpu", "lattice": (16, 16, 16)}


@pytest.fixture(scope="module")
def heads():
    """Small phantoms on two different oblique, anisotropic lattices."""
    return phantom.make_pair(0, (20, 26, 22), spacing=8, with_skull=False, common_lattice=False)


@pytest.fixture(scope="module")
def result(heads):
    return gp.register(heads.fixed, heads.moving, steps=2, **SHORT)


class TestNames:
    def test_the_import_alone_loads_nothing_that_takes_long(self):
        code = (
            "import sys, GradProjIOLib as gp; gp.Settings; dir(gp);"
            "print(*(name for name in ('torch', 'numpy', 'SimpleITK', 'matplotlib') if name in sys.modules))"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == ""

    def test_every_public_name_is_there_and_listed(self):
        assert dir(gp) == sorted(gp.__all__)
        for name in gp.__all__:
            assert getattr(gp, name) is not None

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match=r"GradProjIOLib.*'Transform'"):
            gp.Transform  # noqa: B018

    def test_type_checkers_find_the_annotations(self):
        assert (Path(gp.__file__).parent / "py.typed").is_file()


class TestImages:
    """An oblique, anisotropic image that is not centered keeps its place, whatever it comes as."""

    @pytest.fixture
    def volume(self):
        return oblique_volume((9, 14, 11), (1.3, 0.7, 2.1), (20, -12, 31), (-30, 42, 50), 1, "fixed")

    def same(self, found, volume):
        np.testing.assert_array_equal(found.array, volume.array)
        np.testing.assert_allclose(found.affine, volume.affine, atol=1e-5)

    def test_a_volume_stays_as_it_is(self, volume):
        assert as_volume(volume, "the fixed image") is volume

    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_path_is_read(self, volume, kind, tmp_path):
        gp.write_volume(volume, tmp_path / "image.nii.gz")
        self.same(as_volume(kind(tmp_path / "image.nii.gz"), "the fixed image"), volume)

    def test_a_simpleitk_image_keeps_the_place_of_each_voxel(self, volume):
        image = to_sitk(volume)
        found = as_volume(image, "the fixed image")
        self.same(found, volume)
        lps = image.TransformIndexToPhysicalPoint((3, 5, 7))
        np.testing.assert_allclose(found.affine @ (3, 5, 7, 1), (-lps[0], -lps[1], lps[2], 1), atol=1e-9)
        assert found.array[7, 5, 3] == image[3, 5, 7]

    def test_a_nibabel_image_agrees_with_simpleitk_about_the_same_file(self, volume, tmp_path):
        gp.write_volume(volume, tmp_path / "image.nii.gz")
        found = as_volume(nibabel.load(tmp_path / "image.nii.gz"), "the fixed image")
        self.same(found, as_volume(sitk.ReadImage(tmp_path / "image.nii.gz"), "the fixed image"))
        self.same(found, volume)

    def test_a_nibabel_image_in_memory_may_have_one_frame(self, volume):
        image = nibabel.Nifti1Image(volume.array.T[..., None], volume.affine)
        self.same(as_volume(image, "the fixed image"), volume)

    def test_a_pair_has_simpleitks_array_and_nibabels_affine(self, volume):
        pair = sitk.GetArrayFromImage(to_sitk(volume)), nibabel.Nifti1Image(volume.array.T, volume.affine).affine
        self.same(as_volume(pair, "the fixed image"), volume)

    def test_a_pair_may_hold_a_tensor_and_lists(self, volume):
        self.same(as_volume([torch.from_numpy(volume.array), volume.affine.tolist()], "the fixed image"), volume)

    @pytest.mark.parametrize(
        "image",
        [
            np.ones((9, 9, 9)),
            None,
            7,
            (np.ones((9, 9, 9)), np.ones((9, 9, 9))),
            (np.ones((9, 9)), np.eye(4)),
            (np.eye(4), np.ones((9, 9, 9))),
            ("fixed.nii.gz", "moving.nii.gz"),
        ],
    )
    def test_anything_else_gets_a_sentence_that_says_what_to_pass(self, image):
        with pytest.raises(gp.InputError, match=r"the fixed image is .*; pass the path of an image file, a Volume"):
            as_volume(image, "the fixed image")

    def test_a_nibabel_image_with_several_frames_or_colors_is_refused(self):
        frames = nibabel.Nifti1Image(np.ones((9, 9, 9, 3), dtype=np.float32), np.eye(4))
        colors = nibabel.Nifti1Image(np.ones((9, 9, 9), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4))
        for image in (frames, colors):
            with pytest.raises(gp.InputError, match=r"the moving image has .*; choose a single 3-D volume"):
                as_volume(image, "the moving image")


class TestRegister:
    def test_every_kind_of_image_gives_the_same_result(self, heads, tmp_path):
        """Without steps, which would enlarge the rounding of the affines."""
        gp.write_volume(heads.moving, tmp_path / "moving.nii.gz")
        fixed = heads.fixed
        result = gp.register(fixed, heads.moving, steps=0, **SHORT)
        for image in (to_sitk(fixed), (fixed.array, fixed.affine), nibabel.Nifti1Image(fixed.array.T, fixed.affine)):
            found = gp.register(image, tmp_path / "moving.nii.gz", steps=0, **SHORT)
            difference = found.forward.displacement - result.forward.displacement
            assert np.abs(difference).max() < 1e-3

    def test_a_preset_overrides_the_settings_but_not_other_keywords(self, heads):
        settings = gp.Settings(**SHORT, steps=7, projection="similarity", seed=4)
        found = gp.register(heads.fixed, heads.moving, settings, preset="paper", steps=1)
        used = found.settings
        assert (used.steps, used.refine_steps, used.projection, used.seed) == (1, 0, "random", 4)
        with pytest.raises(gp.InputError, match="did you mean paper"):
            gp.register(heads.fixed, heads.moving, settings, preset="papre")

    def test_masks_and_the_initial_transform_may_be_images_and_files(self, heads, tmp_path):
        mask = sitk.Cast(to_sitk(heads.fixed_labels) > 0, sitk.sitkUInt8)
        sitk.WriteTransform(sitk.TranslationTransform(3, (3.0, -2.0, 1.0)), str(tmp_path / "start.tfm"))
        found = gp.register(
            heads.fixed, heads.moving, fixed_mask=mask, initial_transform=tmp_path / "start.tfm", steps=1, **SHORT
        )
        assert found.report["inputs"]["fixed_mask"]["name"] == "the fixed mask"
        np.testing.assert_allclose(np.array(found.report["initial_transform"])[:3, 3], (-3, 2, 1))

    def test_keywords_override_the_settings(self, heads):
        found = gp.register(heads.fixed, heads.moving, gp.Settings(steps=9, seed=4), steps=1, **SHORT)
        assert len(found.report["steps"]) == 1
        assert found.settings.seed == 4

    def test_an_unknown_keyword_gets_a_suggestion(self, heads):
        with pytest.raises(gp.InputError, match=r"'step' is not known; did you mean steps\?"):
            gp.register(heads.fixed, heads.moving, step=9)

    def test_progress_is_shown_on_request(self, heads, capsys, monkeypatch):
        gp.register(heads.fixed, heads.moving, steps=2, **SHORT)
        assert capsys.readouterr() == ("", "")
        # By itself the bar leaves out what comes within a tenth of a second.
        monkeypatch.setattr("GradProjIOLib.registration.register.Progress", partial(Progress, mininterval=0))
        gp.register(heads.fixed, heads.moving, steps=2, progress=True, **SHORT)
        assert "2/2" in capsys.readouterr().err


@pytest.fixture(scope="class")
def folder_with_images(heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    gp.write_volume(heads.fixed, folder / "fixed.nii.gz")
    gp.write_volume(heads.moving, folder / "moving.nii.gz")
    return folder


class TestExamples:
    """What the documentation shows runs as it stands, with fewer steps."""

    def test_the_readmes_python_example(self, folder_with_images):
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        code = text.partition("```python\n")[2].partition("```")[0].replace('preset="quick"', "steps=1, refine_steps=0")
        run = subprocess.run([sys.executable, "-c", code], cwd=folder_with_images, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("Registration(moving.nii.gz onto fixed.nii.gz · compact, projected, 1 IO steps")
        assert {"result", "overview.png"} <= {path.name for path in folder_with_images.iterdir()}

    def test_the_example_script(self, folder_with_images):
        command = [sys.executable, ROOT / "Docs" / "examples" / "register_pair.py"]
        command += ["fixed.nii.gz", "moving.nii.gz", "example", "1"]
        run = subprocess.run(command, cwd=folder_with_images, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found = {path.name for path in (folder_with_images / "example").iterdir()}
        assert {"report.json", "transform.h5", "bright.nii.gz", "again.png"} <= found


def test_the_changelog_has_the_version():
    assert f"## {gp.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


class TestResult:
    def test_reprs_are_one_short_line(self, heads, result):
        assert repr(heads.fixed) == "Volume('phantom fixed', 22 x 26 x 20 voxels of 8 x 8 x 8 mm, float32)"
        assert repr(result.forward).startswith("Deformation(")
        assert repr(result).startswith(
            "Registration(phantom moving onto phantom fixed · compact, projected, 2 IO steps"
        )
        assert "folded" in repr(result)
        for thing in (heads.fixed, result.forward, result):
            assert "\n" not in repr(thing)
            assert len(repr(thing)) < 200

    def test_plot_returns_a_figure(self, result, tmp_path):
        figure = result.plot()
        assert type(figure) is matplotlib.figure.Figure
        figure.savefig(tmp_path / "overview.png")
        assert (tmp_path / "overview.png").stat().st_size > 10_000

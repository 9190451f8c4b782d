"""The LUMIR folder, displacement fields and submission, on a small made-up folder."""

import gzip
import itertools
import json
import zipfile

import numpy as np
import pytest
from scipy import ndimage

from GradProjIOLib.commands import main
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import lumir
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation

sitk = pytest.importorskip("SimpleITK")
SHAPE = (20, 24, 28)
AFFINE = np.array([[-1.0, 0, 0, 9], [0, 0, 1, -12], [0, 1, 0, -10], [0, 0, 0, 1]])
SUBJECTS = ("3454", "3455", "3456")


def smooth(seed: int, channels: int = 1, width: float = 2.5) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(channels, *SHAPE))
    return np.stack([ndimage.gaussian_filter(channel, width) for channel in noise])


def wave(seed: int, strength: float = 2.0) -> Deformation:
    displacement = np.moveaxis(smooth(seed, 3, 4), 0, -1)
    return Deformation(strength * displacement / displacement.std(), AFFINE)


@pytest.fixture
def folder(tmp_path):
    """Three subjects with labels and landmarks, and the two validation pairs between them."""
    base = tmp_path / "LUMIR"
    for kind in ("images", "labels", "landmarks"):
        (base / f"{kind}Val").mkdir(parents=True)
    for number, subject in enumerate(SUBJECTS):
        name = f"LUMIRMRI_{subject}_0000.nii.gz"
        labels = smooth(number, 4).argmax(axis=0)
        labels[:2] = 0
        landmarks = np.zeros(SHAPE, np.uint8)
        for landmark, center in enumerate([(6, 8, 9), (12, 15, 20), (9, 18, 6)], start=1):
            k, j, i = np.array(center) + number
            landmarks[k - 1 : k + 2, j - 1 : j + 2, i - 1 : i + 2] = landmark
        image = (labels > 0) * (50 + 20 * labels + smooth(number + 10)[0])
        write_volume(Volume(image.astype(np.float32), AFFINE), base / "imagesVal" / name)
        write_volume(Volume(labels.astype(np.uint8), AFFINE), base / "labelsVal" / name)
        write_volume(Volume(landmarks, AFFINE), base / "landmarksVal" / name)
    pairs = [
        {
            "fixed": f"./imagesVal/LUMIRMRI_{fixed}_0000.nii.gz",
            "moving": f"./imagesVal/LUMIRMRI_{moving}_0000.nii.gz",
        }
        for moving, fixed in itertools.pairwise(SUBJECTS)
    ]
    (base / "LUMIR_dataset.json").write_text(json.dumps({"name": "LUMIR", "validation": pairs}))
    return base


def write_fields(folder, target) -> None:
    target.mkdir()
    for number, pair in enumerate(lumir.validation_pairs(folder)):
        field = lumir.voxel_displacement(wave(number), *images_of(pair))
        lumir.write_displacement(field, AFFINE, target / lumir.displacement_file(pair))


def images_of(pair) -> tuple[Volume, Volume]:
    return lumir.read_volume(pair.fixed), lumir.read_volume(pair.moving)


def test_pairs(folder):
    pairs = lumir.validation_pairs(folder)
    assert [lumir.displacement_file(pair) for pair in pairs] == ["disp_3455_3454.nii.gz", "disp_3456_3455.nii.gz"]
    assert lumir.companions(pairs[0], "labels")[1].name == "LUMIRMRI_3454_0000.nii.gz"
    assert lumir.companions(pairs[0], "masks") is None


def test_field_for_map_coordinates():
    """map_coordinates with the voxel field draws what the deformation draws, also between two lattices."""
    fixed = Volume(np.zeros(SHAPE, np.float32), AFFINE)
    elsewhere = np.array([[0, 1.25, 0, -14], [1.5, 0, 0, -15], [0, 0, 0.8, -12], [0, 0, 0, 1]])
    moving = Volume(smooth(3)[0].astype(np.float32), elsewhere)
    deformation = wave(4)
    field = lumir.voxel_displacement(deformation, fixed, moving)
    assert field.shape == (*SHAPE[::-1], 3)
    identity = np.stack(np.meshgrid(*map(np.arange, field.shape[:3]), indexing="ij"))
    drawn = ndimage.map_coordinates(
        moving.array.transpose(2, 1, 0), identity + np.moveaxis(field, -1, 0), order=1, mode="nearest"
    )
    expected = deformation.warp(moving, fixed, background=np.nan).array.transpose(2, 1, 0)
    inside = np.isfinite(expected)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(drawn[inside], expected[inside], atol=1e-4)


def test_field_on_disk_as_nibabel_sees_it(tmp_path):
    """A plain 4-D NIfTI file of 32-bit floats, in LUMIR's order of axes, with the image's place in space."""
    field = np.random.default_rng(0).normal(size=(*SHAPE[::-1], 3)).astype(np.float32)
    lumir.write_displacement(field, AFFINE, tmp_path / "disp_1_2.nii.gz")
    np.testing.assert_array_equal(lumir.read_displacement(tmp_path / "disp_1_2.nii.gz"), field)
    raw = gzip.decompress((tmp_path / "disp_1_2.nii.gz").read_bytes())
    header = np.frombuffer(raw[40:56], "<i2")
    assert header[:5].tolist() == [4, *SHAPE[::-1], 3]
    assert int.from_bytes(raw[70:72], "little") == 16
    stored = np.frombuffer(raw[352:], "<f4").reshape(field.shape, order="F")
    np.testing.assert_array_equal(stored, field)
    rows = np.frombuffer(raw[280:328], "<f4").reshape(3, 4)
    np.testing.assert_allclose(rows, AFFINE[:3], atol=1e-6)


def test_field_with_components_first(tmp_path):
    field = np.random.default_rng(0).normal(size=(3, 9, 10, 11)).astype(np.float32)
    sitk.WriteImage(
        sitk.GetImageFromArray(field.transpose(3, 2, 1, 0), isVector=False), str(tmp_path / "disp_1_2.nii.gz")
    )
    np.testing.assert_array_equal(lumir.read_displacement(tmp_path / "disp_1_2.nii.gz"), np.moveaxis(field, 0, -1))
    write_volume(Volume(np.zeros(SHAPE), AFFINE), tmp_path / "flat.nii.gz")
    with pytest.raises(InputError, match="LUMIR wants"):
        lumir.read_displacement(tmp_path / "flat.nii.gz")


def test_submission_is_measured(folder, tmp_path):
    """From the zip file and from its folder alike; every metric of the challenge is there."""
    write_fields(folder, tmp_path / "fields")
    files = sorted((tmp_path / "fields").iterdir())
    lumir.write_submission(files, tmp_path / "mine.zip")
    with zipfile.ZipFile(tmp_path / "mine.zip") as archive:
        assert archive.namelist() == ["mine/disp_3455_3454.nii.gz", "mine/disp_3456_3455.nii.gz"]
    rows, failed = lumir.check_submission(tmp_path / "mine.zip", folder)
    assert failed == []
    assert [row["case"] for row in rows] == ["3455_3454", "3456_3455"]
    assert rows == lumir.check_submission(tmp_path / "fields", folder)[0]
    row = rows[0]
    assert [found["structure"] for found in row["structures"]] == [0, 1, 2, 3]
    assert row["tre_before_mm"] == pytest.approx(np.sqrt(3))
    assert len(row["landmarks"]) == 3
    assert 0 < row["dice"] < 1
    assert row["hd95_mm"] > 0
    assert row["ndv_percent"] >= 0


def test_landmarks_and_labels_of_a_known_shift(folder):
    """A field that shifts the moving subject onto the fixed one leaves no error of either kind."""
    pair = lumir.validation_pairs(folder)[0]
    name = pair.moving.name
    field = np.ones((*SHAPE[::-1], 3), np.float32) * -1  # the landmarks of 3454 lie one voxel below those of 3455
    row = lumir.measure_pair(pair, field)
    assert row["tre_mm"] == pytest.approx(0, abs=1e-9)
    moving_labels = folder / "labelsVal" / name
    labels = lumir.read_labels(moving_labels).array
    write_volume(Volume(np.roll(labels, (1, 1, 1), (0, 1, 2)), AFFINE), folder / "labelsVal" / pair.fixed.name)
    overlaps = {found["structure"]: found["dice"] for found in lumir.measure_pair(pair, field)["structures"]}
    assert min(overlaps.values()) > 0.85  # only what np.roll brought round the border differs


def test_lost_landmark(folder):
    """A field that points away from a landmark loses it: no mean over the others is reported instead."""
    pair = lumir.validation_pairs(folder)[0]
    row = lumir.measure_pair(pair, np.full((*SHAPE[::-1], 3), 100, np.float32))
    assert np.isnan(row["tre_mm"])
    assert row["dice"] < 0.3


def test_folding_where_the_moving_image_is(folder):
    """FACTS' second field, moved outside of the moving image's foreground, does not count."""
    pair = lumir.validation_pairs(folder)[0]
    i, j, k = np.meshgrid(*map(np.arange, SHAPE[::-1]), indexing="ij")
    field = np.zeros((*SHAPE[::-1], 3), np.float32)
    field[..., 0] = -1.5 * (i - 13.5) * np.exp(-((i - 13.5) ** 2 + (j - 11.5) ** 2 + (k - 9.5) ** 2) / 32)
    foreground = np.zeros(SHAPE, np.float32)
    foreground[1:-1, 1:-1, 1:-1] = 1
    write_volume(Volume(foreground, AFFINE), pair.moving)
    row = lumir.measure_pair(pair, field)
    assert row["ndv_percent"] * 18 * 22 * 26 / 100 == pytest.approx(18.774128, rel=1e-5)
    assert row["folded_voxels"] == 96
    foreground[:, :, 6:20] = 0
    write_volume(Volume(foreground, AFFINE), pair.moving)
    row = lumir.measure_pair(pair, field)
    assert (row["ndv_percent"], row["folded_voxels"]) == (0, 0)


def test_submission_that_is_incomplete(folder, tmp_path):
    """What is missing, superfluous, of the wrong shape or not finite is named; the rest is measured."""
    write_fields(folder, tmp_path / "fields")
    (tmp_path / "fields" / "disp_3455_3454.nii.gz").rename(tmp_path / "fields" / "disp_1_2.nii.gz")
    said = []
    rows, failed = lumir.check_submission(tmp_path / "fields", folder, on_problem=said.append)
    assert [row["case"] for row in rows] == ["3456_3455"]
    assert "does not exist" in failed[0]["message"]
    assert failed[1]["case"] == "disp_1_2.nii.gz"
    assert len(said) == 2
    pair = lumir.validation_pairs(folder)[0]
    with pytest.raises(InputError, match="LUMIR wants"):
        lumir.measure_pair(pair, np.zeros((9, 9, 9, 3), np.float32))
    with pytest.raises(InputError, match="not finite"):
        lumir.measure_pair(pair, np.full((*SHAPE[::-1], 3), np.nan, np.float32))


def test_folders_that_are_not_lumir(folder, tmp_path):
    with pytest.raises(InputError, match=r"LUMIR_dataset\.json does not exist"):
        lumir.validation_pairs(tmp_path)
    (folder / "LUMIR_dataset.json").write_text("{}")
    with pytest.raises(InputError, match="does not list validation pairs"):
        lumir.validation_pairs(folder)
    (tmp_path / "broken.zip").write_text("no zip")
    with pytest.raises(InputError, match="zip file"):
        lumir.unpack_submission(tmp_path / "broken.zip", tmp_path)


def test_command_registers_packs_and_checks(folder, tmp_path, capsys):
    """All in one command; a second call takes the fields that are there, other settings are refused."""
    output = tmp_path / "out" / "mine.zip"
    options = ["lumir", "register", str(folder), "-o", str(output), "--model", "compact", "--method", "vanilla",
               "--steps", "1", "--refine-steps", "0",
               "--lattice", "16", "16", "16", "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main.main(options) == 0
    with zipfile.ZipFile(output) as archive:
        assert archive.namelist() == ["mine/disp_3455_3454.nii.gz", "mine/disp_3456_3455.nii.gz"]
    rows = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [row["case"] for row in rows] == ["3455_3454", "3456_3455"]
    assert rows[0]["dice"] != rows[0]["dice_before"]
    first = output.with_suffix("") / "disp_3455_3454.nii.gz"
    stamp = first.stat().st_mtime_ns
    (output.with_suffix("") / "disp_3456_3455.nii.gz").unlink()
    assert main.main(options) == 0
    assert first.stat().st_mtime_ns == stamp
    assert main.main(["lumir", "check", str(output), str(folder), "--structures", "1,2"]) == 0
    assert "3456_3455" in capsys.readouterr().out
    options[options.index("1")] = "2"
    assert main.main(options) == 2
    assert "other inputs or settings (steps)" in capsys.readouterr().err


def test_a_preset_holds_for_every_pair(folder, tmp_path):
    """The fields were made with the preset's settings, and with what the command line says instead."""
    output = tmp_path / "mine.zip"
    assert main.main(["lumir", "register", str(folder), "-o", str(output), "--model", "compact", "--device", "cpu",
                      "--preset", "paper", "--steps", "1", "--lattice", "16", "16", "16"]) == 0  # fmt: skip
    records = list(output.with_suffix("").glob("*.json"))
    settings = [json.loads(path.read_text())["settings"] for path in records]
    assert [(one["steps"], one["refine_steps"], one["projection"]) for one in settings] == [(1, 0, "random")] * 2


def test_command_goes_on_after_a_broken_pair(folder, tmp_path, capsys):
    output = tmp_path / "mine.zip"
    pair = lumir.validation_pairs(folder)[0]
    pair.moving.write_bytes(b"broken")
    options = ["lumir", "register", str(folder), "-o", str(output), "--model", "compact", "--method", "direct",
               "--lattice", "16", "16", "16"]  # fmt: skip
    assert main.main(options) == 2
    assert not output.exists()
    assert (tmp_path / "mine" / "disp_3456_3455.nii.gz").exists()
    error = capsys.readouterr().err
    assert "3455_3454" in error
    assert "pairs without a field: 1" in error

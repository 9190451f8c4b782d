"""Images in physical space: agreement with SimpleITK, files whole or not at all, and one sentence for bad input."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_affine, smooth_noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from GradProjIOLib.errors import InputError, WriteError
from GradProjIOLib.geometry.files import atomic_path, checksum, staging_folder
from GradProjIOLib.geometry.image_files import WRITTEN_SUFFIXES, read_labels, read_volume, write_volume
from GradProjIOLib.geometry.lattice import lattice_affine
from GradProjIOLib.geometry.volume import Volume, check_image, from_sitk, image_warnings, looks_like_labels, to_sitk

RAS_LPS = np.array([-1, -1, 1])


def assert_one_sentence(message: str, *words: str) -> None:
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    for word in words:
        assert word in message


def test_voxels_lie_where_simpleitk_puts_them(fixed_volume):
    image = to_sitk(fixed_volume)
    for index in ((0, 0, 0), (25, 33, 23), (3, 17, 9)):
        point = (fixed_volume.affine @ [*index, 1])[:3]
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), point * RAS_LPS, atol=1e-9)
        assert image[index] == fixed_volume.array[index[::-1]]


def test_spacing_and_shape(fixed_volume):
    np.testing.assert_allclose(fixed_volume.spacing, (1.3, 0.7, 2.1))
    assert fixed_volume.shape == (24, 34, 26)


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_files_give_back_what_was_written(tmp_path, fixed_volume, suffix, dtype):
    written = Volume(fixed_volume.array.astype(dtype), fixed_volume.affine)
    path = tmp_path / f"größe 脳{suffix}"
    write_volume(written, path)
    read = read_volume(path)
    np.testing.assert_array_equal(read.array, written.array)
    assert read.array.dtype == written.array.dtype
    np.testing.assert_allclose(read.affine, written.affine, atol=1e-5)
    assert path.name in read.name


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    degrees=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.05, 8)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    mirrored=st.booleans(),
)
def test_any_orientation_survives_simpleitk_and_nifti(tmp_path, degrees, spacing, origin, mirrored):
    affine = oblique_affine(spacing, degrees, origin) @ np.diag([-1 if mirrored else 1, 1, 1, 1])
    volume = Volume(np.arange(8 * 9 * 10, dtype=np.float32).reshape(8, 9, 10), affine)
    np.testing.assert_allclose(from_sitk(to_sitk(volume)).affine, affine, atol=1e-9)
    write_volume(volume, tmp_path / "image.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "image.nii").affine, affine, atol=2e-4)


def test_a_lattice_stretches_as_torch_does():
    import torch

    size, lattice = (10, 14, 9), (7, 20, 9)
    affine = oblique_affine((1.3, 0.7, 2.1), (20, -12, 31), (-30, 12, 50))
    stretched = np.linalg.inv(affine) @ lattice_affine(affine, size, lattice)
    k, j, i = np.meshgrid(*map(np.arange, size), indexing="ij")
    coordinates = torch.from_numpy(np.stack([k, j, i])[None].astype(np.float64))
    resized = torch.nn.functional.interpolate(coordinates, size=lattice, mode="trilinear", align_corners=False)[
        0
    ].numpy()
    inner = [*map(np.ravel, np.meshgrid(range(1, 6), range(1, 19), range(9), indexing="ij"))]
    index = np.stack([*inner[::-1], np.ones_like(inner[0])])
    np.testing.assert_allclose((stretched @ index)[:3], resized[::-1, inner[0], inner[1], inner[2]], atol=1e-9)


def test_one_frame_of_four_dimensions_is_accepted(tmp_path, fixed_volume):
    image = sitk.JoinSeries([to_sitk(fixed_volume)])
    sitk.WriteImage(image, str(tmp_path / "one.nii.gz"))
    read = read_volume(tmp_path / "one.nii.gz")
    np.testing.assert_array_equal(read.array, fixed_volume.array)
    np.testing.assert_allclose(read.affine, fixed_volume.affine, atol=1e-5)


def time_series(path):
    sitk.WriteImage(sitk.Image([10, 10, 10, 3], sitk.sitkFloat32), str(path))


def flat(path):
    sitk.WriteImage(sitk.Image([20, 20], sitk.sitkUInt8), str(path))


def colored(path):
    sitk.WriteImage(sitk.Image([10, 10, 10], sitk.sitkVectorUInt8, 3), str(path))


def garbage(path):
    path.write_bytes(b"not an image " * 100)


def empty(path):
    path.touch()


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize(
    ("make", "word"),
    [(time_series, "4-D"), (flat, "2-D"), (colored, "components"), (garbage, "export"), (empty, "incomplete")],
)
def test_files_that_hold_no_single_volume(tmp_path, suffix, make, word):
    path = tmp_path / f"bad{suffix}"
    make(path)
    with pytest.raises(InputError) as caught:
        read_volume(path)
    assert_one_sentence(str(caught.value).replace(str(path), "FILE"), "FILE", word)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_truncated_files_are_refused(tmp_path, fixed_volume, suffix):
    path = tmp_path / f"half{suffix}"
    write_volume(fixed_volume, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="half"):
        read_volume(path)


def test_missing_folder_and_unknown_format(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    for path, word in (("none.nii", "does not exist"), ("", "folder"), ("photo.jpg", "unsupported format")):
        with pytest.raises(InputError, match=word) as caught:
            read_volume(tmp_path / path)
        assert_one_sentence(str(caught.value).replace(str(tmp_path), "").replace(".nii.gz", "").replace("..", ""))


def patched_nifti(path, *patches):
    """An ordinary NIfTI-1 file with some bytes of its header replaced."""
    write_volume(Volume(smooth_noise((9, 10, 11), 0), np.diag([1, 1.5, 2, 1])), path)
    content = bytearray(path.read_bytes())
    for offset, layout, values in patches:
        struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)


@pytest.mark.parametrize("row", [(0, 0, 0, 0), (0, 1.5, 0, 0), (1, 0.5, 0, 0)])
def test_singular_and_skewed_nifti_affines(tmp_path, row):
    only_sform, first_row = (252, "<2h", (0, 1)), (280, "<4f", row)
    patched_nifti(tmp_path / "odd.nii", only_sform, first_row)
    with pytest.raises(InputError, match="orientation matrix") as caught:
        read_volume(tmp_path / "odd.nii")
    assert_one_sentence(str(caught.value).replace(str(tmp_path / "odd.nii"), "odd"), "odd")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_singular_directions_in_other_formats(tmp_path, suffix):
    path = tmp_path / f"odd{suffix}"
    write_volume(Volume(smooth_noise((9, 10, 11), 0), np.diag([1, 1.5, 2, 1])), path)
    replaced = path.read_bytes().replace(b"(0,-1.5,0)", b"(-1,0,0)")
    path.write_bytes(replaced.replace(b"Matrix = -1 0 0 0 -1 0", b"Matrix = -1 0 0 -1 0 0"))
    with pytest.raises(InputError, match="orientation matrix"):
        read_volume(path)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1, 0, 1, 1]),
        np.full((4, 4), np.nan),
        np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.eye(3),
        np.diag([1, 1, 1, 2]),
    ],
)
def test_singular_affines_are_refused_when_constructed(affine):
    with pytest.raises(InputError, match="T1 has a singular"):
        Volume(np.zeros((9, 9, 9)), affine, "T1")


def test_small_spacing_is_not_singular():
    np.testing.assert_allclose(Volume(np.zeros((9, 9, 9)), np.diag([1e-3, 1e-3, 1e-3, 1])).spacing, 1e-3)


def test_arrays_that_are_not_three_dimensional():
    with pytest.raises(InputError, match="4 dimensions"):
        Volume(np.zeros((9, 9, 9, 3)), np.eye(4))


def spoiled(values) -> np.ndarray:
    array = smooth_noise((16, 17, 18), 0)
    array.ravel()[100 : 100 + len(values)] = values
    return array


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (spoiled([np.nan, np.inf, -np.inf]), "3 of 4896 voxels"),
        (np.full((16, 16, 16), 7, dtype=np.int16), "same value (7)"),
        (np.zeros((16, 16, 16)), "same value (0)"),
        (smooth_noise((16, 4, 18), 0), "18 x 4 x 16"),
        (np.zeros((0, 16, 16)), "16 x 16 x 0"),
    ],
)
def test_images_that_cannot_be_registered(array, word):
    with pytest.raises(InputError) as caught:
        check_image(Volume(array, np.eye(4), "scan 7"))
    assert_one_sentence(str(caught.value), "scan 7", word)


@pytest.mark.parametrize(
    "array",
    [
        np.digitize(smooth_noise((40, 40, 40), 0, 4), (90, 110, 130)),
        np.digitize(smooth_noise((40, 40, 40), 0, 4), (90, 110, 130)).astype(float),
        smooth_noise((40, 40, 40), 0, 4) > 100,
    ],
)
def test_label_maps_are_accepted_as_images_with_a_warning(array):
    """People register masks."""
    mask = Volume(array, np.eye(4), "mask 7")
    check_image(mask)
    (warning,) = image_warnings(Volume(smooth_noise((40, 40, 40), 0, 4), np.eye(4)), mask)
    assert_one_sentence(warning, "mask 7", "label map")


def test_noise_in_few_bits_is_no_label_map():
    noise = np.random.default_rng(0).normal(128, 40, (30, 30, 30)).clip(0, 255)
    noise[:10] = 0
    for bits in range(3, 9):
        array = (noise / 2 ** (8 - bits)).astype(np.uint8)
        assert not looks_like_labels(array)
        assert not looks_like_labels(array.astype(np.float32))


def test_real_images_and_label_maps_are_told_apart(shared_data):
    for path in sorted(shared_data.glob("*.nii.gz")):
        array = read_volume(path).array
        for step in (1, 2, 4):
            assert looks_like_labels(array[::step, ::step, ::step]) == ("labels" in path.name)
        # As if the scanner had given 5 bits only.
        assert looks_like_labels(array // 8) == ("labels" in path.name and array.max() > 8)


def test_a_ct_with_constant_padding_is_no_label_map():
    body = smooth_noise((40, 40, 40), 3, 4) * 10 - 1000
    scan = np.where(body > 0, body + np.random.default_rng(0).normal(0, 12, body.shape), -1024).astype(np.int16)
    assert not looks_like_labels(scan)


def test_labels_are_whole_numbers(tmp_path, fixed_volume):
    labels = np.digitize(fixed_volume.array, (80, 120)).astype(np.float32)
    write_volume(Volume(labels, fixed_volume.affine), tmp_path / "labels.nii.gz")
    read = read_labels(tmp_path / "labels.nii.gz")
    assert read.array.dtype.kind == "i"
    np.testing.assert_array_equal(read.array, labels)
    write_volume(fixed_volume, tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match="not a label map"):
        read_labels(tmp_path / "image.nii.gz")


def test_skewed_lattices_are_not_straightened_in_silence(tmp_path):
    skewed = np.eye(4)
    skewed[0, 1] = 0.2
    volume = Volume(smooth_noise((9, 10, 11), 0), skewed)
    with pytest.raises(WriteError, match="right angles"):
        write_volume(volume, tmp_path / "skewed.nii.gz")
    write_volume(volume, tmp_path / "skewed.nrrd")
    np.testing.assert_allclose(read_volume(tmp_path / "skewed.nrrd").affine, skewed)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]
    with atomic_path(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.json"]


def test_folders_that_cannot_be_written_to(tmp_path, fixed_volume):
    with pytest.raises(WriteError, match=r"nowhere.*could not be written"):
        write_volume(fixed_volume, tmp_path / "nowhere" / "image.nii.gz")
    with pytest.raises(WriteError, match="suffix"):
        write_volume(fixed_volume, tmp_path / "image.png")


FULL_DISK = """
import resource, sys
import numpy as np
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0).normal(size=(48, 48, 48, 3))
for path in sys.argv[1:]:
    try:
        if "field" in path:
            Deformation(noise, np.eye(4)).write(path)
        else:
            write_volume(Volume(noise[..., 0], np.eye(4)), path)
    except InputError as error:
        print(error)
"""


def test_a_full_disk_is_one_sentence_and_no_damage(tmp_path):
    names = [*(f"image{suffix}" for suffix in WRITTEN_SUFFIXES), "field.h5", "field.tfm", "field.nii.gz"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_text("old")
    command = [sys.executable, "-c", FULL_DISK, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for path, message in zip(paths, done.stdout.splitlines(), strict=True):
        assert_one_sentence(message.replace(str(path), "FILE"), "FILE could not be written")
        assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found_in_every_format(tmp_path, suffix, value):
    """ITK reads NaN in NIfTI files as zero."""
    array = smooth_noise((9, 10, 11), 0)
    array[3, 4, 5] = value
    path = tmp_path / f"image{suffix}"
    write_volume(Volume(array, np.eye(4)), path)
    with pytest.raises(InputError, match=f"image{suffix}.* NaN or infinity in 1 of 990"):
        check_image(read_volume(path))


def test_a_packed_file_is_unpacked_once(tmp_path, fixed_volume, monkeypatch):
    path = tmp_path / "image.nii.gz"
    write_volume(fixed_volume, path)
    opened, read_by_itk = [], []
    reader, open_packed = sitk.ImageFileReader, gzip.open

    class Reader(reader):
        def SetFileName(self, name):
            read_by_itk.append(name)
            super().SetFileName(name)

    monkeypatch.setattr(gzip, "open", lambda file, *options: opened.append(file) or open_packed(file, *options))
    monkeypatch.setattr(sitk, "ImageFileReader", Reader)
    np.testing.assert_array_equal(read_volume(path).array, fixed_volume.array)
    assert opened == [path]
    assert not any(name.endswith(".gz") for name in read_by_itk)


def test_the_temporary_folder_may_be_full(tmp_path, fixed_volume):
    write_volume(fixed_volume, tmp_path / "image.nii.gz")
    code = """if True:
        import resource, sys
        from GradProjIOLib.errors import InputError
        from GradProjIOLib.geometry.image_files import read_volume
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            read_volume(sys.argv[1])
        except InputError as error:
            print(error)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "image.nii.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert_one_sentence(done.stdout.strip().replace("image.nii.gz", "FILE"), "FILE cannot be unpacked", "TMPDIR")


HEADERS = {
    "no change": [],
    "sform and qform": [(252, "<2h", (1, 2))],
    "only qform": [(252, "<2h", (1, 0))],
    "only spacing": [(252, "<2h", (0, 0))],
    "slope": [(112, "<2f", (2.5, -7))],
    "slope of zero": [(112, "<2f", (0, 5))],
    "slope that is no number": [(112, "<2f", (np.nan, 5))],
    "offset of zero": [(108, "<f", (0,))],
    "meters": [(123, "<b", (1,))],
    "microns": [(123, "<b", (3,))],
    "right-handed": [(76, "<f", (-1.0,))],
}


@pytest.mark.parametrize("packed", [False, True], ids=[".nii", ".nii.gz"])
@pytest.mark.parametrize("patches", HEADERS.values(), ids=HEADERS)
def test_values_and_places_are_what_itk_reads_from_the_file(tmp_path, patches, packed):
    path = tmp_path / "image.nii"
    patched_nifti(path, *patches)
    if packed:
        path = path.with_suffix(".nii.gz")
        with gzip.open(path, "wb") as file:
            file.write((tmp_path / "image.nii").read_bytes())
    expected, found = from_sitk(sitk.ReadImage(str(path))), read_volume(path)
    assert found.array.dtype == expected.array.dtype
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_array_equal(found.affine, expected.affine)


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_freesurfer_s_files_are_read_where_the_same_nifti_lies(tmp_path, fixed_volume, suffix, dtype):
    array = fixed_volume.array.T.astype(dtype)
    nibabel.save(nibabel.MGHImage(array, fixed_volume.affine), tmp_path / f"image{suffix}")
    nibabel.save(nibabel.Nifti1Image(array, fixed_volume.affine), tmp_path / "image.nii")
    found, expected = read_volume(tmp_path / f"image{suffix}"), read_volume(tmp_path / "image.nii")
    assert found.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    path = tmp_path / f"image{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="incomplete or damaged"):
        read_volume(path)
    nibabel.save(nibabel.MGHImage(np.stack([array] * 3, axis=-1), fixed_volume.affine), path)
    with pytest.raises(InputError, match="single 3-D volume"):
        read_volume(path)


def test_a_volume_knows_its_file_until_its_voxels_change(tmp_path, fixed_volume):
    path = tmp_path / "image.nii.gz"
    write_volume(fixed_volume, path)
    read = read_volume(path)
    assert read.path == path
    assert fixed_volume.path is None
    assert replace(read, array=read.array + 1).path is None
    read.array[0, 0, 0] += 1
    assert read.path is None


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    """Folders in which another process is still writing stay."""
    code = """if True:
        import sys
        from GradProjIOLib.geometry.files import staging_folder
        with staging_folder(sys.argv[1]) as folder:
            (folder / "half.nii").write_text("half")
            print(folder, flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    killed, living = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    abandoned, busy = (Path(process.stdout.readline().strip()) for process in (killed, living))
    killed.kill()
    killed.communicate()
    assert abandoned.exists()
    with staging_folder(tmp_path) as own:
        assert not abandoned.exists()
        assert (busy / "half.nii").exists()
        assert own not in (abandoned, busy)
    living.communicate("", timeout=60)
    assert living.returncode == 0
    assert os.listdir(tmp_path) == []


def test_checksum_is_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert checksum(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(InputError, match="No such file"):
        checksum(tmp_path / "b")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mgz"])
@pytest.mark.parametrize("skew", [3e-4, 1e-3])
def test_axes_that_are_off_right_angles_by_rounding_are_straightened_with_a_note(tmp_path, skew, suffix):
    straight = oblique_affine((1.3, 0.7, 2.1), (20, -12, 31), (-30, 42, 50))
    skewed = straight.copy()
    skewed[:3, 0] += skew * 1.3 / 0.7 * straight[:3, 1]
    array = smooth_noise((9, 8, 10), 0)
    path = tmp_path / f"image{suffix}"
    if suffix == ".nrrd":
        sitk.WriteImage(to_sitk(Volume(array, skewed)), str(path))
    else:
        kind = nibabel.MGHImage if suffix == ".mgz" else nibabel.Nifti1Image
        image = kind(array.T, skewed)
        if suffix != ".mgz":
            image.set_sform(skewed, 1)
            image.set_qform(None, 0)
        nibabel.save(image, path)
    read = read_volume(path)
    np.testing.assert_array_equal(read.array, array)
    axes = read.affine[:3, :3] / read.spacing
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(read.affine, skewed, atol=2 * skew * 2.1)
    assert "right angles" in read.note
    assert read.note in image_warnings(read)
    assert "right angles" not in read_volume(written(tmp_path, Volume(array, straight), suffix)).note


def written(folder, volume, suffix):
    path = folder / f"straight{suffix}"
    if suffix == ".mgz":
        nibabel.save(nibabel.MGHImage(volume.array.T, volume.affine), path)
    else:
        write_volume(volume, path)
    return path

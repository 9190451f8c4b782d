"""`gradprojio transform` against SimpleITK, Slicer's markups and vtk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_affine, oblique_volume
from scipy import ndimage

from GradProjIOLib.commands.main import main
from GradProjIOLib.evaluation import lumir
from GradProjIOLib.evaluation.metrics import label_overlap
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.landmarks import read_landmarks
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_points
from GradProjIOLib.geometry.volume import Volume, to_sitk
from GradProjIOLib.spatial.deformation import Deformation

FLIP = np.array([-1, -1, 1])
LATTICE = ((24, 26, 22), oblique_affine((3.0, 2.5, 4.0), (12, -20, 8), (-28, 4, 30)))
MIDDLE = apply_matrix(LATTICE[1], np.array([10.5, 12.5, 11.5]))


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def wavy(seed: int, lattice=LATTICE) -> Deformation:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(*lattice[0], 3)), (4, 4, 4, 0))
    return Deformation(3 * noise / np.abs(noise).max(), lattice[1])


def itk(transform, points):
    return np.array([transform.TransformPoint(point) for point in (points * FLIP).tolist()]) * FLIP


@pytest.fixture
def files(tmp_path):
    """A linear transform and two fields, as ITK writes and reads them, and points inside both."""
    euler = sitk.Euler3DTransform((5.0, -3.0, 8.0), 0.1, -0.05, 0.15, (4.0, -6.0, 2.0))
    sitk.WriteTransform(euler, str(tmp_path / "rigid.tfm"))
    for name, seed in (("a", 0), ("b", 1)):
        wavy(seed).write(tmp_path / f"{name}.h5")
    index = np.random.default_rng(3).uniform(6, 15, (60, 3))
    return tmp_path, apply_matrix(LATTICE[1], index)


def read(path):
    return sitk.ReadTransform(str(path))


@pytest.mark.parametrize("names", [("a.h5", "b.h5"), ("rigid.tfm", "a.h5"), ("a.h5", "rigid.tfm"), ("a.h5",)])
def test_composing_and_inverting(files, names):
    folder, points = files
    parts = [read(folder / name) for name in names]
    expected = points
    for part in parts:
        expected = itk(part, expected)
    paths = [folder / name for name in names]
    assert run("transform", *paths, "-o", folder / "whole.h5") == 0
    np.testing.assert_allclose(itk(read(folder / "whole.h5"), points), expected, atol=0.05)
    assert run("transform", *paths, "--invert", "-o", folder / "back.h5") == 0
    np.testing.assert_allclose(itk(read(folder / "back.h5"), expected), points, atol=0.1)


def test_displacements_in_three_conventions_on_any_lattice(files):
    folder, _ = files
    reference = oblique_volume((12, 10, 11), (3, 2, 4), (5, 9, -7), MIDDLE, 0, "reference")
    moving = oblique_volume((9, 14, 12), (2, 3, 2.5), (-8, 4, 12), MIDDLE + np.array([4, -3, 5]), 1, "moving")
    write_volume(reference, folder / "reference.nii.gz")
    write_volume(moving, folder / "moving.nii.gz")
    whole = read(folder / "a.h5")
    points = lattice_points(reference.shape, reference.affine)
    mapped = itk(whole, points.reshape(-1, 3)).reshape(points.shape)
    arguments = ["transform", folder / "a.h5", "-r", folder / "reference.nii.gz", "-o", folder / "out.nii.gz"]
    assert run(*arguments) == 0
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "out.nii.gz")))
    np.testing.assert_allclose(found * FLIP, mapped - points, atol=1e-3)
    assert run(*arguments, "--convention", "voxels") == 0
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "out.nii.gz")))
    np.testing.assert_allclose(found @ reference.affine[:3, :3].T, mapped - points, atol=1e-3)
    assert run(*arguments, "--convention", "lumir", "--moving", folder / "moving.nii.gz") == 0
    found = lumir.read_displacement(folder / "out.nii.gz").transpose(2, 1, 0, 3)
    index = found + lattice_points(reference.shape, np.eye(4))
    np.testing.assert_allclose(apply_matrix(moving.affine, index), mapped, atol=1e-3)


def write_points(path, points):
    names = [f"p, {n}" for n in range(len(points))]
    if path.name.endswith(".mrk.json"):
        placed = [{"id": str(n), "label": name, "position": (point * FLIP).tolist(), "positionStatus": "defined"}
                  for n, (name, point) in enumerate(zip(names, points, strict=True))]  # fmt: skip
        placed.append({"id": "x", "label": "later", "position": None, "positionStatus": "undefined"})
        content = {"markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": placed}]}
        path.write_text(json.dumps(content))
    elif path.suffix == ".fcsv":
        rows = [f"vtkMRMLMarkupsFiducialNode_{n},{x},{y},{z},0,0,0,1,1,1,0,\"{names[n]}\",note,,2,0"
                for n, (x, y, z) in enumerate(points * FLIP)]  # fmt: skip
        header = ["# Markups fiducial file version = 4.11", "# CoordinateSystem = LPS", "# columns = id,x,y,z"]
        path.write_text("\n".join(header + rows) + "\n")
    else:
        rows = [f'"{name}",{z},{y},{x},7' for name, (x, y, z) in zip(names, points, strict=True)]
        path.write_text("name,z,y,x,weight\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("suffix", [".mrk.json", ".fcsv", ".csv"])
def test_landmarks_go_there_and_back_and_the_rest_of_the_file_stays(files, suffix):
    folder, points = files
    source, there, back = (folder / f"{name}{suffix}" for name in ("source", "there", "back"))
    write_points(source, points)
    frame = ["--points-frame", "RAS"] if suffix == ".csv" else []
    maps = [folder / "rigid.tfm", folder / "a.h5", folder / "b.h5"]
    assert run("transform", *maps, "--points", source, "-o", there, *frame) == 0
    expected = points
    for one in maps:
        expected = itk(read(one), expected)
    before, found = (read_landmarks(path, "RAS") for path in (source, there))
    np.testing.assert_allclose(found.points, expected, atol=1e-3)
    assert found.names == before.names
    assert run("transform", *maps, "--invert", "--points", there, "-o", back, *frame) == 0
    np.testing.assert_allclose(read_landmarks(back, "RAS").points, points, atol=0.01)
    text, original = there.read_text(), source.read_text()
    assert ("weight" in text, "note" in text, "later" in text) == ("weight" in original, "note" in original,
                                                                   "later" in original)  # fmt: skip


@pytest.mark.parametrize("suffix", [".vtk", ".vtp", ".ply", ".stl"])
@pytest.mark.parametrize("space", ["LPS", "RAS"])
def test_surfaces_are_mapped_in_their_own_coordinates(files, suffix, space):
    slicer = pytest.importorskip("slicer")
    vtk = pytest.importorskip("vtk")
    from vtk.util.numpy_support import vtk_to_numpy

    folder, points = files
    sphere = vtk.vtkSphereSource()
    sphere.SetCenter(*points.mean(axis=0))
    sphere.SetRadius(6)
    sphere.Update()
    scene = slicer.vtkMRMLScene()
    node, storage = (scene.AddNewNodeByClass(f"vtkMRMLModel{kind}Node") for kind in ("", "Storage"))
    node.SetAndObservePolyData(sphere.GetOutput())
    storage.SetFileName(str(folder / f"ball{suffix}"))
    storage.SetCoordinateSystem(storage.CoordinateSystemLPS if space == "LPS" else storage.CoordinateSystemRAS)
    assert storage.WriteData(node)
    frame = ["--points-frame", space]
    arguments = ["transform", folder / "a.h5", "--points", folder / f"ball{suffix}", *frame]
    assert run(*arguments, "-o", folder / f"moved{suffix}") == 0
    storage.SetFileName(str(folder / f"moved{suffix}"))
    again = scene.AddNewNodeByClass("vtkMRMLModelNode")
    assert storage.ReadData(again)
    moved = vtk_to_numpy(again.GetPolyData().GetPoints().GetData())
    flat = vtk_to_numpy(sphere.GetOutput().GetPoints().GetData()).astype(float)
    expected = itk(read(folder / "a.h5"), flat)
    # The order of the points of an STL file is its own.
    distance = np.linalg.norm(moved[:, None] - expected[None], axis=-1)
    assert distance.min(axis=1).max() < 1e-2
    assert distance.min(axis=0).max() < 1e-2
    assert np.linalg.norm(expected - flat, axis=1).max() > 0.5


def test_what_cannot_be_done_is_said(files, capsys):
    folder, points = files
    write_points(folder / "p.csv", points)
    for arguments, words in (
        (["rigid.tfm", "-o", "out.nii.gz"], "--reference"),
        (["a.h5", "--points", "p.csv", "-o", "q.csv"], "in which coordinates"),
        (["a.h5", "--points", "p.csv", "-o", "q.fcsv"], "both the same one"),
        (["a.h5", "--points", "none.csv", "-o", "q.csv"], "does not exist"),
        (["a.h5", "--points", "a.h5", "-o", "q.csv"], "unsupported"),
    ):
        paths = [folder / one if "." in one else one for one in arguments]
        assert run("transform", *paths) == 2
        assert words in capsys.readouterr().err


def test_warping_several_label_files_of_huge_numbers_and_a_series(files, capsys):
    folder, _ = files
    fixed = oblique_volume((12, 10, 11), (3, 2, 4), (5, 9, -7), MIDDLE, 0, "fixed")
    moving = oblique_volume((14, 12, 13), (3, 3, 3), (-8, 4, 12), MIDDLE, 1, "moving")
    write_volume(fixed, folder / "fixed.nii.gz")
    numbers = np.array([0, 7, 3_000_000_000, 2**40 + 1])
    labels = numbers[(moving.array / 13).astype(int) % 4]
    write_volume(Volume(labels.astype(np.float64), moving.affine), folder / "float.nii.gz")
    write_volume(Volume(labels, moving.affine), folder / "whole.nrrd")
    series = sitk.JoinSeries([to_sitk(Volume(moving.array * factor, moving.affine)) for factor in (1, 2)], 0, 2.5)
    sitk.WriteImage(series, str(folder / "series.nii.gz"))
    more = [folder / "a.h5", "-r", folder / "fixed.nii.gz"]
    expected = Deformation.read(folder / "a.h5").warp(Volume(labels, moving.affine), fixed, "nearest").array
    assert set(np.unique(expected)) == set(numbers)
    assert run("warp", folder / "float.nii.gz", folder / "whole.nrrd", *more, "-o", folder / "out", "--labels") == 0
    for name in ("float.nii.gz", "whole.nrrd"):
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "out" / name)))
        np.testing.assert_array_equal(found, expected)
    assert run("warp", folder / "series.nii.gz", *more, "-o", folder / "warped.nii.gz", "--background", -5) == 0
    found = sitk.ReadImage(str(folder / "warped.nii.gz"))
    assert found.GetSpacing()[3] == pytest.approx(2.5)
    for number in range(2):
        frame = sitk.Resample(series[..., number], to_sitk(fixed), read(folder / "a.h5"), sitk.sitkLinear, -5.0)
        expected = sitk.GetArrayFromImage(frame)
        got = sitk.GetArrayFromImage(found[..., number])
        assert (got == -5).any()
        assert np.mean(np.abs(got - expected) > 0.1) < 0.01
    too_large = Volume(np.where(labels > 0, 1e30, 0), moving.affine)
    write_volume(too_large, folder / "large.nii.gz")
    assert run("warp", folder / "large.nii.gz", *more, "-o", folder / "x.nii.gz", "--labels") == 2
    assert "too large" in capsys.readouterr().err


def test_huge_labels_are_measured():
    labels = np.zeros((6, 6, 6), np.int64)
    labels[1:4, 1:4, 1:4], labels[4:, 4:, 4:] = 3_000_000_000, -2
    (small, large) = label_overlap(labels, labels, (1, 1, 1))
    assert small == {"structure": -2, "dice": 1, "hd95_mm": 0}
    assert large == {"structure": 3_000_000_000, "dice": 1, "hd95_mm": 0}


def test_a_reference_whose_axes_were_straightened_is_named(tmp_path, capsys):
    skewed = LATTICE[1].copy()
    skewed[:3, 0] += 1e-3 * skewed[:3, 1]
    reference = sitk.GetImageFromArray(np.zeros(LATTICE[0], np.uint8))
    image = to_sitk(Volume(np.zeros(LATTICE[0], np.uint8), LATTICE[1]))
    axes = FLIP[:, None] * skewed[:3, :3] / np.linalg.norm(skewed[:3, :3], axis=0)
    reference.CopyInformation(image)
    reference.SetDirection(axes.ravel().tolist())
    sitk.WriteImage(reference, str(tmp_path / "skewed.nrrd"))
    wavy(1).write(tmp_path / "wavy.h5")
    assert run("transform", tmp_path / "wavy.h5", "-r", tmp_path / "skewed.nrrd", "-o", tmp_path / "out.h5") == 0
    assert "not quite at right angles" in capsys.readouterr().err

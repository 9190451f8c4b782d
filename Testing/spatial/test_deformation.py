"""Deformations against SimpleITK and Slicer's MRML, and the laws that maps obey."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_affine, smooth_noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from GradProjIOLib.errors import InputError, WriteError
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_points
from GradProjIOLib.geometry.transform_files import linear_from_sitk
from GradProjIOLib.geometry.volume import Volume, to_sitk
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.spatial.jacobian import determinant_map

RAS_LPS = np.array([-1, -1, 1])
LATTICE = ((14, 18, 16), oblique_affine((3.0, 2.0, 4.0), (12, -20, 8), (-28, 4, 30)))
LINEAR = oblique_affine((1.1, 0.95, 1.02), (8, -5, 14), (6, -9, 4))


def wavy(amplitude: float = 2.0, lattice=LATTICE, seed: int = 0) -> Deformation:
    """A smooth deformation without folds, of about `amplitude` mm."""
    shape, affine = lattice
    noise = np.random.default_rng(seed).normal(size=(*shape, 3))
    smooth = ndimage.gaussian_filter(noise, (2.5, 2.5, 2.5, 0))
    return Deformation(smooth / np.abs(smooth).max() * amplitude, affine)


def random_points(deformation_or_volume, count: int = 500, margin: float = 0.0) -> np.ndarray:
    """Points (RAS mm) inside a lattice, `margin` voxels away from its outermost samples."""
    high = np.array(deformation_or_volume.shape[::-1]) - 1 - margin
    index = np.random.default_rng(7).uniform(margin, high, size=(count, 3))
    return index @ deformation_or_volume.affine[:3, :3].T + deformation_or_volume.affine[:3, 3]


def itk_points(transform, points: np.ndarray) -> np.ndarray:
    """Points (RAS mm) as an ITK transform (LPS mm) maps them."""
    return np.array([transform.TransformPoint(point) for point in (points * RAS_LPS).tolist()]) * RAS_LPS


def inverted(deformation: Deformation, *lattice) -> Deformation:
    """The inverse, which must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return deformation.inverse(*lattice)


# Points and lattices


def test_points_between_samples_equal_simpleitk(tmp_path):
    deformation = wavy()
    deformation.write(tmp_path / "transform.h5")
    points = random_points(deformation)
    expected = itk_points(sitk.ReadTransform(str(tmp_path / "transform.h5")), points)
    np.testing.assert_allclose(deformation.map_points(points), expected, atol=1e-4)
    assert np.abs(expected - points).max() > 1


def test_outside_its_lattice_a_deformation_keeps_the_border_displacement():
    deformation = wavy()
    index = np.array([[-9.0, 4, 5], [3, 17 + 8, 6], [15 + 2, -1, 13 + 30]])
    nearest = np.clip(index, 0, [15, 17, 13])
    to_points = deformation.affine
    points, border = (i @ to_points[:3, :3].T + to_points[:3, 3] for i in (index, nearest))
    expected = deformation.map_points(border) - border
    np.testing.assert_allclose(deformation.map_points(points) - points, expected, atol=1e-4)


def test_sampling_on_the_same_lattice_changes_nothing_and_on_another_interpolates():
    deformation = wavy()
    assert deformation.sample(deformation.shape, deformation.affine) is deformation
    shape, affine = (9, 12, 10), oblique_affine((4.0, 3.0, 5.0), (0, 10, 0), (-20, 10, 35))
    points = lattice_points(shape, affine)
    sampled = deformation.sample(shape, affine)
    np.testing.assert_allclose(sampled.displacement, deformation.map_points(points) - points, atol=1e-4)


def test_displacements_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\[k, j, i, 3\]"):
        Deformation(np.zeros((3, 8, 8, 8)), np.eye(4))


# Warping


@pytest.mark.parametrize(
    ("interpolation", "interpolator"),
    [("linear", sitk.sitkLinear), ("bspline", sitk.sitkBSpline), ("nearest", sitk.sitkNearestNeighbor)],
)
def test_warping_equals_simpleitk(fixed_volume, moving_volume, interpolation, interpolator):
    # A lattice that reaches beyond the fixed image, since outside ITK takes another displacement.
    coarse = fixed_volume.affine @ np.array([[2, 0, 0, -3], [0, 2, 0, -3], [0, 0, 2, -3], [0, 0, 0, 1]])
    deformation = wavy(3.0, ((16, 21, 17), coarse))
    field = sitk.GetImageFromArray(deformation.displacement.astype(float) * RAS_LPS, isVector=True)
    field.CopyInformation(to_sitk(Volume(deformation.displacement[..., 0], deformation.affine)))
    transform = sitk.DisplacementFieldTransform(field)
    for moving in (moving_volume, Volume(np.rint(moving_volume.array), moving_volume.affine)):
        resampled = sitk.Resample(to_sitk(moving), to_sitk(fixed_volume), transform, interpolator, 17)
        expected = sitk.GetArrayFromImage(resampled)
        assert 0.5 < (expected != 17).mean() < 0.9
        warped = deformation.warp(moving, fixed_volume, interpolation, background=17)
        np.testing.assert_allclose(warped.array, expected, atol=1e-3)
        np.testing.assert_array_equal(warped.affine, fixed_volume.affine)
    # Whole numbers are rounded, where ITK cuts them off.
    whole = Volume(moving.array.astype(np.uint8), moving.affine)
    warped = deformation.warp(whole, fixed_volume, interpolation, background=17)
    assert warped.array.dtype == np.uint8
    assert np.abs(warped.array - np.clip(expected, 0, 255)).max() < 0.501


def test_what_lies_outside_the_moving_image_is_background(fixed_volume):
    shape, affine = fixed_volume.shape, fixed_volume.affine
    far = Deformation.from_linear(oblique_affine((1, 1, 1), (0, 0, 0), (500, 0, 0)), shape, affine)
    image = Volume(fixed_volume.array - 1000, affine)
    assert np.all(far.warp(image, fixed_volume).array == image.array.min())
    assert np.all(far.warp(image, fixed_volume, background=5).array == 5)
    labels = Volume(np.full(shape, 3, dtype=np.int16), affine)
    assert np.all(far.warp(labels, fixed_volume, "nearest").array == 0)


def test_warping_keeps_large_labels_exactly(fixed_volume):
    labels = np.random.default_rng(0).integers(0, 2**31 - 1, fixed_volume.shape, dtype=np.int32)
    volume = Volume(labels, fixed_volume.affine)
    identity = Deformation.from_linear(np.eye(4), *LATTICE)
    np.testing.assert_array_equal(identity.warp(volume, (volume.shape, volume.affine), "nearest").array, labels)


def test_a_spline_does_not_leave_the_range_of_the_pixel_type(fixed_volume):
    steps = Volume(np.where(fixed_volume.array > 100, 255, 0).astype(np.uint8), fixed_volume.affine)
    warped = wavy(2.0).warp(steps, fixed_volume, "bspline").array
    linear = wavy(2.0).warp(steps, fixed_volume).array
    # Without the limit, an overshoot to 260 would come out as 4.
    assert np.abs(warped.astype(int) - linear).max() < 128


def test_unknown_interpolations_are_refused(fixed_volume):
    with pytest.raises(ValueError, match="linear, bspline, nearest"):
        wavy().warp(fixed_volume, fixed_volume, "cubic")


# Composing and inverting

modest = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@modest
@given(seed=st.integers(0, 1000))
def test_composition_is_one_map_after_the_other(seed):
    inner, outer = wavy(2.0, seed=seed), wavy(3.0, ((9, 9, 9), oblique_affine((5, 5, 5), (0, 0, 5), (-25, 5, 30))))
    points = lattice_points(inner.shape, inner.affine)
    composed = outer.compose(inner)
    expected = outer.map_points(inner.map_points(points))
    np.testing.assert_allclose(composed.map_points(points), expected, atol=1e-3)


@modest
@given(seed=st.integers(0, 1000), amplitude=st.floats(0.1, 4.0))
def test_a_deformation_and_its_inverse_cancel(seed, amplitude):
    deformation = wavy(amplitude, seed=seed)
    inverse = inverted(deformation)
    points = lattice_points(inverse.shape, inverse.affine)
    np.testing.assert_allclose(deformation.map_points(inverse.map_points(points)), points, atol=0.02)


def test_a_strongly_shearing_diffeomorphism_is_inverted():
    # Composed of small steps, so without folds, but no contraction: the fixed-point iteration alone fails.
    deformation = wavy(0.35, ((24, 24, 24), np.diag([2.0, 2.0, 2.0, 1.0])))
    for _ in range(5):
        deformation = deformation.compose(deformation)
    assert np.abs(deformation.displacement).max() > 7
    inverse = inverted(deformation)
    points = lattice_points(inverse.shape, inverse.affine)
    np.testing.assert_allclose(deformation.map_points(inverse.map_points(points)), points, atol=0.03)


def test_the_inverse_can_have_another_lattice(moving_volume):
    deformation = wavy()
    inverse = inverted(deformation, moving_volume.shape, moving_volume.affine)
    assert inverse.shape == moving_volume.shape
    points = lattice_points(inverse.shape, inverse.affine)
    np.testing.assert_allclose(deformation.map_points(inverse.map_points(points)), points, atol=0.03)


def test_folds_are_reported_and_leave_the_rest_alone():
    n = 20
    x = np.arange(n, dtype=float)
    displacement = np.zeros((n, n, n, 3))
    displacement[..., 0] = -2.5 * (x - 9.5) * np.exp(-((x - 9.5) ** 2) / 8)
    deformation = Deformation(displacement, np.eye(4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inverse = deformation.inverse()
    points = lattice_points(inverse.shape, inverse.affine)
    error = np.linalg.norm(deformation.map_points(inverse.map_points(points)) - points, axis=-1)
    assert np.isfinite(inverse.displacement).all()
    assert error[:, :, :2].max() < 0.02
    missed = int((error > 0.0101).sum())
    assert bool(missed) == bool(caught)
    assert all(f"at {missed} of {n**3} points" in str(one.message) for one in caught)


def test_points_that_cannot_be_reached_are_reported():
    # Everything lands on one plane, so no other point has a source.
    displacement = np.zeros((10, 10, 10, 3))
    displacement[..., 0] = 4.5 - np.arange(10)
    with pytest.warns(RuntimeWarning, match=r"off by up to .* mm, at \d+ of 1000 points"):
        Deformation(displacement, np.eye(4)).inverse()


def test_a_linear_map_after_and_before():
    deformation = wavy()
    points = random_points(deformation)
    moved = deformation.map_points(points)
    after = deformation.then_linear(LINEAR)
    np.testing.assert_allclose(after.map_points(points), apply_matrix(LINEAR, moved), atol=1e-9)
    before = deformation.compose(Deformation.from_linear(LINEAR, *LATTICE))
    on_lattice = lattice_points(*LATTICE)
    expected = deformation.map_points(apply_matrix(LINEAR, on_lattice))
    np.testing.assert_allclose(before.map_points(on_lattice), expected, atol=1e-4)
    np.testing.assert_allclose(before.matrix, LINEAR)


def test_forward_and_inverse_with_a_linear_part_cancel():
    forward = wavy(2.0).then_linear(LINEAR)
    back = inverted(forward, (16, 20, 18), LINEAR @ forward.affine)
    np.testing.assert_allclose(back.matrix, np.linalg.inv(LINEAR))
    inner = random_points(forward, margin=2)
    np.testing.assert_allclose(back.map_points(forward.map_points(inner)), inner, atol=0.1)


def test_far_outside_its_lattice_a_faded_deformation_is_its_linear_part(tmp_path):
    """For this class, SimpleITK and Slicer alike; inside nothing changes, and nothing folds on the way."""
    slicer = pytest.importorskip("slicer")
    sharp = wavy(9.0).then_linear(LINEAR)
    faded = sharp.fading()
    inside, (high, low) = random_points(sharp), (np.array(sharp.shape[::-1]) + 40, -40)
    np.testing.assert_allclose(faded.map_points(inside), sharp.map_points(inside), atol=1e-4)
    index = np.random.default_rng(3).uniform(low, high, size=(2000, 3))
    everywhere = apply_matrix(sharp.affine, index)
    outside = everywhere[((index < -16) | (index > np.array(sharp.shape[::-1]) + 15)).any(axis=1)]
    assert len(outside) > 500
    faded.write(tmp_path / "transform.h5")
    transform = sitk.ReadTransform(str(tmp_path / "transform.h5"))
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode")
    storage = slicer.vtkMRMLTransformStorageNode()
    storage.SetFileName(str(tmp_path / "transform.h5"))
    assert storage.ReadData(node)
    for mapped in (faded.map_points(outside), itk_points(transform, outside), slicer_points(node, outside)):
        np.testing.assert_allclose(mapped, apply_matrix(LINEAR, outside), atol=1e-4)
    np.testing.assert_allclose(itk_points(transform, everywhere), faded.map_points(everywhere), atol=1e-3)
    read = Deformation.read(tmp_path / "transform.h5")
    np.testing.assert_allclose(read.map_points(everywhere), faded.map_points(everywhere), atol=1e-4)
    determinant = determinant_map(faded)
    core = determinant_map(sharp)
    assert determinant.min() > 0.1 * core.min()


def test_a_deformation_with_a_large_linear_part_is_inverted():
    turn = oblique_affine((1.2, 0.8, 1.0), (40, 0, 30), (20, -50, 10))
    deformation = wavy(1.0).then_linear(turn)
    inverse = inverted(deformation, deformation.shape, turn @ deformation.affine)
    points = lattice_points(inverse.shape, inverse.affine)
    np.testing.assert_allclose(deformation.map_points(inverse.map_points(points)), points, atol=0.05)


# Files


@pytest.mark.parametrize("suffix", [".h5", ".tfm", ".nii.gz", ".nrrd", ".mha"])
def test_files_give_back_what_was_written(tmp_path, suffix):
    deformation = wavy()
    path = tmp_path / f"größe 変形{suffix}"
    deformation.write(path)
    read = Deformation.read(path)
    np.testing.assert_allclose(read.displacement, deformation.displacement, atol=1e-6)
    np.testing.assert_allclose(read.affine, deformation.affine, atol=1e-5)
    shape, affine = (9, 12, 10), oblique_affine((4.0, 3.0, 5.0), (0, 10, 0), (-20, 10, 35))
    sampled = Deformation.read(path, shape, affine)
    np.testing.assert_allclose(sampled.displacement, deformation.sample(shape, affine).displacement, atol=1e-3)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_displacement_images_are_simpleitk_displacement_fields(tmp_path, suffix):
    deformation = wavy()
    deformation.write(tmp_path / f"field{suffix}")
    field = sitk.ReadImage(str(tmp_path / f"field{suffix}"), sitk.sitkVectorFloat64)
    points = random_points(deformation)
    expected = itk_points(sitk.DisplacementFieldTransform(field), points)
    np.testing.assert_allclose(deformation.map_points(points), expected, atol=1e-4)


def test_slicer_reads_the_transform_and_maps_the_same_points(tmp_path):
    slicer = pytest.importorskip("slicer")
    deformation = wavy(3.0)
    deformation.write(tmp_path / "transform.h5")
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode")
    storage = slicer.vtkMRMLTransformStorageNode()
    storage.SetFileName(str(tmp_path / "transform.h5"))
    assert storage.ReadData(node)
    samples = lattice_points(deformation.shape, deformation.affine).reshape(-1, 3)
    between = random_points(deformation)
    outside = samples + 30 * deformation.affine[:3, 0]
    for points in (samples, outside):
        np.testing.assert_allclose(slicer_points(node, points), deformation.map_points(points), atol=1e-4)
    # Slicer interpolates the displacement with a cubic spline, and linearly when asked to.
    np.testing.assert_allclose(slicer_points(node, between), deformation.map_points(between), atol=0.1)
    node.GetTransformFromParent().SetInterpolationModeToLinear()
    np.testing.assert_allclose(slicer_points(node, between), deformation.map_points(between), atol=1e-4)


def slicer_points(node, points: np.ndarray) -> np.ndarray:
    """Points (RAS mm) of the fixed image in the moving one. ITK's transforms lead there, so for Slicer, which
    moves images, they are transforms from the world."""
    import vtk

    general = vtk.vtkGeneralTransform()
    node.GetTransformFromWorld(general)
    return np.array([general.TransformPoint(point) for point in points.tolist()])


def itk_transforms() -> dict[str, sitk.Transform]:
    euler = sitk.Euler3DTransform((5.0, -3.0, 8.0), 0.2, -0.1, 0.3, (4.0, -6.0, 2.0))
    affine = sitk.AffineTransform((1.1, 0.1, 0, 0, 0.9, 0.05, 0, 0, 1.05), (3.0, 2.0, -1.0))
    spline = sitk.BSplineTransform(3)
    spline.SetTransformDomainOrigin((-60.0, -60.0, -60.0))
    spline.SetTransformDomainPhysicalDimensions((200.0, 200.0, 200.0))
    spline.SetTransformDomainMeshSize((4, 4, 4))
    count = len(spline.GetParameters())
    spline.SetParameters(np.random.default_rng(0).normal(0, 3, count).tolist())
    return {
        "euler": euler,
        "affine": affine,
        "two": sitk.CompositeTransform([euler, affine]),
        "spline": spline,
        "all": sitk.CompositeTransform([spline, euler]),
    }


@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
@pytest.mark.parametrize("name", ["euler", "affine", "two", "spline", "all"])
def test_any_itk_transform_is_read(tmp_path, name, suffix):
    transform = itk_transforms()[name]
    path = tmp_path / f"initial{suffix}"
    sitk.WriteTransform(transform, str(path))
    read = Deformation.read(path, *LATTICE)
    points = lattice_points(*LATTICE).reshape(-1, 3)
    np.testing.assert_allclose(read.map_points(points), itk_points(transform, points), atol=1e-3)
    assert read.is_linear == (name not in ("spline", "all"))
    if read.is_linear:
        np.testing.assert_allclose(apply_matrix(read.matrix, points), itk_points(transform, points), atol=1e-9)


def test_matlab_files_as_ants_writes_them_are_read(tmp_path):
    affine = itk_transforms()["affine"]
    sitk.WriteTransform(affine, str(tmp_path / "0GenericAffine.mat"))
    points = np.random.default_rng(0).normal(0, 50, (20, 3))
    matrix = Deformation.read(tmp_path / "0GenericAffine.mat").matrix
    np.testing.assert_allclose(apply_matrix(matrix, points), itk_points(affine, points), atol=1e-6)


def write_linear(path) -> None:
    """LINEAR as SimpleITK writes it, in LPS."""
    lps = np.diag([-1, -1, 1, 1]) @ LINEAR @ np.diag([-1, -1, 1, 1])
    sitk.WriteTransform(sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist()), str(path))


@pytest.mark.parametrize("suffix", [".tfm", ".h5"])
def test_linear_itk_transforms_are_read_as_matrices(tmp_path, suffix):
    write_linear(tmp_path / f"linear{suffix}")
    np.testing.assert_allclose(Deformation.read(tmp_path / f"linear{suffix}").matrix, LINEAR, atol=1e-12)


def test_a_spline_needs_a_lattice(tmp_path):
    sitk.WriteTransform(itk_transforms()["spline"], str(tmp_path / "spline.h5"))
    with pytest.raises(InputError, match="fixed image"):
        Deformation.read(tmp_path / "spline.h5")


@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
@pytest.mark.parametrize("order", ["affine field", "field affine", "affine field euler", "affine"])
def test_affines_around_one_field_are_read_exactly(tmp_path, suffix, order):
    parts = itk_transforms()
    deformation = wavy(4.0)
    deformation.write(tmp_path / "field.h5")
    parts["field"] = sitk.ReadTransform(str(tmp_path / "field.h5"))
    composite = sitk.CompositeTransform([parts[name] for name in order.split()])
    sitk.WriteTransform(composite, str(tmp_path / f"composite{suffix}"))
    read = Deformation.read(tmp_path / f"composite{suffix}")
    points = random_points(deformation)
    if before := order.partition("field ")[2]:
        points = apply_matrix(np.linalg.inv(linear_from_sitk(parts[before])), points)
    np.testing.assert_allclose(read.map_points(points), itk_points(composite, points), atol=1e-4)
    # What is read can be written again, and is the same.
    if order in ("affine field", "affine"):
        read.write(tmp_path / "again.h5")
        again = sitk.ReadTransform(str(tmp_path / "again.h5"))
        far = points + 300
        np.testing.assert_allclose(itk_points(again, points), itk_points(composite, points), atol=1e-4)
        np.testing.assert_allclose(itk_points(again, far), itk_points(composite, far), atol=1e-6)


def test_a_displacement_image_holds_the_linear_part_too(tmp_path):
    deformation = wavy(3.0).then_linear(LINEAR)
    deformation.write(tmp_path / "field.nii.gz")
    field = sitk.ReadImage(str(tmp_path / "field.nii.gz"), sitk.sitkVectorFloat64)
    points = random_points(deformation)
    expected = itk_points(sitk.DisplacementFieldTransform(field), points)
    np.testing.assert_allclose(deformation.map_points(points), expected, atol=1e-3)


def test_files_that_are_no_transforms(tmp_path):
    for name in ("text.h5", "text.tfm", "text.nrrd"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(InputError, match=name):
            Deformation.read(tmp_path / name, *LATTICE)
    sitk.WriteImage(to_sitk(Volume(smooth_noise((9, 9, 9), 0), np.eye(4))), str(tmp_path / "image.nii.gz"))
    with pytest.raises(InputError, match="three components"):
        Deformation.read(tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match="does not exist"):
        Deformation.read(tmp_path / "none.h5")
    (tmp_path / "transform.npz").write_bytes(b"zip")
    with pytest.raises(InputError, match="unsupported format"):
        Deformation.read(tmp_path / "transform.npz")
    sitk.WriteTransform(sitk.Euler2DTransform(), str(tmp_path / "flat.tfm"))
    with pytest.raises(InputError, match="2-D"):
        Deformation.read(tmp_path / "flat.tfm")


@pytest.mark.parametrize("hole", [np.nan, np.finfo(np.float32).max])
@pytest.mark.parametrize("name", ["field.nii.gz", "field.nrrd", "field.h5", "composite.h5"])
def test_undefined_samples_are_known_and_nothing_is_drawn_there(tmp_path, fixed_volume, name, hole):
    """ANTs writes the largest number there is; ITK reads NaN in NIfTI files as zero."""
    whole = wavy()
    broken = whole.displacement.astype(float) * RAS_LPS
    broken[3, 4, 5], broken[7:9, 8:10, 9] = hole, hole
    field = to_sitk_field(broken, whole.affine)
    path = tmp_path / name
    if name.endswith(".h5"):
        transform = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
        if name.startswith("composite"):
            transform = sitk.CompositeTransform([itk_transforms()["euler"], transform])
        sitk.WriteTransform(transform, str(path))
    else:
        sitk.WriteImage(sitk.Cast(field, sitk.sitkVectorFloat32), str(path))
    read = Deformation.read(path)
    expected = np.zeros(whole.shape, dtype=bool)
    expected[3, 4, 5] = expected[7:9, 8:10, 9] = True
    assert np.array_equal(read.undefined, expected)
    np.testing.assert_allclose(read.displacement[~expected], whole.displacement[~expected], atol=1e-4)
    image = Volume(np.ones(whole.shape, np.uint8), read.matrix @ whole.affine)
    drawn = read.warp(image, (whole.shape, whole.affine), background=9).array
    assert (drawn[expected] == 9).all()
    assert (drawn[3:5, 6:8, 6:8] == 1).all()
    assert np.array_equal(read.then_linear(LINEAR).undefined, expected)
    composed = Deformation.from_linear(LINEAR).compose(read)
    assert np.array_equal(composed.undefined, expected)


def to_sitk_field(displacement: np.ndarray, affine: np.ndarray) -> sitk.Image:
    field = sitk.GetImageFromArray(displacement, isVector=True)
    field.CopyInformation(to_sitk(Volume(displacement[..., 0], affine)))
    return field


def test_a_field_that_is_undefined_everywhere_is_refused():
    with pytest.raises(InputError, match="undefined"):
        Deformation(np.full((3, 3, 3, 3), np.nan), np.eye(4))


def test_unknown_suffixes_are_not_written(tmp_path):
    for name in ("transform.mat", "transform.npz", "transform"):
        with pytest.raises(WriteError, match="suffix"):
            wavy().write(tmp_path / name)
    assert not list(tmp_path.iterdir())

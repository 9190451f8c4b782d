"""Determinants and folding against closed forms, SimpleITK and the values of the package digital-diffeomorphism."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.result import describe_jacobian
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.spatial.jacobian import determinant_map, folding, jacobian_determinant, summary

OBLIQUE = oblique_affine((1.3, 0.7, 2.1), (20, -12, 31), (-30, 12, 50))


def of_voxels(displacement: np.ndarray, affine: np.ndarray = OBLIQUE) -> Deformation:
    """A deformation from a displacement [x, y, z, 3] in voxels along x, y, z."""
    return Deformation(displacement.transpose(2, 1, 0, 3) @ affine[:3, :3].T, affine)


def shear(x, y, z):
    return 0.1 * x + 0.05 * y, -0.05 * z, 0.02 * x


def pinch(x, y, z):
    distance = (x - 11.5) ** 2 + (y - 13.5) ** 2 + (z - 15.5) ** 2
    return -1.5 * (x - 11.5) * np.exp(-distance / 32), 0 * y, 0 * z


def checkerboard(x, y, z):
    return np.where((x + y + z) % 2 == 1, 0.6, -0.6), 0 * y, 0 * z


def random_field(amplitude: float, smoothness: float, shape=(10, 12, 11), seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(*shape, 3))
    smooth = ndimage.gaussian_filter(noise, (smoothness, smoothness, smoothness, 0))
    return amplitude * smooth / np.abs(smooth).max()


@pytest.mark.parametrize("affine", [np.eye(4), OBLIQUE, np.diag([-1.0, 2.0, 0.5, 1.0])])
@pytest.mark.parametrize(
    ("field", "volume", "folded"), [(shear, 0, 0), (pinch, 18.774128, 96), (checkerboard, 1402.5365, 0)]
)
def test_folding_equals_the_reference_package(field, volume, folded, affine):
    grid = np.meshgrid(np.arange(24.0), np.arange(28.0), np.arange(32.0), indexing="ij")
    found = folding(of_voxels(np.stack(field(*grid), axis=-1), affine))
    assert found.ndv_voxels == pytest.approx(volume, rel=1e-5)
    assert found.folded_voxels == folded == found.mask.sum()
    assert found.ndv_percent == pytest.approx(100 * volume / 21504, rel=1e-5)
    assert found.folded_percent == pytest.approx(100 * folded / 21504)


def test_smallest_determinant_of_the_pinch():
    grid = np.meshgrid(np.arange(24.0), np.arange(28.0), np.arange(32.0), indexing="ij")
    deformation = of_voxels(np.stack(pinch(*grid), axis=-1))
    assert determinant_map(deformation).min() == pytest.approx(-0.398671, abs=1e-6)
    assert np.array_equal(determinant_map(deformation) <= 0, folding(deformation).mask)


def tetrahedra_volume(displacement: np.ndarray) -> float:
    """Non-diffeomorphic volume in voxels, tetrahedron by tetrahedron. Liu et al. 2024."""
    padded = np.pad(displacement, [(1, 1)] * 3 + [(0, 0)], mode="edge")
    corners = [np.diag(signs) for signs in itertools.product((1, -1), repeat=3)]
    corners += [np.array([[s, s, 0], [s, 0, s], [0, s, s]]) for s in (1, -1)]
    total = 0.0
    for corner in corners:
        for point in np.ndindex(displacement.shape[:3]):
            here = np.array(point) + 1
            edges = [padded[tuple(here + c)] - padded[tuple(here)] + c for c in corner]
            orientation = np.sign(np.linalg.det(corner))
            total += max(0.0, -orientation * np.linalg.det(edges)) / 6
    return total / 2


@pytest.mark.parametrize("amplitude", [0.8, 2.5])
def test_folded_volume_equals_that_of_the_single_tetrahedra(amplitude):
    field = random_field(amplitude, 0.5, (6, 7, 5))
    expected = tetrahedra_volume(field)
    assert folding(of_voxels(field)).ndv_voxels == pytest.approx(expected, rel=1e-4)
    assert expected > 0


@settings(deadline=None, max_examples=30)
@given(
    degrees=st.tuples(*[st.floats(-80, 80)] * 3),
    scales=st.tuples(*[st.floats(0.3, 3)] * 3),
    shift=st.tuples(*[st.floats(-50, 50)] * 3),
)
def test_a_linear_map_has_its_determinant_everywhere(degrees, scales, shift):
    matrix = oblique_affine(scales, degrees, shift)
    linear = Deformation.from_linear(matrix, (9, 8, 10), OBLIQUE)
    expected = np.linalg.det(matrix[:3, :3])
    np.testing.assert_allclose(determinant_map(linear), expected, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), amplitude=st.floats(0, 0.3))
def test_small_smooth_deformations_do_not_fold(seed, amplitude):
    deformation = of_voxels(random_field(amplitude, 1.5, seed=seed))
    found = folding(deformation)
    assert found.ndv_voxels == 0
    assert found.folded_voxels == 0
    assert determinant_map(deformation).min() > 0


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), amplitude=st.floats(0.5, 4))
def test_folded_voxels_have_folded_volume(seed, amplitude):
    found = folding(of_voxels(random_field(amplitude, 1.0, seed=seed)))
    assert found.ndv_voxels >= 0
    if found.folded_voxels:
        assert found.ndv_voxels > 0


@pytest.mark.parametrize("hole", [np.nan, np.inf, np.finfo(np.float32).max])
def test_what_is_undefined_is_left_out_and_changes_nothing_beside_it(hole):
    """Of a linear field the determinant is the same everywhere, also between and beside holes."""
    matrix = oblique_affine((1.3, 0.8, 1.1), (5, -8, 12), (3, 4, -6))
    whole = lattice_points((9, 8, 10), (matrix - np.eye(4)) @ OBLIQUE).astype(np.float32)
    undefined = np.random.default_rng(0).random((9, 8, 10)) < 0.15
    undefined[:3, 4, 5] = True
    broken = whole.copy()
    broken[undefined, 1] = hole
    deformation = Deformation(broken, OBLIQUE)
    assert np.array_equal(deformation.undefined, undefined)
    assert np.abs(deformation.displacement).max() <= np.abs(whole).max()
    expected = np.linalg.det(matrix[:3, :3])
    determinant = determinant_map(deformation)
    assert (determinant[undefined] == 1).all()
    lonely = sum(
        (np.diff(np.pad(undefined, 1, constant_values=True).astype(int), 2, axis) == 2)[
            tuple(slice(None) if n == axis else slice(1, -1) for n in range(3))
        ]
        for axis in range(3)
    )
    np.testing.assert_allclose(determinant[~undefined & ~(lonely > 0)], expected, rtol=1e-3)
    found = folding(deformation)
    assert found.voxels == undefined.size - undefined.sum()
    assert found.folded_voxels == 0
    figures = describe_jacobian(deformation, Volume(determinant, OBLIQUE))
    assert figures["undefined_voxels"] == undefined.sum()
    assert all(np.isfinite(value) for value in figures.values())
    region = np.zeros_like(undefined)
    region[:2, 4, 5] = True
    with pytest.raises(InputError, match="undefined"):
        describe_jacobian(deformation, Volume(determinant, OBLIQUE), region)


def test_the_affine_part_can_be_left_out():
    field = of_voxels(random_field(0.8, 1.5))
    matrix = oblique_affine((1.3, 0.8, 1.1), (5, -8, 12), (3, 4, -6))
    whole = field.then_linear(matrix)
    factor = np.linalg.det(matrix[:3, :3])
    np.testing.assert_allclose(determinant_map(whole), factor * determinant_map(field), rtol=1e-5)
    np.testing.assert_allclose(determinant_map(whole, with_affine=False), determinant_map(field))
    figures = describe_jacobian(whole, Volume(np.zeros(field.shape), OBLIQUE))
    alone = describe_jacobian(field, Volume(np.zeros(field.shape), OBLIQUE))
    assert figures["affine_determinant"] == pytest.approx(factor)
    for key in ("min", "max", "percentile_1", "percentile_99", "mean_log"):
        assert figures[f"without_affine_{key}"] == pytest.approx(alone[key], rel=1e-4)
    assert figures["mean_log"] == pytest.approx(alone["mean_log"] + np.log(factor), abs=1e-5)


def test_inner_determinants_equal_simpleitk():
    deformation = of_voxels(random_field(2.0, 1.0), np.diag([1.3, 0.7, 2.1, 1.0]))
    field = sitk.GetImageFromArray(deformation.displacement.astype(float), isVector=True)
    field.SetSpacing((1.3, 0.7, 2.1))
    expected = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field))
    ours = determinant_map(deformation)
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(ours[inner], expected[inner], atol=1e-4)
    assert ours[inner].min() < 0.3 < 2 < ours[inner].max()


def test_determinants_are_those_of_the_point_map_on_an_oblique_lattice():
    deformation = of_voxels(random_field(2.0, 2.0, (14, 15, 16)))
    shape, affine = (6, 5, 7), OBLIQUE @ np.array([[1, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 4], [0, 0, 0, 1]])
    points = lattice_points(shape, affine)
    columns = [
        (deformation.map_points(points + axis) - deformation.map_points(points - axis)) / 2 for axis in affine[:3, :3].T
    ]
    change = np.stack(columns, axis=-1) @ np.linalg.inv(affine[:3, :3])
    inner = (slice(1, -1),) * 3
    found = determinant_map(deformation.sample(shape, affine))
    np.testing.assert_allclose(found[inner], np.linalg.det(change)[inner], atol=1e-3)


def test_border_differences_are_one_sided():
    x = torch.arange(6.0)
    displacement = torch.zeros(3, 6, 6, 6)
    displacement[2] = 0.1 * x**2
    determinant = jacobian_determinant(displacement)
    expected = torch.tensor([1.1, 1.2, 1.4, 1.6, 1.8, 1.9])
    torch.testing.assert_close(determinant, expected.expand(6, 6, 6))


def test_the_size_of_the_blocks_changes_nothing(monkeypatch):
    deformation = of_voxels(random_field(3.0, 1.0, (12, 13, 14)))
    whole, map_whole = folding(deformation), determinant_map(deformation)
    for voxels in (1, 12 * 13 * 3, 12 * 13 * 5):
        monkeypatch.setattr(jacobian, "VOXELS_AT_ONCE", voxels)
        part = folding(deformation)
        assert part.ndv_voxels == pytest.approx(whole.ndv_voxels, rel=1e-6)
        np.testing.assert_array_equal(part.mask, whole.mask)
        np.testing.assert_array_equal(determinant_map(deformation), map_whole)


def test_summary_in_a_mask():
    determinant = np.array([[[-1.0, 0.5, 1.0, 2.0, 50.0]]])
    mask = np.array([[[1, 1, 1, 1, 0]]])
    found = summary(determinant, mask)
    assert found["min"] == -1
    assert found["max"] == 2
    assert found["std_log"] == pytest.approx(np.std(np.log([0.5, 1, 2])))
    assert summary(determinant)["max"] == 50
    values = np.linspace(0.5, 1.5, 1001).reshape(7, 11, 13)
    assert summary(values)["percentile_1"] == pytest.approx(0.51)
    assert summary(values)["percentile_99"] == pytest.approx(1.49)
    assert summary(np.full((2, 2, 2), -1.0))["std_log"] == 0


@pytest.mark.parametrize("shape", [(1, 6, 5), (6, 1, 5), (6, 5, 1), (1, 1, 4), (1, 1, 1), (2, 3, 5), (3, 2, 1)])
@pytest.mark.parametrize("voxels_at_once", [1, 1 << 17])
def test_axes_of_few_samples(monkeypatch, shape, voxels_at_once):
    """A linear map has its determinant everywhere; along an axis of one sample nothing is deformed."""
    monkeypatch.setattr(jacobian, "VOXELS_AT_ONCE", voxels_at_once)
    # Memory that was never written holds NaN, so that reading it shows.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: tensor.new_full(size, torch.nan))
    matrix = torch.tensor([[0.2, 0.1, -0.3], [0.05, -0.1, 0.2], [-0.2, 0.15, 0.3]])
    index = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    displacement = torch.einsum("ab,bkji->akji", matrix, index)
    seen = matrix * torch.tensor([float(size > 1) for size in shape])
    expected = torch.linalg.det(torch.eye(3) + seen)
    torch.testing.assert_close(jacobian_determinant(displacement), expected.expand(shape))
    assert not jacobian.non_diffeomorphic_volume(displacement).isnan().any()

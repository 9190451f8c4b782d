"""The second stage: which lattices it works on, that it finds what the images show, and when it begins anew."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import oblique_volume

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.metrics import dice_of
from GradProjIOLib.geometry.lattice import lattice_affine, lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration import refinement
from GradProjIOLib.registration.fields import Fields
from GradProjIOLib.registration.network import network_steps
from GradProjIOLib.registration.refinement import plan_levels
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.synthetic import phantom

NONE = Settings(model="none", refine_steps=20, device="cpu")


def image(shape, spacing):
    return Volume(np.zeros(shape, np.float32), np.diag([*reversed(spacing), 1.0]))


@pytest.fixture(scope="module")
def heads():
    return phantom.make_pair(3, (40, 46, 42), spacing=4.0)


def distance(deformation, pair):
    """Mean distance in mm from the known deformation, over the voxels with labels."""
    points = lattice_points(pair.fixed.shape, pair.fixed.affine)[pair.fixed_labels.array > 0]
    return np.linalg.norm(deformation.map_points(points) - pair.deformation.map_points(points), axis=1).mean()


def levels_of(shape, spacing=(1, 1, 1), **settings):
    return plan_levels(image(shape, spacing), Settings(**settings))


class TestLevels:
    def test_each_level_halves_the_spacing_of_the_one_before(self):
        levels = levels_of((192, 224, 160), refine_steps=60, resolution=2.0)
        assert list(levels.items()) == [((24, 28, 20), 60), ((48, 56, 40), 60), ((96, 112, 80), 60)]

    @pytest.mark.parametrize("samples", [860_000, 2_400_000])
    def test_the_finest_has_about_the_samples_that_are_asked_for(self, samples):
        assert math.prod(list(levels_of((192, 224, 160), samples=samples))[-1]) == pytest.approx(samples, rel=0.03)

    def test_many_samples_take_fewer_steps(self):
        levels = levels_of((192, 224, 160), refine_steps=60, resolution=1.0)
        assert list(levels.items())[-1] == ((192, 224, 160), 36)
        assert list(levels.values())[:-1] == [60, 60]

    def test_voxels_are_never_oversampled(self):
        lattices = list(levels_of((44, 59, 41), (0.4, 0.4, 0.4), resolution=0.1))
        assert lattices[-1] == (44, 59, 41)
        assert all(a <= b for lattice in lattices for a, b in zip(lattice, (44, 59, 41), strict=True))

    @pytest.mark.parametrize("slices", [5, 8, 12])
    def test_a_short_axis_stays_as_it_is(self, slices):
        lattices = list(levels_of((slices, 256, 256), (6, 1, 1)))
        assert all(min(slices, 8) <= lattice[0] <= slices for lattice in lattices)
        assert lattices[0][1] < lattices[-1][1]

    def test_no_steps_no_level(self):
        assert levels_of((64, 64, 64), refine_steps=0) == {}
        assert levels_of((64, 64, 64), method="direct") == {}
        assert network_steps(Settings(model="none", steps=50, refine_steps=7)) == 0
        assert network_steps(Settings(model="compact", steps=50, refine_steps=0)) == 50
        assert network_steps(Settings(method="direct", steps=50)) == 0


def test_fields_on_another_lattice_are_the_same_in_space():
    volume = oblique_volume((14, 18, 16), (1.3, 0.7, 2.1), (20, -12, 31), (-30, 42, 50), 1, "fixed")
    lattice, finer = (10, 12, 11), (14, 17, 21)
    affine, finer_affine = (lattice_affine(volume.affine, volume.shape, one) for one in (lattice, finer))
    samples = torch.randn(2, 3, *lattice, generator=torch.Generator().manual_seed(0))
    fields = Fields(samples, affine)
    assert torch.equal(fields.on_lattice(lattice), samples)
    # One sample along x is one step of the index i in space.
    shift = fields.forward.displacement[4, 5, 6]
    np.testing.assert_allclose(shift, affine[:3, :3] @ samples[0, :, 4, 5, 6].numpy(), atol=1e-5)
    there = Fields(fields.on_lattice(finer), finer_affine).forward
    expected = fields.forward.sample(finer, finer_affine).displacement
    np.testing.assert_allclose(there.displacement, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["vanilla", "projected"])
def test_without_a_network_the_known_deformation_is_found(heads, method):
    still = Deformation(np.zeros((2, 2, 2, 3)), np.eye(4))
    found = register(heads.fixed, heads.moving, replace(NONE, method=method))
    assert distance(found.forward, heads) < 0.5 * distance(still, heads)
    assert found.report["jacobian"]["ndv_percent"] < 1e-3
    assert found.report["similarity"] < found.report["similarity_before"]
    assert found.report["start"] == "zero"
    assert {step["stage"] for step in found.report["steps"]} == {"refinement"}
    assert found.report["steps"][-1]["remaining_seconds"] == 0


def test_the_stages_follow_each_other_and_improve_each_other(heads):
    direct = register(heads.fixed, heads.moving, Settings(model="compact", method="direct", device="cpu"))
    both = register(heads.fixed, heads.moving, Settings(model="compact", steps=2, refine_steps=10, device="cpu"))
    assert distance(both.forward, heads) < distance(direct.forward, heads)
    stages = [(step["stage"], step["level"]) for step in both.report["steps"]]
    assert stages == sorted(stages)
    assert stages.count(("network", 0)) == 2
    assert len(stages) == 2 + sum(plan_levels(heads.fixed, both.settings).values())
    assert both.report["start"] == "network"


def test_a_network_that_makes_it_worse_is_not_the_start(heads, monkeypatch):
    """Its weights are spoiled, so that it shifts everything."""
    from GradProjIOLib.models import registry

    def load(*arguments, original=registry.load):
        loaded = original(*arguments)
        for stage in loaded.network.stages:
            stage.head.bias.data.fill_(0.8)
        return loaded

    monkeypatch.setattr(registry, "load", load)
    found = register(heads.fixed, heads.moving, Settings(model="compact", steps=0, refine_steps=5, device="cpu"))
    assert found.report["start"] == "zero"
    assert any("began without it" in warning for warning in found.report["warnings"])
    assert found.report["similarity"] < found.report["similarity_before"]


def test_images_of_other_contrast_that_lie_far_apart_start_from_their_translation(heads):
    """Descent on MIND alone would not get there."""
    shift = np.array([14.0, -22.0, 9.0])
    affine = heads.fixed.affine.copy()
    affine[:3, 3] += shift
    inverted = np.where(heads.fixed.array > 0, heads.fixed.array.max() - heads.fixed.array, 0)
    moving = Volume(inverted, affine, "inverted")
    found = register(heads.fixed, moving, replace(NONE, similarity="mind"))
    inside = lattice_points(heads.fixed.shape, heads.fixed.affine)[heads.fixed_labels.array > 0]
    assert found.report["start"] == "translation"
    assert np.linalg.norm(found.forward.map_points(inside) - inside - shift, axis=1).mean() < 0.5 * np.linalg.norm(
        shift
    )
    assert register(heads.fixed, heads.fixed, replace(NONE, similarity="mind")).report["start"] == "zero"


def test_an_image_registered_to_itself_stays_where_it_is(heads):
    found = register(heads.fixed, heads.fixed, NONE)
    assert np.linalg.norm(found.forward.displacement, axis=-1).mean() < 0.05


def test_few_slices_can_be_refined():
    thin = phantom.make_pair(1, (40, 46, 42), spacing=4.0)
    cut = [replace(volume, array=volume.array[18:23]) for volume in (thin.fixed, thin.moving)]
    labels = [replace(volume, array=volume.array[18:23]) for volume in (thin.fixed_labels, thin.moving_labels)]
    found = register(*cut, NONE)
    before, after = (
        np.nanmean(dice_of(labels[0].array, warped.array, list(phantom.LABELS)))
        for warped in (labels[1], found.forward.warp(labels[1], cut[0], "nearest"))
    )
    assert after > before
    assert found.report["jacobian"]["folded_voxels"] == 0


def test_it_ends_where_it_is_asked_to(heads):
    found = register(heads.fixed, heads.moving, NONE, on_step=lambda step: step.level < 1)
    assert [step["level"] for step in found.report["steps"]] == [0] * 20 + [1]
    assert found.report["stopped"] == "by request"


def test_what_cannot_fit_into_memory_is_refused_before_anything_is_computed(heads, monkeypatch):
    monkeypatch.setattr(refinement, "available_memory", lambda device: 2**20)
    with pytest.raises(InputError, match=r"the refinement needs about .* GB .* choose a coarser resolution"):
        register(heads.fixed, heads.moving, NONE)


def test_the_same_seed_gives_the_same_result_bit_for_bit(heads):
    first, second = (register(heads.fixed, heads.moving, replace(NONE, refine_steps=4)) for _ in range(2))
    assert np.array_equal(first.forward.displacement, second.forward.displacement)

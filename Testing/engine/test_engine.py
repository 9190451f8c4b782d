"""The parts of the optimization that need no reference implementation: properties and small closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from live_tensors import LiveTensors
from scipy import ndimage

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.engine.regularity import STRIDE, GradientInverseConsistency, LatticeInverseConsistency
from GradProjIOLib.engine.similarity import LNCC, MINDSSC, SquaredLNCC, gaussian_blur, has_structure, mind_ssc
from GradProjIOLib.models import registry
from GradProjIOLib.models.cascade import Cascade
from GradProjIOLib.spatial import maps

LATTICE = (20, 26, 18)
TINY = ((2, 8, 16), (8, 8))


def smooth_image(seed, lattice=LATTICE):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=lattice), 2)
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return torch.from_numpy(noise.astype(np.float32))[None, None]


def tiny_network(seed=0, head=0.02, voxels=4.0):
    torch.manual_seed(seed)
    network = Cascade((TINY, TINY), (1, 0), voxels).eval()
    for stage in network.stages:
        torch.nn.init.normal_(stage.head.weight, std=head)
    return network


def linear_field(matrix, lattice=LATTICE):
    """Displacement field of p → matrix·p in samples about the middle of the lattice, [1, 3, D, H, W]."""
    scale = maps.voxels_per_unit(lattice)
    points = maps.identity(lattice) * scale
    moved = points @ torch.tensor(matrix, dtype=torch.float32).T
    return ((moved - points) / scale).movedim(-1, 1)


class TestMaps:
    def test_displace_applies_the_last_field_first(self):
        first = linear_field(np.diag([0.5, 1, 1]))
        second = torch.zeros(1, 3, *LATTICE)
        second[:, 0] = 0.2
        points = torch.zeros(1, 1, 1, 1, 3)
        assert maps.displace([first, second], points).flatten()[0].item() == pytest.approx(0.1, abs=1e-6)
        assert maps.displace([second, first], points).flatten()[0].item() == pytest.approx(0.2, abs=1e-6)

    def test_displaced_identity_is_displace_at_the_lattice(self):
        generator = torch.Generator().manual_seed(0)
        fields = [torch.randn(2, 3, *size, generator=generator) * 0.05 for size in ((5, 7, 5), (10, 13, 9), LATTICE)]
        points = maps.identity(LATTICE).expand(2, -1, -1, -1, -1)
        for chain in (fields, fields[:2], fields[:1]):
            torch.testing.assert_close(
                maps.displaced_identity(chain, points), maps.displace(chain, points), rtol=0, atol=2e-6
            )


class TestSimilarity:
    def test_blur_is_a_truncated_gaussian_with_zeros_outside(self):
        picture = smooth_image(0)
        # scipy's window ends at truncate·sigma + 0.5 samples: the same 4·sigma + 1 samples.
        expected = ndimage.gaussian_filter(picture[0, 0].numpy(), 5, mode="constant", truncate=2)
        np.testing.assert_allclose(gaussian_blur(picture)[0, 0].numpy(), expected, atol=1e-5)

    def test_equal_images_are_perfectly_similar(self):
        targets = torch.cat([smooth_image(0), smooth_image(1)])
        assert LNCC(targets)(targets).max() < 0.05
        assert SquaredLNCC(targets)(targets).max() < 0.1
        assert MINDSSC(targets)(targets).max() == 0

    @pytest.mark.parametrize("kind", [LNCC, SquaredLNCC, MINDSSC])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_gradient_is_that_of_finite_differences(self, kind, weighted):
        generator = torch.Generator().manual_seed(0)
        targets, warped, weights = torch.rand(3, 2, 1, 5, 7, 6, generator=generator, dtype=torch.float64)
        weights[..., :2] = 0
        similarity = kind(targets) if kind is MINDSSC else kind(targets, sigma=1)
        warped.requires_grad_()
        assert torch.autograd.gradcheck(lambda images: similarity(images, weights if weighted else None), warped)

    @pytest.mark.parametrize("kind", [LNCC, SquaredLNCC])
    def test_with_a_shared_signal_equal_images_match_best_as_they_are_also_where_they_show_nothing(self, kind):
        targets = smooth_image(0)
        targets[..., :12] = 0.2
        warped = targets.clone().requires_grad_()
        slopes = []
        for shared in (0.0, 1e-4):
            loss = kind(targets, shared_variance=shared)(warped)
            slopes.append(torch.autograd.grad(loss, warped)[0].abs().max())
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert slopes[1] < 1e-3 * slopes[0]

    def test_lncc_sees_the_sign_of_the_contrast_and_its_square_does_not(self):
        targets = smooth_image(0)
        assert LNCC(targets)(-targets).item() > 1.95
        assert SquaredLNCC(targets)(-targets).item() == pytest.approx(SquaredLNCC(targets)(targets).item(), abs=1e-4)

    def test_a_shifted_image_is_less_similar(self):
        targets = smooth_image(0)
        for similarity in (LNCC(targets), SquaredLNCC(targets), MINDSSC(targets)):
            assert similarity(targets.roll(2, dims=-1)) > similarity(targets) + 0.01

    @pytest.mark.parametrize("weighted", [False, True])
    def test_windows_that_lie_apart_are_some_of_those_around_every_sample(self, weighted):
        targets, warped = smooth_image(0), smooth_image(1)
        weights = (smooth_image(2) > 0.5).float() if weighted else None
        every = LNCC(targets).correlation(warped, weights)
        apart = LNCC(targets, stride=4).correlation(warped, weights)
        first = [(size - 1) % 4 // 2 for size in LATTICE]
        torch.testing.assert_close(
            apart, every[:, :, first[0] :: 4, first[1] :: 4, first[2] :: 4], rtol=1e-4, atol=1e-4
        )
        for kind in (LNCC, SquaredLNCC):
            of_all, of_some = (kind(targets, stride=stride)(warped, weights).item() for stride in (1, 4))
            assert of_some == pytest.approx(of_all, rel=0.05)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_descriptors_that_lie_apart_are_some_of_those_of_every_sample(self, weighted):
        targets, warped = smooth_image(0), smooth_image(1)
        weights = (smooth_image(2) > 0.5).float() if weighted else None
        first = [(size - 1) % 2 // 2 for size in LATTICE]
        some = (..., slice(first[0], None, 2), slice(first[1], None, 2), slice(first[2], None, 2))
        counted = torch.ones(()) if weights is None else weights[some]
        apart, every = mind_ssc(targets, weights, stride=2), mind_ssc(targets, weights)[some]
        torch.testing.assert_close(apart * counted, every * counted)
        of_all, of_some = (MINDSSC(targets, stride=stride)(warped, weights).item() for stride in (1, 2))
        assert of_some == pytest.approx(of_all, rel=0.05)

    @pytest.mark.parametrize("kind", [LNCC, SquaredLNCC, MINDSSC])
    def test_samples_without_weight_count_nowhere(self, kind):
        """Whatever they are, in either image, value and gradient are the same; the gradient there is zero."""
        weights = torch.zeros(1, 1, *LATTICE)
        weights[..., 4:15, 3:, :12] = 1
        found = []
        for seed in (7, 8):
            noise = torch.rand(2, 1, *LATTICE, generator=torch.Generator().manual_seed(seed))
            targets = torch.where(weights > 0, smooth_image(0), noise[:1])
            warped = torch.where(weights > 0, smooth_image(1), noise[1:]).requires_grad_()
            value = kind(targets)(warped, weights)
            found.append((value, *torch.autograd.grad(value, warped)))
        for first, second in zip(*found, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)
        assert found[0][1][weights == 0].abs().max() < 1e-7
        assert found[0][1].abs().max() > 1e-6

    @pytest.mark.parametrize("kind", [LNCC, SquaredLNCC, MINDSSC])
    def test_equal_images_are_perfectly_similar_up_to_the_edge_of_what_is_seen(self, kind):
        weights = torch.zeros(1, 1, *LATTICE)
        weights[..., :9] = 1
        assert kind(smooth_image(0))(smooth_image(0), weights) < 0.05

    def test_weights_of_one_are_as_good_as_none_for_mind(self):
        targets, warped = smooth_image(0), smooth_image(1)
        weighted = MINDSSC(targets)(warped, torch.ones_like(targets))
        torch.testing.assert_close(weighted, MINDSSC(targets)(warped), rtol=1e-5, atol=1e-7)

    def test_mind_has_nothing_to_say_where_all_is_of_one_value(self):
        picture = torch.full((1, 1, 20, 20, 20), 0.3)
        picture[..., 15:] = torch.rand(20, 20, 5, generator=torch.Generator().manual_seed(0))
        expected = torch.zeros_like(picture)
        expected[..., 11:] = 1
        assert torch.equal(has_structure(picture), expected)


class TestRegularity:
    @pytest.fixture(params=[GradientInverseConsistency, LatticeInverseConsistency])
    def regularity(self, request):
        return request.param(LATTICE)

    def jitter(self, regularity):
        return (regularity.jitter(torch.Generator().manual_seed(0)) * 0.1).to(regularity.jitter().dtype)

    def test_maps_that_are_each_others_inverse_cost_nothing(self, regularity):
        matrix = np.diag([0.9, 1.05, 0.95])
        loss = regularity([linear_field(matrix)], [linear_field(np.linalg.inv(matrix))], self.jitter(regularity))
        # Where the second map leaves the lattice, the first is cut off at its border.
        assert loss < 0.05
        assert regularity([linear_field(np.eye(3))], [linear_field(np.eye(3))], self.jitter(regularity)) < 1e-5

    def test_a_translation_costs_nothing(self, regularity):
        shift = torch.full((1, 3, *LATTICE), 0.1)
        assert regularity([shift], [shift], self.jitter(regularity)) < 1e-5

    def test_the_value_is_the_squared_norm_of_the_derivative(self, regularity):
        """A shear of samples along one axis by another: one entry of the matrix, whatever the axes' lengths."""
        identity = linear_field(np.eye(3))
        for row, column in ((0, 1), (1, 0), (2, 0), (1, 2)):
            matrix = np.eye(3)
            matrix[row, column] = 0.3
            loss = regularity([linear_field(matrix)], [identity])
            # The mean runs over the three components as well as over the points.
            assert loss.item() == pytest.approx(0.3**2 / 3, rel=0.12)

    def test_on_the_lattice_it_is_the_same_but_for_where_it_is_looked_at(self):
        """Averaged over many steps, for smooth maps."""
        generator = torch.Generator().manual_seed(3)
        coarse = 0.06 * torch.randn(2, 3, 4, 4, 4, generator=generator)
        forward, backward = F.interpolate(coarse, size=LATTICE, mode="trilinear", align_corners=True).split(1)
        losses = []
        for regularity in (GradientInverseConsistency(LATTICE), LatticeInverseConsistency(LATTICE)):
            steps = [regularity([forward], [backward], regularity.jitter(generator)) for _ in range(60)]
            losses.append(torch.stack(steps).mean().item())
        assert losses[1] == pytest.approx(losses[0], rel=0.15)

    def test_on_the_lattice_every_sample_but_the_last_is_reached(self):
        regularity = LatticeInverseConsistency(LATTICE)
        generator = torch.Generator().manual_seed(0)
        reached = torch.zeros(LATTICE).flatten()
        for _ in range(300):
            reached[(regularity.samples + (regularity.jitter(generator) * regularity.per_step).sum()).flatten()] = 1
        d, h, w = LATTICE
        last = [size - 1 - (size - 1) % STRIDE for size in (d, h, w)]
        assert reached.view(LATTICE)[: last[0], : last[1], : last[2]].all()

    def test_jitter_has_two_samples_of_standard_deviation(self):
        regularity = GradientInverseConsistency(LATTICE)
        in_samples = regularity.jitter(torch.Generator().manual_seed(1)) * maps.voxels_per_unit(LATTICE)
        expected = [2 * (n - 1) / n for n in reversed(LATTICE)]
        assert in_samples.flatten(0, 3).std(dim=0).tolist() == pytest.approx(expected, rel=0.05)


class TestMasks:
    """A mask moves with its image: a sample counts where both images are seen at what they have there."""

    def shifted(self, samples):
        field = torch.zeros(2, 3, *LATTICE)
        field[0, 0], field[1, 0] = 2 * samples / (LATTICE[2] - 1), -2 * samples / (LATTICE[2] - 1)
        return [field]

    def spoiled(self, image, mask, seed):
        noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(seed))
        return torch.where(mask > 0, image, noise)

    @pytest.mark.parametrize("similarity", ["lncc", "lncc2", "mind"])
    def test_what_is_masked_in_either_image_counts_in_neither_direction(self, similarity):
        fixed_mask, moving_mask = torch.ones(2, 1, 1, *LATTICE)
        fixed_mask[..., 3:6, 4:8, 5:9] = 0
        moving_mask[..., 12:15, 10:14, 5:9] = 0
        values = []
        for seed in (3, 4):
            fixed = self.spoiled(smooth_image(0), fixed_mask, seed)
            moving = self.spoiled(smooth_image(1), moving_mask, seed + 10)
            objective = Objective(None, fixed, moving, similarity, fixed_mask, moving_mask)
            values.append(objective.similarity_of(self.shifted(2)).item())
        assert values[0] == pytest.approx(values[1], rel=1e-4)

    def test_masks_that_hide_nothing_change_nothing(self):
        images, fields = (smooth_image(0), smooth_image(1)), self.shifted(1)
        plain = Objective(None, *images).similarity_of(fields)
        ones = torch.ones_like(images[0])
        assert torch.equal(Objective(None, *images, "lncc", ones, ones).similarity_of(fields), plain)


class TestNetwork:
    @pytest.mark.parametrize("name", ["compact", "unigradicon"])
    def test_an_untrained_network_is_the_identity(self, name):
        network = registry.build(registry.MODELS[name])
        lattice = (16, 20, 17)
        images = torch.cat([smooth_image(0, lattice), smooth_image(1, lattice)])
        with torch.no_grad():
            fields = network(images, images.flip(0))
        assert all(field.shape[:2] == (2, 3) and not field.any() for field in fields)

    def test_sizes_and_parameters(self):
        def parameters(name):
            return sum(p.numel() for p in registry.build(registry.MODELS[name]).parameters())

        assert parameters("unigradicon") == 70_680_916
        assert 1e6 < parameters("compact") < 3e6

    def test_a_composed_cascade_has_one_field_with_the_map_of_all(self):
        apart = tiny_network()
        together = Cascade((TINY, TINY), (1, 0), 4.0, composed=True).eval()
        together.load_state_dict(apart.state_dict())
        images = torch.cat([smooth_image(0), smooth_image(1)])
        with torch.no_grad():
            fields, (field,) = apart(images, images.flip(0)), together(images, images.flip(0))
        points = maps.identity(LATTICE)
        expected = maps.displaced_identity(fields, points)
        torch.testing.assert_close(points + field.movedim(1, -1), expected, rtol=0, atol=2e-6)
        assert (expected - points).abs().max() > 0.01

    def test_lean_changes_nothing(self):
        jitter = torch.zeros(1, 10, 13, 9, 3)
        gradients, losses = {}, {}
        for mode in ("full", "lean"):
            network = tiny_network()
            network.checkpointed = mode == "lean"
            objective = Objective(network, smooth_image(0), smooth_image(1))
            similarity, regularity = objective.losses(objective.fields(), jitter)
            losses[mode] = similarity.item()
            parts = torch.autograd.grad(similarity + regularity, list(network.parameters()))
            gradients[mode] = torch.cat([part.flatten() for part in parts])
        assert losses["lean"] == losses["full"]
        torch.testing.assert_close(gradients["lean"], gradients["full"])

    def test_directions_do_not_see_each_other(self):
        """Both as one batch give what each gives alone."""
        network = tiny_network()
        fixed, moving = smooth_image(0), smooth_image(1)
        with torch.no_grad():
            both = network(torch.cat([moving, fixed]), torch.cat([fixed, moving]))
            for alone, batch in zip(network(fixed, moving), both, strict=True):
                torch.testing.assert_close(alone, batch[1:], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("shape", "spacing", "expected"), [
        ((192, 224, 160), (1, 1, 1), (96, 112, 80)),
        ((64, 64, 64), (1, 1, 1), (64, 64, 64)),
        ((24, 256, 256), (0.9, 0.9, 5.0), None),
    ])  # fmt: skip
    def test_the_compact_lattice_is_isotropic_in_space(self, shape, spacing, expected):
        lattice = registry.MODELS["compact"].lattice_for(shape, spacing)
        assert expected is None or lattice == expected
        steps = [n * s / m for n, s, m in zip(shape, reversed(spacing), lattice, strict=True)]
        assert max(steps) / min(steps) < 1.1
        assert math.prod(lattice) < 1.1 * registry.MODELS["compact"].samples


class TestOptimization:
    def objective(self, weight=1.5, **options):
        return Objective(tiny_network(**options), smooth_image(0), smooth_image(1), regularity_weight=weight)

    def run(self, objective, steps=4, **options):
        options = {"learning_rate": 1e-3, "steps": steps} | options
        with InstanceOptimizer(objective, **options) as optimizer:
            return list(optimizer), objective.displacements()

    def test_the_loss_goes_down(self):
        steps, _ = self.run(self.objective(), steps=15)
        assert steps[-1].similarity < steps[0].similarity - 0.02
        assert [step.index for step in steps] == list(range(15))
        assert all(step.seconds > 0 for step in steps)

    def test_same_seed_same_result_bit_for_bit(self):
        first, second = (self.run(self.objective(), seed=3) for _ in range(2))
        assert torch.equal(first[1], second[1])
        assert [s.similarity for s in first[0]] == [s.similarity for s in second[0]]
        assert not torch.equal(first[1], self.run(self.objective(), seed=4)[1])

    def test_parameters_are_restored(self):
        objective = self.objective()
        before = [p.clone() for p in objective.model.parameters()]
        self.run(objective)
        assert all(torch.equal(a, b) for a, b in zip(before, objective.model.parameters(), strict=True))
        with (
            pytest.raises(RuntimeError, match="stop"),
            InstanceOptimizer(objective, learning_rate=1, steps=3) as steps,
        ):
            for _ in steps:
                raise RuntimeError("stop")
        assert all(torch.equal(a, b) for a, b in zip(before, objective.model.parameters(), strict=True))

    def test_direct_takes_no_step(self):
        steps, displacements = self.run(self.objective(), method="direct", steps=9)
        assert steps == []
        assert displacements.abs().max() > 0

    def test_vanilla_is_amsgrad_on_the_weighted_sum(self):
        # After more steps than these, rounding has grown: the regulariser's differences jump between cells.
        _, found = self.run(self.objective(weight=0.7), steps=2, method="vanilla", seed=1)
        objective = self.objective()
        adam = torch.optim.Adam(objective.model.parameters(), lr=1e-3, weight_decay=1e-3, amsgrad=True)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            adam.zero_grad()
            similarity, regularity = objective.losses(objective.fields(), objective.regularity.jitter(generator))
            (similarity + 0.7 * regularity).backward()
            adam.step()
        torch.testing.assert_close(found, objective.displacements(), rtol=1e-3, atol=1e-3)

    def test_without_conflict_projected_and_vanilla_agree(self):
        projected, mine = self.run(self.objective(), steps=1)
        _, other = self.run(self.objective(), steps=1, method="vanilla")
        assert projected[0].projected == "none"
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    def test_conflicts_are_projected_and_reported(self):
        steps, _ = self.run(self.objective(head=0.2, weight=1.0), steps=12, learning_rate=3e-3)
        conflicts = [step for step in steps if step.cosine < 0]
        assert conflicts
        assert {step.projected for step in conflicts} <= {"similarity", "regularity"}
        assert {step.projected for step in steps if step.cosine >= 0} <= {"none"}

    def test_leaving_the_loop_ends_it(self):
        objective = self.objective()
        with InstanceOptimizer(objective, learning_rate=1e-3, steps=50) as optimizer:
            for step in optimizer:
                if step.index == 1:
                    break
            early = objective.displacements()
        assert torch.equal(early, self.run(self.objective(), steps=2)[1])

    @pytest.mark.parametrize(("options", "message"), [
        ({"steps": -1}, "negative"),
        ({"learning_rate": 0}, "positive"),
        ({"method": "magic"}, "one of"),
        ({"projection": "neither"}, "one of random, both, similarity, regularity"),
    ])  # fmt: skip
    def test_senseless_settings_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            InstanceOptimizer(self.objective(), **({"learning_rate": 1e-3, "steps": 1} | options))

    def test_losses_that_are_not_finite_end_it(self):
        objective = self.objective()
        with torch.no_grad():
            objective.model.stages[1].head.weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="step 0"):
            self.run(objective)


@pytest.mark.parametrize(("checkpointed", "limit"), [(False, 165), (True, 105)])
def test_a_step_keeps_few_intermediate_results(checkpointed, limit):
    """Bytes per sample that a step takes for itself, without the gradients of the parameters."""
    lattice = 48, 56, 40
    network = registry.build(registry.MODELS["compact"])
    network.checkpointed = checkpointed
    objective = Objective(network, smooth_image(0, lattice), smooth_image(1, lattice))
    with InstanceOptimizer(objective, learning_rate=1e-3, steps=2) as optimizer:
        steps = iter(optimizer)
        next(steps)
        with LiveTensors() as live:
            before = live.bytes
            next(steps)
    gradients = 2 * 4 * sum(parameter.numel() for parameter in network.parameters())
    assert 0 < (live.peak - before - gradients) / math.prod(lattice) < limit

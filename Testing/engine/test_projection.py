import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchjd.aggregation import PCGrad

from GradProjIOLib.engine.projection import combine_, gram_matrix, weighting
from GradProjIOLib.settings import PROJECTION_RULES

SHAPES = [(7,), (4, 3), (2, 3, 3, 3, 3)]


def gradients(seed, cosine):
    """Two random gradients, one tensor per parameter, with a cosine near the given one."""
    generator = torch.Generator().manual_seed(seed)
    a = [torch.randn(shape, generator=generator) for shape in SHAPES]
    noise = [torch.randn(shape, generator=generator) for shape in SHAPES]
    b = [cosine * x + math.sqrt(1 - cosine**2) * n for x, n in zip(a, noise, strict=True)]
    return a, b


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double()


def project(a, b, rule, seed=0):
    weights = weighting(gram_matrix([a, b]), rule, torch.Generator().manual_seed(seed))
    return weights, flat(combine_([[x.clone() for x in a], b], weights.weights))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("rule", "kept"), [("similarity", 1), ("regularity", 0)])
def test_the_projected_gradient_is_normal_to_the_other(seed, rule, kept):
    pair = gradients(seed, -0.7)
    weights, update = project(*pair, rule)
    assert weights.projected == (1 - kept,)
    other = flat(pair[kept])
    projected = update - other
    assert abs(projected @ other) <= 1e-6 * projected.norm() * other.norm()


@pytest.mark.parametrize("rule", PROJECTION_RULES)
@pytest.mark.parametrize("seed", range(5))
def test_gradients_that_do_not_conflict_are_left_alone(seed, rule):
    a, b = gradients(seed, 0.6)
    weights, update = project(a, b, rule)
    assert (weights.weights, weights.conflicts, weights.projected) == ((1.0, 1.0), (), ())
    assert torch.equal(update, flat([x + y for x, y in zip(a, b, strict=True)]))


def test_each_choice_is_as_likely():
    gram = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
    chosen = [weighting(gram, "random", torch.Generator().manual_seed(seed)).projected for seed in range(2000)]
    assert 0.45 < chosen.count((0,)) / 2000 < 0.55
    assert chosen.count((0,)) + chosen.count((1,)) == 2000


@pytest.mark.parametrize("zero", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rule", PROJECTION_RULES)
def test_zero_gradients_are_safe(rule, zero):
    pair = [[torch.zeros_like(x) for x in g] if none else g for g, none in zip(gradients(0, -0.7), zero, strict=True)]
    weights, update = project(*pair, rule)
    assert weights.cosine == 0
    assert torch.equal(update, flat(pair[0]) + flat(pair[1]))


@given(st.integers(0, 10_000), st.floats(-0.99, 0.99))
def test_both_is_pcgrad(seed, cosine):
    a, b = gradients(seed, cosine)
    _, update = project(a, b, "both")
    # TorchJD sums the two projected gradients, whatever the order, where there are only two.
    expected = PCGrad()(torch.stack([flat(a), flat(b)]))
    torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_the_size_of_one_gradient_does_not_change_the_direction_in_which_the_other_is_projected(seed, factor):
    a, b = gradients(seed, -0.5)
    first = project(a, b, "similarity")[1] - flat(b)
    scaled = [factor * x for x in b]
    second = project(a, scaled, "similarity")[1] - flat(scaled)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4 * factor)


def test_the_gram_matrix_does_not_depend_on_the_memory_layout():
    a, b = gradients(3, -0.4)
    expected = torch.stack([flat(a), flat(b)])
    permuted = [x.contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else x for x in b]
    torch.testing.assert_close(gram_matrix([a, permuted]), expected @ expected.T, rtol=1e-6, atol=1e-6)
    both = [x.contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else x for x in a]
    torch.testing.assert_close(gram_matrix([both, permuted]), expected @ expected.T, rtol=1e-6, atol=1e-6)


def test_the_cosine_is_the_cosine():
    a, b = gradients(1, -0.3)
    expected = torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0)
    assert weighting(gram_matrix([a, b])).cosine == pytest.approx(expected.item(), abs=1e-6)


def conflicting(count, seed):
    """Random gradients [count, 9], turned so that most of them conflict with most others."""
    matrix = torch.randn(count, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix - 1.1 * matrix.mean(dim=0)


@pytest.mark.parametrize("count", [3, 4])
@given(seed=st.integers(0, 10_000))
def test_both_is_pcgrad_for_more_than_two_objectives(count, seed):
    """TorchJD's PCGrad asks torch's own random state for the order in which a gradient meets the others."""
    matrix = conflicting(count, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = PCGrad()(matrix)
        torch.manual_seed(seed)
        found = weighting(gram_matrix([[row] for row in matrix]), "both")
    update = combine_([[row.clone()] for row in matrix], found.weights)[0]
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-9)
    assert found.conflicts == tuple(
        (i, j) for i in range(count) for j in range(i + 1, count) if matrix[i] @ matrix[j] < 0
    )


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rule", PROJECTION_RULES)
@given(seed=st.integers(0, 10_000))
def test_only_those_that_the_rule_names_are_projected(count, rule, seed):
    found = weighting(gram_matrix([[row] for row in conflicting(count, seed)]), rule, torch.Generator().manual_seed(1))
    assert set(found.projected) <= {"similarity": {0}, "regularity": set(range(1, count))}.get(rule, set(range(count)))
    if rule == "random" and count == 2:
        assert len(found.projected) == len(found.conflicts)


@given(seed=st.integers(0, 10_000), factor=st.floats(1e-3, 1e3))
def test_objectives_that_do_not_conflict_are_summed(seed, factor):
    matrix = conflicting(4, seed).abs()
    matrix[1] *= factor
    found = weighting(gram_matrix([[row] for row in matrix]), "both", torch.Generator().manual_seed(0))
    assert found.weights == (1.0,) * 4
    assert found.projected == ()

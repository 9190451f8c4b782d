"""When an optimization counts as no longer improving."""

import random

import pytest

from GradProjIOLib.stopping import Plateau


def steps_until_stop(losses, **keywords):
    plateau = Plateau(1.5, **keywords)
    for index, (similarity, regularity) in enumerate(losses):
        if plateau(similarity, regularity):
            return index + 1
    return None


def test_a_steady_descent_goes_on():
    assert steps_until_stop((1 - 0.01 * n, 0.0) for n in range(100)) is None


def test_a_plateau_ends_within_two_windows_in_spite_of_noise():
    chance = random.Random(3)
    losses = [(1 - 0.02 * min(n, 20) + chance.gauss(0, 2e-4), 0.0) for n in range(200)]
    assert 25 <= steps_until_stop(losses) <= 45


def test_better_similarity_bought_with_as_much_roughness_is_no_improvement():
    losses = [(1 - 0.015 * n, 0.01 * n) for n in range(60)]
    assert steps_until_stop(losses) == 20


@pytest.mark.parametrize("keywords", [{"window": 0}, {"least": -1}])
def test_settings_without_sense_are_refused(keywords):
    with pytest.raises(ValueError, match="expected"):
        Plateau(1.5, **keywords)

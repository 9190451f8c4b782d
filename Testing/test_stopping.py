"""When an optimisation ends before all its steps are done."""

import random

import pytest
import torch

from GradProjIOLib import jacobian
from GradProjIOLib.models.network import Cascade
from GradProjIOLib.objective import Objective
from GradProjIOLib.optimization import InstanceOptimizer
from GradProjIOLib.stopping import FoldingBudget, Plateau


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


@pytest.fixture
def optimizer():
    """One whose large steps and small weight of the regularity make the deformation fold."""
    torch.manual_seed(0)
    network = Cascade((((2, 8, 16), (8, 8)),), (0,), 4.0).eval()
    fixed, moving = torch.rand(2, 1, 1, 16, 18, 20)
    objective = Objective(network, fixed, moving)
    with InstanceOptimizer(objective, learning_rate=2e-2, steps=40, regularity_weight=0.0) as entered:
        yield entered


def folded_percent(optimizer):
    displacement = optimizer.objective.displacements()[0].flip(0)
    return 100 * (jacobian.jacobian_determinant(displacement) <= 0).float().mean().item()


def test_a_folding_budget_ends_the_steps_and_goes_back(optimizer):
    budget = FoldingBudget(optimizer, percent=0.5, every=2)
    assert not budget.exceeded
    taken = next(step.index + 1 for step in optimizer if budget())
    assert folded_percent(optimizer) > 0.5
    assert budget.go_back() == taken - 2
    assert folded_percent(optimizer) <= 0.5


def test_a_budget_that_is_kept_ends_nothing(optimizer):
    optimizer.steps = 6
    budget = FoldingBudget(optimizer, percent=100)
    assert not any(budget() for _ in optimizer)
    assert budget.go_back() == 6


def test_a_budget_without_sense_is_refused(optimizer):
    with pytest.raises(ValueError, match="expected"):
        FoldingBudget(optimizer, percent=-1)

"""An instance optimization that was interrupted goes on as if nothing had happened."""

import io

import pytest
import torch

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.models.cascade import Cascade


@pytest.fixture
def objective():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Cascade([((2, 4, 8), (4, 6))] * 2, [1, 0]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    fixed, moving = torch.rand(2, 1, 1, 16, 16, 16, generator=generator)
    return Objective(network, fixed, moving)


def summary(step):
    return step.index, step.similarity, step.regularity, step.cosine, step.projected


def optimizer(objective, method="projected"):
    return InstanceOptimizer(objective, learning_rate=1e-3, steps=6, method=method, seed=0)


@pytest.mark.parametrize("method", ["projected", "vanilla"])
def test_interrupted_steps_are_the_same(objective, method):
    with optimizer(objective, method) as whole:
        expected = [summary(step) for step in whole]
        displacements = objective.displacements()
    before = [parameter.clone() for parameter in objective.model.parameters()]
    stored = io.BytesIO()
    with optimizer(objective, method) as first:
        found = []
        for step in first:
            found.append(summary(step))
            if step.index == 2:
                break
        torch.save(first.state(), stored)
    stored.seek(0)
    with optimizer(objective, method) as second:
        second.restore(torch.load(stored, weights_only=True))
        found += [summary(step) for step in second]
        assert torch.equal(objective.displacements(), displacements)
    assert found == expected
    assert method == "vanilla" or {"similarity", "regularity"} <= {step[-1] for step in found}
    assert all(map(torch.equal, before, objective.model.parameters()))


def test_a_state_can_be_used_again_and_stays_as_it_is(objective):
    with optimizer(objective) as first:
        for step in first:
            if step.index == 2:
                break
        state = first.state()
    stored = io.BytesIO()
    torch.save(state, stored)
    found = []
    for _ in range(2):
        with optimizer(objective) as again:
            again.restore(state)
            found.append([summary(step) for step in again])
    assert found[0] == found[1]
    stored.seek(0)
    kept = torch.load(stored, weights_only=True)
    assert all(map(torch.equal, state["parameters"], kept["parameters"]))
    for moments, expected in zip(state["adam"], kept["adam"], strict=True):
        assert all(torch.equal(moments[name], expected[name]) for name in expected)


def test_loop_that_is_entered_again(objective):
    with optimizer(objective) as whole:
        expected = [summary(step) for step in whole]
    with optimizer(objective) as parts:
        found = [summary(next(iter(parts)))]
        found += [summary(step) for step in parts]
    assert found == expected

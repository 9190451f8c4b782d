"""The displacement fields as the parameters of a deformation model."""

import pytest
import torch

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.models.displacements import Displacements
from GradProjIOLib.settings import PROJECTION_RULES

LATTICE = (16, 20, 18)


def blob(center, width=3.0):
    """A smooth ball [1, 1, D, H, W] around a center (z, y, x) in samples."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in LATTICE), indexing="ij")
    distance = sum((axis - middle) ** 2 for axis, middle in zip(axes, center, strict=True))
    return torch.exp(-distance / (2 * width**2))[None, None]


def test_it_begins_with_the_fields_that_it_is_given():
    start = torch.randn(2, 3, *LATTICE, generator=torch.Generator().manual_seed(0))
    objective = Objective(Displacements(start, 1.5), blob((8, 10, 9)), blob((8, 10, 9)))
    torch.testing.assert_close(objective.displacements(), start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [1.0, 1.5, 4.0])
def test_one_parameter_makes_a_gaussian_of_its_width_and_all_of_them_a_shift(smoothing):
    lattice = (33, 65, 49)
    model = Displacements(torch.zeros(2, 3, *lattice), smoothing)
    knots = model.change.shape[2:]
    middle = tuple(count // 2 for count in knots)
    with torch.no_grad():
        model.change[0, 0, middle[0], middle[1], middle[2]] = 1
        line = (model(None, None)[0] / model.unit)[0, 0].sum(dim=(0, 2))
        samples = torch.arange(lattice[1])
        center = (line * samples).sum() / line.sum()
        width = ((line * (samples - center) ** 2).sum() / line.sum()).sqrt()
        model.change.fill_(2.5)
        shift = model(None, None)[0] / model.unit
    assert center.item() == pytest.approx(middle[1] * 64 / (knots[1] - 1), abs=0.02)
    assert width.item() == pytest.approx(smoothing, rel=0.03)
    torch.testing.assert_close(shift, torch.full_like(shift, 2.5))


@pytest.mark.parametrize(
    ("method", "rule"), [("vanilla", "random"), *(("projected", rule) for rule in PROJECTION_RULES)]
)
def test_a_shifted_ball_is_found_in_both_directions(method, rule):
    shift = (1.0, -2.0, 1.5)
    fixed, moving = blob((8, 10, 9)), blob((8 + shift[0], 10 + shift[1], 9 + shift[2]))
    objective = Objective(Displacements(torch.zeros(2, 3, *LATTICE), 1.5), fixed, moving, folding_weight=50.0)
    with InstanceOptimizer(
        objective, learning_rate=0.2, steps=60, method=method, projection=rule, weight_decay=0.0
    ) as optimizer:
        steps = list(optimizer)
        forward, backward = objective.displacements()
    assert steps[-1].similarity < 0.2 * steps[0].similarity
    for axis, distance in enumerate(reversed(shift)):
        assert forward[axis, 8, 10, 9].item() == pytest.approx(distance, abs=0.3)
        place = tuple(round(c + s) for c, s in zip((8, 10, 9), shift, strict=True))
        assert backward[axis][place].item() == pytest.approx(-distance, abs=0.4)

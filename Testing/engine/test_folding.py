"""Folding as an objective."""

import pytest
import torch

from GradProjIOLib.engine.folding import CORNERS, LEAST_DETERMINANT, cell_determinants, folding_penalty


def linear_displacement(matrix, shape=(6, 7, 8)):
    """The displacement [1, 3, D, H, W] of x → matrix·x, components along (x, y, z)."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    points = torch.stack([x, y, z])
    return (torch.einsum("ab,bzyx->azyx", matrix - torch.eye(3, dtype=torch.float64), points))[None]


@pytest.mark.parametrize("seed", range(5))
def test_a_linear_map_has_its_determinant_in_every_cell(seed):
    matrix = torch.eye(3, dtype=torch.float64) + 0.4 * torch.randn(
        3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    found = cell_determinants(linear_displacement(matrix))
    assert found.shape == (1, 5, 6, 7)
    torch.testing.assert_close(found, torch.full_like(found, torch.linalg.det(matrix).item()))


def test_the_penalty_is_what_the_determinants_lack_and_nothing_where_they_lack_nothing():
    shrunk = linear_displacement(torch.diag(torch.tensor([0.15, 1.0, 1.0], dtype=torch.float64)))
    assert folding_penalty(shrunk).item() == pytest.approx(0.05)
    assert folding_penalty(torch.cat([shrunk, torch.zeros_like(shrunk)])).item() == pytest.approx(0.05)
    still = torch.zeros(1, 3, 5, 5, 5, requires_grad=True)
    penalty = folding_penalty(still)
    assert penalty.item() == 0
    assert torch.autograd.grad(penalty, still)[0].abs().max() == 0


def test_going_down_the_penalty_unfolds_a_fold():
    x = torch.arange(12.0)
    displacement = torch.zeros(1, 3, 12, 12, 12)
    displacement[:, 0] = (-1.5 * (x - 5.5) * torch.exp(-((x - 5.5) ** 2) / 8))[None, None, :]
    displacement.requires_grad_()
    assert cell_determinants(displacement).min() < 0
    optimizer = torch.optim.Adam([displacement], lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        folding_penalty(displacement).backward()
        optimizer.step()
    assert cell_determinants(displacement).min() > 0


def test_an_axis_with_one_sample_counts_as_undeformed():
    matrix = torch.diag(torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64))
    found = cell_determinants(linear_displacement(matrix, (1, 7, 8)))
    torch.testing.assert_close(found, torch.full_like(found, 1.5))


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    displacement = (0.8 * torch.randn(2, 3, 4, 4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(folding_penalty, displacement)


def test_the_gradient_of_the_few_cells_is_that_of_all_cells():
    torch.manual_seed(1)
    displacement = (0.8 * torch.randn(2, 3, 7, 6, 8, dtype=torch.float64)).requires_grad_()
    all_cells = torch.relu(LEAST_DETERMINANT - cell_determinants(displacement)).mean(dim=(1, 2, 3)).sum()
    few_cells = folding_penalty(displacement)
    torch.testing.assert_close(few_cells, all_cells)
    torch.testing.assert_close(*(torch.autograd.grad(loss, displacement)[0] for loss in (few_cells, all_cells)))


@pytest.mark.parametrize("corner", range(CORNERS))
def test_the_edges_that_meet_in_any_corner_are_looked_at(corner):
    torch.manual_seed(2)
    displacement = 0.6 * torch.randn(1, 3, 5, 6, 7, dtype=torch.float64)
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in displacement.shape[2:]), indexing="ij")
    mapped = displacement[0] + torch.stack([x, y, z])
    backward = [corner >> axis & 1 for axis in range(3)]
    edges = []
    for axis in range(3):
        along = mapped.diff(dim=3 - axis)
        for other in {0, 1, 2} - {axis}:
            along = along.narrow(3 - other, backward[other], along.shape[3 - other] - 1)
        edges.append(along)
    determinants = torch.linalg.det(torch.stack(edges, dim=-1).movedim(0, -2))
    expected = torch.relu(LEAST_DETERMINANT - determinants).mean()
    torch.testing.assert_close(folding_penalty(displacement, corner=corner), expected)

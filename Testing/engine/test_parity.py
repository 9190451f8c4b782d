"""Losses and gradients against the published package, on the same weights, images and random numbers."""

import pytest
import torch
import torch.nn.functional as F
import unigradicon

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.models import registry
from GradProjIOLib.spatial import maps

# The package's network needs four halvings at a quarter of the resolution: this is the smallest lattice it takes.
SIZE = 65
MODEL = registry.MODELS["unigradicon"]


def image(seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 12, 12, 12, generator=generator)
    smooth = F.interpolate(coarse, size=(SIZE,) * 3, mode="trilinear")
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


@pytest.fixture(scope="module")
def state():
    """A network state whose last layers and normalisations do something."""
    torch.manual_seed(0)
    network = unigradicon.make_network([1, 1, SIZE, SIZE, SIZE], include_last_step=True)
    found = network.regis_net.state_dict()
    for key, value in found.items():
        if "lastConv.weight" in key:
            value.normal_(std=0.004)
        elif "lastConv.bias" in key:
            value.normal_(std=0.02)
        elif "batchNorms" in key and value.is_floating_point():
            value.uniform_(0.6, 1.4)
    return found


@pytest.fixture(scope="module")
def ours(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "checkpoint.trch"
    torch.save(state, path)
    return registry.load("unigradicon", path).network


def their_losses(state, similarity):
    theirs = unigradicon.make_network(
        [1, 1, SIZE, SIZE, SIZE], include_last_step=True, loss_fn=unigradicon.make_sim(similarity)
    ).eval()
    theirs.regis_net.load_state_dict(state)
    torch.manual_seed(5)
    losses = theirs(image(2), image(1))
    return theirs, losses


def their_jitter():
    """The random shifts that the package draws in `their_losses`, in our frame."""
    torch.manual_seed(5)
    noise = 2 * torch.randn(1, 3, SIZE, SIZE, SIZE)[:, :, ::2, ::2, ::2] / SIZE
    return 2 * noise.flip(1).movedim(1, -1)


def gradient(loss, network):
    parameters = dict(network.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    return dict(zip(parameters, found, strict=True))


def assert_same_gradient(theirs, mine):
    expected = torch.cat([theirs[registry.published_key(key, MODEL)].flatten() for key in mine])
    found = torch.cat([(value.flip(0) if ".head." in key else value).flatten() for key, value in mine.items()])
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("similarity", ["lncc", "lncc2", "mind"])
def test_losses_and_gradients_are_the_packages(state, ours, similarity):
    theirs, expected = their_losses(state, similarity)
    objective = Objective(ours, image(1), image(2), similarity)
    similarity_loss, regularity_loss = objective.losses(objective.fields(), their_jitter())
    assert similarity_loss.item() == pytest.approx(expected.similarity_loss.item(), rel=1e-5)
    assert regularity_loss.item() == pytest.approx(expected.inverse_consistency_loss.item(), rel=1e-5)
    assert_same_gradient(gradient(expected.similarity_loss, theirs.regis_net), gradient(similarity_loss, ours))
    if similarity == "lncc":
        regularity = expected.inverse_consistency_loss
        assert_same_gradient(gradient(regularity, theirs.regis_net), gradient(regularity_loss, ours))


def test_the_map_is_the_packages(state, ours):
    theirs, _ = their_losses(state, "lncc")
    found = Objective(ours, image(1), image(2)).displacements()
    for mine, phi in zip(found, (theirs.phi_AB_vectorfield, theirs.phi_BA_vectorfield), strict=True):
        expected = (phi - theirs.identity_map)[0].flip(0) * (SIZE - 1)
        assert expected.abs().max() > 1
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-3)


def test_points_of_the_frame_are_grid_samples():
    points = maps.identity((4, 5, 6))
    picture = torch.rand(1, 1, 4, 5, 6)
    torch.testing.assert_close(maps.sample(picture, points), picture)
    assert points[0, 0, 0, -1].tolist() == [1, -1, -1]

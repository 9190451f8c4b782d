"""The fast network computes what the plain one computes, in outputs and in gradients."""

from __future__ import annotations

import pytest
import torch

from GradProjIOLib.models import cascade, registry
from GradProjIOLib.models.fast_unet import FastUNet
from GradProjIOLib.models.unet import UNet

# The weights of the third outweigh the images. The fourth becomes narrower on the way down.
WIDTHS = [
    ((2, 8, 16), (8, 8)),
    ((2, 8, 16), (8,)),
    ((2, 4, 12, 60, 70), (4, 12, 40, 50)),
    ((2, 8, 4), (2, 4)),
]


def pair_of_unets(encoder, decoder) -> tuple[UNet, FastUNet]:
    """Both with the same random state, in which the last layer and the normalization do something."""
    torch.manual_seed(0)
    plain = UNet(encoder, decoder).double().eval()
    torch.nn.init.normal_(plain.head.weight, std=0.1)
    torch.nn.init.normal_(plain.head.bias)
    for norm in plain.norm:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 2)
    fast = FastUNet(encoder, decoder).double().eval()
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def assert_same(found, expected, mine, theirs):
    """In value, and in the gradients with respect to each model's own inputs, in float64."""
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, mine, cotangent), torch.autograd.grad(expected, theirs, cotangent)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lattice", [(16, 20, 24), (17, 19, 23), (16, 17, 31), (18, 18, 1)])
@pytest.mark.parametrize(("encoder", "decoder"), WIDTHS)
def test_the_fast_unet_is_the_plain_one(encoder, decoder, lattice):
    plain, fast = pair_of_unets(encoder, decoder)
    images = torch.rand(2, 2, *lattice, dtype=torch.float64, requires_grad=True)
    copy = images.detach().clone().requires_grad_()
    assert_same(fast(copy), plain(images), [copy, *fast.parameters()], [images, *plain.parameters()])


@pytest.mark.parametrize("name", ["compact", "unigradicon"])
def test_the_fast_network_is_the_plain_one(name, monkeypatch):
    """A whole cascade with a model's own widths; where it samples images, rounding may decide between two cells."""
    fast = registry.build(registry.MODELS[name]).double()
    monkeypatch.setattr(cascade, "FastUNet", UNet)
    plain = registry.build(registry.MODELS[name]).double()
    assert [type(network.stages[0]) for network in (fast, plain)] == [FastUNet, UNet]
    with torch.no_grad():
        for stage in fast.stages:
            stage.head.weight.normal_(std=0.01)
    plain.load_state_dict(fast.state_dict())
    lattice = (34, 29, 32)
    source, target = torch.rand(2, 2, 1, *lattice, dtype=torch.float64)
    found, expected = fast(source, target), plain(source, target)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs)
    losses = [sum(field.square().sum() for field in fields) for fields in (found, expected)]
    gradients = [
        torch.autograd.grad(loss, list(network.parameters()))
        for loss, network in zip(losses, (fast, plain), strict=True)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)

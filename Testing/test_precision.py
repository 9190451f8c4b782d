"""What "exact" and "fast" mean for convolutions: torch's settings, and what TF32 does to a registration."""

import numpy as np
import pytest
import torch
from test_engine import smooth_image, tiny_network
from tf32 import RoundedGradients

from GradProjIOLib import phantom
from GradProjIOLib.objective import Objective
from GradProjIOLib.optimization import InstanceOptimizer
from GradProjIOLib.precision import PRECISIONS, convolutions
from GradProjIOLib.registration import Settings, register


def setting():
    return torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_gradients_are_ever_computed_in_less_precision(precision, checkpointed):
    """Not what a gradient needs and is computed again for it, either."""
    network = tiny_network()
    network.checkpointed = checkpointed
    seen = {"forward": [], "backward": []}
    for stage in network.stages:
        stage.down[0].register_forward_hook(lambda *_: seen["forward"].append(setting()))
        stage.down[0].weight.register_hook(lambda _: seen["backward"].append(setting()))
    objective = Objective(network, smooth_image(0), smooth_image(1))
    before = setting()
    assert before != "ieee"
    with InstanceOptimizer(objective, learning_rate=1e-3, steps=2, precision=precision) as optimizer:
        assert len(list(optimizer)) == 2
    assert setting() == before
    # Two stages, two steps; computed again for each of the two gradients.
    assert seen["forward"] == ["ieee"] * (12 if checkpointed else 4)
    assert seen["backward"] == [{"exact": "ieee", "fast": "tf32"}[precision]] * 8


def test_the_setting_comes_back_after_an_error():
    before = setting()
    with pytest.raises(RuntimeError, match="stop"), convolutions("exact"):
        raise RuntimeError("stop")
    assert setting() == before


def test_older_torch_has_another_name_for_it(monkeypatch):
    monkeypatch.delattr(type(torch.backends.cudnn), "conv")
    before = torch.backends.cudnn.allow_tf32
    for precision, allowed in (("exact", False), ("fast", True)):
        with convolutions(precision):
            assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is before


def test_rounded_gradients_are_close_to_the_exact_ones_and_not_the_same():
    gradients = {}
    for rounded in (False, True):
        network = tiny_network()
        fields = Objective(network, smooth_image(0), smooth_image(1)).fields()
        ones = [torch.ones_like(field) for field in fields]
        if rounded:
            with RoundedGradients():
                parts = torch.autograd.grad(fields, list(network.parameters()), ones)
        else:
            parts = torch.autograd.grad(fields, list(network.parameters()), ones)
        gradients[rounded] = torch.cat([part.flatten() for part in parts])
    assert not torch.equal(gradients[True], gradients[False])
    torch.testing.assert_close(gradients[True], gradients[False], rtol=0, atol=2e-3 * gradients[False].abs().max())


def test_tf32_moves_the_deformation_by_less_than_a_tenth_of_a_millimetre():
    pair = phantom.make_pair(0, (32, 40, 36), spacing=6.0)
    settings = Settings(model="compact", lattice=(32, 40, 36), steps=10, device="cpu")
    exact = register(pair.fixed, pair.moving, settings)
    with RoundedGradients():
        fast = register(pair.fixed, pair.moving, settings)
    distance = np.linalg.norm(fast.forward.displacement - exact.forward.displacement, axis=-1)
    assert 0 < distance.mean() < 0.1


def test_a_device_without_tf32_says_that_fast_changes_nothing():
    pair = phantom.make_pair(0, (24, 24, 24), spacing=8.0)
    settings = Settings(model="compact", lattice=(24, 24, 24), steps=1, device="cpu")
    exact = register(pair.fixed, pair.moving, settings)
    fast = register(pair.fixed, pair.moving, Settings(**(vars(settings) | {"precision": "fast"})))
    assert np.array_equal(exact.forward.displacement, fast.forward.displacement)
    assert [note for note in fast.report["warnings"] if "makes no difference on cpu" in note]
    assert not [note for note in exact.report["warnings"] if "precision" in note]

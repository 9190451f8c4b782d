"""What "exact" and "tf32" mean for convolutions: torch's settings, and what TF32 does to a registration."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import numpy as np
import pytest
import torch
from test_engine import smooth_image, tiny_network
from tf32 import RoundedGradients

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.precision import convolutions
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings
from GradProjIOLib.synthetic import phantom


def setting():
    return torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize(("precision", "wanted"), [("tf32", "tf32"), ("exact", "ieee")])
@pytest.mark.parametrize("memory", ["full", "lean"])
def test_a_whole_registration_is_computed_in_its_precision(monkeypatch, precision, wanted, memory):
    """Also what is computed again for a gradient."""
    seen = set()
    original = torch.nn.functional.conv3d

    def spy(*arguments, **keywords):
        seen.add(setting())
        return original(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "conv3d", spy)
    pair = phantom.make_pair(0, (24, 24, 24), spacing=8.0)
    before = setting()
    chosen = Settings(model="compact", refine_steps=0, steps=1, device="cpu", precision=precision, memory=memory)
    report = register(pair.fixed, pair.moving, chosen).report
    assert seen == {wanted}
    assert setting() == before
    assert report["settings"]["precision"] == precision


def test_the_setting_comes_back_after_an_error():
    before = setting()
    with pytest.raises(RuntimeError, match="stop"), convolutions("exact"):
        raise RuntimeError("stop")
    assert setting() == before


def test_the_last_thread_to_leave_brings_the_setting_back():
    before = setting()
    first, second = ExitStack(), ExitStack()
    first.enter_context(convolutions("exact"))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(second.enter_context, convolutions("exact")).result()
        first.close()
        assert setting() == "ieee"
        thread.submit(second.close).result()
    assert setting() == before


def test_a_thread_that_wants_another_precision_waits():
    entered = Event()

    def enter():
        with convolutions("tf32"):
            entered.set()
            return setting()

    with ThreadPoolExecutor(1) as thread:
        with convolutions("exact"):
            other = thread.submit(enter)
            assert not entered.wait(0.2)
            assert setting() == "ieee"
        assert other.result() == "tf32"


def test_older_torch_has_another_name_for_it(monkeypatch):
    monkeypatch.delattr(type(torch.backends.cudnn), "conv")
    before = torch.backends.cudnn.allow_tf32
    for precision, allowed in (("exact", False), ("tf32", True)):
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
    settings = Settings(model="compact", refine_steps=0, lattice=(32, 40, 36), steps=10, device="cpu")
    exact = register(pair.fixed, pair.moving, settings)
    with RoundedGradients():
        fast = register(pair.fixed, pair.moving, settings)
    distance = np.linalg.norm(fast.forward.displacement - exact.forward.displacement, axis=-1)
    assert 0 < distance.mean() < 0.1

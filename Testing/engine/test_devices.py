"""That nothing mixes devices, where there is no second one: torch's device "meta" computes shapes only, and refuses to
mix with the processor as a graphics card does."""

import pytest
import same_on_gpu
import torch

from GradProjIOLib.engine import devices
from GradProjIOLib.engine import objective as objective_module
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.errors import InputError
from GradProjIOLib.models import registry

LATTICE = (64, 70, 66)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("model", ["compact", "unigradicon"])
@pytest.mark.parametrize("similarity", ["lncc", "lncc2", "mind"])
def test_both_gradients_of_a_step_stay_on_the_device(monkeypatch, model, similarity, checkpointed):
    # It has shapes only, no values to look at.
    monkeypatch.setattr(objective_module, "_hides_nothing", lambda masks: False)
    network = registry.build(registry.MODELS[model]).to("meta")
    network.checkpointed = checkpointed
    fixed, moving, mask = (torch.rand(1, 1, *LATTICE, device="meta") for _ in range(3))
    objective = Objective(network, fixed, moving, similarity, mask)
    fields = objective.fields()
    losses, gradients = objective.gradients(fields, torch.rand(objective.regularity.points.shape, device="meta"))
    assert losses["similarity"].device.type == losses["regularity"].device.type == "meta"
    parameters = list(objective.model.parameters())
    for of_fields in gradients:
        for part, parameter in zip(
            torch.autograd.grad(fields, parameters, of_fields, retain_graph=True), parameters, strict=True
        ):
            assert part.device.type == "meta"
            assert part.shape == parameter.shape
    assert objective.displacements_of(fields).shape == (2, 3, *objective.lattice)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "limit"), [("exact", same_on_gpu.MOST_IN_EXACT), ("tf32", 0.02)])
def test_a_card_computes_what_the_processor_computes(precision, limit):
    found = same_on_gpu.differences("compact", (40, 48, 44), torch.device("cuda"), precision)
    assert max(found.values()) < limit


def fails(images):
    raise NotImplementedError(
        "The operator 'aten::grid_sampler_3d_backward' is not implemented for this device.\nMore."
    )


@pytest.fixture
def device_without_sampling(monkeypatch):
    """The processor, as if 3-D sampling had no backward pass there."""

    class Sampled(torch.autograd.Function):
        forward = staticmethod(lambda ctx, images: images.clone())
        backward = staticmethod(lambda ctx, gradient: fails(gradient))

    devices.check_device.cache_clear()
    monkeypatch.setitem(devices._OPERATIONS, "3-D sampling", Sampled.apply)
    yield torch.device("cpu")
    devices.check_device.cache_clear()


def test_a_device_on_which_an_operation_fails_is_refused_with_its_name(device_without_sampling):
    with pytest.raises(InputError) as error:
        devices.find_device("cpu")
    assert str(error.value) == (
        "The device 'cpu' cannot be used, since 3-D sampling does not work on it (The operator "
        "'aten::grid_sampler_3d_backward' is not implemented for this device.); choose auto or cpu."
    )


def test_a_device_from_which_no_number_can_be_read_is_refused():
    with pytest.raises(InputError, match="does not work on it"):
        devices.find_device("meta")


def test_a_card_on_which_an_operation_fails_is_not_offered(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    # There is no such device here, so every operation fails on it.
    assert devices.usable_devices()[-1] == torch.device("cpu")
    assert torch.device("mps") not in devices.usable_devices()


def test_a_device_is_checked_once(monkeypatch):
    devices.check_device.cache_clear()
    seen = []
    monkeypatch.setitem(devices._OPERATIONS, "counting", lambda images: (seen.append(images), images)[1])
    assert devices.find_device("cpu") == devices.find_device("cpu") == torch.device("cpu")
    assert len(seen) == 1
    devices.check_device.cache_clear()

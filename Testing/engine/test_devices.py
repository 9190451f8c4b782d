"""That nothing mixes devices, where there is no second one: torch's device "meta" computes shapes only, and refuses to
mix with the processor as a graphics card does."""

from contextlib import nullcontext

import pytest
import same_on_gpu
import torch

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.models import registry

LATTICE = (64, 70, 66)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("model", ["compact", "unigradicon"])
@pytest.mark.parametrize("similarity", ["lncc", "lncc2", "mind"])
def test_both_gradients_of_a_step_stay_on_the_device(monkeypatch, model, similarity, checkpointed):
    # There is no autocast for this device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    network = registry.build(registry.MODELS[model]).to("meta")
    network.checkpointed = checkpointed
    fixed, moving, mask = (torch.rand(1, 1, *LATTICE, device="meta") for _ in range(3))
    objective = Objective(network, fixed, moving, similarity, mask)
    fields = objective.fields()
    losses, *gradients = objective.gradients(fields, torch.rand(objective.regularity.points.shape, device="meta"))
    assert losses.similarity.device.type == losses.regularity.device.type == "meta"
    parameters = list(objective.network.parameters())
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

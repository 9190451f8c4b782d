"""Whether a graphics card computes what the processor computes: losses, displacements and gradients of one step.

    python Testing/benchmarks/same_on_gpu.py [--device cuda] [--model unigradicon] [--lattice 80]

Ends with 1 where "exact" differs by more than rounding. Needs torch and numpy only.
"""

from __future__ import annotations

import argparse
import sys

import torch
from io_step import image, random_network
from torch import Tensor

from GradProjIOLib.engine import devices
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.precision import convolutions
from GradProjIOLib.models import registry
from GradProjIOLib.settings import PRECISIONS

MOST_IN_EXACT = 1e-3


def computed(model: str, lattice: tuple[int, int, int], device: torch.device, precision: str) -> dict[str, Tensor]:
    """Results by name, on the CPU and flat, from the same weights and images whatever the device."""
    network = random_network(model, std=0.02)
    cpu = torch.device("cpu")
    objective = Objective(network.to(device), *(image(lattice, seed, cpu).to(device) for seed in (1, 2)))
    parameters = list(network.parameters())
    with convolutions(precision):
        fields = objective.fields()
        displacements = objective.displacements_of(fields)
        losses, of_fields = objective.gradients(fields, torch.zeros_like(objective.regularity.points))
        similarity, regularity = (
            torch.autograd.grad(fields, parameters, part, retain_graph=True) for part in of_fields
        )
    found = {
        "similarity": losses["similarity"],
        "regularity": losses["regularity"],
        "displacements": displacements.detach(),
        "gradient of the similarity": torch.cat([part.flatten() for part in similarity]),
        "gradient of the regularity": torch.cat([part.flatten() for part in regularity]),
    }
    return {name: values.flatten().cpu() for name, values in found.items()}


def differences(model: str, lattice: tuple[int, int, int], device: torch.device, precision: str) -> dict[str, float]:
    """How far the device's results are from the processor's, as a part of their norm."""
    expected = computed(model, lattice, torch.device("cpu"), "exact")
    found = computed(model, lattice, device, precision)
    return {name: float((found[name] - values).norm() / values.norm()) for name, values in expected.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="unigradicon", choices=tuple(registry.MODELS))
    parser.add_argument("--lattice", type=int, default=80)
    options = parser.parse_args()
    device = devices.find_device(options.device)
    worst = 0.0
    for precision in PRECISIONS:
        found = differences(options.model, (options.lattice,) * 3, device, precision)
        print(f"{options.model}, {options.lattice}³, {devices.describe_device(device)}, {precision}:", flush=True)
        for name, difference in found.items():
            print(f"    {name:30}{difference:.1e}", flush=True)
        if precision == "exact":
            worst = max(found.values())
    return int(worst > MOST_IN_EXACT)


if __name__ == "__main__":
    sys.exit(main())

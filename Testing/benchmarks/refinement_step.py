"""Seconds and memory of the refinement's steps on each level of a brain, and how far a card is from the processor.

    python Testing/benchmarks/refinement_step.py [--device cuda] [--samples 3200000] [--steps 20] [--json FILE]

Needs torch and numpy only, so that it runs on a bare machine with a card. The images are random and smooth. "Apart" is
how far the displacements after ten steps on a coarse lattice are from the processor's, in samples: mean and largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from io_step import PeakMemory, image
from torch import Tensor

from GradProjIOLib.engine import devices, memory
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.engine.precision import convolutions
from GradProjIOLib.models.displacements import Displacements
from GradProjIOLib.settings import METHODS, PRECISIONS

PROPORTIONS = (1.25, 1.5, 0.85)
SMOOTHING, LEARNING_RATE, LEAST_SLOPE = 1.5, 0.2, 0.03
LOSSES = {"folding_weight": 100.0, "shared_variance": 1e-4, "window_stride": 4}
"""As in ``registration.refinement`` with LNCC, which cannot be imported without SimpleITK."""
SMALL = (40, 48, 32)


def lattice_of(samples: float) -> tuple[int, int, int]:
    scale = (samples / (PROPORTIONS[0] * PROPORTIONS[1] * PROPORTIONS[2])) ** (1 / 3)
    k, j, i = (round(scale * length) for length in PROPORTIONS)
    return k, j, i


def refine(
    lattice: tuple[int, int, int], device: torch.device, method: str, precision: str, steps: int
) -> tuple[Tensor, list[float]]:
    """The displacements after some steps, on the CPU, and the seconds of each step."""
    model = Displacements(torch.zeros(2, 3, *lattice, device=device), SMOOTHING)
    images = (image(lattice, seed, torch.device("cpu")).to(device) for seed in (1, 2))
    objective = Objective(model, *images, on_lattice=True, **LOSSES)
    knots = next(model.parameters())[0, 0].numel()
    with (
        convolutions(precision),
        memory.recycled_memory(device),
        InstanceOptimizer(
            objective,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            epsilon=LEAST_SLOPE / knots,
            steps=steps,
            method=method,
        ) as optimizer,
    ):
        seconds = [step.seconds for step in optimizer]
        return objective.displacements().cpu(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=float, default=3.2e6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = devices.find_device(options.device)
    print(f"{devices.describe_device(device)}, torch {torch.__version__}")
    rows = []
    expected, _ = refine(SMALL, torch.device("cpu"), "projected", "exact", 10)
    for precision in PRECISIONS:
        found, _ = refine(SMALL, device, "projected", precision, 10)
        apart = (found - expected).norm(dim=1)
        rows.append({"precision": precision, "apart_mean": apart.mean().item(), "apart_most": apart.max().item()})
        print(f"{precision}: {apart.mean():.1e}, at most {apart.max():.1e} samples apart", flush=True)
    for level in (64, 8, 1):
        lattice = lattice_of(options.samples / level)
        for method in [method for method in METHODS if method != "direct"]:
            for precision in PRECISIONS if device.type == "cuda" else ("exact",):
                with PeakMemory(device) as peak:
                    _, seconds = refine(lattice, device, method, precision, options.steps)
                step = statistics.median(seconds[1:])
                rows.append({
                    "lattice": lattice, "method": method, "precision": precision, "seconds": step,
                    "peak_bytes": peak.bytes,
                })  # fmt: skip
                print(f"{lattice}, {method}, {precision}: {step:.4f} s, {peak.bytes / 1e9:.2f} GB", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

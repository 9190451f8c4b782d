"""Seconds of 50 projected steps with everything from two arrays on the lattice to the displacements.

python Testing/benchmarks/fifty_steps.py [--model unigradicon] [--lattice 175] [--steps 50] [--device D] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from io_step import image, random_network
from live_tensors import LiveTensors

from GradProjIOLib.engine import devices, memory
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.engine.precision import convolutions
from GradProjIOLib.models import registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lattice", type=int, nargs="+", default=[175])
    parser.add_argument("--model", default="unigradicon", choices=tuple(registry.MODELS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--memory", default="full", choices=("full", "lean"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lattice = tuple(options.lattice * 3 if len(options.lattice) == 1 else options.lattice)
    device = devices.find_device(options.device)
    network = random_network(options.model)
    network.checkpointed = options.memory == "lean"
    network = network.to(device)
    arrays = [image(lattice, seed, torch.device("cpu")) for seed in (1, 2)]
    # On a card the allocator counts; counting here costs time there.
    counted = LiveTensors() if device.type == "cpu" else None
    start = time.perf_counter()
    objective = Objective(network, *[array.to(device) for array in arrays])
    with (
        counted or nullcontext(),
        convolutions("tf32"),
        memory.recycled_memory(device),
        InstanceOptimizer(objective, learning_rate=2e-5, steps=options.steps) as optimizer,
    ):
        seconds = [step.seconds for step in optimizer]
        displacements = objective.displacements().cpu()
    whole = time.perf_counter() - start
    found = {
        "model": options.model,
        "lattice": lattice,
        "memory": options.memory,
        "device": devices.describe_device(device),
        "steps": len(seconds),
        "seconds": whole,
        "seconds_of_steps": seconds,
        "peak_bytes": memory.peak_memory(device),
        "tensor_bytes": counted.peak if counted else None,
        "finite": bool(torch.isfinite(displacements).all()),
    }
    peak = found["peak_bytes"] / 1e9
    tensors = f", tensors {counted.peak / 1e9:.2f} GB" if counted else ""
    print(f"{options.model} on {lattice}: {len(seconds)} steps in {whole:.1f} s, peak {peak:.2f} GB{tensors}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

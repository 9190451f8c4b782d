"""What each part of the fast network gains in a step, in seconds and in memory.

    python Testing/benchmarks/fast_parts.py [--lattice 96] [--repeats 5] [--model unigradicon] [--only PART]

One optimizer takes all steps. In each step one part is replaced by its plain counterpart, or all of them are. The
rounds are interleaved, so that other load on the machine slows all of them alike, and processor seconds tell it apart.
Memory is that of the tensors that are alive at the same time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from io_step import image, random_network
from live_tensors import peak_of
from refinement_step import LOSSES, SMOOTHING
from torch import Tensor

from GradProjIOLib.engine import memory, regularity
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.models import fast_unet, registry
from GradProjIOLib.models.displacements import Displacements
from GradProjIOLib.models.fast_unet import FastUNet
from GradProjIOLib.models.unet import UNet, crop, double_resolution, halve_resolution
from GradProjIOLib.spatial import maps


class PlainActivatedAndHalved:
    @staticmethod
    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.leaky_relu(x), halve_resolution(x)


class PlainActivatedBeside:
    @staticmethod
    def apply(x: Tensor, skip: Tensor, first: int) -> tuple[Tensor, Tensor]:
        return torch.cat([F.leaky_relu(x), skip], dim=1), x[:, :first]


class PlainWithFaces:
    @staticmethod
    def apply(x: Tensor) -> tuple[Tensor, ...]:
        return x, *(x.select(*face) for face in fast_unet.FACES)


class PlainPadded:
    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return F.pad(x, [1] * 6, mode="replicate")


def two_layers(
    activated: Tensor, residual: Tensor, scale: Tensor, offset: Tensor, up: Tensor, head: Tensor, size: Sequence[int]
) -> Tensor:
    y = F.conv_transpose3d(activated, up, stride=2, padding=1) + double_resolution(residual)
    return F.conv3d(crop(y * scale + offset, size), head, padding=1)


def normalized_after(self: FastUNet, level: int, x: Tensor, activated: Tensor) -> Tensor:
    return self.norm[level](self.up[level](activated) + double_resolution(x))


def four_entries(fields: Sequence[Tensor], points: Tensor) -> Tensor:
    return maps.displace([field.expand(4, -1, -1, -1, -1) for field in fields], points[:, :, None, None])[:, :, 0, 0]


WITHOUT: dict[str, list[tuple[Any, str, Any]]] = {
    "nothing": [],
    "the fast network": [(FastUNet, "forward", UNet.forward)],
    "the last two layers as one": [(fast_unet, "double_and_convolve", two_layers)],
    "their gradients by hand": [(fast_unet, "_WithFaces", PlainWithFaces), (fast_unet, "_Padded", PlainPadded)],
    "gradients of activations by hand": [
        (fast_unet, "_ActivatedAndHalved", PlainActivatedAndHalved),
        (fast_unet, "_ActivatedBeside", PlainActivatedBeside),
    ],
    "normalization in the weights": [(FastUNet, "_doubled", normalized_after)],
    "layouts": [(fast_unet, "laid_out", lambda x, convolution: x)],
    "an entry per thread": [(regularity, "_mapped", four_entries)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lattice", type=int, default=96)
    parser.add_argument("--model", default="unigradicon", choices=tuple(registry.MODELS))
    parser.add_argument("--method", default="projected", choices=("vanilla", "projected"))
    parser.add_argument("--memory", default="full", choices=("full", "lean"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(WITHOUT), help="the part to leave out (each of them)")
    parser.add_argument("--refinement", action="store_true", help="steps on displacement fields instead of a network")
    options = parser.parse_args()
    parts = {name: WITHOUT[name] for name in WITHOUT if options.only in (None, name) or name == "nothing"}
    torch.set_num_threads(options.threads)
    device, lattice = torch.device("cpu"), (options.lattice,) * 3
    network = random_network(options.model)
    network.checkpointed = options.memory == "lean"
    images = image(lattice, 1, device), image(lattice, 2, device)
    if options.refinement:
        fields = Displacements(torch.zeros(2, 3, *lattice), SMOOTHING)
        objective = Objective(fields, *images, on_lattice=True, **LOSSES)
    else:
        objective = Objective(network, *images)
    steps = iter(InstanceOptimizer(objective, learning_rate=2e-5, steps=10**6, method=options.method))
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    processor: dict[str, list[float]] = {name: [] for name in parts}
    peaks: dict[str, int] = {}
    with memory.recycled_memory(device):
        next(steps)
        for repeat in range(options.repeats + 1):
            for name, replacements in parts.items():
                with ExitStack() as stack:
                    for replacement in replacements:
                        stack.enter_context(mock.patch.object(*replacement))
                    if repeat == 0:
                        peaks[name] = peak_of(lambda: next(steps))
                        continue
                    wall, busy = time.perf_counter(), time.process_time()
                    next(steps)
                    seconds[name].append(time.perf_counter() - wall)
                    processor[name].append(time.process_time() - busy)
    what = "refinement" if options.refinement else options.model
    print(f"{what} on {options.lattice}³, {options.method}, {options.memory}, {options.threads} threads")
    print(f"{'without':34}{'seconds':>9}{'processor s':>13}{'ratio':>7}{'tensors GB':>12}{'ratio':>7}")
    whole = statistics.median(processor["nothing"])
    for name, peak in peaks.items():
        wall, busy = statistics.median(seconds[name]), statistics.median(processor[name])
        print(f"{name:34}{wall:9.2f}{busy:13.2f}{busy / whole:7.2f}{peak / 1e9:12.2f}{peak / peaks['nothing']:7.2f}")


if __name__ == "__main__":
    main()

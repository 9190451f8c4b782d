"""What each part of the fast network and of the fast LNCC gains in a step, in seconds and in memory.

    python Testing/benchmarks/fast_parts.py [--lattice 96] [--repeats 5] [--threads 2] [--json FILE]

One optimizer takes all steps. For each step one part is replaced by its plain counterpart, or all of them are. The
rounds are interleaved, so that other load on the machine slows all of them alike; processor seconds tell it apart.
Memory is that of the tensors that are alive at the same time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from io_step import image, random_network
from live_tensors import peak_of

from GradProjIOLib.engine import fast_similarity, memory
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.engine.regularity import GradientInverseConsistency
from GradProjIOLib.engine.similarity import LNCC
from GradProjIOLib.models import fast_unet
from GradProjIOLib.models.unet import UNet, crop, double_resolution, halve_resolution
from GradProjIOLib.spatial import maps


def plain_beside(x, skip, first):
    return torch.cat([F.leaky_relu(x), skip], dim=1), x[:, :first]


def plain_halve(x):
    return F.leaky_relu(x), halve_resolution(x)


def plain_last_layers(activated, residual, scale, offset, up, head, size):
    y = F.conv_transpose3d(activated, up, stride=2, padding=1) + double_resolution(residual)
    return F.conv3d(crop(y * scale + offset, size), head, padding=1)


def plain_double(x, weight):
    return F.conv_transpose3d(x, weight, stride=2, padding=1)


def always_last(x, convolution):
    return x.contiguous(memory_format=torch.channels_last_3d)


def contiguous(x, convolution):
    return x.contiguous()


class PlainFaces:
    @staticmethod
    def apply(x):
        return x, *(x.select(*face) for face in fast_unet.FACES)


class PlainPadded:
    @staticmethod
    def apply(x):
        return F.pad(x, [1] * 6, mode="replicate")


def plain_mapped(fields, points):
    return maps.displace([field.expand(4, -1, -1, -1, -1) for field in fields], points)


def single_mapped(fields, points):
    return maps.displace(fields, points.view(1, -1, *points.shape[2:])).view(points.shape)


PARTS = {
    "nothing": [],
    "everything": [(fast_unet.FastUNet, "forward", UNet.forward), (fast_similarity.FastLNCC, "__call__", LNCC.__call__),
                   (GradientInverseConsistency, "_mapped", staticmethod(plain_mapped))],
    "whole unet": [(fast_unet.FastUNet, "forward", UNet.forward)],
    "whole unet channels last": [(fast_unet.FastUNet, "forward", lambda self, x: UNet.forward(self, x.contiguous(memory_format=torch.channels_last_3d)))],
    "lncc gradient": [(fast_similarity.FastLNCC, "__call__", LNCC.__call__)],
    "last two layers": [(fast_unet, "double_and_convolve", plain_last_layers)],
    "activate and halve": [(fast_unet, "activate_and_halve", plain_halve)],
    "activate beside": [(fast_unet, "activate_beside", plain_beside)],
    "both activate": [(fast_unet, "activate_beside", plain_beside), (fast_unet, "activate_and_halve", plain_halve)],
    "product": [(fast_unet, "double", plain_double)],
    "deep contiguous": [(fast_unet, "laid_out", always_last)],
    "layout": [(fast_unet, "laid_out", contiguous)],
    "normalization": [(fast_unet, "fold_normalization", lambda up, x: False)],
    "faces": [(fast_unet, "_WithFaces", PlainFaces)],
    "padded": [(fast_unet, "_Padded", PlainPadded)],
    "regularity copies": [(GradientInverseConsistency, "_mapped", staticmethod(plain_mapped))],
    "regularity single": [(GradientInverseConsistency, "_mapped", staticmethod(single_mapped))],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lattice", type=int, default=96)
    parser.add_argument("--method", default="projected")
    parser.add_argument("--model", default="unigradicon")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lean", action="store_true")
    parser.add_argument("--parts", nargs="*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    lattice = (options.lattice,) * 3
    network = random_network(options.model)
    network.checkpointed = options.lean
    objective = Objective(network, image(lattice, 1, device), image(lattice, 2, device))
    optimizer = InstanceOptimizer(objective, learning_rate=2e-5, steps=10**6, method=options.method)
    steps = iter(optimizer)
    parts = {name: PARTS[name] for name in options.parts or PARTS}
    walls, busys, peaks = ({name: [] for name in parts} for _ in range(3))
    with memory.recycled_memory(device, 8 * 2**30):
        next(steps)
        for repeat in range(options.repeats + 1):
            for name, patches in parts.items():
                with ExitStack() as stack:
                    for patch in patches:
                        stack.enter_context(mock.patch.object(*patch))
                    if repeat == 0:
                        print(name, flush=True)
                        peaks[name] = peak_of(lambda: next(steps))
                        continue
                    wall, busy = time.perf_counter(), time.process_time()
                    next(steps)
                    walls[name].append(time.perf_counter() - wall)
                    busys[name].append(time.process_time() - busy)
            if repeat:
                show(parts, walls, busys, peaks)


def show(parts, walls, busys, peaks):
    base = statistics.median(busys["nothing"])
    print()
    for name in parts:
        wall, busy = (statistics.median(x[name]) for x in (walls, busys))
        print(
            f"{name:28}{wall:8.2f}{min(walls[name], default=0):8.2f}{busy:8.2f}{busy / base:7.3f}{peaks[name] / 1e9:8.3f}{peaks[name] / peaks['nothing']:7.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

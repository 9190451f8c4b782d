"""Seconds and memory of one instance-optimization step, side by side with the published package.

    python Testing/benchmarks/io_step.py --lattice 96 [--device cpu] [--json FILE] [--model unigradicon|compact]

All in this process and on the same random weights (last layers not zero), images and lattice; one after the other, so
that the memory of each is its own. On a CPU ours runs as in a registration, with ``memory.recycled_memory``, and the
package both as it comes and with that. Where the package `unigradicon` is not installed (say, on a machine with torch
and numpy only), ours runs alone, or with ``--peer DIR`` against a folder that holds the package's and
icon_registration's sources.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import mmap
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from live_tensors import peak_of

from GradProjIOLib.engine import devices, memory
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.engine.precision import convolutions
from GradProjIOLib.models import registry
from GradProjIOLib.models.cascade import Cascade

PARTS = {
    "convolution": ("convolution",),
    "sampling": ("grid_sampler",),
    "resampling": ("upsample", "avg_pool"),
    "products, blur": ("bmm", "aten::mm", "slow_conv3d"),
    "optimizer": ("adam", "aten::dot"),
}


def image(lattice: tuple[int, int, int], seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *[max(2, n // 4) for n in lattice], generator=generator)
    smooth = F.interpolate(coarse, size=lattice, mode="trilinear")
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min())).to(device)


def random_network(model: str, std: float = 0.004) -> Cascade:
    """A network with the same weights in every call, the last layers' not zero."""
    torch.manual_seed(0)
    network = registry.build(registry.MODELS[model])
    for stage in network.stages:
        torch.nn.init.normal_(stage.head.weight, std=std)
    return network


def ours(
    method: str, options: argparse.Namespace, lattice: tuple[int, int, int], device: torch.device
) -> Callable[[], object]:
    """A step of this project."""
    network = random_network(options.model)
    network.checkpointed = options.memory == "lean"
    objective = Objective(network.to(device), image(lattice, 1, device), image(lattice, 2, device))
    optimizer = InstanceOptimizer(objective, learning_rate=2e-5, steps=10**6, method=method)
    return partial(next, iter(optimizer))


def package(lattice: tuple[int, int, int], device: torch.device) -> Callable[[], object]:
    """A vanilla step of the published package; it has no others."""
    import unigradicon
    from icon_registration import config

    config.device = device
    network = unigradicon.make_network([1, 1, *lattice], include_last_step=True).to(device).eval()
    torch.manual_seed(0)
    for key, value in network.named_parameters():
        if "lastConv.weight" in key:
            torch.nn.init.normal_(value, std=0.004)
    images = image(lattice, 2, device), image(lattice, 1, device)
    adam = torch.optim.Adam(network.parameters(), lr=2e-5, weight_decay=1e-3, amsgrad=True)

    def step() -> None:
        adam.zero_grad()
        network(*images).all_loss.backward()
        adam.step()

    return step


class PeakMemory:
    """Most memory in use while inside, beyond what was at the beginning: ``.bytes``."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return self
        self.before = self.bytes = _resident()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self.ended.set()
        self.thread.join()
        self.bytes -= self.before

    def _watch(self) -> None:
        while not self.ended.wait(0.005):
            self.bytes = max(self.bytes, _resident())


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def measure(build: Callable[[], Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Median wall and processor seconds of a step after three for a warm-up, peak memory, and shares of the parts.

    Memory: of the process or the card, and of tensors alone.
    """
    seconds, processor = [], []
    with PeakMemory(device) as memory:
        step = build()
        for _ in range(repeats + 3):
            wall, busy = time.perf_counter(), time.process_time()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - wall)
            processor.append(time.process_time() - busy)
    return {
        "seconds": statistics.median(seconds[3:]),
        "processor_seconds": statistics.median(processor[3:]),
        "peak_bytes": memory.bytes,
        "tensor_bytes": peak_of(step),
        "shares": shares(step),
    }


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Which part of a step's time is spent in what, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    totals = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        part = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), "other")
        totals[part] += spent
    whole = sum(totals.values()) or 1
    return {part: spent / whole for part, spent in totals.items()}


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device does at best, measured now: copying, and multiplying matrices."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    matrix = (
        torch.randn(4096 if device.type == "cuda" else 1500, device=device)
        .expand(4096 if device.type == "cuda" else 1500, -1)
        .contiguous()
    )

    def best(action: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "copy_gb_per_s": 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9,
        "matrix_product_gflop_per_s": 2 * matrix.shape[0] ** 3 / best(lambda: matrix @ matrix) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lattice", type=int, nargs="+", default=[96], help="one number, or three")
    parser.add_argument("--model", default="unigradicon", choices=tuple(registry.MODELS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", default="full", choices=("full", "lean"))
    parser.add_argument("--precision", default="tf32", choices=("tf32", "exact"))
    parser.add_argument("--peer", help="folder with the sources of unigradicon and icon_registration")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lattice = tuple(options.lattice * 3 if len(options.lattice) == 1 else options.lattice)
    device = devices.find_device(options.device)
    usual = nullcontext
    recycled = partial(memory.recycled_memory, device)
    contestants = {}
    if options.peer:
        sys.path[:0] = [options.peer]
    if not options.without_peer and options.model != "compact":
        try:
            import unigradicon  # noqa: F401

            contestants["package, vanilla"] = partial(package, lattice, device), usual
            if device.type == "cpu":
                contestants["package, recycled"] = partial(package, lattice, device), recycled
        except ImportError as error:
            print(f"without the package ({error})", file=sys.stderr)
    for method in ("vanilla", "projected"):
        contestants[f"ours, {method}"] = partial(ours, method, options, lattice, device), recycled
    found = {}
    for name, (build, allocation) in contestants.items():
        with allocation(), convolutions(options.precision):
            found[name] = measure(build, options.repeats, device)
            gc.collect()
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": {"system": platform.platform(), "device": devices.describe_device(device),
                    "threads": torch.get_num_threads(), "python": platform.python_version(),
                    "torch": torch.__version__},
        "lattice": lattice, "model": options.model, "memory": options.memory, "precision": options.precision,
        "ceilings": ceilings(device), "steps": found,
    }  # fmt: skip
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(report: dict[str, Any]) -> None:
    steps = report["steps"]
    whole = steps.get("package, vanilla")
    print(f"{report['model']} on {' x '.join(map(str, report['lattice']))}, {report['machine']['device']}")
    print(f"{'':20}{'seconds':>9}{'ratio':>7}{'processor s':>13}{'ratio':>7}{'peak GB':>9}{'tensors':>9}  shares")
    for name, step in steps.items():
        ratios = [step[key] / whole[key] if whole else float("nan") for key in ("seconds", "processor_seconds")]
        parts = ", ".join(f"{part} {share:.0%}" for part, share in step["shares"].items() if share >= 0.01)
        print(f"{name:20}{step['seconds']:9.2f}{ratios[0]:7.2f}{step['processor_seconds']:13.2f}{ratios[1]:7.2f}"
              f"{step['peak_bytes'] / 1e9:9.2f}{step['tensor_bytes'] / 1e9:9.2f}  {parts}")  # fmt: skip


if __name__ == "__main__":
    main()

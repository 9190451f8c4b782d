"""Devices and their memory."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Sequence

import torch
from torch import nn

from GradProjIOLib.volume import InputError

MEMORY_MODES = ("auto", "full", "lean")

# Of each parameter there are at most: itself, two gradients, and the three moments of AMSGrad; the original values
# are kept in the computer's memory.
COPIES_OF_PARAMETERS = 6
# Bytes of intermediate results per sample of the lattice, network (unigradicon) alone and the rest, as PyTorch
# keeps them for the backward pass (measured, see Docs/benchmarks.md); with the temporary ones of that pass.
BYTES_PER_SAMPLE = {"full": 1500, "lean": 1200}


def find_device(name: str) -> torch.device:
    """The device to compute on: "auto", "cpu", "cuda", "cuda:1", "mps". Raises InputError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {name!r} is not there or cannot be used; choose auto or cpu.") from error
    return device


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int | None:
    """Most memory in use so far, in bytes: of the graphics card, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: torch.device) -> int | None:
    """Free memory of the device in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def needed_memory(network: nn.Module, lattice: Sequence[int], mode: str) -> int:
    """About how many bytes an instance optimisation takes on the device."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return 4 * COPIES_OF_PARAMETERS * parameters + BYTES_PER_SAMPLE[mode] * math.prod(lattice)


def modes_to_try(memory: str, network: nn.Module, lattice: Sequence[int], device: torch.device) -> tuple[str, ...]:
    """The modes "full" and "lean" in the order to try them, for a setting of MEMORY_MODES."""
    if memory != "auto":
        return (memory,)
    free = available_memory(device)
    if free is not None and needed_memory(network, lattice, "full") > free:
        return ("lean",)
    return ("full", "lean")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was too little memory, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("not enough memory", "allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)

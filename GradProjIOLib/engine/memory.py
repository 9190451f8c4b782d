"""How much memory an optimization needs, how much there is, and how to keep it between steps."""

from __future__ import annotations

import ctypes
import math
import platform
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from GradProjIOLib.errors import InputError

# Of each parameter there are at most the value, two gradients, and the three moments of AMSGrad. The original value is
# kept in the computer's memory.
COPIES_OF_PARAMETERS = 6
# Bytes of intermediate results per sample of the lattice, for unigradicon: on a card those of tensors and room for what
# cuDNN takes, else what a process was seen to take (Docs/benchmarks.md).
BYTES_PER_SAMPLE = {"cuda": {"full": 900, "lean": 600}, "cpu": {"full": 1200, "lean": 900}}
# What the computer holds per sample while a card computes: both images, masks and the points at which they are sampled.
BYTES_PER_SAMPLE_BESIDE_A_CARD = 100


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


def available_memory(device: torch.device) -> int:
    """Free memory of the device in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def needed_memory(network: nn.Module, lattice: Sequence[int], mode: str, device: torch.device) -> int:
    """About how many bytes an instance optimization takes on the device.

    network: its ``memory_share`` says how much a sample takes, as a part of what it takes in uniGradICON.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    per_sample = BYTES_PER_SAMPLE.get(device.type, BYTES_PER_SAMPLE["cpu"])[mode]
    share = getattr(network, "memory_share", 1.0)
    return 4 * COPIES_OF_PARAMETERS * parameters + int(share * per_sample * math.prod(lattice))


def modes_to_try(
    memory: str, model: str, network: nn.Module, lattice: Sequence[int], device: torch.device
) -> tuple[str, ...]:
    """The modes "full" and "lean" in the order to try them, for a setting of MEMORY_MODES.

    Call it before anything on the lattice is allocated. model: the network's name. lattice: its size (D, H, W). Raises
    InputError where there is too little memory for the leanest mode, on the device or, for the images on the lattice,
    on the computer.
    """
    modes = ("full", "lean") if memory == "auto" else (memory,)
    free = available_memory(device)
    fitting = tuple(mode for mode in modes if needed_memory(network, lattice, mode, device) <= free)
    if not fitting:
        raise too_little_memory(model, network, lattice, modes[-1], device)
    if device.type != "cpu":
        computer = torch.device("cpu")
        if BYTES_PER_SAMPLE_BESIDE_A_CARD * math.prod(lattice) > available_memory(computer):
            raise too_little_memory(model, network, lattice, modes[-1], computer)
    return fitting


def too_little_memory(
    model: str, network: nn.Module, lattice: Sequence[int], mode: str, device: torch.device
) -> InputError:
    """What to tell a user whose registration does not fit into the memory of a device."""
    needed, free = needed_memory(network, lattice, mode, device), available_memory(device)
    size = " x ".join(map(str, lattice))
    advice = "a smaller lattice or another device"
    if model != "compact":
        advice = f"the model compact, {advice}"
    return InputError(
        f"There is not enough memory on {device}: the model {model} needs about {needed / 2**30:.1f} GB on a lattice "
        f"of {size} and {free / 2**30:.1f} GB are free; choose {advice}."
    )


@contextmanager
def recycled_memory(device: torch.device) -> Iterator[None]:
    """While inside, memory that a computation on the CPU frees stays with the process.

    The large tensors of an optimization step are otherwise given back to the system and fetched again, page by page,
    in every step. Works on Linux with glibc, in the main thread. The setting is that of the whole process: it lasts
    until the last thread has left. Afterwards the process keeps fixed thresholds, the highest that glibc chooses by
    itself. See mallopt(3).
    """
    global _users
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    with _users_change:
        _users += 1
        if _users == 1:
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _users_change:
            _users -= 1
            if _users == 0:
                libc.mallopt(_M_MMAP_MAX, 65536)
                libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
                libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
                libc.malloc_trim(ctypes.c_size_t(0))


_users_change = threading.Lock()
_users = 0
# Parameters of mallopt(3), in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was too little memory, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("not enough memory", "allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)

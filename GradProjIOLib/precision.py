"""How precisely convolutions are multiplied on a graphics card.

cuDNN multiplies in TF32, with 10 bits of mantissa instead of 23, wherever torch lets it, and torch does. ``exact`` does
not: a registration then computes on a card what it computes on a processor, up to rounding. ``fast`` lets it for the
gradients of convolutions, most of the work of an optimisation step. The losses and the deformation are computed as
ever: what is rounded is the direction of a step, never the result of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("exact", "fast")


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies in TF32: NVIDIA cards since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def convolutions(precision: str) -> Iterator[None]:
    """While inside, cuDNN's convolutions are computed in one of PRECISIONS, "exact" in single precision."""
    # torch has two interfaces to one setting, and does not like them mixed: the newer one where there is one.
    settings = getattr(torch.backends.cudnn, "conv", None)
    if settings is not None:
        name, value = "fp32_precision", "tf32" if precision == "fast" else "ieee"
    else:
        settings, name, value = torch.backends.cudnn, "allow_tf32", precision == "fast"
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)

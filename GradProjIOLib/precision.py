"""How precisely convolutions are multiplied on a graphics card.

cuDNN multiplies in TF32, with 10 bits of mantissa instead of 23, wherever torch lets it, and torch does. ``exact`` does
not: a registration then computes on a card what it computes on a processor, up to rounding. ``fast`` lets it for the
gradients of convolutions, most of the work of an optimisation step. The losses and the deformation are computed as
ever: what is rounded is the direction of a step, never the result of the steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

PRECISIONS = ("exact", "fast")


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies in TF32: NVIDIA cards since Ampere."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def convolutions(precision: str) -> AbstractContextManager:
    """While inside, cuDNN's convolutions are computed in one of PRECISIONS, "exact" in single precision.

    For the whole process. torch has an older and a newer interface to this and does not like them mixed: since torch
    2.9, ``torch.backends.cudnn.allow_tf32`` cannot be read inside.
    """
    settings, _ = _setting()
    newer = settings is not torch.backends.cudnn
    values: tuple[str | bool, str | bool] = ("ieee", "tf32") if newer else (False, True)
    return _Multiplying(values[precision == "fast"])


def convolutions_as_now() -> AbstractContextManager:
    """Brings the present setting back while inside, wherever and however often it is entered."""
    return _Multiplying(getattr(*_setting()))


class _Multiplying(AbstractContextManager):
    def __init__(self, value: str | bool):
        self.value = value
        self.before: list[str | bool] = []

    def __enter__(self) -> None:
        self.before.append(getattr(*_setting()))
        setattr(*_setting(), self.value)

    def __exit__(self, *exception: object) -> None:
        setattr(*_setting(), self.before.pop())


def _setting() -> tuple[object, str]:
    """torch's setting: whose attribute it is, and its name."""
    newer = getattr(torch.backends.cudnn, "conv", None)
    return (torch.backends.cudnn, "allow_tf32") if newer is None else (newer, "fp32_precision")

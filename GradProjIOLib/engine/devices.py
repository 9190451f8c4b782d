"""Devices to compute on, and whether they can compute what a registration needs."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from GradProjIOLib.errors import InputError


def find_device(name: str) -> torch.device:
    """The device to compute on: "auto", "cpu", "cuda", "cuda:1", "mps".

    "auto" is CUDA's current device where that is usable, else the processor. Raises InputError for a device that is
    not there, or on which an operation of a registration fails.
    """
    if name == "auto":
        cuda = torch.device("cuda")
        return cuda if torch.cuda.is_available() and _is_usable(cuda) else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {name!r} is not there or cannot be used; choose auto or cpu.") from error
    check_device(device)
    return device


def usable_devices() -> list[torch.device]:
    """All devices of this computer that can compute a registration, the processor last."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    graphics = [torch.device("cuda", index) for index in range(cards)]
    if torch.backends.mps.is_available():
        graphics.append(torch.device("mps"))
    return [*filter(_is_usable, graphics), torch.device("cpu")]


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


@cache
def check_device(device: torch.device) -> None:
    """Runs each operation of an optimization step on a few numbers, once per device, forward and backward.

    Raises InputError that names the operation which does not work, as 3-D sampling on some versions of MPS.
    """
    for name, operation in _OPERATIONS.items():
        try:
            image = torch.ones(1, 2, 4, 4, 4, device=device, requires_grad=True)
            result = operation(image).sum()
            (gradient,) = torch.autograd.grad(result, image)
            # Losses and inner products of gradients are read on the processor.
            (result + torch.dot(gradient.flatten(), gradient.flatten())).detach().cpu().double()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"The device {str(device)!r} cannot be used, since {name} does not work on it ({reason}); "
                "choose auto or cpu."
            ) from error


def _is_usable(device: torch.device) -> bool:
    try:
        check_device(device)
    except InputError:
        return False
    return True


def _sampled(images: Tensor) -> Tensor:
    points = images[:, :1].movedim(1, -1).expand(-1, -1, -1, -1, 3)
    return F.grid_sample(images, points, padding_mode="border", align_corners=True)


# Each takes images [1, 2, 4, 4, 4], with respect to which the gradient is computed.
_OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "3-D convolution": lambda images: F.conv3d(images, images[:, :, 1:, 1:, 1:], stride=2, padding=1),
    "transposed 3-D convolution": lambda images: F.conv_transpose3d(
        images, images.transpose(0, 1), stride=2, padding=1
    ),
    "3-D pooling": lambda images: F.avg_pool3d(images, 2, ceil_mode=True),
    "trilinear resizing": lambda images: F.interpolate(images, scale_factor=2, mode="trilinear"),
    "3-D sampling": _sampled,
}

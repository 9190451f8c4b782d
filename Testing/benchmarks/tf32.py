"""What TF32 does to the gradients of convolutions, on a processor that does not have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

IGNORED_BITS = 13


class RoundedGradients(TorchDispatchMode):
    """While active, what enters the gradient of a convolution is cut to ten bits of mantissa, as tensor cores do.

    Products and sums are in single precision, as they are there. The forward passes are not rounded.
    """

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.convolution_backward.default:
            args = *(_cut(part) for part in args[:3]), *args[3:]
        return function(*args, **(kwargs or {}))


def _cut(x: Tensor) -> Tensor:
    return (x.view(torch.int32) >> IGNORED_BITS << IGNORED_BITS).view(torch.float32)

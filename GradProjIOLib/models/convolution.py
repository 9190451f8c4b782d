"""A convolution with few outputs that keeps a processor's vector units busy.

A convolution with three outputs fills three of a processor's eight or sixteen lanes. Taken over four neighbors along
the last axis at once, the same convolution has twelve outputs, a kernel of six samples and a stride of four; that
costs twice the products and runs at almost four times the speed. In memory with the channels last, its
result is the wanted one without moving anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PACKED = 4


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv3d(x, weight, bias, padding=1)`` for kernels of 3x3x3, fast on a processor for few outputs."""
    half = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or x.shape[-1] % PACKED or half:
        return F.conv3d(x, weight, bias, padding=1)
    y = _PackedConvolution.apply(x.contiguous(memory_format=torch.channels_last_3d), weight)
    return y if bias is None else y + bias.view(1, -1, 1, 1, 1)


class _PackedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        outputs, inputs = weight.shape[:2]
        packed = weight.new_zeros(PACKED, outputs, inputs, 3, 3, PACKED + 2)
        for place in range(PACKED):
            packed[place, ..., place : place + 3] = weight
        return _unpack(F.conv3d(x, packed.flatten(0, 1), stride=(1, 1, PACKED), padding=1), outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _backward(gradient, x, weight, (1, 1, 1), (True, False))[0]
        if ctx.needs_input_grad[1]:
            outputs, inputs = weight.shape[:2]
            shape = (PACKED * outputs, inputs, 3, 3, PACKED + 2)
            packed = _backward(_pack(gradient), x, weight.new_empty(shape), (1, 1, PACKED), (False, True))[1]
            packed = packed.view(PACKED, outputs, *shape[1:])
            of_weight = sum(packed[place, ..., place : place + 3] for place in range(PACKED))
        return of_x, of_weight


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int, int], wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    ones, zeros = [1, 1, 1], [0, 0, 0]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, list(stride), ones, ones, False, zeros, 1, [*wanted, False]
    )


def _unpack(packed: Tensor, channels: int) -> Tensor:
    """[N, 4·C, D, H, W] → [N, C, D, H, 4·W], both with the channels last in memory."""
    n, _, d, h, w = packed.shape
    return packed.permute(0, 2, 3, 4, 1).reshape(n, d, h, w * PACKED, channels).permute(0, 4, 1, 2, 3)


def _pack(x: Tensor) -> Tensor:
    """The inverse of ``_unpack``."""
    n, c, d, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(n, d, h, w // PACKED, PACKED * c).permute(0, 4, 1, 2, 3)

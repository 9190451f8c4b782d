"""The transposed convolution that doubles the resolution where its weights outweigh the image.

Where they outweigh it by far, it is best computed as the product of two matrices, between the few input samples and all
weights, whose rows are then laid over each other: a convolution reads and writes the weights several times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TAPS = 4


def double(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv_transpose3d(x, weight, stride=2, padding=1)``: [N, A, D, H, W], [A, B, 4, 4, 4] → [N, B, 2D, 2H, 2W]."""
    if weight.numel() > TAPS**3 * x.numel():
        return _AsProduct.apply(x, weight)
    return F.conv_transpose3d(x, weight, stride=2, padding=1)


class _AsProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        n, _, d, h, w = x.shape
        columns = (_rows(x) @ weight.flatten(1)).view(n, d, h, w, -1, TAPS, TAPS, TAPS)
        for dimension in (1, 2, 3):
            columns = _laid_over(columns, dimension)
        return columns.movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x, windows = x.to(weight.dtype), F.pad(gradient.to(weight.dtype), [1] * 6)
        for dimension in (2, 3, 4):
            windows = windows.unfold(dimension, TAPS, 2)
        columns = windows.movedim(1, 4).reshape(-1, weight[0].numel())
        n, channels, *size = x.shape
        of_x = (columns @ weight.flatten(1).T).view(n, *size, channels).movedim(-1, 1)
        return of_x, (_rows(x).T @ columns).view(weight.shape)


def _rows(x: Tensor) -> Tensor:
    """[N, C, D, H, W] → [N · D · H · W, C]."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _laid_over(columns: Tensor, dimension: int) -> Tensor:
    """Along one dimension of ``n`` samples, adds up their taps, those of dimension 5: 2n samples.

    The two inner taps of a sample lie on its own two results, the outer ones on the neighbours'.
    """
    taps = columns.movedim(5, dimension + 1)
    results = taps.narrow(dimension + 1, 1, 2).clone(memory_format=torch.contiguous_format)
    rest = columns.shape[dimension] - 1
    left, right = results.unbind(dimension + 1)
    left.narrow(dimension, 1, rest).add_(taps.select(dimension + 1, TAPS - 1).narrow(dimension, 0, rest))
    right.narrow(dimension, 0, rest).add_(taps.select(dimension + 1, 0).narrow(dimension, 1, rest))
    return results.flatten(dimension, dimension + 1)

"""The last doubling of the resolution and the last convolution of a U-Net, as one convolution of the coarser lattice.

Between the two there is nothing that is not linear: the transposed convolution (kernel 4, stride 2, padding 1), its
residual by trilinear interpolation, and the convolution with three outputs (kernel 3, padding 1) are together a
convolution with 8 · 3 outputs, one for each of the eight fine samples within a coarse one. The large tensor between
them, the largest of the network by far, is never made, and the products are fewer.

At the border of the lattice the last convolution sees zeros, where the linear continuation of what comes before it
would not be zero. What that continuation would add to the outermost samples is computed for the six faces, and taken
off. So the result is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FACES = tuple((dimension, edge) for dimension in (2, 3, 4) for edge in (0, -1))
"""Dimension and index of the outermost samples of a tensor [N, C, D, H, W]."""


def double_and_convolve(activated: Tensor, residual: Tensor, up: Tensor, head: Tensor, size: Sequence[int]) -> Tensor:
    """``F.conv3d(crop(F.conv_transpose3d(activated, up, stride=2, padding=1) + double(residual)), head, padding=1)``.

    activated [N, A, D, H, W], up [A, B, 4, 4, 4], residual [N, B, D, H, W], head [3, B, 3, 3, 3]; ``double`` is
    trilinear interpolation (align_corners=False) and ``crop`` cuts the last sample off the axes that have an odd
    ``size`` (2D or 2D − 1, …). Returns [N, 3, *size].
    """
    kernel, kernel_of_residual = _within_coarse(F.conv3d(up, head, padding=2)), _within_coarse(_interpolating(head))
    coarse = F.conv3d(activated, kernel, padding=1)
    coarse = coarse + F.conv3d(F.pad(residual, [1] * 6, mode="replicate"), kernel_of_residual)
    fine = _spread(coarse)[:, :, : size[0], : size[1], : size[2]]
    faces = zip(FACES, _Faces.apply(activated), _Faces.apply(residual), strict=True)
    return _WithoutExcess.apply(fine, *(_excess(*face, up, head, activated.shape[2:], size) for face in faces))


class _Faces(torch.autograd.Function):
    """The outermost samples [N, C, D, H, W] at each of FACES; their gradients share one tensor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        return tuple(x.select(*face).clone() for face in FACES)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        of_x = torch.zeros_like(x)
        for face, gradient in zip(FACES, gradients, strict=True):
            of_x.select(*face).add_(gradient)
        return of_x


class _WithoutExcess(torch.autograd.Function):
    """[N, 3, D, H, W] less what belongs off at each of FACES, in place."""

    @staticmethod
    def forward(ctx, fine: Tensor, *excesses: Tensor) -> Tensor:
        ctx.mark_dirty(fine)
        for face, excess in zip(FACES, excesses, strict=True):
            fine.select(*face).sub_(excess)
        return fine

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(-gradient.select(*face) for face in FACES)


def _interpolating(head: Tensor) -> Tensor:
    """The kernel [B, 3, 6, 6, 6] of trilinear doubling and the convolution after it."""
    outputs, channels = head.shape[:2]
    line = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=head.dtype, device=head.device)
    cube = line[:, None, None] * line[:, None] * line
    kernel = F.conv3d(cube[None, None], head.reshape(-1, 1, 3, 3, 3), padding=2)
    return kernel.view(outputs, channels, 6, 6, 6).transpose(0, 1)


def _within_coarse(kernel: Tensor) -> Tensor:
    """A transposed convolution [A, 3, 6, 6, 6] with stride 2 as a convolution [8 · 3, A, 3, 3, 3] without.

    Output (z, y, x, channel) is that channel of the fine sample (z, y, x), each 0 or 1, within a coarse one.
    """
    inputs, outputs = kernel.shape[:2]
    split = kernel.view(inputs, outputs, 3, 2, 3, 2, 3, 2).flip(2, 4, 6)
    joined = split.permute(3, 5, 7, 1, 0, 2, 4, 6).reshape(8 * outputs, inputs, 3, 3, 3)
    return joined.contiguous(memory_format=torch.channels_last_3d)


def _spread(coarse: Tensor) -> Tensor:
    """[N, 8 · 3, D, H, W] → [N, 3, 2D, 2H, 2W], the fine samples to their places; both with the channels last."""
    n, channels, d, h, w = coarse.shape
    split = coarse.permute(0, 2, 3, 4, 1).reshape(n, d, h, w, 2, 2, 2, channels // 8)
    fine = split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, 2 * d, 2 * h, 2 * w, channels // 8)
    return fine.permute(0, 4, 1, 2, 3)


def _excess(
    face: tuple[int, int],
    activated: Tensor,
    residual: Tensor,
    up: Tensor,
    head: Tensor,
    coarse: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """What the layer just outside one face would add to the outermost samples there, from those at the face.

    activated and residual: [N, C, …] without the face's axis; ``coarse`` is the size before the doubling. Returns
    [N, 3, …]. Along the axes before the face's, the layer is cut to the lattice, so that no edge counts twice.
    """
    axis, last = face[0] - 2, face[1] == -1
    # Outside the first sample and an even last one the transposed convolution reaches with its outermost weight.
    tap = (3 if size[axis] == 2 * coarse[axis] else 2) if last else 0
    others = [other for other in range(3) if other != axis]
    cut = [int(other < axis) for other in others]
    layer = F.conv_transpose2d(activated, up.select(axis + 2, tap), stride=2, padding=cut)
    doubled = F.interpolate(residual, scale_factor=2, mode="bilinear", align_corners=False)
    over = [1 - inside for inside in cut]
    layer = layer + F.pad(doubled, [over[1]] * 2 + [over[0]] * 2, mode="replicate")
    rows, columns = (size[other] + 2 * more for other, more in zip(others, over, strict=True))
    return F.conv2d(layer[:, :, :rows, :columns], head.select(axis + 2, 2 if last else 0), padding=cut)

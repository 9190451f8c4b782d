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


def double_and_convolve(
    activated: Tensor, residual: Tensor, scale: Tensor, offset: Tensor, up: Tensor, head: Tensor, size: Sequence[int]
) -> Tensor:
    """``F.conv3d(crop(y · scale + offset), head, padding=1)``, y = conv_transpose3d(activated, up) + double(residual).

    activated [N, A, D, H, W], up [A, B, 4, 4, 4] (stride 2, padding 1), residual [N, B, D, H, W], scale and offset
    [1, B, 1, 1, 1], head [3, B, 3, 3, 3]; ``double`` is trilinear interpolation (align_corners=False) and ``crop``
    cuts the last sample off the axes that have an odd ``size`` (2D or 2D − 1, …). Returns [N, 3, *size].
    """
    up, scaled_head = up * scale, head * scale
    activated, *activated_faces = _WithFaces.apply(activated)
    residual, *residual_faces = _WithFaces.apply(residual)
    excesses = [
        _excess(face, of_activated, of_residual * scale[..., 0] + offset[..., 0], up, head, activated.shape[2:], size)
        for face, of_activated, of_residual in zip(FACES, activated_faces, residual_faces, strict=True)
    ]
    constant = (head * offset).sum(dim=(1, 2, 3, 4)).repeat(8)
    coarse = F.conv3d(_Padded.apply(residual), _within_coarse(_interpolating(scaled_head)), constant)
    coarse.add_(F.conv3d(activated, _within_coarse(F.conv3d(up, head, padding=2)), padding=1))
    return _Spread.apply(coarse, size, *excesses)


class _WithFaces(torch.autograd.Function):
    """[N, C, D, H, W] as it is, and its outermost samples at each of FACES; they share one gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, ...]:
        return x.view_as(x), *(x.select(*face).clone() for face in FACES)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *of_faces: Tensor) -> Tensor:
        # In place: this gradient comes from the one convolution or padding that read x, and nobody else has it.
        for face, of_face in zip(FACES, of_faces, strict=True):
            gradient.select(*face).add_(of_face)
        return gradient


class _Padded(torch.autograd.Function):
    """``F.pad(x, [1] * 6, mode="replicate")``, which for its gradient would keep x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.pad(x, [1] * 6, mode="replicate")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        # In place, as in _WithFaces.
        for dimension in (2, 3, 4):
            for outside, edge in ((0, 1), (-1, -2)):
                gradient.select(dimension, edge).add_(gradient.select(dimension, outside))
            gradient = gradient.narrow(dimension, 1, gradient.shape[dimension] - 2)
        return gradient


class _Spread(torch.autograd.Function):
    """[N, 8 · 3, D, H, W] → [N, 3, *size], the fine samples to their places, less what belongs off at each of FACES.

    All with the channels last in memory.
    """

    @staticmethod
    def forward(ctx, coarse: Tensor, size: Sequence[int], *excesses: Tensor) -> Tensor:
        n, channels, d, h, w = ctx.coarse = coarse.shape
        split = coarse.permute(0, 2, 3, 4, 1).reshape(n, d, h, w, 2, 2, 2, channels // 8)
        fine = split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, 2 * d, 2 * h, 2 * w, channels // 8)
        fine = fine.permute(0, 4, 1, 2, 3)[:, :, : size[0], : size[1], : size[2]]
        for face, excess in zip(FACES, excesses, strict=True):
            fine.select(*face).sub_(excess)
        return fine

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        n, channels, d, h, w = ctx.coarse
        cut = [2 * coarse - fine for coarse, fine in zip((w, h, d), reversed(gradient.shape[2:]), strict=True)]
        fine = gradient.permute(0, 2, 3, 4, 1)
        if any(cut):
            fine = F.pad(fine, [0, 0, 0, cut[0], 0, cut[1], 0, cut[2]])
        split = fine.reshape(n, d, 2, h, 2, w, 2, channels // 8).permute(0, 1, 3, 5, 2, 4, 6, 7)
        coarse = split.reshape(n, d, h, w, channels).permute(0, 4, 1, 2, 3)
        return coarse, None, *(-gradient.select(*face) for face in FACES)


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

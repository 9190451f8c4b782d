"""The U-Net of `GradProjIOLib.models.unet` in less time and memory.

Parameters and results are the same, up to rounding.

The last two layers are one convolution of the coarser lattice. Between the last doubling of the resolution and the last
convolution there is nothing that is not linear: the transposed convolution (kernel 4, stride 2, padding 1), its
residual by trilinear interpolation, the normalization, and the convolution with three outputs (kernel 3, padding 1) are
together a convolution with 8 · 3 outputs, three for each of the eight fine samples within a coarse one. The large
tensor between the two layers, by far the largest of the network, is never made, and there are fewer products.

At the border of the lattice the last convolution sees zeros outside. The joined convolution sees there what the first
layer would give beyond the lattice. This excess is computed for the six faces and taken off.

Of each activation the result is kept for the gradient rather than the input, gradients of joined tensors are added up
in place, and tensors have the channels last in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from GradProjIOLib.models.unet import UNet, add_to_last_channels, crop, double_resolution, halve_resolution

SLOPE = 0.01
"""Of the leaky rectifier for negative values. This is torch's default."""
FACES = tuple((dimension, edge) for dimension in (2, 3, 4) for edge in (0, -1))
"""Dimension and index of the outermost samples of a tensor [N, C, D, H, W]."""


class FastUNet(UNet):
    """A UNet that takes less time and memory. Docs/benchmarks.md says how much each of its parts gains."""

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, D, H, W] → [N, 3, D', H', W']."""
        x, skips, finest = images, [], images
        for level, down in enumerate(self.down, start=1):
            activated, halved = _ActivatedAndHalved.apply(x)
            skips.append(activated)
            x = add_to_last_channels(down(laid_out(activated, down)), halved)
            if level == len(self.down) - len(self.up):
                finest = x
        activated = F.leaky_relu(x)
        x = x[:, : self.up[-1].out_channels]
        for level in reversed(range(1, len(self.up))):
            skip = skips.pop()
            x = crop(self._doubled(level, x, laid_out(activated, self.up[level])), skip.shape[2:])
            activated, x = _ActivatedBeside.apply(x, skip, self.up[level - 1].out_channels)
        return self._last_layers(x, laid_out(activated, self.up[0]), finest)

    def _doubled(self, level: int, x: Tensor, activated: Tensor) -> Tensor:
        """``norm(up(activated) + double_resolution(x))``: [N, C, …] at twice the resolution.

        The normalization is applied to the weights and to the small input of the interpolation, which saves passes
        over the large output. Where there are more weights than samples, that would cost more than it saves.
        """
        up = self.up[level]
        scale, offset = self._normalization(level)
        if up.weight.numel() > activated.numel():
            doubled = F.conv_transpose3d(activated, up.weight, stride=2, padding=1) + double_resolution(x)
            return doubled * scale + offset
        weight = (up.weight * scale).contiguous(memory_format=torch.channels_last_3d)
        y = F.conv_transpose3d(activated, weight, stride=2, padding=1)
        return y.add_(double_resolution(x * scale + offset))

    def _last_layers(self, x: Tensor, activated: Tensor, skip: Tensor) -> Tensor:
        """The last doubling of x, and the last convolution of the result beside ``skip``."""
        up, head = self.up[0], self.head.weight
        channels, size = up.out_channels, skip.shape[2:]
        # This convolution comes first: in lean mode the second forward pass ends where it has all that the gradient
        # needs, and so leaves out the last convolution, which is the larger one.
        beside = F.conv3d(skip, head[:, channels:], self.head.bias, padding=1)
        doubled = double_and_convolve(activated, x, *self._normalization(0), up.weight, head[:, :channels], size)
        return beside.add_(doubled)

    def _normalization(self, level: int) -> tuple[Tensor, Tensor]:
        """What normalization does to a doubling without bias: factor and offset, [1, C, 1, 1, 1]."""
        norm = self.norm[level]
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        offset = norm.bias + scale * (self.up[level].bias - norm.running_mean)
        return scale.view(1, -1, 1, 1, 1), offset.view(1, -1, 1, 1, 1)


def laid_out(x: Tensor, convolution: nn.Conv3d | nn.ConvTranspose3d) -> Tensor:
    """x in the memory layout in which the convolution is fastest.

    That is the one with the channels last, except where there are more weights than samples: there torch would spend
    more time on the layout of the weights.
    """
    if convolution.weight.numel() > x.numel():
        # Where an axis has one sample, torch takes a tensor for both layouts. Flattening it settles the strides.
        return x.flatten().view(x.shape)
    return x.contiguous(memory_format=torch.channels_last_3d)


class _ActivatedAndHalved(torch.autograd.Function):
    """``F.leaky_relu(x)`` and ``halve_resolution(x)``, of which nothing but the former is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.leaky_relu(x)
        ctx.save_for_backward(activated)
        return activated, halve_resolution(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_activated: Tensor, of_halved: Tensor) -> Tensor:
        (activated,) = ctx.saved_tensors
        of_x = torch.ops.aten.leaky_relu_backward(of_activated, activated, SLOPE, self_is_result=True)
        # Torch uses only the shape of the images that were halved.
        kernel = [min(2, size) for size in activated.shape[2:]]
        return of_x.add_(torch.ops.aten.avg_pool3d_backward(of_halved, activated, kernel, [2], [0], True, True, None))


class _ActivatedBeside(torch.autograd.Function):
    """``torch.cat([F.leaky_relu(x), skip], dim=1)``, and the first channels of x as they are.

    Of the former nothing but the result is kept, and its gradient becomes that of x without a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, first: int) -> tuple[Tensor, Tensor]:
        ctx.channels = x.shape[1]
        both = torch.cat([F.leaky_relu(x), skip], dim=1)
        ctx.save_for_backward(both)
        return both, x[:, :first]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_both: Tensor, of_first: Tensor) -> tuple[Tensor, Tensor, None]:
        (both,) = ctx.saved_tensors
        # In place: this gradient comes from the one convolution that read the result, and nothing else uses it.
        of_x, of_skip = of_both.tensor_split([ctx.channels], dim=1)
        activated = both[:, : ctx.channels]
        torch.ops.aten.leaky_relu_backward(of_x, activated, SLOPE, self_is_result=True, grad_input=of_x)
        of_x[:, : of_first.shape[1]].add_(of_first)
        # A copy, because the whole would otherwise stay in memory as long as this part of it.
        return of_x, of_skip.clone(), None


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
    return _spread(coarse, size, excesses)


class _WithFaces(torch.autograd.Function):
    """[N, C, D, H, W] as it is, and its outermost samples at each of FACES; they share one gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.view_as(x), *(x.select(*face).clone() for face in FACES)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *of_faces: Tensor) -> Tensor:
        # In place: this gradient comes from the one convolution or padding that read x, and nothing else uses it.
        for face, of_face in zip(FACES, of_faces, strict=True):
            gradient.select(*face).add_(of_face)
        return gradient


class _Padded(torch.autograd.Function):
    """``F.pad(x, [1] * 6, mode="replicate")``, which for its gradient would keep x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.pad(x, [1] * 6, mode="replicate")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # In place, as in _WithFaces.
        for dimension in (2, 3, 4):
            for outside, edge in ((0, 1), (-1, -2)):
                gradient.select(dimension, edge).add_(gradient.select(dimension, outside))
            gradient = gradient.narrow(dimension, 1, gradient.shape[dimension] - 2)
        return gradient


def _spread(coarse: Tensor, size: Sequence[int], excesses: Sequence[Tensor]) -> Tensor:
    """[N, 8 · 3, D, H, W] → [N, 3, *size], the fine samples to their places, less the excess at each of FACES.

    All with the channels last in memory.
    """
    n, channels, d, h, w = coarse.shape
    split = coarse.permute(0, 2, 3, 4, 1).reshape(n, d, h, w, 2, 2, 2, channels // 8)
    fine = split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, 2 * d, 2 * h, 2 * w, channels // 8)
    fine = crop(fine.permute(0, 4, 1, 2, 3), size)
    for face, excess in zip(FACES, excesses, strict=True):
        fine.select(*face).sub_(excess)
    return fine


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

"""The registration network of uniGradICON: a cascade of U-Nets, coarse to fine.

Each U-Net of the cascade sees the moving image, warped by what the ones before it found, beside the fixed
image, and adds a displacement field (Greer et al., "ICON", ICCV 2021; Tian et al., "GradICON", CVPR 2023;
Tian et al., "uniGradICON", MICCAI 2024). With the widths of :data:`UNIGRADICON` the cascade computes what
``unigradicon.make_network`` computes; other widths and resolutions make smaller networks of the same kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from GradProjIOLib.models import transposed
from GradProjIOLib.models.doubling import double_and_convolve
from GradProjIOLib.spatial import maps

SLOPE = 0.01
"""Of the leaky rectifier for negative values; torch's default."""


class UNet(nn.Module):
    """A U-Net with residual resampling; the last convolution starts at zero.

    encoder: channels of the input and after each halving of the resolution. decoder: channels after each
    doubling, finest first; where it is shorter than the encoder has levels, the output stays at
    the coarser resolution (one level less, half the resolution).
    """

    def __init__(self, encoder: Sequence[int], decoder: Sequence[int]):
        super().__init__()
        levels = len(encoder) - 1
        skipped = levels - len(decoder)
        self.down = nn.ModuleList(
            nn.Conv3d(inputs, outputs, kernel_size=3, stride=2, padding=1)
            for inputs, outputs in itertools.pairwise(encoder)
        )
        below = [*(a + b for a, b in zip(decoder[1:], encoder[skipped + 1 : -1], strict=True)), encoder[-1]]
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(inputs, outputs, kernel_size=4, stride=2, padding=1)
            for inputs, outputs in zip(below, decoder, strict=True)
        )
        self.norm = nn.ModuleList(nn.BatchNorm3d(channels) for channels in decoder)
        self.head = nn.Conv3d(decoder[0] + encoder[skipped], 3, kernel_size=3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, unit: Tensor) -> Tensor:
        """Images [N, C, D, H, W] → [N, 3, D', H', W'], times ``unit`` [3]."""
        x, skips, finest = images, [], images
        for level, down in enumerate(self.down, start=1):
            activated, halved = _ActivatedAndHalved.apply(x)
            skips.append(activated)
            x = _add_to_last(down(_laid_out(activated, down)), halved)
            if level == len(self.down) - len(self.up):
                finest = x
        activated = F.leaky_relu(x)
        x = x[:, : self.up[-1].out_channels]
        for level in reversed(range(1, len(self.up))):
            skip = skips.pop()
            x = _crop(self._double(level, x, activated), skip.shape[2:])
            activated, x = _ActivatedBeside.apply(x, skip, self.up[level - 1].out_channels)
        return self._finish(x, activated, finest, unit)

    def _double(self, level: int, x: Tensor, activated: Tensor) -> Tensor:
        """``norm(up(activated) + upsampled(x))``: [N, C, …] at twice the resolution.

        The normalisation, a factor and an offset per channel, is applied to the weights and to the small input
        of the upsampling, which saves passes over the large output; where the weights outweigh that, to the output.
        """
        up = self.up[level]
        activated = _laid_out(activated, up)
        scale, offset = self._normalization(level)
        if up.weight.numel() > activated.numel():
            return (transposed.double(activated, up.weight) + _double_resolution(x)) * scale + offset
        weight = (up.weight * scale).contiguous(memory_format=torch.channels_last_3d)
        y = F.conv_transpose3d(activated, weight, stride=2, padding=1)
        return y.add_(_double_resolution(x * scale + offset))

    def _finish(self, x: Tensor, activated: Tensor, skip: Tensor, unit: Tensor) -> Tensor:
        """The last doubling, and the last convolution of its result beside ``skip``.

        Always in full precision: what is rounded here is the displacement itself.
        """
        with torch.autocast(x.device.type, enabled=False):
            up, head, bias = self.up[0].weight, self.head.weight * unit.view(3, 1, 1, 1, 1), self.head.bias * unit
            x, activated = x.float(), _laid_out(activated.float(), self.up[0])
            channels, size = x.shape[1], skip.shape[2:]
            # Before the other convolution: computed again in the backward pass, that one is left out as the last.
            beside = F.conv3d(skip.float(), head[:, channels:], bias, padding=1)
            found = double_and_convolve(activated, x, *self._normalization(0), up, head[:, :channels], size)
            return beside.add_(found)

    def _normalization(self, level: int) -> tuple[Tensor, Tensor]:
        """What normalisation does to a doubling without bias: factor and offset, [1, C, 1, 1, 1].

        The statistics are always those that the network came with, as in evaluation mode.
        """
        norm = self.norm[level]
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        offset = norm.bias + scale * (self.up[level].bias - norm.running_mean)
        return scale.view(1, -1, 1, 1, 1), offset.view(1, -1, 1, 1, 1)


class _ActivatedAndHalved(torch.autograd.Function):
    """``F.leaky_relu(x)`` and ``halve_resolution(x)``, of which nothing but the former is kept."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.leaky_relu(x)
        ctx.save_for_backward(activated)
        return activated, halve_resolution(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_activated: Tensor, of_halved: Tensor) -> Tensor:
        (activated,) = ctx.saved_tensors
        of_x = torch.ops.aten.leaky_relu_backward(of_activated, activated, SLOPE, self_is_result=True)
        # Of the images that were halved, torch wants to know no more than the shape.
        kernel = _halving_kernel(activated)
        return of_x.add_(torch.ops.aten.avg_pool3d_backward(of_halved, activated, kernel, [2], [0], True, True, None))


class _ActivatedBeside(torch.autograd.Function):
    """``torch.cat([F.leaky_relu(x), skip], dim=1)``, and the first channels of x as they are.

    Of the former nothing but the result is kept, and its gradient becomes that of x without a copy.
    """

    @staticmethod
    def forward(ctx, x: Tensor, skip: Tensor, first: int) -> tuple[Tensor, Tensor]:
        ctx.channels = x.shape[1]
        x = x.to(torch.promote_types(x.dtype, skip.dtype))
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if last else torch.contiguous_format
        shape = x.shape[0], ctx.channels + skip.shape[1], *x.shape[2:]
        both = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        torch.ops.aten.leaky_relu.out(x, SLOPE, out=both[:, : ctx.channels])
        both[:, ctx.channels :] = skip
        ctx.save_for_backward(both)
        return both, x[:, :first]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_both: Tensor, of_first: Tensor) -> tuple[Tensor, Tensor, None]:
        (both,) = ctx.saved_tensors
        # In place: this gradient comes from the one convolution that read the result, and nobody else has it.
        of_x, of_skip = of_both.tensor_split([ctx.channels], dim=1)
        activated = both[:, : ctx.channels]
        torch.ops.aten.leaky_relu_backward(of_x, activated, SLOPE, self_is_result=True, grad_input=of_x)
        of_x[:, : of_first.shape[1]].add_(of_first)
        # A copy, for else the whole would stay as long as this part of it.
        return of_x, of_skip.clone(), None


def _laid_out(x: Tensor, convolution: nn.Module) -> Tensor:
    """x in the memory layout in which the convolution is fastest.

    That is channels last, except where the weights outweigh the image: there reordering them would cost more.
    """
    deep = convolution.weight.numel() > x.numel()
    if deep:
        # A single sample has its channels last and first at once; a view of a line settles it.
        return x.flatten().view(x.shape)
    return x.contiguous(memory_format=torch.channels_last_3d)


def _add_to_last(y: Tensor, x: Tensor) -> Tensor:
    """y + x where x has fewer channels: it is added to the last of y; of more, the first count."""
    missing = y.shape[1] - x.shape[1]
    if missing <= 0:
        return y + x[:, : y.shape[1]]
    return torch.cat([y[:, :missing], y[:, missing:] + x], dim=1)


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == size else x[:, :, : size[0], : size[1], : size[2]]


def _double_resolution(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)


def halve_resolution(x: Tensor) -> Tensor:
    """Means of 2x2x2 samples; an axis of one sample keeps it."""
    return F.avg_pool3d(x, _halving_kernel(x), stride=2, ceil_mode=True)


def _halving_kernel(x: Tensor) -> list[int]:
    return [min(2, size) for size in x.shape[2:]]


def _warped(images: Tensor, *fields: Tensor) -> Tensor:
    """Images [N, 2, D, H, W] of which the first is warped by displacement fields, see ``maps.displace``."""
    mapped = maps.displaced_identity(fields, maps.identity(images.shape[2:], images.device))
    return torch.cat([maps.sample(images[:, :1], mapped), images[:, 1:]], dim=1)


class Cascade(nn.Module):
    """U-Nets applied one after the other, the first at the coarsest resolution.

    widths: one (encoder, decoder) per U-Net, see :class:`UNet`. halvings: how often the resolution of the
    images is halved for each of them. voxels: how many samples of the full lattice an output of 1 means;
    None makes it a tenth of the lattice's extent along each axis, as in uniGradICON. composed: whether the
    U-Nets' fields are composed into one on the lattice of the latest, rather than at every point where the map is
    read, as uniGradICON does; that saves most of the sampling.
    """

    def __init__(
        self,
        widths: Sequence[tuple[Sequence[int], Sequence[int]]],
        halvings: Sequence[int],
        voxels: float | None = None,
        composed: bool = False,
    ):
        super().__init__()
        self.stages = nn.ModuleList(UNet(encoder, decoder) for encoder, decoder in widths)
        self.halvings = tuple(halvings)
        self.voxels = voxels
        self.composed = composed
        self.checkpointed = False
        """Whether to compute intermediate results again in the backward pass rather than to keep them."""

    def forward(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """Displacement fields that together warp ``source`` onto ``target``, both [N, 1, D, H, W].

        The map at a point of the target's lattice is ``maps.displace(fields, point)``: see there for the
        frame and the order. Each field is [N, 3, …] at the resolution of its stage; a composed cascade has one.
        """
        lattice = source.shape[2:]
        pyramid = [torch.cat([source, target], dim=1)]
        for _ in range(max(self.halvings)):
            pyramid.append(halve_resolution(pyramid[-1]))
        unit = self._unit(lattice, source.device)
        fields: list[Tensor] = []
        for stage, halvings in zip(self.stages, self.halvings, strict=True):
            images = pyramid[halvings]
            if fields:
                images = self._call(_warped, images, *fields)
            field = self._call(stage, images.contiguous(memory_format=torch.channels_last_3d), unit)
            fields = [maps.compose(*fields, field)] if self.composed and fields else [*fields, field]
        return fields

    def _call(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def _unit(self, lattice: Sequence[int], device: torch.device) -> Tensor:
        """One unit of a U-Net's output in the frame of :mod:`GradProjIOLib.spatial.maps`: [3]."""
        if self.voxels is None:
            return torch.full((3,), 0.2, device=device)
        return self.voxels / maps.voxels_per_unit(lattice, device)

"""The U-Net of uniGradICON, written with torch's own layers.

This is ``tallUNet2`` of the published package (Tian et al., "uniGradICON", MICCAI 2024) for any widths. Each change of
the resolution has a residual: the input, resampled and cut to the number of channels, is added to the output.
`GradProjIOLib.models.fast_unet` computes the same in less time and memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """A U-Net with three output channels. Its last convolution starts at zero, so it starts as the identity map.

    encoder: the number of channels of the input, and after each halving of the resolution. decoder: the number of
    channels after each doubling of the resolution, finest first. A decoder with one level less than the encoder gives
    an output at half the input's resolution. The network must be in evaluation mode: its normalization uses the
    statistics that came with the weights.
    """

    def __init__(self, encoder: Sequence[int], decoder: Sequence[int]):
        super().__init__()
        skipped = len(encoder) - 1 - len(decoder)
        inputs = [*(a + b for a, b in zip(decoder[1:], encoder[skipped + 1 : -1], strict=True)), encoder[-1]]
        # Any: torch does not know what kind of modules a list holds.
        self.down: Any = nn.ModuleList(nn.Conv3d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(encoder))
        self.up: Any = nn.ModuleList(
            nn.ConvTranspose3d(a, b, 4, stride=2, padding=1) for a, b in zip(inputs, decoder, strict=True)
        )
        self.norm: Any = nn.ModuleList(nn.BatchNorm3d(channels) for channels in decoder)
        self.head = nn.Conv3d(decoder[0] + encoder[skipped], 3, 3, padding=1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, D, H, W] → [N, 3, D', H', W']."""
        x, skips = images, []
        for down in self.down:
            skips.append(x)
            x = add_to_last_channels(down(F.leaky_relu(x)), halve_resolution(x))
        for up, norm in zip(reversed(self.up), reversed(self.norm), strict=True):
            x = norm(up(F.leaky_relu(x)) + double_resolution(x[:, : up.out_channels]))
            skip = skips.pop()
            x = torch.cat([crop(x, skip.shape[2:]), skip], dim=1)
        return self.head(x)


def halve_resolution(x: Tensor) -> Tensor:
    """Means of 2x2x2 samples. An axis of one sample keeps it."""
    return F.avg_pool3d(x, [min(2, size) for size in x.shape[2:]], stride=2, ceil_mode=True)


def double_resolution(x: Tensor) -> Tensor:
    """Trilinear interpolation to twice as many samples along each axis."""
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)


def add_to_last_channels(y: Tensor, x: Tensor) -> Tensor:
    """y + x, where x may have fewer channels, which are added to y's last ones, or more, of which the first count."""
    missing = y.shape[1] - x.shape[1]
    if missing <= 0:
        return y + x[:, : y.shape[1]]
    return torch.cat([y[:, :missing], y[:, missing:] + x], dim=1)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first samples of [N, C, D, H, W] along each of the last three axes, as many as ``size`` says."""
    return x[:, :, : size[0], : size[1], : size[2]]

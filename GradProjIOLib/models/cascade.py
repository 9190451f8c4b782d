"""The registration network of uniGradICON: a cascade of U-Nets, coarse to fine.

Each U-Net of the cascade sees the moving image, warped by what the ones before it found, beside the fixed
image, and adds a displacement field (Greer et al., "ICON", ICCV 2021; Tian et al., "GradICON", CVPR 2023;
Tian et al., "uniGradICON", MICCAI 2024). With the widths of uniGradICON the cascade computes what
``unigradicon.make_network`` computes; other widths and resolutions make smaller networks of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from GradProjIOLib.models.fast_unet import FastUNet
from GradProjIOLib.models.unet import halve_resolution
from GradProjIOLib.spatial import maps


def _warped(images: Tensor, *fields: Tensor) -> Tensor:
    """Images [N, 2, D, H, W] of which the first is warped by displacement fields, see ``maps.displace``."""
    mapped = maps.displaced_identity(fields, maps.identity(images.shape[2:], images.device))
    return torch.cat([maps.sample(images[:, :1], mapped), images[:, 1:]], dim=1)


class Cascade(nn.Module):
    """U-Nets applied one after the other, the first at the coarsest resolution.

    widths: one (encoder, decoder) per U-Net, see ``UNet``. halvings: how often the resolution of the
    images is halved for each of them. voxels: how many samples of the full lattice an output of 1 means;
    None makes it a tenth of the lattice's extent along each axis, as in uniGradICON. composed: whether the
    U-Nets' fields are composed into one field on the lattice of the latest U-Net. uniGradICON composes them at every
    point where the map is read, which takes most of its sampling. memory_share: how much memory a sample of the lattice
    takes in an optimization, as a part of uniGradICON's.
    """

    def __init__(
        self,
        widths: Sequence[tuple[Sequence[int], Sequence[int]]],
        halvings: Sequence[int],
        voxels: float | None = None,
        composed: bool = False,
        memory_share: float = 1.0,
    ):
        super().__init__()
        self.stages = nn.ModuleList(FastUNet(encoder, decoder) for encoder, decoder in widths)
        self.halvings = tuple(halvings)
        self.voxels = voxels
        self.composed = composed
        self.memory_share = memory_share
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
        # What 1 in a U-Net's output means in the frame of spatial.maps.
        per_unit = maps.voxels_per_unit(lattice, source.device).view(3, 1, 1, 1)
        unit = torch.full_like(per_unit, 0.2) if self.voxels is None else self.voxels / per_unit
        fields: list[Tensor] = []
        for stage, halvings in zip(self.stages, self.halvings, strict=True):
            images = pyramid[halvings]
            if fields:
                images = self._call(_warped, images, *fields)
            # Convolutions are fastest with the channels last in memory. Done here, lean mode keeps only this copy.
            images = images.contiguous(memory_format=torch.channels_last_3d)
            field = self._call(stage, images).mul_(unit)
            fields = [maps.compose(fields[0], field)] if self.composed and fields else [*fields, field]
        return fields

    def _call(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

"""The two objectives of one pair on the network's lattice: similarity and regularity.

Both directions go through the network as one batch: entry 0 maps fixed to moving (the warped moving image
lies on the fixed one), entry 1 moving to fixed. The network is in evaluation mode, where batch
normalisation keeps the entries apart, so the batch computes what two passes would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from GradProjIOLib.engine.regularity import GradientInverseConsistency
from GradProjIOLib.engine.similarity import SIGMA, SIMILARITIES
from GradProjIOLib.spatial import maps


@dataclass(frozen=True)
class Losses:
    """Scalars: similarity (the sum of both directions) and regularity (without its weight)."""

    similarity: Tensor
    regularity: Tensor


class Objective:
    """Losses of a network for one pair of images [1, 1, D, H, W] with intensities in [0, 1].

    similarity: a key of ``similarity.SIMILARITIES``. sigma: of LNCC's window, in samples. Masks [1, 1, D, H, W]
    say where each image counts.
    """

    def __init__(
        self,
        network: nn.Module,
        fixed: Tensor,
        moving: Tensor,
        similarity: str = "lncc",
        fixed_mask: Tensor | None = None,
        moving_mask: Tensor | None = None,
        sigma: float = SIGMA,
    ):
        self.network = network
        self.sources = torch.cat([moving, fixed])
        self.targets = torch.cat([fixed, moving])
        self.lattice = tuple(fixed.shape[2:])
        self.points = maps.identity(self.lattice, fixed.device)
        masks = _stack_masks(fixed, fixed_mask, moving_mask)
        window = {} if similarity == "mind" else {"sigma": sigma}
        self.similarity = SIMILARITIES[similarity](self.targets, masks, **window)
        self.regularity = GradientInverseConsistency(self.lattice, fixed.device)

    def losses(self, jitter: Tensor) -> Losses:
        """Both losses; jitter comes from ``self.regularity.jitter`` and keeps the regulariser's points random."""
        return self.losses_of(self.fields(), jitter)

    def fields(self) -> list[Tensor]:
        """The network's chain of displacement fields [2, 3, …], see ``maps.displace``; fixed → moving first."""
        return self.network(self.sources, self.targets)

    def losses_of(self, fields: Sequence[Tensor], jitter: Tensor) -> Losses:
        """``losses`` of fields that are there already."""
        return Losses(self._similarity_of(fields), self._regularity_of(fields, jitter))

    def gradients(self, fields: Sequence[Tensor], jitter: Tensor) -> tuple[Losses, list[Tensor], list[Tensor]]:
        """Both losses and their gradients with respect to the fields: of the similarity, of the regularity.

        One loss after the other, so that the intermediate results of the two, and those of the network's backward
        pass after them, are never there at the same time.
        """
        ends = [field.detach().requires_grad_() for field in fields]
        similarity = self._similarity_of(ends)
        of_similarity = list(torch.autograd.grad(similarity, ends))
        regularity = self._regularity_of(ends, jitter)
        of_regularity = list(torch.autograd.grad(regularity, ends))
        return Losses(similarity.detach(), regularity.detach()), of_similarity, of_regularity

    def _similarity_of(self, fields: Sequence[Tensor]) -> Tensor:
        warped = maps.sample(self.sources, maps.displaced_identity(fields, self.points), padding="zeros")
        return self.similarity(warped).sum()

    def _regularity_of(self, fields: Sequence[Tensor], jitter: Tensor) -> Tensor:
        forward, backward = [field[:1] for field in fields], [field[1:] for field in fields]
        return self.regularity(forward, backward, jitter)

    @torch.no_grad()
    def displacements(self) -> Tensor:
        """Displacements in samples of the lattice along (x, y, z): [2, 3, D, H, W], fixed → moving first."""
        return self.displacements_of(self.fields())

    def displacements_of(self, fields: Sequence[Tensor]) -> Tensor:
        """``displacements`` of fields that are there already."""
        mapped = maps.displaced_identity(fields, self.points)
        return ((mapped - self.points) * maps.voxels_per_unit(self.lattice, mapped.device)).movedim(-1, 1)


def _stack_masks(image: Tensor, fixed_mask: Tensor | None, moving_mask: Tensor | None) -> Tensor | None:
    if fixed_mask is None and moving_mask is None:
        return None
    everywhere = torch.ones_like(image)
    return torch.cat([everywhere if mask is None else mask for mask in (fixed_mask, moving_mask)])

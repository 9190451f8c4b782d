"""The objectives of one pair on a lattice: similarity where masks let it count, and regularity with folding.

Both directions are one batch: entry 0 maps fixed to moving (the warped moving image lies on the fixed one), entry 1
moving to fixed. A network is in evaluation mode, where batch normalization keeps the entries apart, so the batch
computes what two passes would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from GradProjIOLib.engine.folding import folding_penalty
from GradProjIOLib.engine.guidance import LabelOverlap, LandmarkDistance
from GradProjIOLib.engine.regularity import GradientInverseConsistency, LatticeInverseConsistency, bending
from GradProjIOLib.engine.similarity import SIGMA, SIMILARITIES, has_structure
from GradProjIOLib.spatial import maps


class Objective:
    """Losses of a deformation model for one pair of images [1, 1, D, H, W] with intensities in [0, 1].

    A deformation model is a module that gives, for source and target images, the chain of displacement fields
    [2, 3, …] of both directions, fixed → moving first (see ``maps.displace``).

    similarity: a key of ``similarity.SIMILARITIES``. sigma, shared_variance: see ``similarity.LNCC``; MIND has none.
    window_stride: how many samples the similarity's windows lie apart. Masks [1, 1, D, H, W] say where each image
    counts (above zero); a sample counts where its own image's mask is above zero, and the other image's mask is, too,
    at the point to which the sample is mapped. The folding penalty is a part of the regularity's objective, with a
    weight of its own.
    outside_counts: whether samples that are mapped outside the lattice count, as black; uniGradICON has it so.
    landmarks, labels: pairs of points and of structures that should meet, further objectives.
    on_lattice: whether the model's maps are one field each on the lattice itself. The regularity is then computed at
    fewer points, which is faster and gives the same but for noise (Docs/benchmarks.md).
    """

    def __init__(
        self,
        model: nn.Module,
        fixed: Tensor,
        moving: Tensor,
        similarity: str = "lncc",
        fixed_mask: Tensor | None = None,
        moving_mask: Tensor | None = None,
        sigma: float = SIGMA,
        shared_variance: float = 0.0,
        window_stride: int = 1,
        regularity_weight: float = 1.5,
        folding_weight: float = 0.0,
        on_lattice: bool = False,
        landmarks: LandmarkDistance | None = None,
        labels: LabelOverlap | None = None,
        outside_counts: bool = True,
    ):
        self.model = model
        self.on_lattice = on_lattice
        guides = {"landmarks": landmarks, "labels": labels}
        self.guides = {name: guide for name, guide in guides.items() if guide is not None}
        self.names = ("similarity", "regularity", *self.guides)
        self.sources = torch.cat([moving, fixed])
        self.targets = torch.cat([fixed, moving])
        self.lattice = tuple(fixed.shape[2:])
        self.points = maps.identity(self.lattice, fixed.device)
        self.masks: Tensor | None = _stack_masks(self.targets, fixed_mask, moving_mask, similarity)
        if outside_counts and _hides_nothing(self.masks):
            self.masks = None
        window = {} if similarity == "mind" else {"sigma": sigma, "shared_variance": shared_variance}
        self.similarity = SIMILARITIES[similarity](self.targets, stride=window_stride, **window)
        consistency = LatticeInverseConsistency if on_lattice else GradientInverseConsistency
        self.regularity = consistency(self.lattice, fixed.device)
        self.counting = self.unseen = None
        if self.masks is not None:
            self.counting = self.masks * self._seen_at_start()
            # 1 where samples do not count in both directions, else 0: [1, 1, D, H, W].
            unseen = (self.counting.amin(dim=0, keepdim=True) == 0).to(self.counting.dtype)
            self.unseen = unseen if on_lattice and unseen.any() else None
        self.regularity_weight = regularity_weight
        self.folding_weight = folding_weight

    def fields(self) -> list[Tensor]:
        """The model's chain of displacement fields [2, 3, …], see ``maps.displace``; fixed → moving first."""
        return self.model(self.sources, self.targets)

    def losses(self, fields: Sequence[Tensor], jitter: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Similarity (the sum of both directions) and regularity of these fields: scalars, without weights.

        fields: as ``fields()`` gives them. jitter: from ``self.regularity.jitter``; it moves the regularizer's points,
        and None leaves them where they are.
        """
        return self.similarity_of(fields), self._regularity_of(fields, jitter)

    def gradients(
        self, fields: Sequence[Tensor], jitter: Tensor | None, corner: int = 0
    ) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        """All losses, and for each objective the gradient of its weighted loss with respect to the fields.

        The losses are those of ``losses``, folding, and those of landmarks and labels where there are any, by name.
        jitter: as for ``losses``. corner: see ``folding_penalty``.

        One loss after the other, so that the intermediate results of two losses, and those of the model's backward
        pass after them, are never there at the same time.
        """
        ends = [field.detach().requires_grad_() for field in fields]
        similarity = self.similarity_of(ends)
        of_similarity = list(torch.autograd.grad(similarity, ends))
        regularity = self._regularity_of(ends, jitter)
        of_regularity = list(torch.autograd.grad(regularity, ends))
        torch._foreach_mul_(of_regularity, self.regularity_weight)
        folding = torch.zeros((), device=self.points.device)
        if self.folding_weight:
            folding = folding_penalty(self.displacements_of(ends), corner=corner)
            of_folding = torch.autograd.grad(folding, ends)
            torch._foreach_add_(of_regularity, of_folding, alpha=self.folding_weight)
        losses = {"similarity": similarity, "regularity": regularity, "folding": folding}
        gradients = [of_similarity, of_regularity]
        for name, guide in self.guides.items():
            losses[name] = guide(ends)
            gradients.append(list(torch.autograd.grad(guide.weight * losses[name], ends)))
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    def similarity_of(self, fields: Sequence[Tensor]) -> Tensor:
        """The similarity loss of ``fields()``, a scalar."""
        mapped = maps.displaced_identity(fields, self.points)
        warped = maps.sample(self.sources, mapped, padding="zeros")
        return self.similarity(warped, self._weights(mapped)).sum()

    @torch.no_grad()
    def _weights(self, mapped: Tensor) -> Tensor | None:
        """How much each sample counts: its mask's value times that of the other image's mask where it is mapped."""
        if self.counting is None:
            return None
        return self.counting * maps.sample(self.masks.flip(0), mapped, padding="zeros")

    @torch.no_grad()
    def _seen_at_start(self) -> Tensor:
        """Which samples are mapped to what is seen of the other image before the first step.

        A sample that is not seen then never counts: once a deformation had drawn it into view, no loss would push it
        out again.
        """
        mapped = maps.displaced_identity(self.fields(), self.points) if self.on_lattice else self.points
        return maps.sample(self.masks.flip(0), mapped.expand(2, -1, -1, -1, -1), padding="zeros")

    def _regularity_of(self, fields: Sequence[Tensor], jitter: Tensor | None) -> Tensor:
        forward, backward = zip(*(field.split(1) for field in fields), strict=True)
        consistency = self.regularity(forward, backward, jitter)
        return consistency if self.unseen is None else consistency + bending(fields[0], self.unseen)

    @property
    def seen(self) -> float:
        """The part of the samples that the masks let count, 0 to 1."""
        return 1.0 if self.counting is None else self.counting.mean().item()

    @torch.no_grad()
    def displacements(self) -> Tensor:
        """Displacements in samples of the lattice along (x, y, z): [2, 3, D, H, W], fixed → moving first."""
        return self.displacements_of(self.fields())

    def displacements_of(self, fields: Sequence[Tensor]) -> Tensor:
        """``displacements`` of ``fields()`` that are there already."""
        per_unit = maps.voxels_per_unit(self.lattice, self.points.device)
        if self.on_lattice:
            return fields[0] * per_unit.view(3, 1, 1, 1)
        mapped = maps.displaced_identity(fields, self.points)
        return ((mapped - self.points) * per_unit).movedim(-1, 1)


def _stack_masks(targets: Tensor, fixed_mask: Tensor | None, moving_mask: Tensor | None, similarity: str) -> Tensor:
    """What counts of the targets: [2, 1, D, H, W] of zeros and ones."""
    everywhere = torch.ones_like(targets[:1])
    given = (everywhere if mask is None else mask > 0 for mask in (fixed_mask, moving_mask))
    masks = torch.cat([mask.to(targets.dtype) for mask in given])
    return masks * has_structure(targets) if similarity == "mind" else masks


def _hides_nothing(masks: Tensor) -> bool:
    return bool(masks.all())

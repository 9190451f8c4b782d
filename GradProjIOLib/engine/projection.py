"""Gradient projection for two objectives (the heart of the method).

Instance optimisation follows two gradients with respect to the same parameters: ``a``, of the image
similarity, and ``b``, of the regularity (already multiplied by its weight λ). Where they conflict,
⟨a, b⟩ < 0, one of them is replaced by its part normal to the other (PCGrad: Yu et al., "Gradient surgery
for multi-task learning", NeurIPS 2020, algorithm 1; used for instance optimisation by Zhang, Zhao and Tao,
Learn2Reg 2024, section 2.4):

    a ← a − (⟨a, b⟩ / ‖b‖²) b        or        b ← b − (⟨a, b⟩ / ‖a‖²) a

The update is the sum of the two. Either way it is a combination ``w_a · a + w_b · b``, and the weights
depend on nothing but the 2x2 Gram matrix of the two gradients, so the vectors themselves, millions of
numbers long, are read once for the matrix and once for the sum.

The paper's eq. (3) prints ‖a‖² as the denominator while it projects a; the result would not be normal
to b. The denominator above is that of the algorithm that the paper cites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from GradProjIOLib.settings import PROJECTION_RULES

ProjectionRule = Literal["random", "both", "similarity", "regularity"]


@dataclass(frozen=True)
class Weighting:
    """How two gradients are combined: ``similarity · a + regularity · b``.

    ``cosine`` is that of the angle between them (0 where one of them is zero) and ``projected`` says
    which was projected: "none", "similarity", "regularity" or "both".
    """

    similarity: float
    regularity: float
    cosine: float
    projected: str


def gram_matrix(similarity: Sequence[Tensor], regularity: Sequence[Tensor]) -> Tensor:
    """Inner products of two gradients, each given as one tensor per parameter.

    Returns a [2, 2] float64 tensor on the CPU, [[⟨a, a⟩, ⟨a, b⟩], [⟨a, b⟩, ⟨b, b⟩]].
    """
    products = [
        torch.stack([torch.dot(a, a), torch.dot(a, b), torch.dot(b, b)]).double()
        for a, b in (_flat_pair(a, b) for a, b in zip(similarity, regularity, strict=True))
    ]
    aa, ab, bb = torch.stack(products).sum(dim=0).cpu()
    return torch.stack([torch.stack([aa, ab]), torch.stack([ab, bb])])


def weighting(gram: Tensor, rule: ProjectionRule = "random", generator: torch.Generator | None = None) -> Weighting:
    """Weights of the projected update from the Gram matrix of the two gradients.

    gram: [2, 2], similarity first. rule: which gradient is projected where they conflict: one chosen at
    random (the paper's), both (PCGrad's for two tasks), or always the named one. generator: a CPU generator
    for the choice; it is asked only where the gradients conflict.
    Raises ValueError for an unknown rule.
    """
    if rule not in PROJECTION_RULES:
        raise ValueError(f"The projection rule is one of {', '.join(PROJECTION_RULES)}, not {rule!r}.")
    aa, ab, bb = gram[0, 0].item(), gram[0, 1].item(), gram[1, 1].item()
    if ab >= 0 or aa == 0 or bb == 0:
        return Weighting(1.0, 1.0, _cosine(aa, ab, bb), "none")
    if rule == "random":
        rule = "similarity" if torch.rand((), generator=generator) < 0.5 else "regularity"
    return Weighting(
        similarity=1.0 - ab / aa if rule in ("regularity", "both") else 1.0,
        regularity=1.0 - ab / bb if rule in ("similarity", "both") else 1.0,
        cosine=_cosine(aa, ab, bb),
        projected=rule,
    )


def combine_(similarity: Sequence[Tensor], regularity: Sequence[Tensor], weights: Weighting) -> Sequence[Tensor]:
    """Writes ``w_a · a + w_b · b`` over the tensors of ``a`` and returns them."""
    if weights.similarity != 1.0:
        torch._foreach_mul_(similarity, weights.similarity)
    torch._foreach_add_(similarity, regularity, alpha=weights.regularity)
    return similarity


def _cosine(aa: float, ab: float, bb: float) -> float:
    norm = (aa * bb) ** 0.5
    return max(-1.0, min(1.0, ab / norm)) if norm > 0 else 0.0


def _flat_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as vectors, in the order of the memory where they share it (no copy), else of the indices."""
    if a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a):
        flat = (a.numel(),), (1,)
        return a.as_strided(*flat), b.as_strided(*flat)
    return a.reshape(-1), b.reshape(-1)

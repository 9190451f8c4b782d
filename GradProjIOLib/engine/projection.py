"""Gradient projection (the heart of the method).

Instance optimization follows several gradients with respect to the same parameters: ``a``, of the image similarity,
and ``b``, of the regularity (already multiplied by its weight λ), and perhaps those of further objectives. Where two of
them conflict, ⟨a, b⟩ < 0, one is replaced by its part normal to the other (PCGrad: Yu et al., "Gradient surgery for
multi-task learning", NeurIPS 2020, algorithm 1; used for instance optimization by Zhang, Zhao and Tao, Learn2Reg 2024,
section 2.4):

    a ← a − (⟨a, b⟩ / ‖b‖²) b        or        b ← b − (⟨a, b⟩ / ‖a‖²) a

The update is the sum of all gradients after that. It is a weighted sum of the gradients as they were, and the weights
depend on nothing but the matrix of their inner products (the Gram matrix). So the gradients themselves, millions of
numbers long, are read once for the matrix and once for the sum, however many objectives there are.

The paper's eq. (3) prints ‖a‖² as the denominator while it projects a; the result would not be normal to b. The
denominator above is that of the algorithm that the paper cites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighting:
    """The update as the sum of ``weights[i]`` times gradient i.

    cosine: cosine of the angle between the first two gradients, 0 where one of them is zero. conflicts: the pairs
    (i, j), i < j, of gradients with a negative inner product. projected: the gradients that were projected.
    """

    weights: tuple[float, ...]
    cosine: float
    conflicts: tuple[tuple[int, int], ...]
    projected: tuple[int, ...]


def gram_matrix(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products of n gradients, each given as one tensor per parameter: [n, n], float64, on the CPU."""
    pairs = [(i, j) for i in range(len(gradients)) for j in range(i, len(gradients))]
    products = [torch.stack([_dot(parts[i], parts[j]) for i, j in pairs]) for parts in zip(*gradients, strict=True)]
    sums = torch.stack(products).cpu().double().sum(dim=0)
    gram = torch.empty(len(gradients), len(gradients), dtype=torch.float64)
    for (i, j), value in zip(pairs, sums, strict=True):
        gram[i, j] = gram[j, i] = value
    return gram


def weighting(gram: Tensor, rule: str = "random", generator: torch.Generator | None = None) -> Weighting:
    """Weights of the projected update from the Gram matrix [n, n] of the gradients, the similarity's first.

    rule: which gradient is projected where two conflict. "both": each of the two onto the normal space of the other
    (PCGrad). "random": one of the two, chosen at random (the paper). "similarity": always the first. "regularity":
    never the first. generator: a CPU generator for the choices; it is asked only where gradients conflict.
    """
    inner = gram.tolist()
    count = len(inner)
    conflicts = tuple((i, j) for i, j in combinations(range(count), 2) if inner[i][j] < 0)
    kept = _kept(conflicts, count, rule, generator)
    total, projected = [0.0] * count, []
    for i in range(count):
        # The projected gradient i, as weights of the gradients as they were.
        weights = [float(j == i) for j in range(count)]
        for j in _order(count, generator) if conflicts else ():
            along = sum(weight * product for weight, product in zip(weights, inner[j], strict=True) if weight)
            if j != i and along < 0 < inner[j][j] and (i, j) not in kept:
                weights[j] -= along / inner[j][j]
                projected.append(i)
        total = [a + b for a, b in zip(total, weights, strict=True)]
    return Weighting(tuple(total), _cosine(inner), conflicts, tuple(dict.fromkeys(projected)))


def combine_(gradients: Sequence[list[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """Write the weighted sum of the gradients over the tensors of the first and return them."""
    first, *others = gradients
    if weights[0] != 1.0:
        torch._foreach_mul_(first, weights[0])
    for other, weight in zip(others, weights[1:], strict=True):
        torch._foreach_add_(first, other, alpha=weight)
    return first


def _kept(
    conflicts: Sequence[tuple[int, int]], count: int, rule: str, generator: torch.Generator | None
) -> set[tuple[int, int]]:
    """The pairs (i, j) of which gradient i stays as it is where it conflicts with j."""
    if rule == "random":
        return {(j, i) if torch.rand((), generator=generator) < 0.5 else (i, j) for i, j in conflicts}
    keeps = {"both": set(), "similarity": set(range(1, count)), "regularity": {0}}[rule]
    return {(i, j) for i in keeps for j in range(count)}


def _order(count: int, generator: torch.Generator | None) -> list[int]:
    """The order in which a gradient meets the others: random, as in PCGrad, where that makes a difference."""
    return [0, 1] if count == 2 else torch.randperm(count, generator=generator).tolist()


def _cosine(inner: Sequence[Sequence[float]]) -> float:
    norm = (inner[0][0] * inner[1][1]) ** 0.5
    return max(-1.0, min(1.0, inner[0][1] / norm)) if norm > 0 else 0.0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, read in the order of the memory where both share it (no copy), else of the indices."""
    if a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a):
        flat = (a.numel(),), (1,)
        return torch.dot(a.as_strided(*flat), b.as_strided(*flat))
    return torch.dot(a.reshape(-1), b.reshape(-1))

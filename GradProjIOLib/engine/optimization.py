"""Instance optimisation: the network's parameters refined for one pair, one step at a time.

The method of Zhang, Zhao and Tao (Learn2Reg 2024): AMSGrad on all parameters, for ``vanilla`` on the weighted
sum of the two losses, for ``projected`` on the projected sum of their gradients.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.projection import ProjectionRule, Weighting, combine_, gram_matrix, weighting
from GradProjIOLib.settings import METHODS, PROJECTION_RULES

Method = Literal["projected", "vanilla", "direct"]

REGULARITY_WEIGHT = 1.5
WEIGHT_DECAY = 1e-3


@dataclass(frozen=True)
class Step:
    """What one step saw and did.

    Losses are those before the update; ``regularity`` is without its weight. ``cosine`` is that of the angle
    between the two gradients, ``projected`` which of them was projected ("none", "similarity", "regularity",
    "both"); vanilla steps know neither: None. ``seconds`` is the time the step took.
    """

    index: int
    similarity: float
    regularity: float
    cosine: float | None
    projected: str | None
    seconds: float


class InstanceOptimizer:
    """Iterates over the steps of an instance optimisation; leaving the loop ends it where it is.

    Use it as a context manager: the network's parameters are restored at the end, so read the
    deformation before.

        with InstanceOptimizer(objective, learning_rate=2e-5, steps=50) as optimizer:
            for step in optimizer:
                print(step)
            displacements = objective.displacements()

    A loop that was left goes on where it stopped when it is entered again, and in another process after
    ``restore(state())``.

    method "direct" takes no step, whatever ``steps`` says. The same seed gives the same steps, bit for bit on a
    CPU with the same number of threads. Raises ValueError for settings that make no sense and
    FloatingPointError when a loss is no longer finite.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        learning_rate: float,
        steps: int,
        method: Method = "projected",
        regularity_weight: float = REGULARITY_WEIGHT,
        projection: ProjectionRule = "random",
        seed: int = 0,
    ):
        if method not in METHODS:
            raise ValueError(f"The method is one of {', '.join(METHODS)}, not {method!r}.")
        if projection not in PROJECTION_RULES:
            raise ValueError(f"The projection rule is one of {', '.join(PROJECTION_RULES)}, not {projection!r}.")
        if steps < 0 or learning_rate <= 0 or regularity_weight < 0:
            raise ValueError("Steps and the regularity weight cannot be negative, the learning rate must be positive.")
        self.objective = objective
        self.method = method
        self.steps = 0 if method == "direct" else steps
        self.learning_rate = learning_rate
        self.regularity_weight = regularity_weight
        self.projection = projection
        self.parameters = [p for p in objective.network.parameters() if p.requires_grad]
        self.choice = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(self.parameters[0].device).manual_seed(seed)
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.adam = torch.optim.Adam(
            self.parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY, amsgrad=True, fused=fused
        )
        self.taken = 0
        self.saved: list[Tensor] | None = None

    def __enter__(self) -> InstanceOptimizer:
        if self.steps:
            self.saved = [p.detach().to("cpu", copy=True) for p in self.parameters]
        return self

    def __exit__(self, *exception: object) -> None:
        if self.saved is not None:
            with torch.no_grad():
                for parameter, saved in zip(self.parameters, self.saved, strict=True):
                    parameter.copy_(saved)
        self.saved = None

    def __iter__(self) -> Iterator[Step]:
        while self.taken < self.steps:
            step = self._step(self.taken)
            self.taken += 1
            yield step

    def state(self) -> dict[str, Any]:
        """All that the coming steps depend on, in types that ``torch.load(weights_only=True)`` accepts."""
        return {
            "taken": self.taken,
            "parameters": [p.detach() for p in self.parameters],
            "adam": self.adam.state_dict(),
            "choice": self.choice.get_state(),
            "noise": self.noise.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``; call it inside the context, which brings the network's parameters back."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.adam.load_state_dict(state["adam"])
        self.choice.set_state(state["choice"])
        self.noise.set_state(state["noise"])
        self.taken = state["taken"]

    def _step(self, index: int) -> Step:
        start = time.perf_counter()
        objective = self.objective
        fields = objective.fields()
        jitter = objective.regularity.jitter(self.noise)
        losses, of_similarity, of_regularity = objective.gradients(fields, jitter)
        if self.method == "projected":
            torch._foreach_mul_(of_regularity, self.regularity_weight)
            gradients, weights = self._projected_gradient(fields, of_similarity, of_regularity)
        else:
            torch._foreach_add_(of_similarity, of_regularity, alpha=self.regularity_weight)
            gradients, weights = self._gradient(fields, of_similarity), None
        # Read only now: a graphics card has its work for the whole step by then.
        similarity, regularity = losses.similarity.item(), losses.regularity.item()
        if not (abs(similarity) + abs(regularity) < float("inf")):
            raise FloatingPointError(f"The losses are not finite in step {index}; a smaller learning rate may help.")
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return Step(
            index,
            similarity,
            regularity,
            weights.cosine if weights else None,
            weights.projected if weights else None,
            time.perf_counter() - start,
        )

    def _projected_gradient(
        self, fields: list[Tensor], of_similarity: list[Tensor], of_regularity: list[Tensor]
    ) -> tuple[list[Tensor], Weighting]:
        similarity = self._gradient(fields, of_similarity, retain_graph=True)
        regularity = self._gradient(fields, of_regularity)
        weights = weighting(gram_matrix(similarity, regularity), self.projection, self.choice)
        return combine_(similarity, regularity, weights), weights

    def _gradient(self, fields: list[Tensor], of_fields: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
        """From the gradient with respect to the fields, which it clears, that with respect to the parameters.

        Each part is in the memory layout of its parameter: fused Adam goes by the memory.
        """
        found = torch.autograd.grad(fields, self.parameters, of_fields, retain_graph=retain_graph)
        of_fields.clear()
        return [
            part if part.stride() == parameter.stride() else torch.empty_like(parameter).copy_(part)
            for part, parameter in zip(found, self.parameters, strict=True)
        ]

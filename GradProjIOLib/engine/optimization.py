"""Instance optimization: the parameters of a deformation model fitted to one pair, one step at a time.

The method of Zhang, Zhao and Tao (Learn2Reg 2024): AMSGrad on all parameters, for ``vanilla`` on the weighted
sum of the losses, for ``projected`` on the projected sum of their gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from GradProjIOLib.engine.folding import CORNERS
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.projection import combine_, gram_matrix, weighting
from GradProjIOLib.settings import METHODS, PROJECTION_RULES

WEIGHT_DECAY = 1e-3
EPSILON = 1e-8
"""Added to the size of a gradient before it divides the step; PyTorch's default."""


@dataclass(frozen=True)
class Step:
    """What one step saw and did.

    Losses are those before the update, without weights. ``cosine`` is that of the angle between the gradients of
    similarity and regularity, ``projected`` which of them was projected ("none", "similarity", "regularity",
    "both"); vanilla steps know neither: None. ``seconds`` is the time the step took. ``stage`` says what was optimized
    ("network" or "refinement") and ``level`` on which of its lattices, coarsest first. ``remaining_seconds`` estimates
    the time of all steps to come. A caller that runs several optimizations in a row sets these three. ``landmarks`` and
    ``labels`` are their losses where they guide the registration, and ``conflicts`` are the pairs of objectives whose
    gradients conflict, such as "similarity–landmarks".
    """

    index: int
    similarity: float
    regularity: float
    folding: float
    cosine: float | None
    projected: str | None
    seconds: float
    stage: str = "network"
    level: int = 0
    remaining_seconds: float = 0.0
    landmarks: float | None = None
    labels: float | None = None
    conflicts: tuple[str, ...] = ()


class InstanceOptimizer:
    """Iterates over the steps of an instance optimization; leaving the loop ends it where it is.

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
        method: str = "projected",
        weight_decay: float = WEIGHT_DECAY,
        epsilon: float = EPSILON,
        projection: str = "random",
        seed: int = 0,
    ):
        if method not in METHODS:
            raise ValueError(f"The method is one of {', '.join(METHODS)}, not {method!r}.")
        if projection not in PROJECTION_RULES:
            raise ValueError(f"The projection rule is one of {', '.join(PROJECTION_RULES)}, not {projection!r}.")
        if steps < 0 or learning_rate <= 0:
            raise ValueError("Steps cannot be negative, and the learning rate must be positive.")
        self.objective = objective
        self.method = method
        self.steps = 0 if method == "direct" else steps
        self.projection = projection
        self.parameters: list[Tensor] = [p for p in objective.model.parameters() if p.requires_grad]
        self.choice = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(self.parameters[0].device).manual_seed(seed)
        self.adam = torch.optim.Adam(
            self.parameters, learning_rate, eps=epsilon, weight_decay=weight_decay, amsgrad=True,
            fused=self.parameters[0].device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.taken = 0
        self.saved: list[Tensor] | None = None

    def __enter__(self) -> InstanceOptimizer:
        if self.steps:
            self.saved = _copied(self.parameters)
        return self

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        if self.saved is not None:
            torch._foreach_copy_(self.parameters, self.saved)
        self.saved = None

    def __iter__(self) -> Iterator[Step]:
        while self.taken < self.steps:
            step = self._step(self.taken)
            self.taken += 1
            yield step

    def state(self) -> dict[str, Any]:
        """All that the coming steps depend on, in types that ``torch.load(weights_only=True)`` accepts.

        It is a copy in the memory of the processor, which later steps do not change.
        """
        return {
            "taken": self.taken,
            "parameters": _copied(self.parameters),
            "adam": [
                dict(zip(moments, _copied(moments.values()), strict=True)) for moments in self.adam.state.values()
            ],
            "choice": self.choice.get_state(),
            "noise": self.noise.get_state(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``; call it inside the context, which brings the network's parameters back."""
        torch._foreach_copy_(self.parameters, state["parameters"])
        # Copies in the layout of the parameters: the steps to come change them in place.
        moments = [
            {
                name: value.clone() if name == "step" else torch.empty_like(parameter).copy_(value)
                for name, value in kept.items()
            }
            for parameter, kept in zip(self.parameters, state["adam"], strict=False)
        ]
        self.adam.load_state_dict(self.adam.state_dict() | {"state": dict(enumerate(moments))})
        self.choice.set_state(state["choice"])
        self.noise.set_state(state["noise"])
        self.taken = state["taken"]

    def _step(self, index: int) -> Step:
        start = time.perf_counter()
        fields = self.objective.fields()
        jitter = self.objective.regularity.jitter(self.noise)
        losses, of_fields = self.objective.gradients(fields, jitter, corner=index % CORNERS)
        if self.method == "projected":
            gradients, projection = self._projected_gradient(fields, of_fields)
        else:
            combine_(of_fields, [1.0] * len(of_fields))
            gradients, projection = self._gradient(fields, of_fields[0]), {"cosine": None, "projected": None}
        # Read only now: a graphics card has its work for the whole step by then.
        values: dict[str, Any] = {name: loss.item() for name, loss in losses.items()}
        if not all(math.isfinite(value) for value in values.values()):
            raise FloatingPointError(f"The losses are not finite in step {index}; a smaller learning rate may help.")
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.adam.step()
        self.adam.zero_grad()
        return Step(index, **values, **projection, seconds=time.perf_counter() - start)

    def _names(self, projected: Sequence[int]) -> str:
        """Which objectives were projected, in a word."""
        if len(projected) == len(self.objective.names) == 2:
            return "both"
        return ", ".join(self.objective.names[i] for i in projected) or "none"

    def _projected_gradient(
        self, fields: list[Tensor], of_fields: list[list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """The projected gradient with respect to the parameters, and what ``Step`` says of the projection."""
        *rest, last = of_fields
        gradients = [self._gradient(fields, part, retain_graph=True) for part in rest]
        gradients.append(self._gradient(fields, last))
        found = weighting(gram_matrix(gradients), self.projection, self.choice)
        conflicts = tuple("–".join(self.objective.names[i] for i in pair) for pair in found.conflicts)
        projection = {"cosine": found.cosine, "projected": self._names(found.projected), "conflicts": conflicts}
        return combine_(gradients, found.weights), projection

    def _gradient(self, fields: list[Tensor], of_fields: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
        """The gradient with respect to the parameters, from that with respect to the fields.

        The list of the latter is emptied to free its memory.

        Each part is in the memory layout of its parameter: fused Adam goes by the memory.
        """
        found = torch.autograd.grad(fields, self.parameters, of_fields, retain_graph=retain_graph)
        of_fields.clear()
        return [
            part if part.stride() == parameter.stride() else torch.empty_like(parameter).copy_(part)
            for part, parameter in zip(found, self.parameters, strict=True)
        ]


def _copied(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies in the memory of the processor."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]

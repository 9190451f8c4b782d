"""Adam with AMSGrad (Reddi et al., "On the convergence of Adam and beyond", ICLR 2018), by torch's own function.

It is what ``torch.optim.Adam(amsgrad=True)`` computes. That class loads torch's compiler when it is made, which takes
two seconds and more of each process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam


class AMSGrad:
    """Steps of some parameters. ``state`` has, for each of them, what the coming steps depend on."""

    def __init__(self, parameters: Sequence[Tensor], learning_rate: float, weight_decay: float, epsilon: float):
        self.parameters = list(parameters)
        self.fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.learning_rate, self.weight_decay, self.epsilon = learning_rate, weight_decay, epsilon
        moments = ("mean", "mean_square", "largest_mean_square")
        self.state = {name: [torch.zeros_like(one) for one in self.parameters] for name in moments}
        count_on = self.parameters[0].device if self.fused else torch.device("cpu")
        self.state["steps"] = [torch.zeros((), device=count_on) for _ in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move the parameters by their gradients, which have the same layout in memory."""
        adam(
            self.parameters,
            list(gradients),
            self.state["mean"],
            self.state["mean_square"],
            self.state["largest_mean_square"],
            self.state["steps"],
            fused=self.fused,
            amsgrad=True,
            beta1=0.9,
            beta2=0.999,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            maximize=False,
        )

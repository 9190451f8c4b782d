"""The first stage: a network's deformation, and instance optimization of the network's parameters (the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from GradProjIOLib.engine.memory import (
    is_out_of_memory,
    modes_to_try,
    recycled_memory,
    too_little_memory,
)
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import registry
from GradProjIOLib.registration.fields import Fields
from GradProjIOLib.registration.preprocessing import ImagePair
from GradProjIOLib.settings import Settings


def network_steps(settings: Settings) -> int:
    """How many steps are taken on the network's parameters."""
    return 0 if settings.model == "none" or settings.method == "direct" else settings.steps


class NetworkStage:
    """The network of a registration, on its lattice over the fixed image.

    ``settings`` are those given, with the learning rate and the lattice that were chosen. ``mode`` is the memory mode
    in which the optimization fitted. Raises InputError where weights are missing or memory is too short.
    """

    def __init__(self, settings: Settings, fixed: Volume, device: torch.device, warnings: list[str]):
        self.loaded = registry.load(settings.model, settings.weights, device)
        self.device, self.warnings = device, warnings
        model = self.loaded.model
        self.learning_rate = settings.learning_rate or model.learning_rate
        self.lattice = settings.lattice or model.lattice_for(fixed.shape, fixed.spacing.tolist())
        self.settings = replace(settings, learning_rate=self.learning_rate, lattice=self.lattice)
        self.modes = modes_to_try(settings.memory, settings.model, self.loaded.network, self.lattice, device)
        self.mode = self.modes[0]

    @property
    def cost(self) -> float:
        """What a step costs, as a multiple of a step of the refinement on one sample."""
        return self.loaded.network.memory_share * COST_OF_A_SAMPLE * math.prod(self.lattice)

    def run(self, images: ImagePair, optimize: Callable[..., Fields]) -> Fields:
        """The fields after the optimization, in the first memory mode that fits.

        optimize: as for ``Refinement.run``; it is called in every mode that is tried.
        """
        network, lattice = self.loaded.network, self.lattice
        too_little = partial(too_little_memory, self.settings.model, network, lattice, self.modes[-1])
        try:
            images.on_lattice(lattice)
        except MemoryError as error:
            raise too_little(torch.device("cpu")) from error
        for mode in self.modes:
            self.mode = mode
            network.checkpointed = mode == "lean"
            try:
                with recycled_memory(self.device):
                    return self._optimize(images, optimize)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            torch.cuda.empty_cache()
            if mode != self.modes[-1]:
                self.warnings.append(
                    f"There was too little memory on {self.device}, so the optimization began anew in lean mode."
                )
        raise too_little(self.device)

    def _optimize(self, images: ImagePair, optimize: Callable[..., Fields]) -> Fields:
        weight = self.settings.regularity_weight
        objective = images.objective(self.loaded.network, self.lattice, self.device, regularity_weight=weight)
        return optimize(
            objective,
            lambda: Fields.over(images.fixed, objective.displacements()),
            learning_rate=self.learning_rate,
        )


COST_OF_A_SAMPLE = 8.0
"""A network's step on one sample, as a multiple of a step of the refinement.

Measured for compact, whose share is a half: 1.2 s against 0.29 s on 860,000 samples. The published networks cost more;
the time that is left is overestimated for them until the refinement begins.
"""

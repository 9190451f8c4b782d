"""Refinement, the second stage: instance optimization of the displacement fields themselves, coarse to fine.

Losses, steps and gradient projection are those of the first stage; only the parameters are others. A network can give
no deformation that its weights cannot express, and every step of it costs a pass through the network. Here the
parameters are the displacements of both directions on a lattice over the fixed image, smoothed (see
``models.displacements``), so a step costs the losses alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from GradProjIOLib.engine.memory import available_memory, recycled_memory
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer, Step
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models.displacements import Displacements
from GradProjIOLib.registration.fields import Fields
from GradProjIOLib.registration.preprocessing import ImagePair
from GradProjIOLib.settings import Settings

SAMPLES = 860_000
"""About how many samples the finest lattice has where no resolution is asked for: 2 mm for a brain."""
FEWEST_SAMPLES = 8
"""An axis is not coarsened below so many samples."""
COARSER_LEVELS = 2
"""How many levels, each with twice the spacing of the next, come before the finest."""


@dataclass(frozen=True)
class Tuning:
    """How the fields of one kind of similarity are optimized.

    regularity_weight: λ, before the user's factor. smoothing: see ``Displacements``. learning_rate: how far a step
    moves a sample at most, in samples of the level.
    """

    regularity_weight: float
    smoothing: float
    learning_rate: float


TUNINGS = {"lncc": Tuning(1.5, 1.5, 0.2), "lncc2": Tuning(1.5, 1.5, 0.2), "mind": Tuning(20.0, 6.0, 0.1)}
FOLDING_WEIGHT = 50.0
LEAST_SLOPE = 2e-2
"""A sample whose loss changes by less than that per sample of displacement moves by less than a step.

The optimizer divides gradients by their size. Where two images are the same, or show nothing, what is left is rounding,
and without this bound the fields would follow it.
"""
BYTES_PER_SAMPLE = 700
"""What the process was seen to take at most, in single precision, for both directions (Docs/benchmarks.md)."""


@dataclass(frozen=True)
class Level:
    """One lattice (K, J, I) of the refinement and how many steps are taken on it."""

    lattice: tuple[int, int, int]
    steps: int


def plan_levels(fixed: Volume, steps: int, resolution: float | None) -> list[Level]:
    """The levels of a refinement, coarse to fine.

    fixed: its voxels are never oversampled. steps: on every level up to the usual spacing, at which the lattice has
    about SAMPLES samples; a finer level, whose steps cost more, takes a quarter of them. resolution: spacing of the
    finest level in mm; None for the usual one.
    """
    if steps == 0:
        return []
    extent = [size * length for size, length in zip(fixed.shape, reversed(fixed.spacing), strict=True)]
    usual = max(min(fixed.spacing), (math.prod(extent) / SAMPLES) ** (1 / 3))
    spacings = [usual * 2**power for power in range(COARSER_LEVELS, -1, -1)]
    if resolution is not None:
        finest = max(resolution, min(fixed.spacing))
        spacings = [spacing for spacing in spacings if spacing > 1.05 * finest] + [finest]
    levels: dict[tuple[int, int, int], Level] = {}
    for spacing in spacings:
        lattice = tuple(
            min(size, max(FEWEST_SAMPLES, round(length / spacing)))
            for size, length in zip(fixed.shape, extent, strict=True)
        )
        finer = spacing < usual / 1.05
        levels[lattice] = Level(lattice, -(-steps // 4) if finer else steps)
    return list(levels.values())


def count_steps(fixed: Volume, settings: Settings) -> int:
    """How many steps a registration takes in both stages."""
    if settings.method == "direct":
        return 0
    network = 0 if settings.model == "none" else settings.steps
    return network + sum(level.steps for level in plan_levels(fixed, settings.refine_steps, settings.resolution))


def check_memory(levels: Sequence[Level], device: torch.device) -> None:
    """Raise InputError where the largest lattice does not fit into the device's memory."""
    free = available_memory(device)
    samples = max((math.prod(level.lattice) for level in levels), default=0)
    if free is not None and samples * BYTES_PER_SAMPLE > free:
        needed = samples * BYTES_PER_SAMPLE
        raise InputError(
            f"There is not enough memory on {device}: the refinement needs about {needed / 2**30:.1f} GB at its finest "
            f"resolution and {free / 2**30:.1f} GB are free; choose a coarser resolution or another device."
        )


class Refinement:
    """The refinement of one pair, level after level."""

    def __init__(self, images: ImagePair, settings: Settings, device: torch.device):
        self.images, self.settings, self.device = images, settings, device
        self.tuning = TUNINGS[settings.similarity]

    def objective(self, lattice: tuple[int, int, int], start: Fields | None) -> tuple[Objective, np.ndarray]:
        """The losses on a lattice of fields that begin as ``start`` (None: zero), and the lattice's affine."""
        drawn = self.images.on_lattice(lattice, smoothed=True).to(self.device)
        displacements = torch.zeros(2, 3, *lattice) if start is None else start.to_samples(lattice, drawn.affine)
        model = Displacements(displacements.to(self.device), self.tuning.smoothing)
        objective = drawn.objective(
            model,
            self.settings,
            regularity_weight=self.tuning.regularity_weight * self.settings.regularity_weight / 1.5,
            folding_weight=FOLDING_WEIGHT,
        )
        return objective, drawn.affine

    def similarity(self, lattice: tuple[int, int, int], start: Fields | None) -> float:
        """The similarity loss of fields on a lattice."""
        objective, _ = self.objective(lattice, start)
        with torch.no_grad():
            return objective.similarity_of(objective.fields()).item()

    def run(self, level: Level, start: Fields | None, on_step: Callable[[Step], bool]) -> Fields:
        """Optimize on one level. on_step: returns whether to go on."""
        objective, affine = self.objective(level.lattice, start)
        size = BYTES_PER_SAMPLE * math.prod(level.lattice)
        with (
            recycled_memory(self.device, size),
            InstanceOptimizer(
                objective,
                learning_rate=self.tuning.learning_rate,
                weight_decay=0.0,
                epsilon=LEAST_SLOPE / math.prod(level.lattice),
                steps=level.steps,
                method=self.settings.method,
                projection=self.settings.projection,
                seed=self.settings.seed,
            ) as optimizer,
        ):
            for step in optimizer:
                if not on_step(step):
                    break
            return Fields.of(objective, affine)

"""Refinement, the second stage: instance optimization of the displacement fields themselves, coarse to fine.

Losses, steps and gradient projection are those of the first stage; only the parameters are others. A network can give
no deformation that its weights cannot express, and every step of it costs a pass through the network. Here the
parameters are the displacements of both directions on a lattice over the fixed image, smoothed (see
``models.displacements``), so a step costs the losses alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from GradProjIOLib.engine.memory import available_memory, recycled_memory
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models.displacements import Displacements
from GradProjIOLib.registration.fields import Fields
from GradProjIOLib.registration.preprocessing import ImagePair
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial import maps

MANY_SAMPLES = 1_000_000
"""Levels with more samples take fewer steps, as each costs more."""
SHARE_OF_STEPS = 0.6
"""Levels with more than MANY_SAMPLES samples take this share of the other levels' steps."""
FEWEST_SAMPLES = 8
"""An axis is not coarsened below so many samples."""
SEARCH_SAMPLES = 30
"""Samples along the longest axis on which a translation is searched."""
LEAST_GAIN = 0.95
"""A translation is used only if its loss plus its penalty is below this part of the loss without it."""
SEARCH_PENALTY = 0.02
"""Penalty per sample of a translation's length, as a part of the loss without it."""
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


TUNINGS = {
    "lncc": Tuning(1.5, 1.5, 0.2),
    "lncc2": Tuning(1.5, 1.5, 0.2),
    "mind": Tuning(20.0, 7.0, 0.06),
}
LEAST_SLOPE = 0.03
"""Slope of the loss, per sample of displacement, below which a neighborhood moves by less than a full step.

The optimizer divides gradients by their size. Where the images are equal or empty, only noise is left, and the fields
would otherwise follow it.
"""
SHARED_VARIANCE = 1e-4
"""See ``LNCC``; of intensities in [0, 1], so it is that of weak noise, or of 20 HU in CT."""
LEAST_SMOOTHING = 2.5
FEW_SAMPLES = 64
"""On lattices with more samples along an axis, a smoothing above LEAST_SMOOTHING gets smaller in proportion.

MIND follows speckle in small, noisy images unless the fields are very smooth. On the larger lattices of a brain that
would hide what is there: with the contrast of one brain inverted, Dice is 0.69 with this and 0.65 without.
"""
LNCC_STRIDE = 4
"""How many samples LNCC's windows lie apart."""
MIND_STRIDE = 2
"""The same of MIND's descriptors on lattices with more than FEW_SAMPLES; those of all take 7 GB for a brain."""
FOLDING_WEIGHT = 100.0
BYTES_PER_SAMPLE = 700
"""A process with 6.9 million samples was seen to take 4.0 GB, 0.5 GB of it before; the rest is a margin."""


Levels = dict[tuple[int, int, int], int]
"""How many steps are taken on each lattice (K, J, I) of a refinement, from coarse to fine."""


def plan_levels(fixed: Volume, settings: Settings) -> Levels:
    """The levels of a refinement, coarse to fine, each with half the spacing of the one before.

    fixed: its voxels are never oversampled, and an axis with few of them is not coarsened.
    """
    if settings.refine_steps == 0 or settings.method == "direct":
        return {}
    extent = [size * length for size, length in zip(fixed.shape, reversed(fixed.spacing), strict=True)]
    spacing = settings.resolution or (math.prod(extent) / settings.samples) ** (1 / 3)
    spacing = max(spacing, min(fixed.spacing))
    levels: Levels = {}
    for power in range(COARSER_LEVELS, -1, -1):
        lattice = lattice_for(fixed, spacing * 2**power)
        share = SHARE_OF_STEPS if math.prod(lattice) > MANY_SAMPLES else 1
        levels[lattice] = math.ceil(share * settings.refine_steps)
    return levels


def from_level(levels: Levels, lattice: tuple[int, int, int]) -> Levels:
    """The levels at least as fine as a lattice (K, J, I); the finest where all are coarser."""
    fine = [one for one in levels if math.prod(one) >= math.prod(lattice)] or list(levels)[-1:]
    return {one: levels[one] for one in fine}


def lattice_for(image: Volume, spacing: float) -> tuple[int, int, int]:
    """The lattice (K, J, I) over an image with about that spacing in mm, but no finer than its voxels."""
    k, j, i = (
        min(size, max(FEWEST_SAMPLES, round(size * length / spacing)))
        for size, length in zip(image.shape, reversed(image.spacing), strict=True)
    )
    return k, j, i


def check_memory(levels: Levels, device: torch.device) -> None:
    """Raise InputError where the largest lattice does not fit into the device's memory."""
    free = available_memory(device)
    needed = BYTES_PER_SAMPLE * max(map(math.prod, levels), default=0)
    if needed > free:
        raise InputError(
            f"There is not enough memory on {device}: the refinement needs about {needed / 2**30:.1f} GB at its finest "
            f"resolution and {free / 2**30:.1f} GB are free; choose a coarser resolution or another device."
        )


class Refinement:
    """The refinement of one pair, level after level.

    keeps_detail: if true, fields finer than a level keep their lattice, and the level's change is added to them; else
    they are resampled to the level's lattice.
    """

    def __init__(self, images: ImagePair, device: torch.device, keeps_detail: bool = False):
        self.images, self.settings, self.device = images, images.settings, device
        self.keeps_detail = keeps_detail
        self.tuning = TUNINGS[self.settings.similarity]

    def objective(self, lattice: tuple[int, int, int], start: Fields | None) -> Objective:
        """The losses on a lattice of fields that begin as ``start`` (None: zero)."""
        displacements = torch.zeros(2, 3, *lattice) if start is None else start.on_lattice(lattice)
        few = min(1.0, FEW_SAMPLES / max(lattice))
        smooth = self.tuning.smoothing
        if smooth > LEAST_SMOOTHING:
            smooth = max(LEAST_SMOOTHING, smooth * few)
        stride = LNCC_STRIDE
        if self.settings.similarity == "mind":
            stride = MIND_STRIDE if few < 1 else 1
        model = Displacements(displacements.to(self.device), smooth)
        return self.images.objective(
            model,
            lattice,
            self.device,
            regularity_weight=self.tuning.regularity_weight
            * self.settings.regularity_weight
            / Settings.regularity_weight,
            folding_weight=FOLDING_WEIGHT,
            on_lattice=True,
            shared_variance=SHARED_VARIANCE,
            window_stride=stride,
            outside_counts=self.settings.similarity != "mind",
        )

    def similarity(self, lattice: tuple[int, int, int], start: Fields | None) -> float:
        """The similarity loss of fields on a lattice."""
        objective = self.objective(lattice, start)
        with torch.no_grad():
            return objective.similarity_of(objective.fields()).item()

    def translation(self) -> Fields | None:
        """The translation with which the images match best, to start from; None where none is clearly better than zero.

        Of all similarities only MIND is tried: it has a wide minimum where images of different modalities match. A
        longer translation must be that much better. The search is coarse, and the levels find the rest.
        """
        if self.settings.similarity != "mind":
            return None
        extent = max(n * d for n, d in zip(self.images.fixed.shape, reversed(self.images.fixed.spacing), strict=True))
        lattice = lattice_for(self.images.fixed, extent / SEARCH_SAMPLES)
        objective = self.objective(lattice, None)
        unit = 1 / maps.voxels_per_unit(lattice, self.device)

        @torch.no_grad()
        def loss(shift: np.ndarray) -> float:
            both = torch.tensor(np.stack([shift, -shift]), dtype=torch.float32, device=self.device) * unit
            return objective.similarity_of([both.view(2, 3, 1, 1, 1).expand(2, 3, *lattice)]).item()

        best = np.zeros(3)
        still = lowest = loss(best)
        for reach, step in ((6, 3), (2, 1)):
            center = best
            for offset in itertools.product(range(-reach, reach + 1, step), repeat=3):
                shift = center + np.array(offset)
                value = loss(shift) + SEARCH_PENALTY * still * float(np.linalg.norm(shift))
                if value < lowest:
                    best, lowest = shift, value
        if lowest > LEAST_GAIN * still:
            return None
        both = torch.tensor(np.stack([best, -best]), dtype=torch.float32)
        return Fields.over(self.images.fixed, both.view(2, 3, 1, 1, 1).expand(2, 3, *lattice))

    def run(self, lattice: tuple[int, int, int], start: Fields | None, optimize: Callable[..., Fields]) -> Fields:
        """The fields after the steps on one lattice.

        optimize: takes the objective, a function for the fields reached so far, and options of ``InstanceOptimizer``;
        returns the fields at the end.
        """
        objective = self.objective(lattice, start)

        def reached() -> Fields:
            found = Fields.over(self.images.fixed, objective.displacements())
            if not self.keeps_detail or start is None or math.prod(start.shape) <= math.prod(lattice):
                return found
            begun = start.on_lattice(lattice).to(self.device)
            change = Fields(found.samples - begun, found.affine).on_lattice(start.shape)
            return Fields(start.samples + change.to(start.samples.device), start.affine)

        knots = next(objective.model.parameters())[0, 0].numel()
        with recycled_memory(self.device):
            return optimize(
                objective,
                reached,
                learning_rate=self.tuning.learning_rate,
                weight_decay=0.0,
                epsilon=LEAST_SLOPE / (knots * objective.seen),
            )

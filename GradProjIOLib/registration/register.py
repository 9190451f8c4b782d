"""Registration of one pair: from two volumes to deformations in both directions and a report.

The moving image is first put where the initial transform says, on the network's lattice over the fixed
image's field of view; the network and the instance optimization find the rest. All results are in
RAS mm.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from GradProjIOLib.engine.devices import find_device
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer, Step
from GradProjIOLib.engine.precision import convolutions
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.conversion import Image, as_volume
from GradProjIOLib.geometry.labels import Labels, Wanted
from GradProjIOLib.geometry.lattice import is_rectangular
from GradProjIOLib.geometry.volume import Volume, check_image, image_warnings, in_ras_order, straightened
from GradProjIOLib.registration.automatic import with_modalities, with_model
from GradProjIOLib.registration.fields import Fields
from GradProjIOLib.registration.initial_transform import initial_of
from GradProjIOLib.registration.inverse import inverse_of
from GradProjIOLib.registration.landmarks import Points
from GradProjIOLib.registration.network import NetworkStage, network_steps
from GradProjIOLib.registration.preprocessing import Guides, ImagePair
from GradProjIOLib.registration.progress import Progress, RemainingTime
from GradProjIOLib.registration.refinement import (
    Levels,
    Refinement,
    check_memory,
    from_level,
    lattice_for,
    plan_levels,
)
from GradProjIOLib.registration.report import report_of
from GradProjIOLib.registration.result import OnStep, Reached, Registration
from GradProjIOLib.settings import Settings, preset_values
from GradProjIOLib.spatial.deformation import Deformation, read_initial

if TYPE_CHECKING:
    from GradProjIOLib.registration.going_on import Earlier

USUAL_SPACINGS = 2.0
"""Spacing of a lattice for which nothing else says one, in spacings of the image's finest axis."""


@dataclass(frozen=True, eq=False)
class Running:
    """An optimization under way: its optimizer, and the deformation fixed → moving that it has reached."""

    optimizer: InstanceOptimizer
    forward: Callable[[], Deformation]


OnStart = Callable[[Running], None]


def register(
    fixed: Image,
    moving: Image,
    settings: Settings | None = None,
    *,
    initial_transform: Deformation | np.ndarray | str | os.PathLike | None = None,
    fixed_mask: Image | None = None,
    moving_mask: Image | None = None,
    fixed_points: Points | None = None,
    moving_points: Points | None = None,
    fixed_labels: Labels | Image | None = None,
    moving_labels: Labels | Image | None = None,
    guiding_labels: Wanted | None = None,
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
    progress: bool = False,
    **keywords: Any,
) -> Registration:
    """Register ``moving`` to ``fixed``.

    fixed, moving and the masks: the path of an image file, a Volume, a SimpleITK or nibabel image, or a pair
    (array [k, j, i], affine from the index (i, j, k) to RAS mm); see ``geometry.conversion.as_volume``. Masks (any
    lattice, non-zero inside) say where each image counts in the similarity.
    fixed_points, moving_points: landmarks that should meet: arrays [n, 3] in RAS mm, ``Landmarks``, or files (see
    ``geometry.landmarks``; a .csv file is in RAS mm). Partners have the same names, else the same order.
    fixed_labels, moving_labels: label maps or segmentations (any lattice) with structures that should overlap: those
    with the same name where both have names (Slicer's .seg.nrrd), else with the same value. guiding_labels: names or
    values of those that count, all without, or a mapping from them to weights (1 is usual).
    settings: how to register. Each field of ``Settings`` may also be given as a keyword, as in ``steps=100``; it
    overrides the one in ``settings``. The keyword ``preset`` names one of ``settings.PRESETS``, whose values override
    those in ``settings`` but not other keywords.
    initial_transform: a map from fixed to moving points in RAS mm, 4x4, a Deformation, or the path of an ITK
    transform file. It takes the place of ``settings.align``.
    on_step: is called after each step; returning False ends the optimization there, and the result is what was
    reached.
    on_start: is called before the first step on the network's parameters and on each level of the refinement, with what
    a reader of the steps needs to look at the deformation on the way.
    progress: whether to show a progress bar.

    Raises InputError for input that cannot be registered: see ``volume.check_image``; images that do not overlap;
    settings that are unknown or out of range; a device that is not there; missing or unfit weights; too little
    memory.
    """
    given = {} if settings is None else asdict(settings)
    settings = Settings.from_mapping(given | preset_values(keywords.pop("preset", None)) | keywords)
    target = straightened(as_volume(fixed, "the fixed image"))
    if isinstance(initial_transform, (str, os.PathLike)):
        initial_transform = read_initial(initial_transform, target)
    return Run(
        target,
        straightened(as_volume(moving, "the moving image")),
        settings,
        initial_transform,
        Guides.of(fixed_mask, moving_mask, fixed_points, moving_points, fixed_labels, moving_labels, guiding_labels),
    ).result(on_step, on_start, progress)


class Run:
    """One registration: what it is made from, what it has found so far, and what the report will say of it.

    earlier: the registration that it goes on with, of the same images and initial transform; see ``going_on``.
    """

    def __init__(
        self,
        fixed: Volume,
        moving: Volume,
        settings: Settings,
        initial_transform: Deformation | np.ndarray | None,
        guides: Guides,
        earlier: Earlier | None = None,
    ):
        self.started = time.perf_counter()
        check_image(fixed)
        check_image(moving)
        if not is_rectangular(fixed.affine):
            raise InputError(f"{fixed.name} has skewed axes, which result files cannot have; resample it first.")
        self.fixed, self.moving, self.guides = fixed, moving, guides
        self.warnings = image_warnings(fixed, moving)
        settings = with_modalities(settings, fixed, moving, self.warnings)
        self.initial, self.overlap = initial_of(fixed, moving, settings, initial_transform, guides, self.warnings)
        self.device = find_device(settings.device)
        self.settings = with_model(settings, self.warnings)
        # What is found must not depend on the order in which the voxels are stored.
        self.ordered, self.order = in_ras_order(fixed)
        if settings.lattice is not None:
            self.settings = replace(self.settings, lattice=self.reorder(settings.lattice))
        self.earlier = earlier
        self.lattices, self.levels = self._plan(plan_levels(self.ordered, settings))
        check_memory(self.levels, self.device)
        self.network: NetworkStage | None = None
        if self.settings.model != "none" and (earlier is None or earlier.uses_network):
            self.network = NetworkStage(self.settings, self.ordered, self.device, self.warnings)
            self.settings = self.network.settings
        self.taken_before = 0 if earlier is None or self.network is None else earlier.network_steps
        self.images = ImagePair(self.ordered, moving, self.initial, self.settings, guides)
        self.steps: list[Step] = []
        # What the refinement began with, and the losses: see the report.
        self.start, self.losses = "zero", dict[str, float]()
        self.stopped = "finished"
        self.optimizer_state: dict[str, Any] | None = None

    def _plan(self, levels: Levels) -> tuple[list[tuple[int, int, int]], Levels]:
        """All lattices of the refinement, which the steps refer to, and the levels that are run."""
        if self.earlier is None:
            return list(levels), levels
        lattices = [self.reorder(lattice) for lattice in self.earlier.result.report["levels"]]
        lattices += [lattice for lattice in levels if lattice not in lattices]
        reached = self.earlier.lattice
        return lattices, levels if reached is None else from_level(levels, self.reorder(reached))

    @property
    def costs(self) -> list[float]:
        """What each step costs, as a multiple of a step of the refinement on one sample.

        The steps on the network's parameters are first, with those that were ``taken_before``.
        """
        costs = [] if self.network is None else [self.network.cost] * network_steps(self.settings)
        for lattice, steps in self.levels.items():
            costs += [math.prod(lattice)] * steps
        return costs

    @property
    def total(self) -> int:
        """How many steps are taken in all."""
        return len(self.costs) - self.taken_before

    def reorder(self, lattice: Sequence[int]) -> tuple[int, int, int]:
        """A lattice (K, J, I) along the axes of the fixed image, in the order in which it is registered."""
        k, j, i = (lattice[axis] for axis in self.order)
        return k, j, i

    def as_stored(self, lattice: Sequence[int]) -> tuple[int, int, int]:
        """The opposite: a lattice in the order of the fixed image's axes."""
        k, j, i = (lattice[self.order.index(axis)] for axis in range(3))
        return k, j, i

    def result(self, on_step: OnStep | None, on_start: OnStart | None, progress: bool) -> Registration:
        """Optimize, and say what was found."""
        self.remaining, self.on_step, self.on_start = RemainingTime(self.costs), on_step, on_start
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.bar = Progress(total=self.total, unit="step", disable=not progress, leave=False, bar_format=layout)
        with self.bar, convolutions(self.settings.precision):
            fields = self._refined(self._begun())
        if self.settings.lattice is not None:
            self.settings = replace(self.settings, lattice=self.as_stored(self.settings.lattice))
        forward = self._whole(fields.forward)
        if not np.array_equal(forward.matrix, np.eye(4)):
            forward = forward.fading()
        inverse, error = inverse_of(forward, self.fixed, self.moving)
        reached = Reached(fields, self.optimizer_state, self.guides)
        found = Registration(
            self.settings, self.fixed, self.moving, self.initial, forward, inverse, report={}, reached=reached
        )
        report = report_of(self, found, error)
        found.report.update(report if self.earlier is None else self.earlier.continued(report))
        return found

    def optimize(
        self, objective: Objective, reached: Callable[[], Fields], stage: str, level: int, **options: Any
    ) -> Fields:
        """Take the steps of one optimization and note them; what is ``reached`` at the end.

        level: the place of its lattice among those of the refinement. options: those of ``InstanceOptimizer``.
        """
        settings = self.settings
        with InstanceOptimizer(
            objective, method=settings.method, projection=settings.projection, seed=settings.seed, **options
        ) as optimizer:
            if stage == "network":
                self._begin_network(optimizer)
            if self.on_start is not None:
                self.on_start(Running(optimizer, lambda: self._whole(reached().forward)))
            for step in optimizer:
                step = replace(step, stage=stage, level=level, remaining_seconds=self.remaining.after(step.seconds))
                self.steps.append(step)
                self.bar.show(step)
                if self.on_step is not None and self.on_step(step) is False:
                    self.stopped = "by request"
                    break
            # Only where these were the last steps of all is there something to go on with.
            if stage == "network" and optimizer.taken and (self.stopped != "finished" or not self.levels):
                self.optimizer_state = optimizer.state()
            return reached()

    def _begin_network(self, optimizer: InstanceOptimizer) -> None:
        """Forget what was computed before in another memory mode; go on from the state of an earlier registration."""
        self.steps.clear()
        self.bar.restart()
        state = None if self.earlier is None else self.earlier.result.reached.optimizer
        if state is not None:
            optimizer.restore(state)
        self.remaining.taken = optimizer.taken

    def _begun(self) -> Fields | None:
        """The fields before the refinement; None where it begins without any."""
        if self.network is not None:
            optimize = partial(self.optimize, stage="network", level=0, steps=self.settings.steps)
            return self.network.run(self.images, optimize)
        return None if self.earlier is None else self.earlier.fields(self)

    def _refined(self, fields: Fields | None) -> Fields:
        """The refined fields, on the processor.

        Notes what the refinement began with, the similarity loss without any deformation, and the losses at the end.
        """
        began_with = None if self.earlier is None else self.earlier.start
        refinement = Refinement(self.images, self.device, keeps_detail=began_with is not None)
        if self.levels:
            finest = list(self.levels)[-1]
        else:
            finest = self.settings.lattice or lattice_for(self.ordered, USUAL_SPACINGS * min(self.fixed.spacing))
        undeformed = refinement.similarity(finest, None)
        self.start = began_with or ("zero" if fields is None else "network")
        given = fields if self.levels and began_with is None else None
        if given is not None and refinement.similarity(finest, given) > undeformed:
            fields = None
            self.warnings.append(
                "The network's deformation matches the images worse than none, so the refinement began without it."
            )
        if self.levels and fields is None:
            fields = refinement.translation()
            self.start = "zero" if fields is None else "translation"
        for lattice, steps in self.levels.items():
            if self.stopped == "finished":
                number = self.lattices.index(lattice)
                optimize = partial(self.optimize, stage="refinement", level=number, steps=steps)
                fields = refinement.run(lattice, fields, optimize)
        if fields is None:
            fields = Fields.over(self.ordered, torch.zeros(2, 3, 2, 2, 2))
        objective = refinement.objective(finest, fields)
        with torch.no_grad():
            similarity, regularity = objective.losses(objective.fields())
        self.losses = {
            "similarity_before": undeformed,
            "similarity": similarity.item(),
            "regularity": regularity.item(),
        }
        return Fields(fields.samples.cpu(), fields.affine)

    def _whole(self, forward: Deformation) -> Deformation:
        """The whole map fixed → moving, of displacements about the initial transform."""
        if isinstance(self.initial, Deformation):
            return self.initial if forward.is_linear else self.initial.compose(forward)
        return forward.then_linear(self.initial)

"""Registration of one pair: from two volumes to deformations in both directions and a report.

The moving image is first put where the initial transform says, on the network's lattice over the fixed
image's field of view; the network and the instance optimisation find the rest. All results are in
RAS mm.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from GradProjIOLib import __version__
from GradProjIOLib.engine.devices import describe_device, find_device
from GradProjIOLib.engine.memory import (
    is_out_of_memory,
    modes_to_try,
    needed_memory,
    peak_memory,
    recycled_memory,
    too_little_memory,
)
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.optimization import InstanceOptimizer, Step
from GradProjIOLib.engine.precision import convolutions
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.conversion import Image, as_volume
from GradProjIOLib.geometry.files import checksum
from GradProjIOLib.geometry.lattice import is_rectangular, lattice_affine
from GradProjIOLib.geometry.volume import Volume, check_image, image_warnings
from GradProjIOLib.models import registry
from GradProjIOLib.registration.preprocessing import _Pair
from GradProjIOLib.registration.progress import Progress
from GradProjIOLib.registration.result import Registration, describe_jacobian
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial import alignment
from GradProjIOLib.spatial.deformation import Deformation, read_initial

LEAST_OVERLAP = 0.01
GOOD_OVERLAP = 0.5

OnStep = Callable[[Step], "bool | None"]


@dataclass(frozen=True, eq=False)
class Running:
    """An optimisation under way: its optimizer, and the deformation fixed → moving that it has reached."""

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
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
    progress: bool = False,
    **keywords: Any,
) -> Registration:
    """Register ``moving`` to ``fixed``.

    fixed, moving and the masks: the path of an image file, a Volume, a SimpleITK or nibabel image, or a pair
    (array [k, j, i], affine from the index (i, j, k) to RAS mm); see ``geometry.conversion.as_volume``. Masks (any
    lattice, non-zero inside) say where each image counts in the similarity.
    settings: how to register. Each field of ``Settings`` may also be given as a keyword, as in ``steps=100``; it
    overrides the one in ``settings``.
    initial_transform: a map from fixed to moving points in RAS mm, 4x4, a Deformation, or the path of an ITK
    transform file. It takes the place of ``settings.align``.
    on_step: is called after each step; returning False ends the optimization there, and the result is what was
    reached.
    on_start: is called before the first step, with what a reader of the steps needs to look at the deformation on the
    way, or to go on from a stored state; steps taken before that state are not in the report.
    progress: whether to show a progress bar.

    Raises InputError for input that cannot be registered: see ``volume.check_image``; images that do not overlap;
    settings that are unknown or out of range; a device that is not there; missing or unfit weights; too little
    memory.
    """
    settings = Settings.from_mapping(asdict(settings or Settings()) | keywords)
    if isinstance(initial_transform, (str, os.PathLike)):
        initial_transform = read_initial(initial_transform)
    with Progress(0 if settings.method == "direct" else settings.steps, progress) as bar:

        def started(running: Running) -> None:
            bar.restart()
            if on_start is not None:
                on_start(running)

        def stepped(step: Step) -> bool | None:
            bar.show(step)
            return None if on_step is None else on_step(step)

        return _register(
            as_volume(fixed, "the fixed image"),
            as_volume(moving, "the moving image"),
            settings,
            initial_transform,
            None if fixed_mask is None else as_volume(fixed_mask, "the fixed mask"),
            None if moving_mask is None else as_volume(moving_mask, "the moving mask"),
            stepped,
            started,
        )


def _register(
    fixed: Volume,
    moving: Volume,
    settings: Settings,
    initial_transform: Deformation | np.ndarray | None,
    fixed_mask: Volume | None,
    moving_mask: Volume | None,
    on_step: OnStep,
    on_start: OnStart,
) -> Registration:
    start = time.perf_counter()
    check_image(fixed)
    check_image(moving)
    if not is_rectangular(fixed.affine):
        raise InputError(f"{fixed.name} has skewed axes, which result files cannot have; resample it first.")
    warnings = image_warnings(fixed, moving)
    initial = _initial(fixed, moving, settings, initial_transform, warnings)
    device = find_device(settings.device)
    name = registry.default_model() if settings.model == "auto" else settings.model
    if name != settings.model and name == "compact":
        warnings.append(registry.FALLBACK_NOTE)
    loaded = registry.load(name, settings.weights, device)
    if loaded.weights is None:
        warnings.append(
            f"The model {name} has no trained weights: it starts as the identity and only the "
            "optimisation steps move it."
        )
    settings = replace(
        settings,
        model=name,
        learning_rate=settings.learning_rate or loaded.model.learning_rate,
        lattice=settings.lattice or loaded.model.lattice_for(fixed.shape, fixed.spacing),
    )
    modes = modes_to_try(settings.memory, name, loaded.network, settings.lattice, device)
    try:
        pair = _Pair.on_lattice(fixed, moving, initial, settings, fixed_mask, moving_mask)
    except MemoryError as error:
        raise too_little_memory(name, loaded.network, settings.lattice, modes[-1], torch.device("cpu")) from error

    def started(optimizer: InstanceOptimizer) -> None:
        on_start(Running(optimizer, lambda: _forward(optimizer.objective.displacements(), pair.affine, initial)))

    outcome, memory = _optimize_in_memory(loaded, pair, settings, device, modes, started, on_step, warnings)
    forward, inverse = _deformations(outcome.displacements, pair.affine, fixed, moving, initial, loaded.model)
    report = {
        "version": __version__,
        "settings": asdict(settings) | {"lattice": list(settings.lattice)},
        "model": {"name": name, "weights": loaded.weights, "sha256": loaded.sha256},
        "device": {"name": str(device), "description": describe_device(device)},
        "software": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "system": platform.platform(), "threads": torch.get_num_threads()},
        "seed": settings.seed,
        "memory_mode": memory,
        "inputs": {role: _describe(volume) for role, volume in
                   (("fixed", fixed), ("moving", moving), ("fixed_mask", fixed_mask), ("moving_mask", moving_mask))
                   if volume is not None},
        "initial_transform": None if isinstance(initial, Deformation) else initial.tolist(),
        "steps": [asdict(step) for step in outcome.steps],
        "stopped": outcome.stopped,
        **outcome.losses,
        "jacobian": describe_jacobian(forward, fixed),
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(device),
        "warnings": warnings,
    }  # fmt: skip
    return Registration(settings, fixed, moving, initial, forward, inverse, report)


def _initial(
    fixed: Volume, moving: Volume, settings: Settings, given: Deformation | np.ndarray | None, warnings: list[str]
) -> Deformation | np.ndarray:
    if isinstance(given, Deformation):
        return given
    if given is not None:
        matrix = np.asarray(given, dtype=np.float64)
    else:
        matrix = alignment.align(fixed, moving, settings.align, settings.seed)
    shared = alignment.overlap(fixed, moving, matrix)
    if shared < LEAST_OVERLAP:
        raise InputError(
            f"{fixed.name} and {moving.name} do not overlap in space; align them first "
            "(automatic alignment: centers, rigid or affine)."
        )
    if shared < GOOD_OVERLAP and settings.align == "none":
        warnings.append(
            f"Only {shared:.0%} of {fixed.name} overlaps with {moving.name}; "
            "consider automatic alignment (centers, rigid or affine)."
        )
    return matrix


@dataclass(frozen=True)
class _Outcome:
    """Of an optimisation: its steps, why it ended, the losses at the end, and displacements in samples along (x, y, z):
    [2, 3, K, J, I]."""

    steps: list[Step]
    stopped: str
    losses: dict[str, float]
    displacements: np.ndarray


def _optimize_in_memory(
    loaded: registry.LoadedModel,
    pair: _Pair,
    settings: Settings,
    device: torch.device,
    modes: Sequence[str],
    started: Callable[[InstanceOptimizer], None],
    on_step: OnStep | None,
    warnings: list[str],
) -> tuple[_Outcome, str]:
    """The outcome, and the memory mode in which it fitted: where it does not, a leaner one is tried."""
    for mode in modes:
        loaded.network.checkpointed = mode == "lean"
        try:
            needed = needed_memory(loaded.network, settings.lattice, mode, device)
            with recycled_memory(device, needed), convolutions(settings.precision):
                return _optimize(loaded, pair, settings, device, started, on_step), mode
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if mode != modes[-1]:
            warnings.append(f"There was too little memory on {device}, so the optimisation began anew in lean mode.")
    raise too_little_memory(loaded.name, loaded.network, settings.lattice, modes[-1], device)


def _optimize(
    loaded: registry.LoadedModel,
    pair: _Pair,
    settings: Settings,
    device: torch.device,
    started: Callable[[InstanceOptimizer], None],
    on_step: OnStep | None,
) -> _Outcome:
    images = [image.to(device) for image in (pair.fixed, pair.moving)]
    masks = [None if mask is None else mask.to(device) for mask in (pair.fixed_mask, pair.moving_mask)]
    objective = Objective(loaded.network, *images, settings.similarity, *masks)
    with InstanceOptimizer(
        objective,
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        method=settings.method,
        regularity_weight=settings.regularity_weight,
        projection=settings.projection,
        seed=settings.seed,
    ) as optimizer:
        started(optimizer)
        steps, stopped = _take_steps(optimizer, on_step)
        with torch.no_grad():
            fields = objective.fields()
            losses = objective.losses_of(fields, torch.zeros_like(objective.regularity.points))
            displacements = objective.displacements_of(fields)
        final = {"similarity": losses.similarity.item(), "regularity": losses.regularity.item()}
        return _Outcome(steps, stopped, final, displacements.cpu().numpy())


def _take_steps(optimizer: InstanceOptimizer, on_step: OnStep | None) -> tuple[list[Step], str]:
    """The steps, and why there are no more of them."""
    steps: list[Step] = []
    for step in optimizer:
        steps.append(step)
        if on_step is not None and on_step(step) is False:
            return steps, "by request"
    return steps, "finished"


def _deformations(
    displacements: np.ndarray,
    affine: np.ndarray,
    fixed: Volume,
    moving: Volume,
    initial: Deformation | np.ndarray,
    model: registry.Model,
) -> tuple[Deformation, Deformation]:
    """Displacements in samples of a lattice with ``affine`` → the whole maps fixed → moving and back."""
    onward, back = (Deformation(np.moveaxis(samples, 0, -1) @ affine[:3, :3].T, affine) for samples in displacements)
    same_place = fixed.shape == moving.shape and np.allclose(fixed.affine, moving.affine)
    if not isinstance(initial, Deformation) and np.array_equal(initial, np.eye(4)) and same_place:
        return onward, back
    lattice = model.lattice_for(moving.shape, moving.spacing)
    target = lattice, lattice_affine(moving.affine, moving.shape, lattice)
    if isinstance(initial, Deformation):
        return initial.compose(onward), back.compose(initial.inverse(*target))
    return onward.then_linear(initial), back.preceded_by_linear(np.linalg.inv(initial), *target)


def _forward(displacements: Tensor, affine: np.ndarray, initial: Deformation | np.ndarray) -> Deformation:
    """The forward one of ``_deformations``, without the work for the other."""
    onward = Deformation(np.moveaxis(displacements[0].cpu().numpy(), 0, -1) @ affine[:3, :3].T, affine)
    return initial.compose(onward) if isinstance(initial, Deformation) else onward.then_linear(initial)


def _describe(volume: Volume) -> dict[str, Any]:
    """What identifies an input: its name, the checksum of its file (or voxels) and its lattice."""
    import hashlib

    path = volume.path
    return {
        "path": str(path.resolve()) if path else None,
        "name": volume.name,
        "sha256": checksum(path) if path else hashlib.sha256(np.ascontiguousarray(volume.array)).hexdigest(),
        "shape": list(volume.shape),
        "spacing": volume.spacing.tolist(),
        "affine": volume.affine.tolist(),
    }

"""Registration of one pair: from two volumes to deformations in both directions and a report.

The moving image is first put where the initial transform says, on the network's lattice over the fixed
image's field of view; the network and the instance optimisation find the rest. All results are in
RAS mm.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from GradProjIOLib import __version__, alignment, jacobian, models
from GradProjIOLib.deformation import Deformation
from GradProjIOLib.models.weights import checksum
from GradProjIOLib.objective import Objective, at_half_resolution
from GradProjIOLib.optimization import METHODS, REGULARITY_WEIGHT, InstanceOptimizer, Step
from GradProjIOLib.precision import PRECISIONS, convolutions, has_tf32
from GradProjIOLib.projection import PROJECTION_RULES
from GradProjIOLib.resources import (
    MEMORY_MODES,
    describe_device,
    find_device,
    is_out_of_memory,
    modes_to_try,
    needed_memory,
    peak_memory,
    recycled_memory,
)
from GradProjIOLib.similarity import SIMILARITIES
from GradProjIOLib.stopping import FoldingBudget, Plateau
from GradProjIOLib.volume import (
    InputError,
    Volume,
    atomic_path,
    check_image,
    is_rectangular,
    lattice_affine,
    write_error,
    write_volume,
)

MODALITIES = ("mri", "ct")
STOPS = ("never", "plateau")
CT_RANGE = (-1000.0, 1000.0)
MRI_QUANTILE = 0.99
LEAST_OVERLAP = 0.01
GOOD_OVERLAP = 0.5

OnStep = Callable[[Step], "bool | None"]


@dataclass(frozen=True, eq=False)
class Running:
    """An optimisation under way: its optimizer, and the deformation fixed → moving that it has reached."""

    optimizer: InstanceOptimizer
    forward: Callable[[], Deformation]


OnStart = Callable[[Running], None]


@dataclass(frozen=True)
class Settings:
    """How to register; the defaults are the paper's.

    model: a key of ``models.MODELS``, or "auto" (``models.default_model``). weights: a file to use instead of
    the model's own. lattice: (K, J, I) instead of the model's own. learning_rate: None for the
    model's own. device: "auto", "cpu", "cuda", "cuda:1", "mps". Raises InputError for a value that makes no
    sense.
    """

    model: str = "auto"
    weights: str | None = None
    method: str = "projected"
    steps: int = 50
    similarity: str = "lncc"
    fixed_modality: str = "mri"
    moving_modality: str = "mri"
    align: str = "none"
    regularity_weight: float = REGULARITY_WEIGHT
    learning_rate: float | None = None
    projection: str = "random"
    seed: int = 0
    device: str = "auto"
    lattice: tuple[int, int, int] | None = None
    precision: str = "exact"
    memory: str = "auto"
    coarse_steps: int = 0
    stop: str = "never"
    folding_budget: float | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"The {name.replace('_', ' ')} {getattr(self, name)!r} is not known; "
                    f"choose one of {', '.join(known)}."
                )
        if not isinstance(self.steps, int) or self.steps < 0:
            raise InputError(f"The number of steps is {self.steps!r}; it must be a whole number, 0 or more.")
        if not isinstance(self.coarse_steps, int) or not 0 <= self.coarse_steps <= self.steps:
            raise InputError(f"The number of coarse steps is {self.coarse_steps!r}; it must be from 0 to {self.steps}.")
        if self.folding_budget is not None and not 0 <= self.folding_budget <= 100:
            raise InputError(f"The folding budget is {self.folding_budget}; it must be from 0 to 100 percent.")
        if not 0 <= self.regularity_weight < float("inf"):
            raise InputError(f"The regularity weight is {self.regularity_weight}; it must be 0 or more.")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise InputError(f"The learning rate is {self.learning_rate}; it must be more than 0.")
        if self.lattice is not None:
            object.__setattr__(self, "lattice", tuple(self.lattice))
            if len(self.lattice) != 3 or min(self.lattice) < models.SMALLEST_LATTICE:
                raise InputError(
                    f"The lattice is {self.lattice}; it must have at least {models.SMALLEST_LATTICE} "
                    "samples along each of three axes."
                )


_CHOICES = {
    "model": ("auto", *models.MODELS), "method": METHODS, "similarity": tuple(SIMILARITIES),
    "fixed_modality": MODALITIES, "moving_modality": MODALITIES, "align": alignment.KINDS,
    "projection": PROJECTION_RULES, "precision": PRECISIONS, "memory": MEMORY_MODES, "stop": STOPS,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Registration:
    """What came out: ``forward`` maps points of the fixed image to the moving image, ``inverse`` back.

    The forward deformation warps the moving image onto the fixed one. ``report`` is what report.json holds.
    """

    settings: Settings
    fixed: Volume
    moving: Volume
    initial: Deformation | np.ndarray
    forward: Deformation
    inverse: Deformation
    report: dict[str, Any] = field(repr=False)

    def warped(self, interpolation: str = "linear") -> Volume:
        """The moving image on the fixed image's lattice."""
        return self.forward.warp(self.moving, self.fixed, interpolation)

    def determinant(self) -> Volume:
        """The Jacobian determinant of the whole map at the fixed image's voxels."""
        return Volume(jacobian.determinant_map(self.forward, self.fixed.shape, self.fixed.affine), self.fixed.affine)

    def folding_mask(self) -> Volume:
        """1 where the deformation folds, 0 elsewhere, at the fixed image's voxels (uint8)."""
        mask = jacobian.folding(self.forward, self.fixed.shape, self.fixed.affine).mask
        return Volume(mask.astype(np.uint8), self.fixed.affine)

    def moved_before(self) -> Volume:
        """The moving image on the fixed image's lattice as the initial transform alone places it."""
        initial = self.initial
        if not isinstance(initial, Deformation):
            initial = Deformation.from_linear(initial, (2, 2, 2), _corners(self.fixed))
        return initial.warp(self.moving, self.fixed)

    def write(self, folder: str | os.PathLike, labels: Volume | None = None) -> None:
        """Write all results into ``folder``, whole or not at all; labels are those of the moving image.

        A new folder appears complete; in an existing one each file is replaced when all are written,
        report.json last. Raises WriteError where that fails.
        """
        folder = Path(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as temporary:
                whole = Path(temporary) / "result"
                whole.mkdir()
                self._write_files(whole, labels)
                _move_folder(whole, folder)
        except OSError as error:
            raise write_error(folder, error) from error

    def _write_files(self, folder: Path, labels: Volume | None) -> None:
        warped, determinant, folding = self.warped(), self.determinant(), self.folding_mask()
        write_volume(warped, folder / "warped.nii.gz")
        self.forward.write(folder / "transform.h5")
        self.inverse.write(folder / "inverse_transform.h5")
        write_volume(determinant, folder / "jacobian.nii.gz")
        write_volume(folding, folder / "folding.nii.gz")
        if labels is not None:
            write_volume(self.forward.warp(labels, self.fixed, "nearest"), folder / "warped_labels.nii.gz")
        from GradProjIOLib import figures

        figures.overview(
            folder / "overview.png",
            self.fixed,
            self.moved_before(),
            warped,
            determinant.array,
            folding.array > 0,
            self.report["steps"],
            self.title(),
            self.forward,
        )
        with atomic_path(folder / "report.json") as path:
            path.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def title(self) -> str:
        """One line that says what was registered, how, and with which folding."""
        folded = self.report["jacobian"]["folded_percent"]
        steps = len(self.report["steps"])
        return (
            f"{Path(self.moving.name).name} → {Path(self.fixed.name).name} · {self.report['model']['name']}, "
            f"{self.settings.method}, {steps} steps · {folded:.3g} % folded · {self.report['seconds']:.0f} s"
        )


def register(
    fixed: Volume,
    moving: Volume,
    settings: Settings | None = None,
    *,
    initial_transform: Deformation | np.ndarray | None = None,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    on_step: OnStep | None = None,
    on_start: OnStart | None = None,
) -> Registration:
    """Register ``moving`` to ``fixed``.

    initial_transform: a map from fixed to moving points in RAS mm, 4x4 or a Deformation, that takes the place of
    ``settings.align``. Masks (any lattice, non-zero inside) say where each image counts in the
    similarity. on_step is called after each step; returning False ends the optimisation there, and the
    result is what was reached. on_start is called before the first step, with what a reader of the steps needs to
    look at the deformation on the way, or to go on from a stored state; steps taken before that state are not in
    the report.

    Raises InputError for input that cannot be registered: see ``volume.check_image``; images that do not overlap;
    a device that is not there; missing or unfit weights; too little memory.
    """
    settings = settings or Settings()
    start = time.perf_counter()
    check_image(fixed)
    check_image(moving)
    if not is_rectangular(fixed.affine):
        raise InputError(f"{fixed.name} has skewed axes, which result files cannot have; resample it first.")
    warnings: list[str] = []
    initial = _initial(fixed, moving, settings, initial_transform, warnings)
    device = find_device(settings.device)
    name = models.default_model() if settings.model == "auto" else settings.model
    if name != settings.model and name == "compact":
        warnings.append(models.FALLBACK_NOTE)
    loaded = models.load(name, settings.weights, device)
    if loaded.weights is None:
        warnings.append(
            f"The model {name} has no trained weights: it starts as the identity and only the "
            "optimisation steps move it."
        )
    if settings.precision == "fast" and not has_tf32(device):
        warnings.append(
            f"The precision fast makes no difference on {device}, only on NVIDIA graphics cards since Ampere."
        )
    settings = replace(
        settings,
        model=name,
        learning_rate=settings.learning_rate or loaded.model.learning_rate,
        lattice=settings.lattice or loaded.model.lattice_for(fixed.shape, fixed.spacing),
    )
    try:
        pair = _Pair.on_lattice(fixed, moving, initial, settings, fixed_mask, moving_mask)
    except MemoryError as error:
        raise _too_little_memory(loaded, settings, torch.device("cpu"), "full") from error

    def started(optimizer: InstanceOptimizer) -> None:
        if on_start is not None:
            on_start(Running(optimizer, lambda: _forward(optimizer.objective.displacements(), pair.affine, initial)))

    outcome, memory = _optimize_in_memory(loaded, pair, settings, device, started, on_step, warnings)
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


def describe_jacobian(forward: Deformation, fixed: Volume, region: np.ndarray | None = None) -> dict[str, float]:
    """Figures of the Jacobian determinant and of folding at the fixed image's voxels, or those of a region."""
    determinant = jacobian.determinant_map(forward, fixed.shape, fixed.affine)
    folding = jacobian.folding(forward, fixed.shape, fixed.affine, region)
    return jacobian.summary(determinant, region) | {
        "folded_voxels": folding.folded_voxels,
        "folded_percent": folding.folded_percent,
        "ndv_percent": folding.ndv_percent,
    }


def normalize(volume: Volume, modality: str) -> np.ndarray:
    """Intensities in [0, 1], float32 [k, j, i], as uniGradICON expects them.

    MRI: from the minimum to the 99th percentile. CT: from −1000 to 1000 HU.
    """
    array = volume.array.astype(np.float32)
    low, high = CT_RANGE
    if modality == "mri":
        low = array.min()
        rank = max(int(MRI_QUANTILE * array.size) - 1, 0)
        high = np.partition(array, rank, axis=None)[rank]
        if high <= low:
            # Less than one voxel in a hundred differs from the background.
            high = array.max()
    return (array.clip(low, high) - low) / (high - low)


@dataclass(frozen=True)
class _Pair:
    """Both images on the network's lattice: tensors [1, 1, K, J, I] and the lattice's affine."""

    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor | None
    moving_mask: Tensor | None
    affine: np.ndarray

    @classmethod
    def on_lattice(
        cls,
        fixed: Volume,
        moving: Volume,
        initial: Deformation | np.ndarray,
        settings: Settings,
        fixed_mask: Volume | None,
        moving_mask: Volume | None,
    ) -> _Pair:
        affine = lattice_affine(fixed.affine, fixed.shape, settings.lattice)
        placed = _as_deformation(initial, settings.lattice, affine)
        still = _as_deformation(np.eye(4), settings.lattice, affine)

        def draw(volume: Volume, deformation: Deformation, interpolation: str = "linear") -> Tensor:
            drawn = deformation.warp(volume, (settings.lattice, affine), interpolation, background=0)
            return torch.from_numpy(np.ascontiguousarray(drawn.array, dtype=np.float32))[None, None]

        def draw_mask(mask: Volume | None, deformation: Deformation) -> Tensor | None:
            if mask is None:
                return None
            drawn = draw(replace(mask, array=(mask.array != 0).astype(np.uint8)), deformation, "nearest")
            if not drawn.any():
                raise InputError(f"{mask.name} is empty where the images overlap; choose a mask with voxels there.")
            return drawn

        def draw_image(volume: Volume, modality: str, deformation: Deformation) -> Tensor:
            return draw(replace(volume, array=normalize(volume, modality)), deformation)

        return cls(
            draw_image(fixed, settings.fixed_modality, still),
            draw_image(moving, settings.moving_modality, placed),
            draw_mask(fixed_mask, still),
            draw_mask(moving_mask, placed),
            affine,
        )


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
    loaded: models.LoadedModel,
    pair: _Pair,
    settings: Settings,
    device: torch.device,
    started: Callable[[InstanceOptimizer], None],
    on_step: OnStep | None,
    warnings: list[str],
) -> tuple[_Outcome, str]:
    """The outcome, and the memory mode in which it fitted: where it does not, a leaner one is tried."""
    modes = modes_to_try(settings.memory, loaded.network, settings.lattice, device)
    for mode in modes:
        loaded.network.checkpointed = mode == "lean"
        try:
            needed = needed_memory(loaded.network, settings.lattice, mode, device)
            with recycled_memory(device, needed), convolutions("exact"):
                return _optimize(loaded, pair, settings, device, started, on_step, warnings), mode
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if mode != modes[-1]:
            warnings.append(f"There was too little memory on {device}, so the optimisation began anew in lean mode.")
    raise _too_little_memory(loaded, settings, device, modes[-1])


def _too_little_memory(loaded: models.LoadedModel, settings: Settings, device: torch.device, mode: str) -> InputError:
    needed = needed_memory(loaded.network, settings.lattice, mode, device) / 2**30
    size = " x ".join(map(str, settings.lattice))
    return InputError(
        f"There is not enough memory on {device}: the model {loaded.name} needs about {needed:.1f} GB on a lattice of "
        f"{size}; choose the model compact, a smaller lattice, or another device."
    )


def _optimize(
    loaded: models.LoadedModel,
    pair: _Pair,
    settings: Settings,
    device: torch.device,
    started: Callable[[InstanceOptimizer], None],
    on_step: OnStep | None,
    warnings: list[str],
) -> _Outcome:
    images = [image.to(device) for image in (pair.fixed, pair.moving)]
    masks = [None if mask is None else mask.to(device) for mask in (pair.fixed_mask, pair.moving_mask)]
    objective = Objective(loaded.network, *images, settings.similarity, *masks)
    coarse = None
    if settings.coarse_steps:
        coarse = at_half_resolution(loaded.network, *images, settings.similarity, *masks)
    with InstanceOptimizer(
        objective,
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        method=settings.method,
        regularity_weight=settings.regularity_weight,
        projection=settings.projection,
        seed=settings.seed,
        coarse=coarse,
        coarse_steps=settings.coarse_steps,
        precision=settings.precision,
    ) as optimizer:
        started(optimizer)
        steps, stopped = _take_steps(optimizer, settings, on_step, warnings)
        with torch.no_grad():
            fields = objective.fields()
            losses = objective.losses_of(fields, torch.zeros_like(objective.regularity.points))
            displacements = objective.displacements_of(fields)
        final = {"similarity": losses.similarity.item(), "regularity": losses.regularity.item()}
        return _Outcome(steps, stopped, final, displacements.cpu().numpy())


def _take_steps(
    optimizer: InstanceOptimizer, settings: Settings, on_step: OnStep | None, warnings: list[str]
) -> tuple[list[Step], str]:
    """The steps that count, and why there are no more of them."""
    plateau = Plateau(settings.regularity_weight) if settings.stop == "plateau" else None
    budget = None
    if settings.folding_budget is not None and optimizer.taken < optimizer.steps:
        budget = FoldingBudget(optimizer, settings.folding_budget)
    steps: list[Step] = []
    if budget is not None and budget.exceeded:
        warnings.append(
            f"More than {settings.folding_budget:g} % of the samples were folded before the first step, "
            "so none was taken."
        )
        return steps, "folding budget"
    first = optimizer.taken
    for step in optimizer:
        steps.append(step)
        stopped = ""
        if on_step is not None and on_step(step) is False:
            stopped = "by request"
        elif plateau is not None and step.index >= settings.coarse_steps:
            stopped = "no improvement" if plateau(step.similarity, step.regularity) else ""
        if budget is not None and budget(last=bool(stopped)):
            return steps[: budget.go_back() - first], "folding budget"
        if stopped:
            return steps, stopped
    return steps, "finished"


def _deformations(
    displacements: np.ndarray,
    affine: np.ndarray,
    fixed: Volume,
    moving: Volume,
    initial: Deformation | np.ndarray,
    model: models.Model,
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


def _as_deformation(transform: Deformation | np.ndarray, shape: Sequence[int], affine: np.ndarray) -> Deformation:
    if isinstance(transform, Deformation):
        return transform
    return Deformation.from_linear(transform, tuple(shape), affine)


def _corners(volume: Volume) -> np.ndarray:
    """Affine of a lattice of 2x2x2 samples at the corners of the volume."""
    return volume.affine @ np.diag([*(max(n - 1, 1) for n in reversed(volume.shape)), 1])


def _describe(volume: Volume) -> dict[str, Any]:
    """What identifies an input: its name, the checksum of its file (or voxels) and its lattice."""
    import hashlib

    path = Path(volume.name)
    found = path.is_file()
    return {
        "path": str(path.resolve()) if found else None,
        "name": volume.name,
        "sha256": checksum(path) if found else hashlib.sha256(np.ascontiguousarray(volume.array)).hexdigest(),
        "shape": list(volume.shape),
        "spacing": volume.spacing.tolist(),
        "affine": volume.affine.tolist(),
    }


def _move_folder(source: Path, target: Path) -> None:
    """Make ``source`` the folder ``target``, or replace the files of the same names in it, report.json last."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        if target.exists():
            target.rmdir()
        os.replace(source, target)
        return
    for path in sorted(source.iterdir(), key=lambda path: path.name == "report.json"):
        os.replace(path, target / path.name)

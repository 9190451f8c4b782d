"""What a registration gives: the deformations, what they do to the images, and the files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.geometry.conversion import Image
from GradProjIOLib.geometry.files import json_text, staging_folder, write_error
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.labels import Labels, Wanted
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.fields import Fields
from GradProjIOLib.registration.landmarks import Points
from GradProjIOLib.registration.preprocessing import Guides
from GradProjIOLib.registration.report import describe_image
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation, as_deformation
from GradProjIOLib.spatial.jacobian import Folding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIMIZER_STATE = "optimizer_state.pt"
INITIAL_TRANSFORM = "initial_transform.h5"
RESULT_FILES = (
    "warped.nii.gz",
    "transform.h5",
    "inverse_transform.h5",
    INITIAL_TRANSFORM,
    "jacobian.nii.gz",
    "folding.nii.gz",
    "warped_labels.nii.gz",
    "overview.png",
    "thumbnail.png",
    OPTIMIZER_STATE,
    "report.json",
)
"""What a folder of results may hold.

Labels and pictures are not always there; the initial transform is where it is not linear, and the optimizer's state
where the last steps were taken on a network's parameters.
"""
STAGE_WORDS = {"network": "IO", "refinement": "refinement"}
"""What the steps of a stage are called (IO: instance optimization)."""


OnStep = Callable[[Step], "bool | None"]


@dataclass(frozen=True, eq=False)
class Reached:
    """What a registration goes on from, besides what its ``Registration`` has.

    fields: None where they have to be made from the deformations. optimizer: the state of the ``InstanceOptimizer``
    where the last steps were taken on a network's parameters. guides: what was registered with.
    """

    fields: Fields | None = None
    optimizer: dict[str, Any] | None = None
    guides: Guides = field(default_factory=Guides)


@dataclass(frozen=True, eq=False, repr=False)
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
    report: dict[str, Any]
    reached: Reached

    def __repr__(self) -> str:
        return f"Registration({self.title()})"

    def go_on(
        self,
        steps: int | None = None,
        *,
        fixed_mask: Image | None = None,
        moving_mask: Image | None = None,
        fixed_points: Points | None = None,
        moving_points: Points | None = None,
        fixed_labels: Labels | Image | None = None,
        moving_labels: Labels | Image | None = None,
        guiding_labels: Wanted | None = None,
        on_step: OnStep | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Registration:
        """The same registration with more steps, from where it is; this one stays as it is.

        steps: how many more steps to take in the stage where the registration ended (in a refinement, at each level
        that is run). Default: the network's steps that were left when it was stopped, else the number in the settings.
        ``refine_steps``: steps of refinement after the network's; may be given instead of `steps`, or with it.
        fixed_mask, moving_mask, fixed_points, moving_points, fixed_labels, moving_labels, guiding_labels: as for
        ``register``, in place of the earlier ones, which hold where none are given. settings: those that change; the
        others stay.

        Only the finest level of a refinement is run, unless landmarks, labels, masks or settings change what counts. In
        the report the new steps follow the earlier ones (`continued_after` says how many those were), seconds add up,
        and what was before is still before the first step. Steps on a network's parameters are exactly those that a
        longer registration would have taken, on the same processor with the same number of threads.

        Raises InputError as ``register`` does, and for settings that cannot change on the way.
        """
        from GradProjIOLib.registration.going_on import prepare

        guides = Guides.of(
            fixed_mask, moving_mask, fixed_points, moving_points, fixed_labels, moving_labels, guiding_labels
        )
        return prepare(self, steps, guides, **settings).result(on_step, None, progress)

    def warped(self, interpolation: str = "linear") -> Volume:
        """The moving image on the fixed image's lattice."""
        return self.forward.warp(self.moving, self.fixed, interpolation)

    def determinant(self) -> Volume:
        """The Jacobian determinant of the whole map at the fixed image's voxels."""
        return Volume(self._maps[0].copy(), self.fixed.affine)

    def folding_mask(self) -> Volume:
        """1 where the deformation folds, 0 elsewhere, at the fixed image's voxels (uint8)."""
        return Volume(self._maps[1].mask.astype(np.uint8), self.fixed.affine)

    def describe_jacobian(self) -> dict[str, float]:
        """Figures of both at the fixed image's voxels; see ``describe_jacobian`` below."""
        return describe_jacobian(self.forward, self.fixed, maps=self._maps)

    @cached_property
    def _maps(self) -> tuple[np.ndarray, Folding]:
        """The Jacobian determinant and the folding, which take seconds."""
        return _jacobian_maps(self.forward, self.fixed, None)

    def plot(self) -> Figure:
        """The overview as a matplotlib figure: slices of the images, the Jacobian determinant, the losses.

        The figure does not belong to pyplot, so nothing has to be closed; `figure.savefig("overview.png")` writes it.
        """
        return self._draw(self.warped())

    def _draw(self, warped: Volume) -> Figure:
        from GradProjIOLib.report.overview import draw_overview

        return draw_overview(
            self.fixed,
            as_deformation(self.initial).warp(self.moving, self.fixed),
            warped,
            self.determinant().array,
            self.folding_mask().array > 0,
            self.report["steps"],
            self.title(),
            self.forward,
            one_kind=self.settings.similarity != "mind",
        )

    def write(self, folder: str | os.PathLike, labels: Volume | None = None, thumbnail: bool = False) -> None:
        """Write all results into ``folder``, whole or not at all.

        labels: those of the moving image, which are warped, too. thumbnail: whether to add a small picture.

        A new folder appears complete. In an existing one each file is replaced when all are written, report.json
        last, and a file of an earlier result that this one does not have is removed. A picture that cannot be
        drawn becomes a warning in the report. Raises WriteError where a file cannot be written.
        """
        folder = Path(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with staging_folder(folder.parent) as temporary:
                whole = temporary / "result"
                whole.mkdir()
                self._write_files(whole, labels, thumbnail)
                _move_folder(whole, folder)
        except OSError as error:
            raise write_error(folder, error) from error

    def _write_files(self, folder: Path, labels: Volume | None, thumbnail: bool) -> None:
        warped, determinant, folding = self.warped(), self.determinant(), self.folding_mask()
        write_volume(warped, folder / "warped.nii.gz")
        self.forward.write(folder / "transform.h5")
        self.inverse.write(folder / "inverse_transform.h5")
        if isinstance(self.initial, Deformation):
            self.initial.write(folder / INITIAL_TRANSFORM)
        if self.reached.optimizer is not None:
            torch.save(self.reached.optimizer, folder / OPTIMIZER_STATE)
        write_volume(determinant, folder / "jacobian.nii.gz", "Jacobian determinant")
        write_volume(folding, folder / "folding.nii.gz")
        if labels is not None:
            write_volume(self.forward.warp(labels, self.fixed, "nearest"), folder / "warped_labels.nii.gz")
        try:
            self._draw(warped).savefig(folder / "overview.png")
            if thumbnail:
                from GradProjIOLib.report.thumbnail import write_thumbnail

                write_thumbnail(folder, self.fixed, warped, determinant, folding)
        except Exception as error:
            warning = f"A picture of the result could not be drawn ({error})."
            if warning not in self.report["warnings"]:
                self.report["warnings"].append(warning)
        report = self.report
        if labels is not None and not report.get("labels"):
            report = report | {"inputs": report["inputs"] | {"moving_labels": describe_image(labels)}}
        (folder / "report.json").write_text(json_text(report, indent=1) + "\n", encoding="utf-8")

    def title(self) -> str:
        """One line that says what was registered, how, and with which folding."""
        folded = self.report["jacobian"]["folded_percent"]
        return (
            f"{Path(self.moving.name).name} onto {Path(self.fixed.name).name} · "
            f"{model_in_words(self.report)}, {self.settings.method}, {steps_in_words(self.report)} · "
            f"{folded:.3g} % folded · {self.report['seconds']:.0f} s"
        )


def model_in_words(report: Mapping[str, Any]) -> str:
    """The name of the network that a registration used."""
    name = report["model"]["name"]
    return "no network" if name == "none" else name


def steps_in_words(report: Mapping[str, Any]) -> str:
    """How many steps of each stage a registration took, in words: "50 IO + 90 refinement steps"."""
    stages = Counter(step["stage"] for step in report["steps"])
    counts = [f"{stages[stage]} {word}" for stage, word in STAGE_WORDS.items() if stages[stage]]
    return f"{' + '.join(counts)} steps" if counts else "no steps"


def describe_jacobian(
    forward: Deformation,
    fixed: Volume,
    region: np.ndarray | None = None,
    maps: tuple[np.ndarray, Folding] | None = None,
) -> dict[str, float]:
    """Figures of the Jacobian determinant and of folding at the fixed image's voxels, or those of a region.

    `affine_determinant` is that of the linear part; the figures that begin with without_affine leave it out. Where the
    deformation is undefined nothing is measured; `undefined_voxels` says at how many voxels. Raises InputError where
    none is left. maps: the determinant and the folding of the same deformation and region, if they are known already.
    """
    from scipy import ndimage

    determinant, folding = maps or _jacobian_maps(forward, fixed, region)
    linear = jacobian.linear_determinant(forward)
    without = jacobian.summary(determinant / linear, folding.region)
    return (
        jacobian.summary(determinant, folding.region)
        | {"affine_determinant": float(linear)}
        | {f"without_affine_{key}": without[key] for key in ("min", "max", "percentile_1", "percentile_99", "mean_log")}
        | {
            "folded_voxels": folding.folded_voxels,
            "folded_percent": folding.folded_percent,
            "folded_regions": int(ndimage.label(folding.mask, structure=np.ones((3, 3, 3)))[1]),
            "ndv_percent": folding.ndv_percent,
            "undefined_voxels": (determinant.size if region is None else int(region.sum())) - folding.voxels,
        }
    )


def _jacobian_maps(forward: Deformation, fixed: Volume, region: np.ndarray | None) -> tuple[np.ndarray, Folding]:
    """The determinant at the fixed image's voxels, and the folding there or in a region."""
    sampled = forward.sample(fixed.shape, fixed.affine)
    return jacobian.determinant_map(sampled), jacobian.folding(sampled, region)


def _move_folder(source: Path, target: Path) -> None:
    """Make ``source`` the folder ``target``, or replace the result that is in it; other files there stay."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        if target.exists():
            target.rmdir()
        os.replace(source, target)
        return
    for name in RESULT_FILES:
        if (source / name).exists():
            os.replace(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)

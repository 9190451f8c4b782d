"""``gradprojio register``: one pair, from files to a folder of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from GradProjIOLib import alignment, models
from GradProjIOLib.deformation import Deformation, read_linear
from GradProjIOLib.optimization import METHODS, Step
from GradProjIOLib.projection import PROJECTION_RULES
from GradProjIOLib.registration import (
    MEMORY_MODES,
    MODALITIES,
    PRECISIONS,
    STOPS,
    OnStep,
    Registration,
    Settings,
    register,
)  # fmt: skip
from GradProjIOLib.similarity import SIMILARITIES
from GradProjIOLib.volume import InputError, read_labels, read_volume

if TYPE_CHECKING:
    import tqdm

SETTING_NAMES = tuple(Settings.__dataclass_fields__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("fixed", metavar="FIXED", help="image that stays (NIfTI, NRRD or MetaImage)")
    parser.add_argument("moving", metavar="MOVING", help="image that is warped onto it")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    add_setting_arguments(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--initial-transform", metavar="FILE", help="ITK transform, fixed to moving, to start from")
    start.add_argument("--align", choices=alignment.KINDS, default="none", help="linear alignment before (none)")
    parser.add_argument("--fixed-mask", metavar="FILE", help="where the fixed image counts")
    parser.add_argument("--moving-mask", metavar="FILE", help="where the moving image counts")
    parser.add_argument("--moving-labels", metavar="FILE", help="label map of the moving image, to be warped, too")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_setting_arguments(parser: argparse.ArgumentParser, method: bool = True) -> None:
    """Those arguments that are fields of ``registration.Settings``; ``method`` and steps only if wanted."""
    default = Settings()
    parser.add_argument(
        "--model",
        choices=("auto", *models.MODELS),
        default=default.model,
        help="network; auto is unigradicon where its weights are on this computer, else compact",
    )
    parser.add_argument("--weights", metavar="FILE", help="weights to use instead of the model's own")
    if method:
        parser.add_argument(
            "--method",
            choices=METHODS,
            default=default.method,
            help="optimisation with projected gradients, with their weighted sum, or none (projected)",
        )
        parser.add_argument("--steps", type=int, default=default.steps, metavar="N", help="optimisation steps (50)")
        parser.add_argument(
            "--coarse-steps",
            type=int,
            default=default.coarse_steps,
            metavar="N",
            help="how many of them, the first, at half the resolution (0)",
        )
        parser.add_argument("--stop", choices=STOPS, default=default.stop, help="end where nothing improves (never)")
        parser.add_argument(
            "--folding-budget",
            type=float,
            metavar="PERCENT",
            help="end before more of the lattice than that is folded (no limit)",
        )
    parser.add_argument("--similarity", choices=tuple(SIMILARITIES), default=default.similarity, help="(lncc)")
    for side in ("fixed", "moving"):
        parser.add_argument(f"--{side}-modality", choices=MODALITIES, default="mri", help="(mri)")
    parser.add_argument(
        "--regularity-weight",
        type=float,
        default=default.regularity_weight,
        metavar="X",
        help="weight of the regularity (1.5)",
    )
    parser.add_argument("--learning-rate", type=float, metavar="X", help="instead of the model's own")
    parser.add_argument(
        "--projection",
        choices=PROJECTION_RULES,
        default=default.projection,
        help="which gradient is projected where they conflict (random)",
    )
    parser.add_argument(
        "--lattice",
        type=int,
        nargs=3,
        metavar=("K", "J", "I"),
        help="lattice of the network instead of the model's own",
    )
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="(0)")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:1 … or mps (auto)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default.precision,
        help="fast computes gradients in TF32 on NVIDIA cards since Ampere (exact)",
    )
    parser.add_argument(
        "--memory", choices=MEMORY_MODES, default=default.memory, help="lean takes less memory and more time (auto)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Register, write the results, say what was found."""
    check_output(arguments.output)
    settings = settings_from(arguments)
    fixed, moving = read_volume(arguments.fixed), read_volume(arguments.moving)
    labels = read_labels(arguments.moving_labels) if arguments.moving_labels else None
    masks = {name: read_volume(path) for name in ("fixed_mask", "moving_mask") if (path := getattr(arguments, name))}
    with Progress(settings, arguments.quiet) as progress:
        result = register(
            fixed,
            moving,
            settings,
            initial_transform=read_initial(arguments.initial_transform),
            on_step=progress.on_step,
            **masks,
        )
    result.write(arguments.output, labels)
    if not arguments.quiet:
        print_summary(result, arguments.output)
    return 0


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings among the arguments; defaults for those that the verb does not have."""
    return Settings(**{name: getattr(arguments, name) for name in SETTING_NAMES if hasattr(arguments, name)})


def check_output(folder: Path) -> None:
    """Raise InputError where results could not be written to ``folder``, before time is spent on them."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the results.")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file, so {folder} cannot be made; give another folder.")


def read_initial(path: str | None) -> Deformation | np.ndarray | None:
    """The initial transform in a file: 4x4 (RAS mm, fixed to moving) where it is linear, else a Deformation."""
    if path is None:
        return None
    matrix = read_linear(path)
    return Deformation.read(path) if matrix is None else matrix


def print_summary(result: Registration, folder: Path) -> None:
    """What came out, and what the user should know about it, in a few lines."""
    report = result.report
    found = report["jacobian"]
    print(
        f"{report['model']['name']}, {report['settings']['method']}, {len(report['steps'])} steps on "
        f"{report['device']['name']} in {report['seconds']:.1f} s"
    )
    print(f"similarity loss {report['similarity']:.4f}, regularity loss {report['regularity']:.5f}")
    print(
        f"folded voxels {found['folded_voxels']} ({found['folded_percent']:.4f} %), "
        f"non-diffeomorphic volume {found['ndv_percent']:.4f} %, "
        f"determinant {found['min']:.3f} to {found['max']:.3f}"
    )
    print(f"results in {folder}, pictures in {folder / 'overview.png'}")
    for warning in report["warnings"]:
        print(f"note: {warning}", file=sys.stderr)


class Progress:
    """A progress bar on a terminal with both losses; elsewhere and with ``quiet`` nothing."""

    def __init__(self, settings: Settings, quiet: bool):
        self.total = 0 if settings.method == "direct" else settings.steps
        self.hidden = quiet or not sys.stderr.isatty()
        self.conflicts = 0
        self.bar: tqdm.tqdm | None = None

    def __enter__(self) -> Progress:
        import tqdm

        self.bar = tqdm.tqdm(total=self.total, unit="step", disable=self.hidden, leave=False)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    @property
    def on_step(self) -> OnStep:
        """What ``register`` calls after each step."""
        return self._show

    def _show(self, step: Step) -> None:
        self.conflicts += step.projected not in (None, "none")
        self.bar.set_postfix_str(
            f"similarity {step.similarity:.4f}, regularity {step.regularity:.4f}, {self.conflicts} conflicts",
            refresh=False,
        )
        self.bar.update()

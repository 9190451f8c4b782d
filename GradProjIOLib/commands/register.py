"""``gradprojio register``: one pair, from files to a folder of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from GradProjIOLib.commands.options import add_setting_options, check_output, settings_from
from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.registration.register import OnStep, register
from GradProjIOLib.registration.result import Registration
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import read_initial

if TYPE_CHECKING:
    import tqdm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("fixed", metavar="FIXED", help="image that stays (NIfTI, NRRD or MetaImage)")
    parser.add_argument("moving", metavar="MOVING", help="image that is warped onto it")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    add_setting_options(parser)
    parser.add_argument(
        "--initial-transform", metavar="FILE", help="ITK transform, fixed to moving, to start from, instead of --align"
    )
    parser.add_argument("--fixed-mask", metavar="FILE", help="where the fixed image counts")
    parser.add_argument("--moving-mask", metavar="FILE", help="where the moving image counts")
    parser.add_argument("--moving-labels", metavar="FILE", help="label map of the moving image, to be warped, too")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


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

"""``gradprojio register``: one pair, from files to a folder of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from GradProjIOLib.commands.console import print_summary
from GradProjIOLib.commands.options import (
    add_output_option,
    add_setting_options,
    given_settings,
    number,
    settings_from,
)
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import checksum
from GradProjIOLib.geometry.image_files import read_labels
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.going_on import load_result
from GradProjIOLib.registration.register import register
from GradProjIOLib.registration.result import Registration

FILES = {
    "moving-labels": "label map of the moving image, which is warped, too; it guides the registration only with "
    "--fixed-labels",
    "fixed-mask": "where the fixed image counts",
    "moving-mask": "where the moving image counts",
    "fixed-points": "landmarks of the fixed image that guide the registration (.mrk.json, .fcsv, or .csv in RAS mm)",
    "moving-points": "their partners, by name or order, in the moving image",
    "fixed-labels": "label map of the fixed image: its structures and those of --moving-labels with the same names "
    "(.seg.nrrd) or values guide the registration; to measure with them, see gradprojio evaluate",
}
"""Options that name a file which belongs to one of the images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("fixed", metavar="FIXED", help="image that stays (NIfTI, NRRD or MetaImage)")
    parser.add_argument("moving", metavar="MOVING", help="image that is warped onto it")
    parser.add_argument(
        "--from",
        dest="earlier",
        metavar="DIR",
        type=Path,
        action=_From,
        help="folder of a result to go on with; FIXED and MOVING are then those of its report unless given, and so are "
        "masks, landmarks, labels and settings. --steps says how many more steps are taken of the stage that it ended "
        "with, --refine-steps how many refine the fields, the finest alone unless something counts that did not before",
    )
    add_output_option(parser, "folder for the results")
    for name, help in FILES.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=help)
    parser.add_argument(
        "--guiding-labels",
        type=_weighted,
        metavar="3,17:0.5,…",
        help="values or names of the labels that guide, perhaps with weights (default: all in both, each with 1)",
    )
    parser.add_argument(
        "--initial-transform", metavar="FILE", help="ITK transform, fixed to moving, to start from instead of --align"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_setting_options(parser.add_argument_group("settings"))


class _From(argparse.Action):
    """``--from``, with which the images need not be named."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Note the folder, and require no images."""
        namespace.earlier = values
        for action in parser._actions:
            if action.dest in ("fixed", "moving"):
                action.required = False


def run(arguments: argparse.Namespace) -> int:
    """Register or go on, write the results, say what was found."""
    if arguments.earlier and arguments.initial_transform:
        raise InputError("--initial-transform says where to begin, and --from to go on; give only one of them.")
    labels = read_labels(arguments.moving_labels) if arguments.moving_labels else None
    if arguments.earlier:
        earlier = load_result(arguments.earlier, fixed=arguments.fixed, moving=arguments.moving)
        if labels is None:
            labels = _earlier_labels(earlier)
        result = earlier.go_on(**given_settings(arguments), **_guides(arguments))
    else:
        result = _register(arguments)
    result.write(arguments.output, labels)
    if not arguments.quiet:
        print_summary(result, arguments.output)
    return 0


def _register(arguments: argparse.Namespace) -> Registration:
    settings, initial = settings_from(arguments), arguments.initial_transform
    if initial and settings.align != "none":
        raise InputError(
            f"--initial-transform and --align {settings.align} both say where to start; give only one of them."
        )
    return register(arguments.fixed, arguments.moving, settings, initial_transform=initial, **_guides(arguments))


def _earlier_labels(earlier: Registration) -> Volume | None:
    """The labels that were warped before, where their file is still the same."""
    described = earlier.report["inputs"].get("moving_labels")
    if described is None:
        return None
    path = described["path"]
    if path is None or not Path(path).is_file() or checksum(path) != described["sha256"]:
        gone = path or described["name"]
        print(f"note: {gone} is gone or has changed, so no labels are warped; give --moving-labels.", file=sys.stderr)
        return None
    return read_labels(path)


def _guides(arguments: argparse.Namespace) -> dict[str, Any]:
    """What else ``register`` and ``Registration.go_on`` take."""
    names = ["fixed_mask", "moving_mask", "fixed_points", "moving_points"]
    if arguments.fixed_labels or arguments.guiding_labels:
        names += ["fixed_labels", "moving_labels", "guiding_labels"]
    guides = {name: getattr(arguments, name) for name in names}
    return guides | {"progress": not arguments.quiet and sys.stderr.isatty()}


def _weighted(text: str) -> dict[str, float]:
    """The labels in a list with commas between them and the weight of each, 1 where there is none."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.rpartition(":") if ":" in part else (part, "", "1")
        found[name.strip()] = number(weight)
    return found

"""``gradprojio register``: one pair, from files to a folder of results."""

from __future__ import annotations

import argparse
import sys

from GradProjIOLib.commands.console import print_summary
from GradProjIOLib.commands.options import add_output_option, add_setting_options, settings_from
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_labels
from GradProjIOLib.registration.register import register


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("fixed", metavar="FIXED", help="image that stays (NIfTI, NRRD or MetaImage)")
    parser.add_argument("moving", metavar="MOVING", help="image that is warped onto it")
    add_output_option(parser, "folder for the results")
    parser.add_argument("--moving-labels", metavar="FILE", help="label map of the moving image, to be warped, too")
    parser.add_argument("--fixed-mask", metavar="FILE", help="where the fixed image counts")
    parser.add_argument("--moving-mask", metavar="FILE", help="where the moving image counts")
    parser.add_argument(
        "--fixed-points",
        metavar="FILE",
        help="landmarks of the fixed image that guide the registration (.mrk.json, .fcsv, or .csv in RAS mm)",
    )
    parser.add_argument("--moving-points", metavar="FILE", help="their partners, by name or order, in the moving image")
    parser.add_argument(
        "--initial-transform", metavar="FILE", help="ITK transform, fixed to moving, to start from instead of --align"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_setting_options(parser.add_argument_group("settings"))


def run(arguments: argparse.Namespace) -> int:
    """Register, write the results, say what was found."""
    settings = settings_from(arguments)
    if arguments.initial_transform and settings.align != "none":
        raise InputError(
            f"--initial-transform and --align {settings.align} both say where to start; give only one of them."
        )
    labels = read_labels(arguments.moving_labels) if arguments.moving_labels else None
    result = register(
        arguments.fixed,
        arguments.moving,
        settings,
        initial_transform=arguments.initial_transform,
        fixed_mask=arguments.fixed_mask,
        moving_mask=arguments.moving_mask,
        fixed_points=arguments.fixed_points,
        moving_points=arguments.moving_points,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    result.write(arguments.output, labels)
    if not arguments.quiet:
        print_summary(result, arguments.output)
    return 0

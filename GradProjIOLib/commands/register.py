"""``gradprojio register``: one pair, from files to a folder of results."""

from __future__ import annotations

import argparse

from GradProjIOLib.commands.console import print_summary, progress_bar
from GradProjIOLib.commands.options import add_output_option, add_setting_options, settings_from
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.registration.register import register
from GradProjIOLib.spatial.deformation import read_initial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("fixed", metavar="FIXED", help="image that stays (NIfTI, NRRD or MetaImage)")
    parser.add_argument("moving", metavar="MOVING", help="image that is warped onto it")
    add_output_option(parser, "folder for the results")
    parser.add_argument("--moving-labels", metavar="FILE", help="label map of the moving image, to be warped, too")
    parser.add_argument("--fixed-mask", metavar="FILE", help="where the fixed image counts")
    parser.add_argument("--moving-mask", metavar="FILE", help="where the moving image counts")
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
    fixed, moving = read_volume(arguments.fixed), read_volume(arguments.moving)
    labels = read_labels(arguments.moving_labels) if arguments.moving_labels else None
    masks = {name: read_volume(path) for name in ("fixed_mask", "moving_mask") if (path := getattr(arguments, name))}
    initial = read_initial(arguments.initial_transform)
    with progress_bar(settings, arguments.quiet) as callbacks:
        result = register(fixed, moving, settings, initial_transform=initial, **masks, **callbacks)
    result.write(arguments.output, labels)
    if not arguments.quiet:
        print_summary(result, arguments.output)
    return 0

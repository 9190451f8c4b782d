"""``gradprojio demo``: register a pair of phantoms whose true deformation is known."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

from GradProjIOLib.commands.console import print_summary
from GradProjIOLib.commands.options import add_output_option, add_setting_options, settings_from, whole_number
from GradProjIOLib.evaluation.metrics import IDENTITY, dice_of
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.registration.register import register
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.synthetic import phantom


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_output_option(parser, "folder for the images and results", default=Path("demo-output"))
    parser.add_argument(
        "--size",
        type=partial(whole_number, least=16),
        default=96,
        metavar="N",
        help="voxels across the head, 16 or more; fewer are faster and coarser",
    )
    parser.set_defaults(model="compact")
    add_setting_options(parser, only=("steps", "refine_steps", "seed", "device"), preset="quick")


def run(arguments: argparse.Namespace) -> int:
    """Make the pair, register it, compare with the truth."""
    shape = (arguments.size, round(arguments.size * 7 / 6), arguments.size)
    settings = settings_from(arguments)
    pair = phantom.make_pair(settings.seed, shape, spacing=192 / arguments.size, with_skull=False)
    print(f"a pair of phantoms, {' x '.join(map(str, reversed(shape)))} voxels, with a known deformation")
    result = register(pair.fixed, pair.moving, settings, progress=sys.stderr.isatty())
    result.write(arguments.output, pair.moving_labels)
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        write_volume(getattr(pair, name), arguments.output / f"{name}.nii.gz")
    for when, deformation in (("before", IDENTITY), ("after", result.forward)):
        warped = deformation.warp(pair.moving_labels, pair.fixed, "nearest")
        overlaps = dice_of(pair.fixed_labels.array, warped.array, list(phantom.LABELS))
        print(
            f"{when:7} mean Dice {np.nanmean(overlaps):.3f}, "
            f"mean distance to the known deformation {_distance(deformation, pair):.2f} mm"
        )
    print_summary(result, arguments.output)
    return 0


def _distance(deformation: Deformation, pair: phantom.PhantomPair) -> float:
    """Mean distance in mm between a deformation and the truth, over the voxels with labels."""
    points = lattice_points(pair.fixed.shape, pair.fixed.affine)[pair.fixed_labels.array > 0]
    difference = deformation.map_points(points) - pair.deformation.map_points(points)
    return float(np.linalg.norm(difference, axis=-1).mean())

"""``gradprojio demo``: registers a pair of phantoms whose true deformation is known."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from GradProjIOLib.commands.options import check_output
from GradProjIOLib.commands.register import Progress, print_summary
from GradProjIOLib.evaluation.metrics import dice_of
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.synthetic import phantom


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the images and results (demo-output)",
    )
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="optimisation steps (50)")
    parser.add_argument(
        "--size", type=int, default=96, metavar="N", help="voxels across the head; fewer are faster and coarser (96)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (auto)")


def run(arguments: argparse.Namespace) -> int:
    """Make the pair, register it, compare with the truth."""
    check_output(arguments.output)
    shape = (arguments.size, round(arguments.size * 7 / 6), arguments.size)
    pair = phantom.make_pair(arguments.seed, shape, spacing=192 / arguments.size, with_skull=False)
    settings = Settings(model="compact", steps=arguments.steps, seed=arguments.seed, device=arguments.device)
    print(f"a pair of phantoms, {' x '.join(map(str, reversed(shape)))} voxels, with a known deformation")
    with Progress(settings, quiet=False) as progress:
        result = register(pair.fixed, pair.moving, settings, on_step=progress.on_step)
    result.write(arguments.output, pair.moving_labels)
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        write_volume(getattr(pair, name), arguments.output / f"{name}.nii.gz")
    still = Deformation.from_linear(np.eye(4), pair.fixed.shape, pair.fixed.affine)
    for when, deformation in (("before", still), ("after", result.forward)):
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

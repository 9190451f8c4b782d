"""``gradprojio warp``: apply a transform to an image or a label map."""

from __future__ import annotations

import argparse

from GradProjIOLib.commands.options import TRANSFORM_HELP
from GradProjIOLib.geometry.image_files import read_labels, read_volume, write_volume
from GradProjIOLib.spatial.deformation import Deformation

INTERPOLATIONS = ("linear", "bspline", "nearest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("moving", metavar="MOVING", help="image or label map to warp")
    parser.add_argument("transform", metavar="TRANSFORM", help=TRANSFORM_HELP)
    parser.add_argument("-r", "--reference", required=True, metavar="FIXED", help="image whose lattice the result has")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="warped image")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, default="linear", help="how to read between voxels")
    parser.add_argument("--labels", action="store_true", help="MOVING is a label map, so --interpolation is nearest")


def run(arguments: argparse.Namespace) -> int:
    """Read, warp, write."""
    moving = (read_labels if arguments.labels else read_volume)(arguments.moving)
    reference = read_volume(arguments.reference)
    interpolation = "nearest" if arguments.labels else arguments.interpolation
    deformation = Deformation.read(arguments.transform, reference.shape, reference.affine)
    write_volume(deformation.warp(moving, reference, interpolation), arguments.output)
    return 0

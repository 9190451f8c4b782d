"""``gradprojio jacobian``: determinant map, folding and their figures for any transform."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.tables import write_json
from GradProjIOLib.geometry.image_files import read_volume, write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.result import describe_jacobian
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "transform",
        metavar="TRANSFORM",
        help="ITK transform or displacement image, fixed to moving, such as transform.h5",
    )
    parser.add_argument("-r", "--reference", required=True, metavar="FIXED", help="image at whose voxels to look")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the determinant map")
    parser.add_argument("--folding", metavar="FILE", help="write where the deformation folds")
    parser.add_argument("--mask", metavar="FILE", help="count only inside this mask")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print."""
    reference = read_volume(arguments.reference)
    deformation = Deformation.read(arguments.transform, reference.shape, reference.affine)
    region = None
    if arguments.mask:
        still = Deformation.from_linear(np.eye(4), reference.shape, reference.affine)
        region = still.warp(read_volume(arguments.mask), reference, "nearest").array != 0
        if not region.any():
            raise InputError(f"{arguments.mask} is empty on {arguments.reference}; choose a mask with voxels there.")
    figures = describe_jacobian(deformation, reference, region)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        write_json(figures, arguments.json)
    if arguments.output:
        determinant = jacobian.determinant_map(deformation, reference.shape, reference.affine)
        write_volume(Volume(determinant, reference.affine), arguments.output)
    if arguments.folding:
        mask = jacobian.folding(deformation, reference.shape, reference.affine).mask
        write_volume(Volume(mask.astype(np.uint8), reference.affine), arguments.folding)
    return 0

"""``gradprojio jacobian``: measure where a transform folds, and map its Jacobian determinant."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from GradProjIOLib.commands.options import TRANSFORM_HELP, say_notes
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.metrics import IDENTITY
from GradProjIOLib.evaluation.tables import write_json
from GradProjIOLib.geometry.files import json_text
from GradProjIOLib.geometry.image_files import read_volume, write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.result import describe_jacobian
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("transform", metavar="TRANSFORM", help=TRANSFORM_HELP)
    parser.add_argument("-r", "--reference", required=True, metavar="FIXED", help="image at whose voxels to measure")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the map of the Jacobian determinant")
    parser.add_argument("--log", action="store_true", help="write the natural logarithm of the determinant instead")
    parser.add_argument(
        "--without-affine", action="store_true", help="write the determinant without the transform's affine part"
    )
    parser.add_argument("--folding", metavar="FILE", help="write a mask of the voxels where the deformation folds")
    parser.add_argument("--mask", metavar="FILE", help="measure only where this image is not 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures that are printed")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print."""
    reference = read_volume(arguments.reference)
    say_notes(reference)
    deformation = Deformation.read(arguments.transform, reference.shape, reference.affine)
    region = None
    if arguments.mask:
        region = IDENTITY.warp(read_volume(arguments.mask), reference, "nearest").array != 0
        if not region.any():
            raise InputError(f"{arguments.mask} is empty on {arguments.reference}; choose a mask with voxels there.")
    figures = describe_jacobian(deformation, reference, region)
    print(json_text(figures, indent=1))
    if arguments.json:
        write_json(figures, arguments.json)
    if arguments.output:
        determinant = jacobian.determinant_map(deformation, with_affine=not arguments.without_affine)
        note = "Jacobian determinant" + (" without the affine part" if arguments.without_affine else "")
        if arguments.log:
            determinant, note = jacobian.logarithm(determinant), f"natural logarithm of the {note}"
        write_volume(Volume(determinant, reference.affine), arguments.output, note)
    if arguments.folding:
        mask = jacobian.folding(deformation).mask
        write_volume(Volume(mask.astype(np.uint8), reference.affine), arguments.folding)
    return 0

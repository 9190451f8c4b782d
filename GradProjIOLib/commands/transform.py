"""``gradprojio transform``: compose, invert and export transforms, and map points and surfaces."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import numpy as np

from GradProjIOLib.commands.options import say_notes
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import lumir
from GradProjIOLib.geometry import mapped_points, transform_files
from GradProjIOLib.geometry.image_files import WRITTEN_SUFFIXES, read_volume, write_sitk
from GradProjIOLib.geometry.landmarks import FRAMES
from GradProjIOLib.geometry.lattice import is_rectangular
from GradProjIOLib.geometry.volume import Volume, sitk_image
from GradProjIOLib.spatial.deformation import Deformation

CONVENTIONS = ("mm", "voxels", "lumir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "transforms",
        nargs="+",
        metavar="TRANSFORM",
        help="ITK transforms or displacement images; of several, points go through the first one first",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the whole as a transform (.h5, .tfm) or as an image of its displacements (.nii.gz, .nrrd …); "
        "with --points, the mapped points",
    )
    parser.add_argument("--invert", action="store_true", help="invert the whole")
    parser.add_argument(
        "-r",
        "--reference",
        metavar="IMAGE",
        help="image whose lattice the result has (default: the first field's own); needed for B-splines",
    )
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="mm",
        help="displacements in an image: in mm as ITK has them, in voxels along the axes of the reference, or as the "
        "LUMIR challenge has them",
    )
    parser.add_argument(
        "--moving",
        metavar="IMAGE",
        help="with the convention lumir: image whose voxels it leads to (default: reference)",
    )
    parser.add_argument(
        "--points",
        metavar="FILE",
        help=f"map these points or this surface ({', '.join(mapped_points.SUFFIXES)}): from the fixed to the moving "
        "image, or with --invert from the moving to the fixed one",
    )
    parser.add_argument(
        "--points-frame", choices=FRAMES, help="coordinates in a .csv file (voxels: of the reference), or of a surface"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read, compose, invert, write."""
    reference = read_volume(arguments.reference) if arguments.reference else None
    if reference is not None:
        say_notes(reference)
    lattice = () if reference is None else (reference.shape, reference.affine)
    maps = [Deformation(*transform_files.read_transform(path, *lattice)) for path in arguments.transforms]
    if arguments.points:
        map_points = functools.partial(_through, maps, arguments.invert)
        affine = None if reference is None else reference.affine
        count = mapped_points.map_file(arguments.points, arguments.output, map_points, arguments.points_frame, affine)
        print(f"{count} points in {arguments.output}")
        return 0
    if lattice and not arguments.invert:
        maps[0] = maps[0].sample(*lattice)
    whole = functools.reduce(_then, maps)
    if arguments.invert:
        whole = whole.inverse(*lattice)
    if not is_rectangular(whole.affine):
        raise InputError("The result would have skewed axes; give an image for its lattice (--reference).")
    as_image = arguments.output.lower().endswith(WRITTEN_SUFFIXES)
    if as_image and whole.is_linear and reference is None:
        raise InputError("The transform is linear; give an image for the lattice of the displacements (--reference).")
    if not as_image or arguments.convention == "mm":
        whole.write(arguments.output)
        return 0
    fixed = Volume(np.zeros(whole.shape, np.uint8), whole.affine)
    if arguments.convention == "lumir":
        moving = read_volume(arguments.moving) if arguments.moving else fixed
        lumir.write_displacement(lumir.voxel_displacement(whole, fixed, moving), whole.affine, arguments.output)
    else:
        in_voxels = lumir.voxel_displacement(whole, fixed, fixed).transpose(2, 1, 0, 3)
        write_sitk(sitk_image(np.ascontiguousarray(in_voxels), whole.affine), arguments.output)
    return 0


def _through(maps: Sequence[Deformation], invert: bool, points: np.ndarray) -> np.ndarray:
    """Points through all maps, exactly; with `invert` back through them."""
    for one in reversed(maps) if invert else maps:
        points = one.source_points(points) if invert else one.map_points(points)
    return points


def _then(first: Deformation, second: Deformation) -> Deformation:
    """x → second(first(x)), on the lattice of the first one, or exactly where that is linear."""
    return second.preceded_by_linear(first.matrix) if first.is_linear else second.compose(first)

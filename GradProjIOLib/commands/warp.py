"""``gradprojio warp``: apply a transform to images or label maps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from GradProjIOLib.commands.options import TRANSFORM_HELP, number, say_notes
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_frames, read_volume, whole_numbers_of, write_frames
from GradProjIOLib.geometry.volume import looks_like_labels
from GradProjIOLib.spatial.deformation import Deformation

INTERPOLATIONS = ("linear", "bspline", "nearest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "moving", nargs="+", metavar="MOVING", help="images or label maps to warp, 3-D or 4-D (frame by frame)"
    )
    parser.add_argument("transform", metavar="TRANSFORM", help=TRANSFORM_HELP)
    parser.add_argument("-r", "--reference", required=True, metavar="FIXED", help="image whose lattice the result has")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="warped image; a folder for several, which keep their names",
    )
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, default="linear", help="how to read between voxels")
    parser.add_argument("--labels", action="store_true", help="MOVING is a label map, so --interpolation is nearest")
    parser.add_argument(
        "--background",
        type=number,
        metavar="VALUE",
        help="value outside the moving image (default: its smallest value, 0 for labels)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Read, warp, write."""
    reference = read_volume(arguments.reference)
    interpolation = "nearest" if arguments.labels else arguments.interpolation
    deformation = Deformation.read(arguments.transform, reference.shape, reference.affine)
    for source, target in _targets([Path(path) for path in arguments.moving], Path(arguments.output)).items():
        frames, step = read_frames(source)
        say_notes(reference, *frames)
        if interpolation != "nearest" and looks_like_labels(frames[0].array):
            print(f"note: {source} looks like a label map, and values between labels mean nothing; give --labels.",
                  file=sys.stderr)  # fmt: skip
        if arguments.labels:
            frames = [whole_numbers_of(frame) for frame in frames]
        lowest = arguments.background
        if lowest is None and interpolation != "nearest":
            lowest = min(frame.array.min() for frame in frames)
        warped = [deformation.warp(frame, reference, interpolation, lowest) for frame in frames]
        write_frames(warped, target, step)
    return 0


def _targets(sources: list[Path], output: Path) -> dict[Path, Path]:
    """Where each of the images goes. Raises InputError where two would go to the same place."""
    if len(sources) == 1 and not output.is_dir():
        return {sources[0]: output}
    if len({source.name for source in sources}) < len(sources):
        raise InputError("Two of the images have the same name, so they cannot go to one folder; rename one.")
    if output.is_file():
        raise InputError(f"{output} is a file; give a folder for several results.")
    output.mkdir(parents=True, exist_ok=True)
    targets = {source: output / source.name for source in sources}
    for source, target in targets.items():
        if source.resolve() == target.resolve():
            raise InputError(f"{target} would replace its own input; give another folder.")
    return targets

"""Options that several verbs share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.settings import PRESETS, SETTING_NAMES, Settings, allowed_range

TRANSFORM_HELP = "ITK transform or displacement image, fixed to moving, such as transform.h5, or folder of a result"


def add_setting_options(
    parser: argparse._ActionsContainer,
    only: Sequence[str] = SETTING_NAMES,
    preset: str = "standard",
) -> None:
    """Add an option for each setting in ``only``, and ``--preset``.

    preset: the one that holds where none is typed.

    An option that is not typed leaves nothing in the parsed arguments, so that a preset can have its own value.
    """
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=argparse.SUPPRESS if preset == "standard" else preset,
        help="values for the settings below that are not given; paper is the published method without refinement "
        f"(default: {preset})",
    )
    usual = Settings.from_mapping({"preset": preset})
    for one in fields(Settings):
        if one.name not in only:
            continue
        kind, rules = one.metadata["kind"], one.metadata
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=", ".join(filter(None, (rules["help"], allowed_range(one))))
            + ("" if one.default is None else f" (default: {getattr(usual, one.name)})"),
            choices=rules["choices"] or None,
            metavar=rules["metavar"] or {int: "N", float: "X"}.get(kind),
            type={int: whole_number, tuple: whole_number, float: number}.get(kind, str),
            nargs=3 if kind is tuple else None,
        )


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The preset and the settings among the arguments, as ``Settings.from_mapping`` wants them."""
    return {name: getattr(arguments, name) for name in ("preset", *SETTING_NAMES) if hasattr(arguments, name)}


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings among the arguments; those of the preset for the others."""
    return Settings.from_mapping(given_settings(arguments))


def add_output_option(parser: argparse.ArgumentParser, help: str, default: Path | None = None) -> None:
    """Add ``--output DIR``, which is required where it has no default."""
    parser.add_argument(
        "-o", "--output", required=default is None, default=default, type=output_folder, metavar="DIR", help=help
    )


def output_folder(text: str) -> Path:
    """A folder that exists or can be made, so that no time is spent on results that cannot be written there."""
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{folder} is a file; give a folder for the results")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise argparse.ArgumentTypeError(f"{parent} is a file, so {folder} cannot be made; give another folder")
    return folder


def number(text: str) -> float:
    """The number that a text stands for."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def whole_number(text: str, least: float = -math.inf) -> int:
    """The whole number that a text stands for, which must be ``least`` or more."""
    try:
        found = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if found < least:
        raise argparse.ArgumentTypeError(f"{found} is too small; give {least} or more")
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    """The whole numbers in a list with commas between them."""
    return tuple(whole_number(part) for part in text.split(","))


def say_notes(*volumes: Volume) -> None:
    """Print what the user should know about images, once."""
    for note in dict.fromkeys(volume.note for volume in volumes if volume.note):
        print(f"note: {note}", file=sys.stderr)

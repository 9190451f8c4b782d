"""Options that several verbs share, made from the settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from GradProjIOLib.errors import InputError
from GradProjIOLib.settings import Settings, value_type

SETTING_NAMES = tuple(one.name for one in fields(Settings))


def add_setting_options(parser: argparse._ActionsContainer, without: Sequence[str] = ()) -> None:
    """Add an option for each setting, but for those named in ``without``."""
    for one in fields(Settings):
        if one.name in without:
            continue
        kind, rules = value_type(one.name), one.metadata
        shown = "" if one.default is None else f" ({one.default})"
        keywords: dict = {"default": one.default, "help": rules["help"] + shown}
        if rules["choices"]:
            keywords["choices"] = rules["choices"]
        else:
            keywords["metavar"] = rules["metavar"]
            keywords["type"] = int if kind is tuple else kind
        if kind is tuple:
            keywords["nargs"] = 3
        parser.add_argument(f"--{one.name.replace('_', '-')}", **keywords)


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings among the arguments; defaults for those that the verb does not have."""
    return Settings(**{name: getattr(arguments, name) for name in SETTING_NAMES if hasattr(arguments, name)})


def check_output(folder: Path) -> None:
    """Raise InputError where results could not be written to ``folder``, before time is spent on them."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the results.")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file, so {folder} cannot be made; give another folder.")

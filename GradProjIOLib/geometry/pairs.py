"""Pairs of images to register: what belongs to one, and reading them from a table."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import IMAGE_SUFFIXES
from GradProjIOLib.geometry.tables import read_table
from GradProjIOLib.geometry.transform_files import transform_in
from GradProjIOLib.settings import SETTING_NAMES, Settings

IMAGES = ("fixed", "moving")


@dataclass(frozen=True)
class Pair:
    """The files of a fixed and a moving image, and how to register them. Paths are made absolute.

    ``case`` names the pair and the folder of its results. The masks say where each image counts, the moving labels
    are warped, both labels measure the overlap, and ``initial_transform`` is an ITK transform (fixed → moving) to
    start from. Raises InputError where the case cannot be the name of a folder.
    """

    case: str
    fixed: Path
    moving: Path
    settings: Settings = field(default_factory=Settings)
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    initial_transform: Path | None = None

    def __post_init__(self) -> None:
        for role, path in self.files.items():
            # Another process may work in another folder.
            path = Path(path).expanduser().absolute()
            object.__setattr__(self, role, transform_in(path) if role == "initial_transform" else path)
        if self.initial_transform is not None:
            object.__setattr__(self, "settings", replace(self.settings, align="none"))
        if self.case in ("", ".", "..") or Path(self.case).name != self.case or self.case.startswith("."):
            raise InputError(f"The case {self.case!r} cannot be the name of a folder; choose another name.")

    @property
    def files(self) -> dict[str, Path]:
        """The files that are there, by their role."""
        return {role: path for role in ROLES if (path := getattr(self, role)) is not None}


ROLES = tuple(one.name for one in fields(Pair) if one.name not in ("case", "settings"))
"""What the files of a pair are."""


def read_pairs(
    path: Path,
    settings: Mapping[str, Any],
    roles: Sequence[str] = ROLES,
    required: Collection[str] = IMAGES,
    without: Collection[str] = (),
) -> tuple[list[Pair], dict[str, str]]:
    """The pairs in the table at ``path``, and the cases whose row cannot be used, with the reason.

    Columns are ``case``, the ``roles``, ``preset``, and the settings but for those in ``without``. Paths are relative
    to the table. A setting whose cell is empty takes its value from ``settings`` (names and values as for
    ``Settings.from_mapping``), else from the row's preset. Without a case a row is named after its files.
    Raises InputError where the file is no such table, a case is there twice, or ``settings`` make no sense.
    """
    Settings.from_mapping(settings)
    columns = ("case", *roles, "preset", *(name for name in SETTING_NAMES if name not in without))
    rows = list(read_table(path, columns, required).values())
    pairs, unusable = [], {}
    for case, row in zip(_cases(path, rows), rows, strict=True):
        try:
            pairs.append(_pair(case, row, path.parent, settings, required))
        except InputError as error:
            unusable[case] = str(error)
    return pairs, unusable


def check_cases(cases: Iterable[str], where: str | Path) -> None:
    """Raise InputError where two cases are the same. Some file systems do not distinguish upper and lower case."""
    for case, count in Counter(case.lower() for case in cases).items():
        if count > 1:
            raise InputError(f"{where} has the case {case!r} twice; name the cases differently.")


def image_stem(path: str | Path) -> str:
    """The name of an image file without its suffix."""
    name = Path(path).name
    suffix = max((end for end in IMAGE_SUFFIXES if name.lower().endswith(end)), key=len, default="")
    return name[: len(name) - len(suffix)]


def _cases(path: Path, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The case of each row: its own, else made of the file names, and of a checksum where that is not enough.

    A row keeps its case when others come or go before it.
    """
    names = [row.get("case") or "_to_".join(_name(row[role]) for role in ("moving", "fixed")) for row in rows]
    counts = Counter(name.lower() for name in names)
    cases = []
    for name, row in zip(names, rows, strict=True):
        if counts[name.lower()] > 1 and not row.get("case"):
            cells = sorted((column, cell) for column, cell in row.items() if cell)
            name += "_" + hashlib.sha256(repr(cells).encode()).hexdigest()[:8]
        cases.append(name)
    check_cases(cases, path)
    return cases


def _name(path: str) -> str:
    # A name that starts with a dot would be hidden.
    return image_stem(path).lstrip(".") or "image"


def _pair(
    case: str, row: Mapping[str, str], folder: Path, settings: Mapping[str, Any], required: Collection[str]
) -> Pair:
    for role in required:
        if not row[role]:
            raise InputError(f"The row names no file for {role.replace('_', ' ')}; fill it in.")
    files = {role: folder / Path(cell).expanduser() for role in ROLES if (cell := row.get(role))}
    values = {one.name: _value(one, cell, folder) for one in fields(Settings) if (cell := row.get(one.name))}
    if preset := row.get("preset"):
        values["preset"] = preset
    return Pair(case, settings=Settings.from_mapping({**settings, **values}), **files)


def _value(setting: Field, cell: str, folder: Path) -> Any:
    """The value of a setting in a cell; where it is no such value, the cell itself, which Settings refuses."""
    rules = setting.metadata
    if rules["is_path"]:
        return str((folder / Path(cell).expanduser()).absolute())
    try:
        kind = rules["kind"]
        return tuple(map(int, cell.replace("x", " ").split())) if kind is tuple else kind(cell)
    except ValueError:
        return cell

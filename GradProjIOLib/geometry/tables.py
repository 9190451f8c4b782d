"""Tables in text files, with a header: separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path

from GradProjIOLib.errors import InputError, suggestion

SEPARATORS = ",;\t"


def read_table(path: Path, columns: Collection[str], required: Collection[str]) -> dict[int, dict[str, str]]:
    """The rows of the table at ``path`` by their line number; each maps column names to cells, "" for an empty one.

    columns: the names that the header may have; required: those that it must have. Header names count in any case,
    with hyphens or underscores. Spaces around cells and empty rows are left out.
    Raises InputError for a file that is no such table.
    """
    try:
        # Spreadsheets put a byte order mark before the header.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); save it as CSV in UTF-8.") from error
    # Spreadsheets of many countries write semicolons.
    separator = max(SEPARATORS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        header = [name.strip().lower().replace("-", "_") for name in next(reader, [])]
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} cannot be read as a row of a table ({error}).") from error
    # A spreadsheet may end each line with separators.
    while header and not header[-1]:
        header.pop()
    _check_header(path, header, columns, required)
    rows = {}
    for number, cells in lines:
        if any(cells[len(header) :]):
            raise InputError(f"{path}, line {number} has more columns than the header; put quotes around commas.")
        if any(cells):
            filled = cells + [""] * (len(header) - len(cells))
            rows[number] = dict(zip(header, filled, strict=False))
    if not rows:
        raise InputError(f"{path} has no row below its header.")
    return rows


def _check_header(path: Path, header: list[str], columns: Collection[str], required: Collection[str]) -> None:
    for name in required:
        if name not in header:
            raise InputError(f"{path} lacks the column {name}; its columns may be {', '.join(columns)}.")
    for name in header:
        if name not in columns:
            raise InputError(f"{path} has the unknown column {name!r}; {suggestion(name, columns)}")
        if header.count(name) > 1:
            raise InputError(f"{path} has the column {name} twice; remove one.")

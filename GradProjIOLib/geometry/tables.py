"""Reading tables of pairs and cases."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from GradProjIOLib.errors import InputError


def read_table(path: Path, columns: set[str], required: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file whose header has the `required` and maybe other `columns`. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = [row for row in reader if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table ({error}).") from error
    missing = [name for name in required if name not in header]
    unknown = [name for name in header if name not in columns]
    if missing or unknown:
        problem = f"lacks the column {missing[0]}" if missing else f"has the unknown column {unknown[0]!r}"
        raise InputError(f"{path} {problem}; its columns may be {', '.join(sorted(columns))}.")
    if not rows:
        raise InputError(f"{path} has no row below its header.")
    for number, row in enumerate(rows, start=2):
        if None in row or any(not row[name] for name in required):
            raise InputError(
                f"{path}, line {number}: fill {', '.join(required)}, and no more columns than the header has."
            )
    return rows

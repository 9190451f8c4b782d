"""``gradprojio evaluate``: how good one result is, or a table of results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from GradProjIOLib.commands.options import whole_numbers
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import tables
from GradProjIOLib.evaluation.cases import INPUTS, Case, measure_all, read_cases
from GradProjIOLib.geometry.landmarks import FRAMES

TABLE_SUFFIXES = (".csv", ".tsv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gradprojio evaluate`."""
    parser.add_argument(
        "result",
        type=Path,
        metavar="RESULT",
        help="folder that `gradprojio register` wrote, a transform file, or a table of them (.csv, .tsv) "
        "with the columns result, case, group, fixed_labels, moving_labels, fixed_points, moving_points, points_frame, "
        "mask; an empty cell takes what the options say",
    )
    for side in ("fixed", "moving"):
        parser.add_argument(f"--{side}-labels", type=Path, metavar="FILE", help=f"{side} label map")
        parser.add_argument(
            f"--{side}-points", type=Path, metavar="FILE", help=f"{side} landmarks: .mrk.json, .fcsv or .csv"
        )
    parser.add_argument("--mask", type=Path, metavar="FILE", help="also measure folding where this image is not 0")
    parser.add_argument("--points-frame", choices=FRAMES, help="coordinates of landmarks in .csv files")
    parser.add_argument(
        "--structures", type=whole_numbers, metavar="1,2,…", help="label values to measure (default: all but 0)"
    )
    parser.add_argument(
        "--reference",
        metavar="GROUP",
        help="group of a table that the others are compared with (default: its first)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every case and structure")


def run(arguments: argparse.Namespace) -> int:
    """Run `gradprojio evaluate`: 0 when every case was measured, 2 otherwise."""
    options = {name: getattr(arguments, name) for name in (*INPUTS, "points_frame")}
    whole = Case(arguments.result, arguments.result.name, **options)
    cases = read_cases(arguments.result, whole) if arguments.result.suffix.lower() in TABLE_SUFFIXES else [whole]
    rows, failed = measure_all(cases, arguments.structures, lambda line: print(line, file=sys.stderr))
    groups = tables.groups_of(rows)
    comparisons = tables.compare_groups(rows, _against(arguments.reference, groups))
    if len(rows) == 1 and "structures" in rows[0]:
        print(_structure_table(rows[0]))
    if rows:
        print(tables.case_table(rows))
    if comparisons:
        print("\n" + tables.comparison_table(comparisons))
    if arguments.json:
        tables.write_json(tables.report(rows, failed, comparisons), arguments.json)
    if arguments.csv:
        tables.write_csv(rows, arguments.csv)
    return 2 if failed else 0


def _structure_table(row: tables.Row) -> str:
    lines = [
        [str(found["structure"]), format(found["dice"], ".4f"), format(found["hd95_mm"], ".3f")]
        for found in row["structures"]
    ]
    return tables.text_table(["structure", "Dice", "HD95 [mm]"], lines).replace("nan", "–") + "\n"


def _against(reference: str | None, groups: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of groups to compare: all others with the reference, which is the first without another."""
    if reference is None:
        return [(groups[0], group) for group in groups[1:]]
    if reference not in groups:
        raise InputError(f"There is no group {reference}; choose one of {', '.join(groups)}.")
    return [(reference, group) for group in groups if group != reference]

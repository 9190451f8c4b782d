"""``gradprojio compare``: settings on pairs with labels, as in the paper's Table 1."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from GradProjIOLib.commands.options import (
    add_output_option,
    add_setting_options,
    settings_from,
    whole_number,
    whole_numbers,
)
from GradProjIOLib.evaluation.comparison import (
    OPTIONAL,
    PAPER,
    REQUIRED,
    Comparison,
    compare,
    parse_settings,
    read_pairs,
    results_text,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gradprojio compare`."""
    parser.add_argument(
        "pairs",
        type=Path,
        metavar="PAIRS.csv",
        help=f"table with the columns {', '.join(REQUIRED)} and perhaps {', '.join(OPTIONAL)}",
    )
    add_output_option(parser, "folder for the results; an interrupted comparison goes on there")
    parser.add_argument("--methods", default=PAPER, help="methods and steps to compare")
    parser.add_argument(
        "--every",
        type=partial(whole_number, least=1),
        default=10,
        metavar="N",
        help="measure Dice and NDV every N steps, for the curves",
    )
    parser.add_argument("--structures", type=whole_numbers, metavar="1,2,…", help="label values to measure (all but 0)")
    parser.add_argument("--quiet", action="store_true", help="print only the table")
    add_setting_options(parser, without=("method", "steps"))


def run(arguments: argparse.Namespace) -> int:
    """Run `gradprojio compare`: 0 done, 2 a pair must be corrected, 1 one failed otherwise, 130 interrupted."""
    comparison = Comparison(
        settings_from(arguments), parse_settings(arguments.methods), arguments.every, arguments.structures
    )
    pairs = read_pairs(arguments.pairs)
    arguments.output.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    try:
        rows, failed = compare(pairs, comparison, arguments.output, say)
    except KeyboardInterrupt:
        print(f"gradprojio: interrupted; the same command goes on with {arguments.output}", file=sys.stderr)
        return 130
    if rows:
        print(results_text(rows, comparison.settings_compared))
        print(f"results in {arguments.output}, curves in {arguments.output / 'curves.png'}")
    for failure in failed:
        print(f"gradprojio: {failure['case']}: {failure['message']}", file=sys.stderr)
    return max((2 if failure["kind"] == "input" else 1 for failure in failed), default=0)

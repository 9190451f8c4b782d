"""``gradprojio compare``: settings on pairs with labels, as in the paper's Table 1."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from GradProjIOLib.batch.run import here
from GradProjIOLib.batch.tasks import FAILED, OPEN
from GradProjIOLib.batch.trajectory import Trajectories
from GradProjIOLib.commands.batch import add_compute_options, exit_status, run_batch
from GradProjIOLib.commands.options import (
    add_output_option,
    add_setting_options,
    given_settings,
    whole_number,
    whole_numbers,
)
from GradProjIOLib.evaluation.comparison import COMPARED, CURVES, DEFAULT, TABLE, Comparison, parse_settings
from GradProjIOLib.geometry.pairs import read_pairs
from GradProjIOLib.models.registry import chosen_model
from GradProjIOLib.settings import SETTING_NAMES, Settings

REQUIRED = ("fixed", "moving", "fixed_labels", "moving_labels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gradprojio compare`."""
    parser.add_argument(
        "pairs",
        type=Path,
        metavar="PAIRS.csv",
        help=f"table with the columns {', '.join(REQUIRED)} and perhaps case, masks, and any option below",
    )
    add_output_option(parser, "folder for the results; an interrupted comparison goes on there")
    parser.add_argument(
        "--methods",
        default=DEFAULT,
        metavar="LIST",
        help="methods to compare, with the steps on the network's parameters and perhaps those of the refinement, "
        "as in projected:50+60 (default: %(default)s)",
    )
    parser.add_argument(
        "--every",
        type=partial(whole_number, least=1),
        default=10,
        metavar="N",
        help="measure Dice and NDV every N steps, for the curves",
    )
    parser.add_argument("--structures", type=whole_numbers, metavar="1,2,…", help="label values to measure (all but 0)")
    add_compute_options(parser, "this process alone")
    parser.add_argument("--quiet", action="store_true", help="print only the table")
    add_setting_options(parser, [name for name in SETTING_NAMES if name not in COMPARED])


def run(arguments: argparse.Namespace) -> int:
    """Run `gradprojio compare`: 0 done, 2 a pair must be corrected, 1 one failed otherwise."""
    comparison = Comparison(parse_settings(arguments.methods), arguments.every, arguments.structures)
    pairs, unusable = read_pairs(arguments.pairs, given_settings(arguments), required=REQUIRED, without=COMPARED)
    if comparison.on_network:
        pairs = [replace(pair, settings=_with_network(pair.settings)) for pair in pairs]
    job = Trajectories(comparison, _print_nothing if arguments.quiet else print_progress)
    outcomes = run_batch(pairs, unusable, arguments.output, arguments, job, here)
    if any(outcome.state not in (FAILED, OPEN) for outcome in outcomes):
        print((arguments.output / TABLE).read_text(encoding="utf-8"), end="")
        print(f"results in {arguments.output}, curves in {arguments.output / CURVES}")
    return exit_status(outcomes)


def print_progress(line: str) -> None:
    """Print a line where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)


def _print_nothing(line: str) -> None:
    pass


def _with_network(settings: Settings) -> Settings:
    """The settings with the network that "auto" takes for steps on its parameters."""
    return replace(settings, model=chosen_model(replace(settings, steps=1)))

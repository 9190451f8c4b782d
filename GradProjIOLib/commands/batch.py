"""``gradprojio batch``: a table of pairs, each into a folder of its own.

What other verbs for many pairs share with it is here, too: `add_compute_options`, `run_batch` and `exit_status`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from GradProjIOLib.batch import cluster, processes
from GradProjIOLib.batch import run as batch
from GradProjIOLib.batch.summary import PAGE
from GradProjIOLib.batch.tasks import DONE, FAILED, KEPT, OPEN, Job, Outcome
from GradProjIOLib.commands.options import add_output_option, add_setting_options, given_settings, whole_number
from GradProjIOLib.geometry.pairs import ROLES, Pair, read_pairs
from GradProjIOLib.models import registry

ROLES_USED = tuple(role for role in ROLES if role != "fixed_labels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "pairs",
        type=Path,
        metavar="PAIRS.csv",
        help="table with the columns fixed and moving, perhaps case (the name of the folder), and any option of "
        "`gradprojio register`, such as preset, model, moving_labels; paths are relative to the table",
    )
    add_output_option(
        parser, "folder for the folders of the pairs and for the summary; a batch that was interrupted goes on there"
    )
    add_compute_options(parser, "one per graphics card, else one")
    parser.add_argument("--quiet", action="store_true", help="print nothing but failures")
    options = parser.add_argument_group("options for all pairs whose row says nothing else")
    add_setting_options(options)


def run(arguments: argparse.Namespace) -> int:
    """Register all pairs: 0 when all are done, 1 when some failed, 2 when the table cannot be used."""
    pairs, unusable = read_pairs(arguments.pairs, given_settings(arguments), ROLES_USED)
    taken = {registry.chosen_model(pair.settings) for pair in pairs if pair.settings.model == "auto"}
    for name, note in registry.SUBSTITUTE_NOTES.items():
        if name in taken and not arguments.quiet:
            print(f"note: where no model is chosen: {note}", file=sys.stderr)
    outcomes = run_batch(pairs, unusable, arguments.output, arguments)
    if not arguments.quiet:
        counts = Counter(outcome.state for outcome in outcomes)
        print(f"{counts[DONE]} registered, {counts[KEPT]} were done before, {counts[FAILED]} failed")
        print(f"summary in {arguments.output / PAGE}")
    return int(any(outcome.state in (FAILED, OPEN) for outcome in outcomes))


def add_compute_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --workers and --scheduler; ``default`` says what happens without them."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=partial(whole_number, least=1),
        metavar="N",
        help=f"processes; they share the graphics cards, or the processor ({default})",
    )
    where.add_argument("--scheduler", metavar="ADDRESS", help="compute on the workers of this Dask scheduler")


def run_batch(
    pairs: Sequence[Pair],
    unusable: Mapping[str, str],
    folder: Path,
    arguments: argparse.Namespace,
    job: Job | None = None,
    compute: batch.Compute = processes.compute,
) -> list[Outcome]:
    """Do a job for all pairs, without one register them, and print what becomes of each.

    compute: where, unless --workers or --scheduler say it. Raises KeyboardInterrupt with what to tell the user.
    """
    if arguments.workers is not None:
        compute = partial(processes.compute, workers=arguments.workers)
    elif arguments.scheduler:
        compute = partial(cluster.compute, scheduler=arguments.scheduler)
    total, counts = len(pairs) + len(unusable), Counter[str]()

    def show(outcome: Outcome) -> None:
        counts[outcome.state] += 1
        if outcome.state == FAILED:
            print(f"gradprojio: {outcome.case}: {' '.join(outcome.message.split())}", file=sys.stderr)
            if outcome.details:
                print(outcome.details, file=sys.stderr)
        elif not getattr(arguments, "quiet", False):
            words = "is done" if outcome.state == DONE else "was done before"
            print(f"{counts.total()}/{total} {outcome.case}: {words}", file=sys.stderr, flush=True)

    try:
        return batch.run(pairs, folder, compute, on_outcome=show, failed=unusable, job=job)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f" with {counts[DONE] + counts[KEPT]} pairs done; nothing half is left in {folder}, and the same command "
            "goes on with the rest"
        ) from None


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 where all pairs are done; 2 where the user must change something; 1 where one failed for another reason."""
    failed = [outcome for outcome in outcomes if outcome.state in (FAILED, OPEN)]
    if any(outcome.kind != "input" for outcome in failed):
        return 1
    return 2 if failed else 0

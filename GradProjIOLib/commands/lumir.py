"""``gradprojio lumir``: displacement fields for the LUMIR challenge, packed and checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from GradProjIOLib.batch.lumir_fields import LumirFields
from GradProjIOLib.batch.run import here
from GradProjIOLib.batch.tasks import FAILED, OPEN
from GradProjIOLib.commands.batch import add_compute_options, exit_status, run_batch
from GradProjIOLib.commands.compare import print_progress
from GradProjIOLib.commands.options import add_setting_options, output_folder, settings_from, whole_numbers
from GradProjIOLib.evaluation import lumir, tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gradprojio lumir register` and `gradprojio lumir check`."""
    verbs = parser.add_subparsers(dest="lumir_verb", required=True, metavar="VERB")
    register = verbs.add_parser("register", help="register the validation pairs, pack the submission and check it")
    register.add_argument("data", type=Path, metavar="DATA", help=f"folder that holds {lumir.DATASET_FILE}")
    register.add_argument(
        "-o",
        "--output",
        type=zip_file,
        required=True,
        metavar="FILE.zip",
        help="the submission; its fields are also kept in the folder FILE, where an interrupted run goes on",
    )
    add_compute_options(register, "this process alone")
    add_setting_options(register)
    check = verbs.add_parser("check", help="measure a submission as the challenge does, as far as labels are there")
    check.add_argument("submission", type=Path, metavar="SUBMISSION", help="zip file, or folder of fields")
    check.add_argument("data", type=Path, metavar="DATA", help=f"folder that holds {lumir.DATASET_FILE}")
    for verb in (register, check):
        verb.add_argument(
            "--structures", type=whole_numbers, metavar="0,1,…", help="label values to measure (all, 0 included)"
        )
        verb.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")


def zip_file(text: str) -> Path:
    """The path of a submission, beside which the folder of its fields can be made."""
    if not text.lower().endswith(".zip"):
        raise argparse.ArgumentTypeError(f"{text} is no zip file; the challenge wants one")
    output_folder(text[: -len(".zip")])
    return Path(text)


def run(arguments: argparse.Namespace) -> int:
    """Run `gradprojio lumir`: 0 done, 2 something must be corrected, 1 a pair failed otherwise."""
    if arguments.lumir_verb == "register":
        submission = arguments.output
        if status := register_pairs(arguments):
            return status
    else:
        submission = arguments.submission
    rows, problems = lumir.check_submission(submission, arguments.data, arguments.structures, print_progress)
    if rows:
        print(tables.case_table(rows))
    if arguments.json:
        tables.write_json(tables.report(rows, problems, []), arguments.json)
    return 2 if problems else 0


def register_pairs(arguments: argparse.Namespace) -> int:
    """Register every pair whose field is not there yet, then pack them all; returns the exit status."""
    pairs, folder = lumir.validation_pairs(arguments.data, settings_from(arguments)), arguments.output.with_suffix("")
    outcomes = run_batch(pairs, {}, folder, arguments, LumirFields(), here)
    if status := exit_status(outcomes):
        missing = sum(outcome.state in (FAILED, OPEN) for outcome in outcomes)
        print_progress(f"gradprojio: {arguments.output} was not written: pairs without a field: {missing}")
        return status
    lumir.write_submission([folder / lumir.displacement_file(pair) for pair in pairs], arguments.output)
    return 0

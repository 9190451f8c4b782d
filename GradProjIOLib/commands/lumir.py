"""``gradprojio lumir``: displacement fields for the LUMIR challenge, packed and checked."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from GradProjIOLib.commands.options import add_setting_options, output_folder, settings_from, whole_numbers
from GradProjIOLib.errors import InputError
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
    """Run `gradprojio lumir`: 0 done, 2 something must be corrected, 1 a pair failed otherwise, 130 interrupted."""
    submission = arguments.output if arguments.lumir_verb == "register" else arguments.submission
    try:
        failed = register_pairs(arguments) if arguments.lumir_verb == "register" else []
    except KeyboardInterrupt:
        print("gradprojio: interrupted; the same command goes on with the next pair", file=sys.stderr)
        return 130
    if failed:
        print(f"gradprojio: {submission} was not written: pairs without a field: {len(failed)}", file=sys.stderr)
        return 1 if any(kind == "internal" for kind in failed) else 2
    rows, problems = lumir.check_submission(submission, arguments.data, arguments.structures, _say)
    if rows:
        print(tables.case_table(rows))
    if arguments.json:
        tables.write_json(tables.report(rows, problems, []), arguments.json)
    return 2 if problems else 0


def register_pairs(arguments: argparse.Namespace) -> list[str]:
    """Register every pair whose field is not there yet, then pack them all; returns what kind each failure was."""
    pairs, folder = lumir.read_pairs(arguments.data), arguments.output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_from(arguments)
    lumir.remember_settings(settings, folder)
    failed = []
    for number, pair in enumerate(pairs, start=1):
        path = folder / pair.displacement_file
        if path.exists():
            continue
        try:
            field, fixed = lumir.register_pair(pair, settings)
            lumir.write_displacement(field, fixed.affine, path)
            _say(f"{pair.name}: pair {number} of {len(pairs)} is done")
        except Exception as error:
            # The other pairs may well be in order.
            expected = isinstance(error, InputError)
            failed.append("input" if expected else "internal")
            _say(f"{pair.name}: {error}" if expected else traceback.format_exc())
    if not failed:
        lumir.write_submission([folder / pair.displacement_file for pair in pairs], arguments.output)
    return failed


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""``gradprojio batch``: a table of pairs, each into a folder of its own."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from GradProjIOLib.batch import processes
from GradProjIOLib.batch import run as batch
from GradProjIOLib.batch.pair import DONE, FAILED, FILE_ROLES, KEPT, OPEN, Outcome, Pair, failure
from GradProjIOLib.batch.summary import PAGE
from GradProjIOLib.commands import register
from GradProjIOLib.commands.options import add_output_option, add_setting_options, settings_from, whole_number
from GradProjIOLib.commands.parser import Parser
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import IMAGE_SUFFIXES
from GradProjIOLib.models import registry
from GradProjIOLib.settings import SETTING_NAMES

REQUIRED = ("fixed", "moving")
PATHS = (*FILE_ROLES, "weights")
NOT_IN_A_TABLE = ("help", "output", "quiet")
DELIMITERS = ",;\t"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "pairs",
        type=Path,
        metavar="PAIRS.csv",
        help="table with the columns fixed and moving, perhaps case (the name of the folder), and any option of "
        "`gradprojio register`, such as steps, model, moving_labels; paths are relative to the table",
    )
    add_output_option(
        parser, "folder for the folders of the pairs and for the summary; a batch that was interrupted goes on there"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=partial(whole_number, least=1),
        metavar="N",
        help="processes; they share the graphics cards, or the processor (one per graphics card, else one)",
    )
    where.add_argument("--scheduler", metavar="ADDRESS", help="compute on the workers of this Dask scheduler")
    parser.add_argument("--quiet", action="store_true", help="print nothing but failures")
    options = parser.add_argument_group("options for all pairs whose row says nothing else")
    add_setting_options(options)


def run(arguments: argparse.Namespace) -> int:
    """Register all pairs: 0 when all are done, 1 when some failed, 2 when the table cannot be used."""
    pairs, unusable = read_pairs(arguments.pairs, arguments)
    if arguments.model == "auto" and registry.default_model() == "compact" and not arguments.quiet:
        print(f"note: where no model is chosen: {registry.FALLBACK_NOTE}", file=sys.stderr)
    teller = _Teller(len(pairs) + len(unusable), arguments.quiet)
    for outcome in unusable:
        teller.tell(outcome)
    if arguments.scheduler:
        from GradProjIOLib.batch import cluster

        where: dict[str, Any] = {"compute": partial(cluster.compute, scheduler=arguments.scheduler)}
    else:
        where = {
            "compute": partial(processes.compute, workers=arguments.workers),
            "check_device": processes.check_device,
        }
    try:
        outcomes = batch.run(pairs, arguments.output, on_outcome=teller.tell, failed=unusable, **where)
    except KeyboardInterrupt:
        done = teller.counts[DONE] + teller.counts[KEPT]
        print(
            f"gradprojio: interrupted with {done} pairs done; nothing half is left in {arguments.output}, and the same "
            "command goes on with the rest",
            file=sys.stderr,
        )
        return 130
    teller.sum_up(arguments.output)
    return int(any(outcome.state in (FAILED, OPEN) for outcome in outcomes))


class _Teller:
    """One line on standard error for each pair, all of them at the end."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.quiet = total, quiet
        self.counts: Counter[str] = Counter()

    def tell(self, outcome: Outcome) -> None:
        self.counts[outcome.state] += 1
        if outcome.state == FAILED:
            print(f"gradprojio: {outcome.case}: {' '.join(outcome.message.split())}", file=sys.stderr)
            if outcome.details:
                print(outcome.details, file=sys.stderr)
        elif not self.quiet:
            number = sum(self.counts.values())
            print(f"{number}/{self.total} {outcome.case}: {_WORDS[outcome.state]}", file=sys.stderr, flush=True)

    def sum_up(self, folder: Path) -> None:
        if not self.quiet:
            counts = self.counts
            print(f"{counts[DONE]} registered, {counts[KEPT]} were done before, {counts[FAILED]} failed")
            print(f"summary in {folder / PAGE}")


_WORDS = {DONE: "registered", KEPT: "was done before"}


def read_pairs(path: Path, common: argparse.Namespace) -> tuple[list[Pair], list[Outcome]]:
    """The pairs in a table, and the rows that cannot be used, with the reason.

    Options that a row leaves empty are those in ``common``. Raises InputError where the file is no such table.
    """
    rows = _read_rows(path)
    parser = _RowParser(add_help=False)
    register.add_arguments(parser)
    names = {name: getattr(common, name) for name in SETTING_NAMES if hasattr(common, name)}
    parser.set_defaults(**names)
    options = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_A_TABLE}
    _check_columns(path, rows[0], {"case", *options})
    pairs, unusable = [], []
    for case, row in zip(_cases(path, rows), rows, strict=True):
        try:
            pairs.append(_pair(case, row, path.parent, parser, options))
        except InputError as error:
            unusable.append(failure(case, error))
    return pairs, unusable


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows with all their columns, with and without what is empty; names with underscores."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); save it as CSV in UTF-8.") from error
    first = next(iter(text.splitlines()), "")
    # Spreadsheets of many countries write semicolons.
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, restkey="")
    reader.fieldnames = [name.strip().lower().replace("-", "_") for name in reader.fieldnames or []]
    rows = [{name: value.strip() if isinstance(value, str) else value for name, value in row.items()}
            for row in reader if any(row.values())]  # fmt: skip
    if not rows:
        raise InputError(f"{path} has no row below its header.")
    for number, row in enumerate(rows, start=1):
        if isinstance(row.get(""), list) and any(row[""]):
            raise InputError(f"{path}: row {number} has more columns than the header; put quotes around commas.")
        row.pop("", None)
    return rows


def _check_columns(path: Path, row: dict[str, str], known: set[str]) -> None:
    missing = [name for name in REQUIRED if name not in row]
    unknown = [name for name in row if name not in known]
    if missing or unknown:
        problem = f"lacks the column {missing[0]}" if missing else f"has the unknown column {unknown[0]!r}"
        raise InputError(f"{path} {problem}; its columns may be {', '.join(sorted(known))}.")


def _cases(path: Path, rows: Sequence[dict[str, str]]) -> list[str]:
    """The name of each row's folder: its case, else made of the file names, and of a checksum where that is not
    enough. A row keeps its name when others come or go before it."""
    names = [row.get("case") or f"{_stem(row['moving'])}_to_{_stem(row['fixed'])}" for row in rows]
    counts = Counter(name.lower() for name in names)
    cases = []
    for name, row in zip(names, rows, strict=True):
        if counts[name.lower()] > 1 and not row.get("case"):
            name += "_" + hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:8]
        cases.append(name)
    twice = [case for case, count in Counter(case.lower() for case in cases).items() if count > 1]
    if twice:
        raise InputError(f"{path} has the same row or case twice ({twice[0]}); name the cases differently.")
    return cases


def _stem(name: str) -> str:
    stem = Path(name).name
    suffix = max((suffix for suffix in IMAGE_SUFFIXES if stem.lower().endswith(suffix)), key=len, default="")
    stem = stem.removesuffix(stem[len(stem) - len(suffix) :]) if suffix else stem
    return stem.lstrip(".") or "image"


def _pair(
    case: str, row: dict[str, str], folder: Path, parser: _RowParser, options: dict[str, argparse.Action]
) -> Pair:
    empty = [name for name in REQUIRED if not row[name]]
    if empty:
        raise InputError(f"The row names no {empty[0]} image; fill it in.")
    values = {
        name: str(folder / Path(value).expanduser()) if name in PATHS else value
        for name, value in row.items()
        if value and name != "case"
    }
    words = [word for name, value in values.items() if name not in REQUIRED for word in _words(options[name], value)]
    # Nothing in a table may be taken for an option but what stands in the column of that name.
    parsed = parser.parse_args(["-o", str(folder), *words, "--", *(values[name] for name in REQUIRED)])
    files = {role: getattr(parsed, role) for role in FILE_ROLES if getattr(parsed, role)}
    settings = settings_from(parsed)
    if settings.weights:
        settings = replace(settings, weights=str(Path(settings.weights).expanduser().absolute()))
    return Pair(case, settings=settings, **files)


def _words(action: argparse.Action, value: str) -> list[str]:
    """An option of the command line with the value in a cell."""
    option = max(action.option_strings, key=len)
    if action.nargs == 0:
        if value.lower() not in ("yes", "true", "1", "no", "false", "0"):
            raise InputError(f"The column {action.dest} holds {value!r}; write yes or no.")
        return [option] if value.lower() in ("yes", "true", "1") else []
    if action.nargs is None:
        return [f"{option}={value}"]
    return [option, *value.replace("x", " ").split()]


class _RowParser(Parser):
    """Says what is wrong with a row instead of ending the command."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"The row cannot be used: {message}.")

"""The parser of the command line, which tells a mistake in one sentence."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from GradProjIOLib.errors import InputError, suggestion


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError for a mistake, where argparse prints the usage and exits.

    Options cannot be abbreviated: an option that is added later would make a script's abbreviation ambiguous.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise InputError with the message and the command that explains the options."""
        raise InputError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """The parsed arguments, and an empty list: an argument that is not known is a mistake."""
        self._check_options(args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]!r} is not expected here")
        return parsed, []

    def _check_options(self, words: Iterable[str]) -> None:
        """Report a misspelled option before argparse reports what is missing because of it."""
        words = takewhile(lambda word: word != "--", words)
        if self._subparsers is not None:
            # What follows the verb is for the parser of the verb.
            words = takewhile(lambda word: word.startswith("-"), words)
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                close = difflib.get_close_matches(name, self._option_string_actions, 1)
                self.error(f"{name} is not known" + (f"; did you mean {close[0]}?" if close else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError, with a suggestion, for a value that is not among the choices."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} is not known; {suggestion(value, action.choices)}")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the required arguments alone in the usage, and each option with its default where it has one."""

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: Any = None) -> None:
        shown = [action for action in actions if action.required or not action.option_strings]
        # The options come after a verb. argparse passes an empty prefix where it only builds the name of a verb.
        if prefix != "" and all(action.nargs != argparse.PARSER for action in shown):
            shown.append(argparse.Action([], dest="options", nargs="?", metavar="options"))
        super().add_usage(usage, shown, [], prefix)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

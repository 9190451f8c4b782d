"""The command ``gradprojio``.

Exit status: 0 done; 2 the user must change something, and one line on standard error says what; 1 anything
else; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from GradProjIOLib import __version__
from GradProjIOLib.errors import InputError

VERBS = {
    "register": ("GradProjIOLib.commands.register", "register a moving image to a fixed one"),
    "warp": ("GradProjIOLib.commands.warp", "warp an image or labels with a transform"),
    "jacobian": ("GradProjIOLib.commands.jacobian", "determinant map and folding of a transform"),
    "models": ("GradProjIOLib.commands.models", "list the networks, fetch their weights"),
    "demo": ("GradProjIOLib.commands.demo", "register a pair of phantoms with a known deformation"),
    "batch": ("GradProjIOLib.commands.batch", "register many pairs, on this computer or a cluster"),
    "evaluate": ("GradProjIOLib.commands.evaluate", "overlap, distances and folding of results"),
    "compare": ("GradProjIOLib.commands.compare", "compare methods on pairs with labels, as the paper does"),
    "train": ("GradProjIOLib.commands.train", "train a network further, on images or synthetic pairs"),
    "lumir": ("GradProjIOLib.commands.lumir", "register and check the validation pairs of the LUMIR challenge"),
}
"""Each verb's module has ``add_arguments(parser)`` and ``run(arguments) -> int``; it is imported when asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(arguments[0] if arguments else None)
    options = parser.parse_args(arguments)
    try:
        with _terminated_like_interrupted():
            return importlib.import_module(VERBS[options.verb][0]).run(options)
    except InputError as error:
        print(f"gradprojio: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gradprojio: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradprojio", description="Deformable registration by instance optimisation with gradient projection."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (module, summary) in VERBS.items():
        subparser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # Only the verb that was asked for needs its options, and what it imports.
        if name == verb:
            importlib.import_module(module).add_arguments(subparser)
    return parser


class _terminated_like_interrupted:  # noqa: N801 - used like a function
    """A polite request to end (SIGTERM) cleans up as Ctrl-C does."""

    def __enter__(self) -> None:
        self.previous = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)

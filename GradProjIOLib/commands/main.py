"""The command ``gradprojio``.

Exit status: 0 done; 2 the user must change something, and one line on standard error says what; 1 anything
else; 130 interrupted.
"""

from __future__ import annotations

import codecs
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from GradProjIOLib import __version__
from GradProjIOLib.commands.parser import Parser
from GradProjIOLib.errors import InputError

VERBS = {
    "register": "register a moving image to a fixed one",
    "warp": "apply a transform to an image or a label map",
    "transform": "compose, invert and export transforms, map points and surfaces",
    "jacobian": "measure where a transform folds, and map its Jacobian determinant",
    "models": "list the networks, fetch their weights",
    "demo": "register a pair of phantoms with a known deformation",
    "batch": "register many pairs, on this computer or a cluster",
    "evaluate": "measure overlap, distances and folding of results",
    "compare": "compare methods on pairs with labels, as the paper does",
    "train": "train a network further, on images or synthetic pairs",
    "lumir": "register and check the validation pairs of the LUMIR challenge",
}
"""Each verb has a module of its name with ``add_arguments(parser)`` and ``run(arguments) -> int``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the arguments, or those of the process; returns the exit status.

    From then on SIGTERM raises KeyboardInterrupt in this process, as Ctrl-C does, so that temporary files are removed.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _say_everything()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = _parser(arguments).parse_args(arguments)
        status = _module(options.verb).run(options)
        # A reader of the output that has gone is noticed here, and not when Python exits.
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"gradprojio: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"gradprojio: interrupted{str(interrupt) or '; no result is half written'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would report it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog="gradprojio", description="Deformable registration by instance optimization with gradient projection."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", title="verbs", description="gradprojio VERB --help explains a verb."
    )
    for verb, summary in VERBS.items():
        subparser = verbs.add_parser(verb, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # Only the verb that was asked for needs its options, and what it imports.
        if verb in arguments[:1]:
            _module(verb).add_arguments(subparser)
    return parser


def _module(verb: str) -> Any:
    return importlib.import_module(f"GradProjIOLib.commands.{verb}")


def _say_everything() -> None:
    """Let the output take every character: arrows, and names of files in any script, also with LC_ALL=C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if codecs.lookup(stream.encoding).name == "ascii":
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
            elif stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")

"""``gradprojio models``: which networks there are, and their weights."""

from __future__ import annotations

import argparse
import sys

from GradProjIOLib.errors import InputError
from GradProjIOLib.models import registry, weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="list, unless you say otherwise")
    actions.add_parser("list", help="the networks, their licenses, and whether their weights are on this computer")
    for action, summary in (
        ("download", "fetch the published weights of a network"),
        ("path", "print where the weights are"),
    ):
        subparser = actions.add_parser(action, help=summary)
        subparser.add_argument("name", choices=tuple(registry.MODELS), metavar="NAME", help=", ".join(registry.MODELS))


def run(arguments: argparse.Namespace) -> int:
    """List, fetch or find."""
    if arguments.action in (None, "list"):
        for name, model in registry.MODELS.items():
            print(f"{name:14} {model.description}; {model.license}; {_state(name)}")
        return 0
    if arguments.action == "download":
        _download(arguments.name)
    path = registry.weights_path(arguments.name)
    if path is None:
        raise InputError(f"{arguments.name} has no trained weights in this version; it starts as the identity.")
    print(path)
    return 0


def _state(name: str) -> str:
    try:
        return "weights here" if registry.weights_path(name) else "no trained weights yet: needs optimization steps"
    except InputError:
        return "weights not on this computer"


def _download(name: str) -> None:
    import tqdm

    url = registry.MODELS[name].url
    if url is None:
        raise InputError(f"{name} needs no download: its weights come with the package.")
    with tqdm.tqdm(unit="B", unit_scale=True, desc=name, disable=not sys.stderr.isatty()) as bar:

        def on_progress(received: int, total: int | None) -> None:
            bar.total = total
            bar.update(received - bar.n)

        weights.download(name, url, on_progress=on_progress)
    # Reading it once tells at once whether the file is good, and keeps its checksum.
    registry.load(name)

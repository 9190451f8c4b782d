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
            state = "weights not on this computer" if registry.missing_url(name) else "weights here"
            print(f"{name:14} {model.description}; {model.license}; {state}")
        return 0
    if arguments.action == "download":
        _download(arguments.name)
    print(registry.weights_path(arguments.name))
    return 0


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

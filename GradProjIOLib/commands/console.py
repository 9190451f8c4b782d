"""What the verbs show in the terminal: the progress of a registration, and what came out of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.registration.result import Registration
from GradProjIOLib.settings import Settings


@contextmanager
def progress_bar(settings: Settings, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """A progress bar on a terminal, with both losses; elsewhere and with ``quiet`` nothing.

    Gives the callbacks for ``register``.
    """
    import tqdm

    total = 0 if settings.method == "direct" else settings.steps
    conflicts = 0
    with tqdm.tqdm(total=total, unit="step", disable=quiet or not sys.stderr.isatty(), leave=False) as bar:

        def start(_: Any) -> None:
            # The time before the first step, or of steps that did not fit into memory, says nothing about the rest.
            bar.reset()

        def show(step: Step) -> None:
            nonlocal conflicts
            conflicts += step.projected not in (None, "none")
            bar.set_postfix_str(
                f"similarity {step.similarity:.4f}, regularity {step.regularity:.4f}, {conflicts} conflicts",
                refresh=False,
            )
            bar.update()

        yield {"on_start": start, "on_step": show}


def print_summary(result: Registration, folder: Path) -> None:
    """What came out, and what the user should know about it, in a few lines."""
    report = result.report
    found = report["jacobian"]
    print(
        f"{report['model']['name']}, {report['settings']['method']}, {len(report['steps'])} steps on "
        f"{report['device']['name']} in {report['seconds']:.1f} s"
    )
    print(f"similarity loss {report['similarity']:.4f}, regularity loss {report['regularity']:.5f}")
    print(
        f"folded voxels {found['folded_voxels']} ({found['folded_percent']:.4f} %), "
        f"non-diffeomorphic volume {found['ndv_percent']:.4f} %, "
        f"determinant {found['min']:.3f} to {found['max']:.3f}"
    )
    print(f"results in {folder}, pictures in {folder / 'overview.png'}")
    for warning in report["warnings"]:
        print(f"note: {warning}", file=sys.stderr)

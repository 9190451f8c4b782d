"""What the verbs show in the terminal about the result of a registration."""

from __future__ import annotations

import sys
from pathlib import Path

from GradProjIOLib.registration.result import Registration, model_in_words, steps_in_words
from GradProjIOLib.report.line import beginning, guidance, is_worse


def print_summary(result: Registration, folder: Path) -> None:
    """What came out, and what the user should know about it, in a few lines."""
    report = result.report
    found = report["jacobian"]
    print(
        f"{model_in_words(report)}, {report['settings']['method']}, {steps_in_words(report)} on "
        f"{report['device']['name']} in {report['seconds']:.1f} s"
    )
    print(
        f"similarity loss {report['similarity_before']:z.4f} → {report['similarity']:z.4f}"
        f"{' (worse than before)' if is_worse(report) else ''}, "
        f"regularity loss {report['regularity']:.5f}"
    )
    if report["levels"]:
        lattices = ", ".join("x".join(map(str, reversed(level))) for level in report["levels"])
        print(f"refinement from {beginning(report)} on {lattices} samples")
    print(
        f"folded voxels {found['folded_voxels']} ({found['folded_percent']:.4f} %), "
        f"non-diffeomorphic volume {found['ndv_percent']:.4f} %, "
        f"determinant {found['min']:.3f} to {found['max']:.3f}"
    )
    if guides := guidance(report):
        print(guides)
    print(f"results in {folder}, pictures in {folder / 'overview.png'}")
    for warning in report["warnings"]:
        print(f"note: {warning}", file=sys.stderr)

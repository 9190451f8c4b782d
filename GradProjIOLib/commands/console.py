"""What the verbs show in the terminal about the result of a registration."""

from __future__ import annotations

import sys
from pathlib import Path

from GradProjIOLib.registration.result import Registration, count_steps
from GradProjIOLib.report.line import guidance


def print_summary(result: Registration, folder: Path) -> None:
    """What came out, and what the user should know about it, in a few lines."""
    report = result.report
    found = report["jacobian"]
    before, after = report["similarity_before"], report["similarity"]
    print(
        f"{report['model']['name']}, {report['settings']['method']}, {count_steps(report)} on "
        f"{report['device']['name']} in {report['seconds']:.1f} s"
    )
    print(
        f"similarity loss {before:.4f} → {after:.4f}{' (worse than before)' if after > before else ''}, "
        f"regularity loss {report['regularity']:.5f}"
    )
    if report["levels"]:
        beginning = "the network's deformation" if report["start"] == "network" else "no deformation"
        lattices = ", ".join("x".join(map(str, reversed(level))) for level in report["levels"])
        print(f"refinement from {beginning} on {lattices} samples")
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

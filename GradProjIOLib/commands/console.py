"""What the verbs show in the terminal about the result of a registration."""

from __future__ import annotations

import sys
from pathlib import Path

from GradProjIOLib.registration.result import Registration


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

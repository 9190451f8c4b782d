"""From how far apart does a registration find its way? With the compact network, without any, and with alignment.

    python Testing/benchmarks/capture_range.py ../shared/data [--preset quick] [--json FILE]

The moving brain of the aligned pair is turned, shifted or scaled about the middle of its view before it is registered.
The table has the mean Dice before and after.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from GradProjIOLib.evaluation.metrics import evaluate_labels
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.register import register

AXIS = np.array([1.0, 1, 1]) / np.sqrt(3)
"""Of rotations and translations."""
MOVES = {
    "as it is": np.eye(3),
    **{f"turned by {angle}°": Rotation.from_rotvec(AXIS * angle, degrees=True).as_matrix() for angle in (5, 10, 20)},
    **{f"scaled by {scale}": scale * np.eye(3) for scale in (0.85, 1.2)},
}
SHIFTS = {f"shifted by {length} mm": length * AXIS for length in (5, 10, 20)}
METHODS = {
    "none": {"model": "none"},
    "compact": {"model": "compact"},
    "none, --align affine": {"model": "none", "align": "affine"},
}


def moved(volume: Volume, linear: np.ndarray, shift: np.ndarray) -> Volume:
    """The volume turned and scaled about the middle of its view, then shifted, mm."""
    center = (volume.affine @ [*((np.array(volume.shape[::-1]) - 1) / 2), 1])[:3]
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, center - linear @ center + shift
    return replace(volume, affine=matrix @ volume.affine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [options.folder / f"aligned_subject_{subject}" for subject in "ba"]
    fixed, moving = (read_volume(f"{name}.nii.gz") for name in names)
    labels, moving_labels = (read_labels(f"{name}_labels.nii.gz") for name in names)
    cases = {name: (linear, np.zeros(3)) for name, linear in MOVES.items()}
    cases |= {name: (np.eye(3), shift) for name, shift in SHIFTS.items()}
    rows = []
    print(
        "| moving image | before |", *(f" {name} |" for name in METHODS), "\n|---|---|", "---|" * len(METHODS), sep=""
    )
    for case, (linear, shift) in cases.items():
        source, source_labels = moved(moving, linear, shift), moved(moving_labels, linear, shift)
        row = {"case": case}
        for name, settings in METHODS.items():
            found = register(fixed, source, preset=options.preset, device="cpu", **settings)
            overlap = evaluate_labels(found.forward, labels, source_labels)
            row |= {"before": overlap["dice_before"], name: overlap["dice"]}
        rows.append(row)
        print(f"| {case} |", *(f" {row[name]:.3f} |" for name in ("before", *METHODS)), sep="", flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the options of a registration cost and win on a real pair with labels.

python Testing/benchmarks/real_pair.py FOLDER [--steps 50] [--device cpu] [--json FILE]

FOLDER holds aligned_subject_{a,b}.nii.gz and aligned_subject_{a,b}_labels.nii.gz; b is fixed, a is moving. Every row is
one whole registration in this process; "distance" is how far its deformation is from that of the first row, on average
over the voxels with labels. On a processor, where the precision "fast" changes nothing, its row shows what TF32 would
do to the gradients.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tf32 import RoundedGradients

from GradProjIOLib import resources
from GradProjIOLib.deformation import Deformation
from GradProjIOLib.evaluation import dice_of
from GradProjIOLib.precision import has_tf32
from GradProjIOLib.registration import Settings, register
from GradProjIOLib.sampling import lattice_points
from GradProjIOLib.volume import Volume, read_labels, read_volume

FAST = "fast"


def variants(steps: int) -> dict[str, dict[str, Any]]:
    """Names of rows and the settings that differ from the first's."""
    return {
        "projected": {},
        "lean": {"memory": "lean"},
        FAST: {"precision": "fast"},
        "half of the steps coarse": {"coarse_steps": steps // 2},
        "stop on a plateau": {"steps": 2 * steps, "stop": "plateau"},
        "folding budget 0": {"folding_budget": 0.0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    images = {name: read_volume(options.folder / f"aligned_subject_{name}.nii.gz") for name in "ab"}
    labels = {name: read_labels(options.folder / f"aligned_subject_{name}_labels.nii.gz") for name in "ab"}
    points = lattice_points(images["b"].shape, images["b"].affine)[labels["b"].array > 0]
    rows: dict[str, dict[str, Any]] = {}
    first = None
    print(f"{'':26}{'Dice':>8}{'folded':>8}{'steps':>7}{'s/step':>8}{'seconds':>9}{'distance mm':>13}")
    for name, more in variants(options.steps).items():
        settings = Settings(**{"model": "compact", "steps": options.steps, "device": options.device} | more)
        simulated = name == FAST and not has_tf32(resources.find_device(options.device))
        with RoundedGradients() if simulated else nullcontext():
            found = register(images["b"], images["a"], settings)
        mapped = found.forward.map_points(points)
        first = mapped if first is None else first
        report = found.report
        rows[name] = {
            "settings": more,
            "simulated": simulated,
            "dice": _dice(found.forward, labels, images["b"]),
            "folded_voxels": report["jacobian"]["folded_voxels"],
            "steps": len(report["steps"]),
            "stopped": report["stopped"],
            "seconds_per_step": statistics.median(step["seconds"] for step in report["steps"]),
            "seconds": report["seconds"],
            "distance_mm": float(np.linalg.norm(mapped - first, axis=1).mean()),
        }
        row = rows[name]
        print(f"{name:26}{row['dice']:8.4f}{row['folded_voxels']:8}{row['steps']:7}{row['seconds_per_step']:8.2f}"
              f"{row['seconds']:9.1f}{row['distance_mm']:13.3f}", flush=True)  # fmt: skip
    if options.json:
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                        "device": resources.describe_device(resources.find_device(options.device))},
            "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _dice(deformation: Deformation, labels: dict[str, Volume], fixed: Volume) -> float:
    structures = [int(label) for label in np.unique(labels["b"].array) if label]
    return float(
        np.nanmean(dice_of(labels["b"].array, deformation.warp(labels["a"], fixed, "nearest").array, structures))
    )


if __name__ == "__main__":
    main()

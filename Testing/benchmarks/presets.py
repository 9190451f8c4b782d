"""What the presets reach on real pairs: overlap, folding and time, as a Markdown table.

    python Testing/benchmarks/presets.py ../shared/data [--pairs brain,spine] [--presets quick,standard] [--json FILE]

Each registration runs in a process of its own, with two threads, and its time includes reading the images.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from GradProjIOLib import __version__
from GradProjIOLib.evaluation.metrics import dice_of, hd95
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.registration.register import register

BRAIN = {"model": "compact"}
OTHER = {"model": "none", "similarity": "mind"}
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "brain": ("aligned_subject_b", "aligned_subject_a", BRAIN),
    "brain back": ("aligned_subject_a", "aligned_subject_b", BRAIN),
    "brain without network": ("aligned_subject_b", "aligned_subject_a", {"model": "none"}),
    "native brain": ("native_subject_b", "native_subject_a", BRAIN | {"align": "affine"}),
    "prostate 0": ("prostate_0_us", "prostate_0_mr", OTHER),
    "prostate 1": ("prostate_1_us", "prostate_1_mr", OTHER),
    "spine": ("spine_t2", "spine_t1", OTHER),
}


def measure(folder: Path, name: str, preset: str) -> dict[str, Any]:
    """One registration of one pair and its figures."""
    torch.set_num_threads(2)
    fixed_name, moving_name, settings = PAIRS[name]
    start = time.perf_counter()
    fixed, moving = (read_volume(folder / f"{image}.nii.gz") for image in (fixed_name, moving_name))
    result = register(fixed, moving, preset=preset, device="cpu", **settings)
    seconds = time.perf_counter() - start
    labels = [read_labels(folder / f"{image}_labels.nii.gz") for image in (fixed_name, moving_name)]
    if name.startswith("prostate"):
        labels = [replace(one, array=(one.array > 0).astype(np.uint8)) for one in labels]
    structures = [int(label) for label in np.unique(labels[0].array) if label]
    warped = result.forward.warp(labels[1], fixed, "nearest").array
    found = result.report["jacobian"]
    return {
        "pair": name,
        "preset": preset,
        "dice": float(np.nanmean(dice_of(labels[0].array, warped, structures))),
        "hd95_mm": float(np.nanmean([hd95(labels[0].array == s, warped == s, fixed.spacing) for s in structures])),
        "folded_percent": found["folded_percent"],
        "ndv_percent": found["ndv_percent"],
        "start": result.report["start"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--presets", default="quick,standard,thorough")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(
        "| pair | preset | Dice | HD95 [mm] | folded % | NDV % | start | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    for name in options.pairs.split(","):
        for preset in options.presets.split(","):
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                row = process.submit(measure, options.folder, name, preset).result()
            rows.append(row)
            print(
                f"| {name} | {preset} | {row['dice']:.4f} | {row['hd95_mm']:.2f} | {row['folded_percent']:.5f} | "
                f"{row['ndv_percent']:.5f} | {row['start']} | {row['seconds']:.0f} |",
                flush=True,
            )
    if options.json:
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "machine": {"system": platform.platform(), "torch": torch.__version__, "threads": 2},
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

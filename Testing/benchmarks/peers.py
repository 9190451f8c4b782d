"""Presets and peers on real pairs: overlap, landmarks, folding, time and memory, as a Markdown table.

    python Testing/benchmarks/peers.py ../shared/data [--pairs brain,spine] [--methods quick,standard,SyNOnly] \\
        [--peer ants=ENVIRONMENT/bin/python --peer elastix=…] [--json FILE]

A method is the name of a preset, with settings after it where they differ ("standard:method=vanilla"), or a key of
PEERS, for which --peer names an interpreter that has the package. Each registration runs in a process
of its own, one after the other, with two threads, and its time includes reading the images. Its memory is the peak of
that process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from GradProjIOLib import __version__
from GradProjIOLib.evaluation.metrics import dice_of, evaluate_folding, hd95, landmark_distances
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.inverse import round_trip
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import PRESETS
from GradProjIOLib.spatial.deformation import Deformation

BRAIN = {"model": "compact"}
OTHER = {"model": "none", "similarity": "mind"}
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "brain": ("aligned_subject_b", "aligned_subject_a", BRAIN),
    "brain back": ("aligned_subject_a", "aligned_subject_b", BRAIN),
    "native brain": ("native_subject_b", "native_subject_a", BRAIN | {"align": "affine"}),
    "prostate 0": ("prostate_0_us", "prostate_0_mr", OTHER),
    "prostate 1": ("prostate_1_us", "prostate_1_mr", OTHER),
    "spine": ("spine_t2", "spine_t1", OTHER),
}
PEERS = {
    "SyNOnly": "ants",
    "SyN": "ants",
    "B-spline": "elastix",
    "ConvexAdam": "convexadam",
    "FireANTs": "fireants",
}
"""Methods of others and who runs them: peer_….py, each with an interpreter of its own."""
THREADS = 2


def measure_ours(folder: Path, name: str, method: str) -> dict[str, Any]:
    """One of our registrations of one pair and its figures."""
    torch.set_num_threads(THREADS)
    fixed_name, moving_name, settings = PAIRS[name]
    preset, *changes = method.split(":")
    start = time.perf_counter()
    fixed, moving = (read_volume(folder / f"{image}.nii.gz") for image in (fixed_name, moving_name))
    changed = {key: _value(text) for key, text in (change.split("=") for change in changes)}
    result = register(fixed, moving, preset=preset, device="cpu", **(settings | changed))
    seconds = time.perf_counter() - start
    fixed_labels, moving_labels = (
        read_labels(folder / f"{image}_labels.nii.gz") for image in (fixed_name, moving_name)
    )
    warped = result.forward.warp(moving_labels, fixed, "nearest")
    report = result.report
    return _figures(name, fixed_labels, moving_labels, warped, result.forward) | {
        "inverse_error_mm": report["inverse_error_mm"]["mean"],
        "similarity": report["similarity"],
        "regularity": report["regularity"],
        "conflicts": float(np.mean([step["projected"] not in (None, "none") for step in report["steps"]] or [0])),
        "start": report["start"],
        "seconds": seconds,
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def measure_peer(folder: Path, name: str, method: str, python: str) -> dict[str, Any]:
    """One of the peers' registrations of one pair and its figures."""
    fixed_name, moving_name, _ = PAIRS[name]
    files = [
        str(folder.resolve() / file)
        for file in (f"{fixed_name}.nii.gz", f"{moving_name}.nii.gz", f"{moving_name}_labels.nii.gz")
    ]
    with tempfile.TemporaryDirectory() as written:
        script = Path(__file__).resolve().with_name(f"peer_{PEERS[method]}.py")
        threads = {name: str(THREADS) for name in ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS")}
        command = [os.path.abspath(python), str(script), *files, method, written]
        printed = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | threads, cwd=written
        ).stdout
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        fixed_labels, moving_labels = _labels(folder, name)
        deformation = Deformation.read(Path(written) / "warp.nii.gz")
        labels = Path(written) / "labels.nii.gz"
        warped = read_labels(labels) if labels.exists() else deformation.warp(moving_labels, fixed_labels, "nearest")
        inverse_error = None
        if (Path(written) / "inverse.nii.gz").exists():
            inverse = Deformation.read(Path(written) / "inverse.nii.gz")
            inverse_error = round_trip(deformation, inverse, fixed_labels, moving_labels)["mean"]
    figures = _figures(name, fixed_labels, moving_labels, warped, deformation)
    if PEERS[method] == "ants":
        # ANTs' stages are separate transforms, of which only the labels saw all.
        figures["landmarks_mm"] = float("nan")
    figures["inverse_error_mm"] = inverse_error
    return figures | {"seconds": float(printed.split()[-1]), "memory_gb": memory / 2**20}


def _labels(folder: Path, name: str) -> list[Volume]:
    """The labels of the fixed and of the moving image."""
    return [read_labels(folder / f"{image}_labels.nii.gz") for image in PAIRS[name][:2]]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _figures(name: str, fixed: Volume, moving: Volume, warped: Volume, deformation: Deformation) -> dict[str, Any]:
    """Overlap of labels, distance of landmarks, and folding."""
    before_mm = after_mm = float("nan")
    if name.startswith("prostate"):
        # The gland is all labels; two of them are landmarks by their centroids.
        targets, sources = (np.array([_centroid(one, label) for label in (2, 3)]) for one in (fixed, moving))
        before_mm = float(np.mean(landmark_distances(targets, sources)))
        after_mm = float(np.mean(landmark_distances(deformation.map_points(targets), sources)))
        fixed, warped = (replace(one, array=(one.array > 0).astype(np.uint8)) for one in (fixed, warped))
    structures = [int(label) for label in np.unique(fixed.array) if label]
    folds, _ = evaluate_folding(deformation, fixed)
    return {
        "dice": float(np.nanmean(dice_of(fixed.array, warped.array, structures))),
        "hd95_mm": float(np.nanmean([hd95(fixed.array == s, warped.array == s, fixed.spacing) for s in structures])),
        "landmarks_before_mm": before_mm,
        "landmarks_mm": after_mm,
        "folded_percent": 100 * folds.folded_voxels / fixed.array.size,
        "ndv_percent": folds.ndv_percent,
        "std_log_jacobian": folds.std_log_jacobian,
    }


def _centroid(labels: Volume, label: int) -> np.ndarray:
    return apply_matrix(labels.affine, np.argwhere(labels.array == label).mean(axis=0)[::-1])


def _in_process(arguments: list[str]) -> dict[str, Any]:
    """What one measurement prints, which a process of its own makes."""
    command = [sys.executable, __file__, *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


COLUMNS = {
    "Dice": ("dice", ".4f"),
    "HD95 [mm]": ("hd95_mm", ".2f"),
    "landmarks [mm]": ("landmarks_mm", ".2f"),
    "folded %": ("folded_percent", ".5f"),
    "NDV %": ("ndv_percent", ".5f"),
    "SD log J": ("std_log_jacobian", ".3f"),
    "inverse [mm]": ("inverse_error_mm", ".3f"),
    "similarity loss": ("similarity", ".4f"),
    "conflicts": ("conflicts", ".0%"),
    "start": ("start", ""),
    "seconds": ("seconds", ".0f"),
    "memory [GB]": ("memory_gb", ".1f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--methods", default="quick,standard,thorough")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("PAIR", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    pythons = dict(one.split("=", 1) for one in options.peer)
    for method in options.methods.split(","):
        if method in PEERS and PEERS[method] not in pythons:
            parser.error(f"{method} needs --peer {PEERS[method]}=PYTHON")
        if method not in PEERS and method.split(":")[0] not in PRESETS:
            parser.error(f"{method} is neither a preset nor one of {', '.join(PEERS)}")
    if options.one:
        name, method = options.one
        if method in PEERS:
            found = measure_peer(options.folder, name, method, pythons[PEERS[method]])
        else:
            found = measure_ours(options.folder, name, method)
        print(json.dumps(found))
        return
    rows = []
    print("| pair | method |", *(f" {title} |" for title in COLUMNS), "\n|---|---|", "---|" * len(COLUMNS), sep="")
    for name in options.pairs.split(","):
        for method in options.methods.split(","):
            peers = [f"--peer={one}" for one in options.peer]
            row = {"pair": name, "method": method} | _in_process([str(options.folder), "--one", name, method, *peers])
            rows.append(row)
            cells = [_cell(row.get(key), form) for key, form in COLUMNS.values()]
            print(f"| {name} | {method} |", *(f" {cell} |" for cell in cells), sep="", flush=True)
            if options.json:
                # After each one, as later ones may fail.
                options.json.write_text(json.dumps(_report(rows), indent=1) + "\n", encoding="utf-8")


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": {"system": platform.platform(), "torch": torch.__version__, "threads": THREADS},
        "rows": rows,
    }


def _cell(value: Any, form: str) -> str:
    return "" if value is None or value != value else format(value, form)


if __name__ == "__main__":
    main()

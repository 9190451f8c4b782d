"""Presets and peers on real pairs: overlap, landmarks, folding, time and memory, as a Markdown table.

    python Testing/benchmarks/peers.py ../shared/data [--pairs brain,spine] [--methods quick,standard,SyNOnly] \\
        [--peer ants=ENVIRONMENT/bin/python --peer elastix=…] [--json FILE]
    python Testing/benchmarks/peers.py PAIRS.csv --methods …

PAIRS.csv has the columns case, fixed, moving, and where there are such files fixed_labels, moving_labels, fixed_points
and moving_points; columns such as model, similarity and align set how a pair is registered.

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_pairs import RealPair, pairs_of

from GradProjIOLib import __version__
from GradProjIOLib.registration.inverse import round_trip
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import PRESETS
from GradProjIOLib.spatial.deformation import Deformation

PEERS = {
    "SyNOnly": "ants",
    "SyN": "ants",
    "B-spline": "elastix",
    "ConvexAdam": "convexadam",
    "FireANTs": "fireants",
}
"""Methods of others and who runs them: peer_….py, each with an interpreter of its own."""
THREADS = 2


def measure_ours(pair: RealPair, method: str) -> dict[str, Any]:
    """One of our registrations of one pair and its figures."""
    torch.set_num_threads(THREADS)
    preset, *changes = method.split(":")
    changed = {key: _value(text) for key, text in (change.split("=") for change in changes)}
    start = time.perf_counter()
    result = register(*pair.images(), preset=preset, device="cpu", **(pair.settings | changed))
    seconds = time.perf_counter() - start
    report = result.report
    return pair.figures(result.forward) | {
        "inverse_error_mm": report["inverse_error_mm"]["mean"],
        "similarity": report["similarity"],
        "regularity": report["regularity"],
        "conflicts": float(np.mean([step["projected"] not in (None, "none") for step in report["steps"]] or [0])),
        "start": report["start"],
        "seconds": seconds,
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def measure_peer(pair: RealPair, method: str, python: str) -> dict[str, Any]:
    """One of the peers' registrations of one pair and its figures."""
    with tempfile.TemporaryDirectory() as written:
        script = Path(__file__).resolve().with_name(f"peer_{PEERS[method]}.py")
        threads = {name: str(THREADS) for name in ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS")}
        command = [os.path.abspath(python), str(script), str(pair.fixed), str(pair.moving), method, written]
        printed = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | threads, cwd=written
        ).stdout
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        deformation = Deformation.read(Path(written) / "warp.nii.gz")
        inverse_error = None
        if (Path(written) / "inverse.nii.gz").exists():
            inverse = Deformation.read(Path(written) / "inverse.nii.gz")
            inverse_error = round_trip(deformation, inverse, *pair.images())["mean"]
    return pair.figures(deformation) | {
        "inverse_error_mm": inverse_error,
        "seconds": float(printed.split()[-1]),
        "memory_gb": memory / 2**20,
    }


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _in_process(arguments: list[str]) -> dict[str, Any]:
    """What one measurement prints, which a process of its own makes."""
    command = [sys.executable, __file__, *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


COLUMNS = {
    "before": ("dice_before", ".3f"),
    "Dice": ("dice", ".4f"),
    "HD95 [mm]": ("hd95_mm", ".2f"),
    "landmarks [mm]": ("tre_mm", ".2f"),
    "folded %": ("folded_percent", ".5f"),
    "NDV %": ("ndv_percent", ".2g"),
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
    parser.add_argument("source", type=Path, help="the folder of real data, or a table of pairs (.csv)")
    parser.add_argument("--pairs", help="the names of those that are wanted, separated by commas (all)")
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
    pairs = pairs_of(options.source)
    if options.one:
        name, method = options.one
        if method in PEERS:
            found = measure_peer(pairs[name], method, pythons[PEERS[method]])
        else:
            found = measure_ours(pairs[name], method)
        print(json.dumps(found))
        return
    rows = []
    print("| pair | method |", *(f" {title} |" for title in COLUMNS), "\n|---|---|", "---|" * len(COLUMNS), sep="")
    for name in options.pairs.split(",") if options.pairs else pairs:
        for method in options.methods.split(","):
            peers = [f"--peer={one}" for one in options.peer]
            row = {"pair": name, "method": method} | _in_process([str(options.source), "--one", name, method, *peers])
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

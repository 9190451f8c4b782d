"""What the refinement's constants gain: Dice on real pairs with each of them changed.

    python Testing/benchmarks/constants.py ../shared/data [--pairs brain,spine] [--only LEAST_SLOPE,…] [--json FILE]

Preset "quick" without a network, on a million samples, so that all of them can be compared in minutes. The first row
has the constants as they are; each other row changes one. Differences below the spread of the seeds in
Docs/projection.md say nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

from real_pairs import pairs_of

from GradProjIOLib.registration import refinement
from GradProjIOLib.registration.register import register

SETTINGS = {"preset": "quick", "model": "none", "samples": 1_000_000, "device": "cpu"}
OTHERS = {
    "LEAST_SLOPE": (0.01, 0.02, 0.05, 0.1),
    "SHARED_VARIANCE": (0.0, 1e-5, 1e-3),
    "LNCC_STRIDE": (2, 6),
    "COARSER_LEVELS": (1, 3),
    "FOLDING_WEIGHT": (0.0, 10.0, 1000.0),
}
"""Constants of ``registration.refinement`` and other values for them."""
FACTORS = {"regularity_weight": (0.5, 2.0), "smoothing": (0.67, 1.5), "learning_rate": (0.5, 2.0)}
"""Fields of each ``Tuning`` and what to multiply them by."""


@contextmanager
def changed(name: str, value: float) -> Iterator[None]:
    """A constant with another value."""
    if name in OTHERS:
        with mock.patch.object(refinement, name, value):
            yield
        return
    tunings = {
        similarity: replace(tuning, **{name: getattr(tuning, name) * value})
        for similarity, tuning in refinement.TUNINGS.items()
    }
    with mock.patch.object(refinement, "TUNINGS", tunings):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder of real data, or a table of pairs (.csv)")
    parser.add_argument("--pairs", default="brain,brain back,prostate 0,prostate 1,spine")
    parser.add_argument("--only", help="names of the constants to change (all)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = pairs_of(options.source)
    pairs = {name: known[name] for name in options.pairs.split(",")}
    images = {name: pair.images() for name, pair in pairs.items()}
    names = options.only.split(",") if options.only else [*OTHERS, *FACTORS]
    variants = [("nothing", None), *((name, value) for name in names for value in (OTHERS | FACTORS)[name])]
    titles = [*pairs, "NDV %", "seconds"]
    print("| changed |", *(f" {title} |" for title in titles), "\n|---|", "---|" * len(titles), sep="")
    rows = []
    for name, value in variants:
        found, start = {}, time.perf_counter()
        with nullcontext() if value is None else changed(name, value):
            for pair_name, pair in pairs.items():
                result = register(*images[pair_name], **(pair.settings | SETTINGS))
                found[pair_name] = pair.figures(result.forward)
        seconds = time.perf_counter() - start
        dice, ndv = ([one[key] for one in found.values()] for key in ("dice", "ndv_percent"))
        rows.append({"name": name, "value": value, "seconds": seconds, "dice": dict(zip(pairs, dice, strict=True))})
        times = " × " if name in FACTORS else " "
        cells = [*(f"{one:.4f}" for one in dice), f"{max(ndv):.1g}", f"{seconds:.0f}"]
        print(f"| {name}{'' if value is None else f'{times}{value:g}'} |", *(f" {cell} |" for cell in cells), sep="")
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

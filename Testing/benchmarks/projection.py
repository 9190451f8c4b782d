"""Does projection help? Vanilla against every projection rule, over pairs and seeds, in both stages.

    python Testing/benchmarks/projection.py ../shared/data [--pairs brain,spine] [--seeds 5] [--json FILE]

Each pair is registered with each seed by vanilla optimization and by each projection rule, with the same number of
steps, and by vanilla optimization with as many more steps as a projected step takes more time (STAGES). To afford
that, lattices are coarse. The table shows the mean difference from vanilla with the same steps: the mean over pairs of
the mean over seeds, with the interval that holds the mean of all such pairs with 95 % (Student's t over pairs).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from real_pairs import RealPair, pairs_of
from scipy import stats

from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import PROJECTION_RULES

STAGES: dict[str, tuple[dict[str, Any], str, float]] = {
    "refinement": ({"model": "none", "refine_steps": 40, "samples": 150_000}, "refine_steps", 1.1),
    "network": ({"model": "compact", "steps": 20, "refine_steps": 0, "lattice": (48, 56, 40)}, "steps", 1.3),
}
"""For each stage its settings, which of them is the number of steps, and how many times as long a projected step takes.

The last is from Docs/benchmarks.md.
"""
MEASURES = ("dice", "similarity", "regularity", "folded_percent", "conflicts")


def methods(steps: int, name: str, longer: float) -> dict[str, dict[str, Any]]:
    """The settings of each method that is compared."""
    projected = {rule: {"method": "projected", "projection": rule} for rule in PROJECTION_RULES}
    return {
        "vanilla": {"method": "vanilla"},
        "vanilla, equal seconds": {"method": "vanilla", name: round(longer * steps)},
    } | projected


def measure(pair: RealPair, name: str, stage: str, seeds: int) -> list[dict[str, Any]]:
    """All methods and seeds for one pair."""
    images = pair.images()
    settings, steps, longer = STAGES[stage]
    rows = []
    for method, changes in methods(settings[steps], steps, longer).items():
        for seed in range(seeds):
            start = time.perf_counter()
            found = register(*images, device="cpu", seed=seed, **pair.settings | settings | changes)
            figures = pair.figures(found.forward)
            report = found.report
            rows.append({
                "stage": stage, "pair": name, "method": method, "seed": seed, "dice": figures["dice"],
                "similarity": report["similarity"], "regularity": report["regularity"],
                "folded_percent": figures["folded_percent"],
                "conflicts": float(np.mean([bool(step["conflicts"]) for step in report["steps"]])),
                "seconds": time.perf_counter() - start,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]], stage: str) -> str:
    """Differences from vanilla with the same steps, as Markdown."""
    rows = [row for row in rows if row["stage"] == stage]
    pairs, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("pair", "method"))
    lines = ["| method | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for method in names:
        cells = []
        for key in MEASURES:
            of = {
                name: np.array(
                    [
                        np.mean([row[key] for row in rows if (row["pair"], row["method"]) == (pair, name)])
                        for pair in pairs
                    ]
                )
                for name in {method, "vanilla"}
            }
            if method == "vanilla":
                cells.append(f"{of[method].mean():.4f}")
                continue
            difference = of[method] - of["vanilla"]
            half = stats.t.ppf(0.975, len(pairs) - 1) * difference.std(ddof=1) / len(pairs) ** 0.5
            cells.append(f"{difference.mean():+.4f} ± {half:.4f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder of real data, or a table of pairs (.csv)")
    parser.add_argument("--pairs", default="brain,brain back,prostate 0,prostate 1,spine")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, pairs = [], pairs_of(options.source)
    for stage in options.stages.split(","):
        for pair in options.pairs.split(","):
            rows += measure(pairs[pair], pair, stage, options.seeds)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for stage in options.stages.split(","):
        print(f"\n{stage}\n\n{table(rows, stage)}")


if __name__ == "__main__":
    main()

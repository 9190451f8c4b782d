"""Draw what peers.py wrote: Dice over seconds, one panel for each pair, one mark for each method, ours in blue.

python Testing/benchmarks/peers_picture.py peers.json [more.json …] -o Docs/pictures/peers.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from GradProjIOLib.settings import PRESETS

COLUMNS = 3
OURS, OTHERS = "#0072b2", "#d55e00"
"""Colors that also readers without red or green cones tell apart."""
MARKS = "osD^v<>PX*"
TICKS = (1, 3, 10, 30, 100, 300)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The whole picture: our presets in blue, others in orange."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = -(-len(pairs) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 3.2 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    handles = {}
    for panel, pair in zip(axes, pairs, strict=False):
        for row in rows:
            if row["pair"] == pair:
                color = OURS if row["method"].split(":")[0] in PRESETS else OTHERS
                mark = MARKS[methods.index(row["method"])]
                (handles[row["method"]],) = panel.plot(max(row["seconds"], TICKS[0]), row["dice"], mark, color=color)
        finish(panel, pair)
    for empty in axes[len(pairs) :]:
        empty.axis("off")
    names = [method.replace(":model=none", ", no network") for method in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def finish(panel: Axes, pair: str) -> None:
    """Title and axes of one panel."""
    panel.set_xscale("log")
    panel.set_xlim(0.8, 500)
    panel.set_xticks(TICKS, [str(tick) for tick in TICKS])
    panel.minorticks_off()
    panel.margins(y=0.12)
    panel.set_title(pair)
    panel.set_xlabel("seconds on 2 cores")
    panel.set_ylabel("mean Dice")
    panel.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    rows = [row for file in options.files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    draw(rows).savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()

"""Draw what peers.py wrote: Dice over seconds, one panel for each pair, one mark for each method.

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
COLORS = {True: "#0072b2", False: "#d55e00"}
"""Of our presets and of others; also readers without red or green cones tell them apart."""
MARKS = {True: "o", False: "^"}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The whole picture."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    lines = -(-len(pairs) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flat
    for panel, pair in zip(axes, pairs, strict=False):
        draw_pair(panel, pair, [row for row in rows if row["pair"] == pair])
    for empty in list(axes)[len(pairs) :]:
        empty.axis("off")
    figure.suptitle("Overlap over time: GradProjIO's presets (blue circles) and others (orange triangles)")
    return figure


def draw_pair(panel: Axes, pair: str, rows: list[dict[str, Any]]) -> None:
    """One pair: quality over seconds, each mark with the name of its method."""
    for row in rows:
        ours = row["method"].split(":")[0] in PRESETS
        seconds = max(row["seconds"], 0.5)
        panel.plot(seconds, row["dice"], MARKS[ours], color=COLORS[ours], markersize=7)
        name = row["method"].replace(":model=none", ", no network")
        panel.annotate(name, (seconds, row["dice"]), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    panel.set_xscale("log")
    panel.margins(0.25, 0.15)
    panel.set_title(pair)
    panel.set_xlabel("seconds, 2 cores")
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

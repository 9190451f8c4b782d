"""Curves over the steps of several methods, as a PNG picture."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.report.canvas import new_figure

COLORS = ("#1f77b4", "#d95f02", "#7570b3", "#1b9e77", "#666666")


@dataclass(frozen=True)
class Curve:
    """Values of one method at the steps `x`, of each of the `cases`; NaN is a gap."""

    name: str
    x: Sequence[float]
    cases: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps. `level` is drawn as a thin line."""

    title: str
    label: str
    curves: Sequence[Curve]
    level: float | None = None


def write_png(panels: Sequence[Panel], title: str, path: str | os.PathLike) -> None:
    """Draw `panels` in two columns into the file `path`: bold lines are means, thin lines single cases.

    Raises WriteError where the file cannot be written.
    """
    rows = (len(panels) + 1) // 2
    figure = new_figure(figsize=(11, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    names = dict.fromkeys(curve.name for panel in panels for curve in panel.curves)
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 2, number)
        axes.set(title=panel.title, xlabel="step", ylabel=panel.label)
        axes.grid(alpha=0.3)
        if panel.level is not None:
            axes.axhline(panel.level, color="black", linewidth=0.8)
        for curve in panel.curves:
            if len(curve.cases) > 1:
                for values in curve.cases:
                    axes.plot(curve.x, values, color=colors[curve.name], alpha=0.25, linewidth=0.8)
            axes.plot(curve.x, np.mean(curve.cases, axis=0), color=colors[curve.name], linewidth=2, label=curve.name)
        if panel.curves:
            axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)

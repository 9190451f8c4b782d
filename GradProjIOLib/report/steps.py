"""The losses over the optimization steps, as the lowest part of the overview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = (
    ("similarity", (0.12, 0.47, 0.71), "o"),
    ("regularity", (0.89, 0.45, 0.13), "s"),
    ("landmarks", (0.17, 0.55, 0.25), "^"),
    ("labels", (0.55, 0.36, 0.72), "D"),
)
"""Their names in report.json, colors and markers."""


def draw_steps(figure: Figure, footer: float, steps: Sequence[Mapping[str, Any]]) -> None:
    """Draw the losses over the `steps` into the lowest `footer` inches of `figure`, and the gradients' cosine.

    Steps in which a gradient was projected are marked. `steps` are those of report.json, numbered from 1 over all
    stages. A line begins each stage and each level of the refinement: their losses are those of different lattices.
    """
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches()
    if not steps:
        text = "No optimization steps were taken."
        figure.text(0.75 / width, (footer - 1.15) / height, text, fontsize=11)
        return
    number = np.arange(1, len(steps) + 1)
    parts = _parts(steps)
    projected = np.array([step["projected"] or "none" for step in steps])
    cosines = [step["cosine"] for step in steps]
    known = all(cosine is not None for cosine in cosines)
    losses = [loss for loss in LOSSES if any(step.get(loss[0]) is not None for step in steps)]
    columns = len(losses) + known
    left, right, gap, bottom, top = 0.85, 0.25, 0.75, 0.55, footer - 1.2
    plot_width = (width - left - right - (columns - 1) * gap) / columns
    grid = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": top / height,
            "wspace": gap / plot_width}  # fmt: skip
    plots = figure.subplots(1, columns, gridspec_kw=grid)
    # Many plots are narrow, and their titles take two lines.
    between = " " if columns <= 3 else "\n"
    for axes, (key, color, marker) in zip(plots, losses, strict=False):
        values = np.array([step.get(key) for step in steps], dtype=float)
        hit = np.array([word == "both" or key in word.split(", ") for word in projected]) & np.isfinite(values)
        for _, first, end in parts:
            axes.plot(number[first:end], values[first:end], ".-", color=color, linewidth=1.6, markersize=3)
        axes.plot(
            number[hit], values[hit], marker, color=color, markersize=4.5, markeredgecolor="black",
            markeredgewidth=0.5, linestyle="none", label=f"this gradient was projected ({hit.sum()})",
        )  # fmt: skip
        name, first, _ = parts[-1]
        # A guide may have come when the registration went on.
        shown = values[first:][np.isfinite(values[first:])]
        where = f" in {name}" if len(parts) > 1 else ""
        axes.set_title(f"{key.capitalize()} loss{where}:{between}{shown[0]:.4g} → {shown[-1]:.4g}", fontsize=11)
        if hit.any():
            # The names of the parts are at the top.
            axes.legend(fontsize=9, loc="lower right" if len(parts) > 1 else "best", framealpha=0.8)
    if known:
        _draw_conflicts(plots[-1], number, np.array(cosines, dtype=float), between)
    for axes in plots:
        if len(parts) > 1:
            _mark_parts(axes, parts)
        axes.set_xlabel("step", fontsize=10)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3)
        axes.set_xlim(0.5, len(steps) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _parts(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Each stage and level of the refinement: its name, and the first and one past the last of its `steps`."""
    keys = [(step["stage"], step["level"]) for step in steps]
    firsts = [place for place, key in enumerate(keys) if place == 0 or key != keys[place - 1]]
    names = [stage if stage == "network" else f"{stage} {level + 1}" for stage, level in (keys[at] for at in firsts)]
    return list(zip(names, firsts, [*firsts[1:], len(keys)], strict=True))


def _mark_parts(axes: Axes, parts: Sequence[tuple[str, int, int]]) -> None:
    """A line where each part begins, and the part's name along it; room for names above and a legend below."""
    axes.margins(y=0.3)
    for name, first, _ in parts:
        if first:
            axes.axvline(first + 0.5, color="0.5", linewidth=0.8)
        axes.text(
            first + 0.6, 0.98, name, transform=axes.get_xaxis_transform(), rotation=90, fontsize=8, color="0.4",
            ha="left", va="top", zorder=1,
        )  # fmt: skip


def _draw_conflicts(axes: Axes, number: np.ndarray, cosines: np.ndarray, between: str) -> None:
    conflict = cosines < 0
    axes.axhspan(-1, 0, color="tab:red", alpha=0.08)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(number, cosines, color="0.35", linewidth=1.2)
    axes.plot(number[conflict], cosines[conflict], "v", color="tab:red", markersize=4.5, linestyle="none")
    largest = max(0.05, 1.15 * float(np.nanmax(np.abs(cosines))))
    axes.set_ylim(-min(largest, 1.05), min(largest, 1.05))
    title = f"Cosine between the gradients:{between}conflict in {conflict.sum()} of {len(number)} steps"
    axes.set_title(title, fontsize=11)

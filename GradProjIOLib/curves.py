"""Curves over the steps of several methods, as a PNG picture and as an HTML page to explore.

The page needs no network and no library: the curves are drawn here as SVG, and a few lines of script show the
values under the pointer and hide single methods. PNG pictures are drawn with matplotlib's Agg canvas alone.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from GradProjIOLib.volume import atomic_path

COLORS = ("#1f77b4", "#d95f02", "#7570b3", "#1b9e77", "#666666")
WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 34, 46


@dataclass(frozen=True)
class Curve:
    """Values of one method at the steps `x`: of each of the `cases`, and their `mean`; NaN is a gap."""

    name: str
    x: Sequence[float]
    mean: Sequence[float]
    cases: dict[str, Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps. `level` is drawn as a thin line."""

    title: str
    label: str
    curves: Sequence[Curve]
    level: float | None = None


def write_png(panels: Sequence[Panel], title: str, path: str | os.PathLike) -> None:
    """Draw `panels` in two columns: bold lines are means, thin ones single cases."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    colors = _colors(panels)
    for panel, axes in zip(panels, figure.subplots(rows, 2, squeeze=False).ravel(), strict=False):
        axes.set(title=panel.title, xlabel="step", ylabel=panel.label)
        axes.grid(alpha=0.3)
        if panel.level is not None:
            axes.axhline(panel.level, color="black", linewidth=0.8)
        for curve in panel.curves:
            if len(curve.cases) > 1:
                for values in curve.cases.values():
                    axes.plot(curve.x, values, color=colors[curve.name], alpha=0.25, linewidth=0.8)
            axes.plot(curve.x, curve.mean, color=colors[curve.name], linewidth=2, label=curve.name)
        if panel.curves:
            axes.legend(frameon=False)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def write_html(panels: Sequence[Panel], title: str, path: str | os.PathLike, table: str = "") -> None:
    """Write one page with `panels` to explore and, below them, `table` as it is."""
    colors = _colors(panels)
    buttons = "".join(
        f'<label style="color:{color}"><input type="checkbox" checked '
        f'data-method="{html.escape(name, True)}"> {html.escape(name)}</label> '
        for name, color in colors.items()
    )
    drawings = "".join(_drawing(panel, colors) for panel in panels)
    data = json.dumps([_plain(panel) for panel in panels]).replace("</", "<\\/")
    page = _PAGE.format(
        title=html.escape(title), buttons=buttons, drawings=drawings, table=html.escape(table), data=data
    )
    with atomic_path(path) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between `low` and `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(number * step) + 0.0 for number in np.arange(first, last + 1)]


def _colors(panels: Sequence[Panel]) -> dict[str, str]:
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}


def _limits(panel: Panel) -> tuple[float, float, float, float]:
    """Smallest and largest x and y of a panel, with some room above and below."""
    x = np.concatenate([np.asarray(curve.x, dtype=float) for curve in panel.curves] or [np.zeros(1)])
    y = np.concatenate(
        [np.ravel([curve.mean, *curve.cases.values()]).astype(float) for curve in panel.curves]
        + [np.array([] if panel.level is None else [panel.level], dtype=float)]
    )
    y = y[np.isfinite(y)]
    low, high = (float(y.min()), float(y.max())) if len(y) else (0.0, 1.0)
    room = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-9)
    left, right = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    return left, right if right > left else left + 1, low - room, high + room


def _drawing(panel: Panel, colors: dict[str, str]) -> str:
    left, right, low, high = _limits(panel)

    def across(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{WIDTH / 2}" y="20" class="title">{html.escape(panel.title)}</text>']
    for tick in ticks(left, right):
        parts.append(
            f'<line x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}">{tick:g}</text>'
        )
    for tick in ticks(low, high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" class="value">{tick:.4g}</text>'
        )
    if panel.level is not None:
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(panel.level):.1f}" '
            f'y2="{down(panel.level):.1f}"/>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">step</text>')
    parts.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">'
        f"{html.escape(panel.label)}</text>"
    )
    for curve in panel.curves:
        cases = curve.cases if len(curve.cases) > 1 else {}
        lines = [(values, "case") for values in cases.values()] + [(curve.mean, "mean")]
        paths = "".join(
            f'<path class="{kind}" d="{_path(curve.x, values, across, down)}"/>' for values, kind in lines
        )
        parts.append(
            f'<g data-method="{html.escape(curve.name, True)}" stroke="{colors[curve.name]}">{paths}</g>'
        )
    parts.append(f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')
    frame = f'data-left="{left}" data-right="{right}"'
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" {frame}>{"".join(parts)}</svg>'
        "<figcaption>&nbsp;</figcaption></figure>"
    )


def _path(x: Sequence[float], y: Sequence[float], across, down) -> str:
    """An SVG path through the points; it starts anew after a gap."""
    commands, pen_down = [], False
    for step, value in zip(x, y, strict=True):
        if np.isfinite(value):
            commands.append(f"{'L' if pen_down else 'M'}{across(step):.1f} {down(value):.1f}")
        pen_down = bool(np.isfinite(value))
    return "".join(commands)


def _plain(panel: Panel) -> dict:
    """What the page's script needs to show values: numbers, None for gaps."""
    return {
        "curves": [
            {
                "name": curve.name,
                "x": [float(step) for step in curve.x],
                "mean": [float(value) if np.isfinite(value) else None for value in curve.mean],
            }
            for curve in panel.curves
        ]
    }


_PAGE = (
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5em; }}
figure {{ display: inline-block; margin: 0 1em 1em 0; width: 520px; }}
figcaption {{ font-size: 12px; min-height: 1.3em; }}
svg text {{ font-size: 11px; text-anchor: middle; }}
svg text.title {{ font-size: 14px; }}
svg text.value {{ text-anchor: end; }}
svg line {{ stroke: #ddd; }}
svg line.level {{ stroke: black; }}
svg line.pointer {{ stroke: #888; stroke-dasharray: 3 3; }}
svg path {{ fill: none; }}
svg path.mean {{ stroke-width: 2.2; }}
svg path.case {{ stroke-width: 0.8; opacity: 0.3; }}
label {{ margin-right: 1em; font-weight: bold; }}
</style></head><body>
<h1>{title}</h1>
<p>{buttons}</p>
{drawings}
<pre>{table}</pre>
<script type="application/json" id="data">{data}</script>
<script>
const panels = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
document.querySelectorAll("input[data-method]").forEach(function (box) {{
  box.addEventListener("change", function () {{
    const name = box.dataset.method;
    if (box.checked) hidden.delete(name); else hidden.add(name);
    document.querySelectorAll("g[data-method]").forEach(function (group) {{
      group.style.display = hidden.has(group.dataset.method) ? "none" : "";
    }});
  }});
}});
document.querySelectorAll("svg").forEach(function (svg, number) {{
  const caption = svg.parentNode.querySelector("figcaption"), pointer = svg.querySelector(".pointer");
  const left = Number(svg.dataset.left), right = Number(svg.dataset.right);
  svg.addEventListener("mousemove", function (event) {{
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * {width};
    const step = left + (x - {left}) / ({width} - {left} - {right}) * (right - left);
    const shown = [];
    let nearest = null;
    panels[number].curves.filter(curve => !hidden.has(curve.name)).forEach(function (curve) {{
      let best = -1;
      curve.x.forEach(function (value, at) {{
        if (curve.mean[at] !== null && (best < 0 || Math.abs(value - step) < Math.abs(curve.x[best] - step)))
          best = at;
      }});
      if (best < 0) return;
      nearest = curve.x[best];
      shown.push(curve.name + " (step " + curve.x[best] + "): " + curve.mean[best].toPrecision(5));
    }});
    caption.textContent = shown.join("   ");
    if (nearest === null) return;
    const at = {left} + (nearest - left) / (right - left) * ({width} - {left} - {right});
    pointer.setAttribute("x1", at);
    pointer.setAttribute("x2", at);
  }});
  svg.addEventListener("mouseleave", function () {{
    caption.textContent = "\\u00a0";
    pointer.setAttribute("x1", -9);
    pointer.setAttribute("x2", -9);
  }});
}});
</script></body></html>
""".replace("{width}", str(WIDTH))
    .replace("{left}", str(LEFT))
    .replace("{right}", str(RIGHT))
)

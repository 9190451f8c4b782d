"""The losses of a registration, step by step, and how often each determinant occurs, as Slicer plots. No Qt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import slicer

from GradProjIOLib.scene.nodes import add_node

STEP = "Step"
# How far the value axis reaches beyond the losses, as a factor.
MARGIN = 1.3
HISTOGRAM_BINS = 120
# The losses in a step of report.json, each with its title and its color.
LOSSES = {
    "similarity": ("Similarity loss", (0.12, 0.47, 0.71)),
    "regularity": ("Regularity loss", (0.89, 0.45, 0.13)),
    "landmarks": ("Landmark loss", (0.17, 0.55, 0.25)),
    "labels": ("Segment loss", (0.55, 0.36, 0.72)),
}
ALWAYS = ("similarity", "regularity")


class LossPlot:
    """A table of the losses and a chart of them, in the scene; those of landmarks and segments where they guide.

    The losses differ by orders of magnitude and Slicer's charts have one value axis, so it is logarithmic.
    A loss that is exactly 0 (the identity is perfectly regular) has no place on it and is left out there. A plot view
    does not fit its axes to a table that grows, so their ranges are set here.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, name: str) -> None:
        self._series: dict[str, slicer.vtkMRMLPlotSeriesNode] = {}
        self.table = add_node(scene, "vtkMRMLTableNode", f"{name} loss table")
        self.table.SetUseColumnTitleAsColumnHeader(True)
        self.chart = _add_chart(scene, f"{name} losses", name, STEP, "Loss")

    def show(self, steps: Sequence[Mapping[str, Any]], total: int) -> None:
        """Show all `steps` done so far of `total`, mappings with similarity and regularity as in report.json.

        They are numbered over all stages and levels; their own index begins again at each of these.
        """
        losses = np.array([[step.get(key) for key in LOSSES] for step in steps], dtype=float).reshape(-1, len(LOSSES))
        losses[losses <= 0] = np.nan
        columns = {STEP: np.arange(len(losses), dtype=float)}
        for (key, (title, _)), column in zip(LOSSES.items(), losses.T, strict=True):
            if key in ALWAYS or np.isfinite(column).any():
                columns[title] = column
        with slicer.util.NodeModify(self.table):
            slicer.util.updateTableFromArray(self.table, list(columns.values()), list(columns))
        for title, color in LOSSES.values():
            if title in columns and title not in self._series:
                series = _add_series(self.chart, self.table, STEP, title, color)
                series.SetMarkerStyle(series.MarkerStyleCircle)
                self._series[title] = series
        for series in self._series.values():
            # A line through a single point would run along the axis for ever.
            series.SetLineStyle(series.LineStyleSolid if len(losses) > 1 else series.LineStyleNone)
        shown = losses[np.isfinite(losses)]
        if shown.size:
            self.chart.SetXAxisRangeAuto(False)
            self.chart.SetXAxisRange(0, max(total, len(losses), 2) - 1)
            self.chart.SetYAxisRangeAuto(False)
            self.chart.SetYAxisRange(shown.min() / MARGIN, shown.max() * MARGIN)


def add_histogram(scene: slicer.vtkMRMLScene, name: str, determinant: np.ndarray) -> slicer.vtkMRMLPlotChartNode:
    """A chart, with its table, of how many voxels have which Jacobian determinant."""
    # Where the deformation is undefined there is none.
    values = determinant[np.isfinite(determinant)]
    low, high = min(float(values.min()), 0.0), max(float(np.percentile(values, 99.9)), 2.0)
    counts, edges = np.histogram(values, HISTOGRAM_BINS, (low, high))
    table = add_node(scene, "vtkMRMLTableNode", f"Histogram table {name}")
    columns = (edges[:-1] + edges[1:]) / 2, np.maximum(counts, 0.5)
    slicer.util.updateTableFromArray(table, columns, ["Determinant", "Voxels"])
    title = "Jacobian determinant; 0 or less folds"
    chart = _add_chart(scene, f"Histogram {name}", title, "volume in moving / in fixed", "Voxels")
    chart.SetLegendVisibility(False)
    series = _add_series(chart, table, "Determinant", "Voxels", LOSSES["similarity"][1])
    series.SetMarkerStyle(series.MarkerStyleNone)
    series.SetLineStyle(series.LineStyleSolid)
    return chart


def _add_chart(scene: slicer.vtkMRMLScene, name: str, title: str, x: str, y: str) -> slicer.vtkMRMLPlotChartNode:
    chart = add_node(scene, "vtkMRMLPlotChartNode", name)
    chart.SetTitle(title)
    chart.SetXAxisTitle(x)
    chart.SetYAxisTitle(y)
    chart.SetYAxisLogScale(True)
    return chart


def _add_series(
    chart: slicer.vtkMRMLPlotChartNode, table: slicer.vtkMRMLTableNode, x: str, y: str, color: tuple[float, ...]
) -> slicer.vtkMRMLPlotSeriesNode:
    series = add_node(chart.GetScene(), "vtkMRMLPlotSeriesNode", y)
    series.SetAndObserveTableNodeID(table.GetID())
    series.SetXColumnName(x)
    series.SetYColumnName(y)
    series.SetPlotType(series.PlotTypeScatter)
    series.SetColor(*color)
    chart.AddAndObservePlotSeriesNodeID(series.GetID())
    return series

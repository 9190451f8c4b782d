"""The losses of a registration, step by step, and how often each determinant occurs, as Slicer plots. No Qt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import slicer
import vtk

from GradProjIOLib.scene.nodes import add_node

STEP = "Step"
# How far the value axis reaches beyond the losses, as a factor.
MARGIN = 1.3
HISTOGRAM_BINS = 120
COLORS = {
    "Similarity loss": (0.12, 0.47, 0.71),
    "Regularity loss": (0.89, 0.45, 0.13),
    "Landmark loss": (0.17, 0.55, 0.25),
    "Segment loss": (0.55, 0.36, 0.72),
}
LOSSES = {
    "similarity": "Similarity loss",
    "regularity": "Regularity loss",
    "landmarks": "Landmark loss",
    "labels": "Segment loss",
}
ALWAYS = ("similarity", "regularity")


class LossPlot:
    """A table of the losses and a chart of them, in the scene; those of landmarks and segments where they guide.

    The losses differ by orders of magnitude and Slicer's charts have one value axis, so it is logarithmic.
    A loss that is exactly 0 (the identity is perfectly regular) has no place on it and is left out there. A plot view
    does not fit its axes to a table that grows, so their ranges are set here, for `total` steps from the beginning.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, name: str, total: int = 0) -> None:
        self.scene, self.total = scene, total
        self._range = (math.inf, 0.0)
        self._series: list[slicer.vtkMRMLPlotSeriesNode] = []
        self.table = add_node(scene, "vtkMRMLTableNode", f"{name} loss table")
        self.table.SetUseColumnTitleAsColumnHeader(True)
        self.chart = add_node(scene, "vtkMRMLPlotChartNode", f"{name} losses")
        self.chart.SetTitle(name)
        self.chart.SetXAxisTitle(STEP)
        self.chart.SetYAxisTitle("Loss")
        self.chart.SetYAxisLogScale(True)
        self._add_column(STEP)
        self._shown: list[str] = []
        for key in ALWAYS:
            self._add_loss(key)

    def _add_column(self, title: str) -> None:
        column = vtk.vtkDoubleArray()
        column.SetName(title)
        for _row in range(self.table.GetNumberOfRows() if self.table.GetNumberOfColumns() else 0):
            column.InsertNextValue(math.nan)
        self.table.AddColumn(column)

    def _add_loss(self, key: str) -> None:
        title = LOSSES[key]
        self._add_column(title)
        self._shown.append(key)
        series = add_node(self.scene, "vtkMRMLPlotSeriesNode", title)
        series.SetAndObserveTableNodeID(self.table.GetID())
        series.SetXColumnName(STEP)
        series.SetYColumnName(title)
        series.SetPlotType(series.PlotTypeScatter)
        # A line through a single point would run along the axis for ever.
        series.SetLineStyle(series.LineStyleNone)
        series.SetMarkerStyle(series.MarkerStyleCircle)
        series.SetColor(*COLORS[title])
        self.chart.AddAndObservePlotSeriesNodeID(series.GetID())
        self._series.append(series)

    def add(self, steps: Iterable[Mapping[str, float]]) -> None:
        """Append `steps`, mappings with similarity and regularity as in report.json.

        They are numbered over all stages and levels; their own index begins again at each of these.
        """
        table = self.table.GetTable()
        for step in steps:
            for key in LOSSES:
                if key not in self._shown and step.get(key) is not None:
                    self._add_loss(key)
            row = table.InsertNextBlankRow()
            found = [step.get(key) for key in self._shown]
            losses = [loss if loss is not None and loss > 0 else math.nan for loss in found]
            for column, value in enumerate((row, *losses)):
                table.SetValue(row, column, vtk.vtkVariant(float(value)))
            shown = [loss for loss in losses if loss > 0]
            self._range = min([self._range[0], *shown]), max([self._range[1], *shown])
        table.Modified()
        self.table.Modified()
        rows = table.GetNumberOfRows()
        for series in self._series if rows > 1 else ():
            series.SetLineStyle(series.LineStyleSolid)
        if self._range[1] > 0:
            self.chart.SetXAxisRangeAuto(False)
            self.chart.SetXAxisRange(0, max(self.total, rows, 2) - 1)
            self.chart.SetYAxisRangeAuto(False)
            self.chart.SetYAxisRange(self._range[0] / MARGIN, self._range[1] * MARGIN)


class Histogram:
    """How many voxels have which Jacobian determinant: a table and a chart in the scene."""

    def __init__(self, scene: slicer.vtkMRMLScene, name: str, determinant: np.ndarray) -> None:
        # Where the deformation is undefined there is none.
        values = determinant[np.isfinite(determinant)]
        low, high = min(float(values.min()), 0.0), max(float(np.percentile(values, 99.9)), 2.0)
        counts, edges = np.histogram(values, HISTOGRAM_BINS, (low, high))
        self.table = add_node(scene, "vtkMRMLTableNode", f"Histogram table {name}")
        for title, numbers in (("Determinant", (edges[:-1] + edges[1:]) / 2), ("Voxels", np.maximum(counts, 0.5))):
            column = vtk.vtkDoubleArray()
            column.SetName(title)
            for number in numbers:
                column.InsertNextValue(float(number))
            self.table.AddColumn(column)
        series = add_node(scene, "vtkMRMLPlotSeriesNode", "Voxels")
        series.SetAndObserveTableNodeID(self.table.GetID())
        series.SetXColumnName("Determinant")
        series.SetYColumnName("Voxels")
        series.SetPlotType(series.PlotTypeScatter)
        series.SetMarkerStyle(series.MarkerStyleNone)
        series.SetLineStyle(series.LineStyleSolid)
        series.SetColor(*COLORS["Similarity loss"])
        self.chart = add_node(scene, "vtkMRMLPlotChartNode", f"Histogram {name}")
        self.chart.SetTitle("Jacobian determinant; 0 or less folds")
        self.chart.SetXAxisTitle("volume in moving / in fixed")
        self.chart.SetYAxisTitle("Voxels")
        self.chart.SetYAxisLogScale(True)
        self.chart.SetLegendVisibility(False)
        self.chart.AddAndObservePlotSeriesNodeID(series.GetID())

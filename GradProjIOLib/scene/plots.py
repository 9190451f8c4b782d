"""The two losses of a registration as Slicer plots, step by step. Needs slicer and vtk, no Qt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import slicer
import vtk

from GradProjIOLib.scene.nodes import add_node

STEP, SIMILARITY, REGULARITY = "Step", "Similarity loss", "Regularity loss"
COLORS = {SIMILARITY: (0.12, 0.47, 0.71), REGULARITY: (0.89, 0.45, 0.13)}


class LossPlot:
    """A table of the losses and a chart with both, in the scene.

    The losses differ by orders of magnitude and Slicer's charts have one value axis, so it is logarithmic.
    A loss that is exactly 0 (the identity is perfectly regular) has no place on it and is left out there.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, name: str) -> None:
        self.table = add_node(scene, "vtkMRMLTableNode", f"{name} loss table")
        self.chart = add_node(scene, "vtkMRMLPlotChartNode", f"{name} losses")
        self.chart.SetTitle(name)
        self.chart.SetXAxisTitle(STEP)
        self.chart.SetYAxisTitle("Loss")
        self.chart.SetYAxisLogScale(True)
        for title in (STEP, SIMILARITY, REGULARITY):
            column = vtk.vtkDoubleArray()
            column.SetName(title)
            self.table.AddColumn(column)
        self.table.SetUseColumnTitleAsColumnHeader(True)
        for title in (SIMILARITY, REGULARITY):
            self._add_series(scene, title)

    def _add_series(self, scene: slicer.vtkMRMLScene, title: str) -> None:
        series = add_node(scene, "vtkMRMLPlotSeriesNode", title)
        series.SetAndObserveTableNodeID(self.table.GetID())
        series.SetXColumnName(STEP)
        series.SetYColumnName(title)
        series.SetPlotType(slicer.vtkMRMLPlotSeriesNode.PlotTypeScatter)
        series.SetLineStyle(slicer.vtkMRMLPlotSeriesNode.LineStyleSolid)
        series.SetMarkerStyle(slicer.vtkMRMLPlotSeriesNode.MarkerStyleCircle)
        series.SetColor(*COLORS[title])
        self.chart.AddAndObservePlotSeriesNodeID(series.GetID())

    def add(self, steps: Iterable[Mapping[str, float]]) -> None:
        """Append `steps`, mappings with index, similarity and regularity as in report.json."""
        table = self.table.GetTable()
        for step in steps:
            row = table.InsertNextBlankRow()
            table.SetValue(row, 0, vtk.vtkVariant(float(step["index"])))
            for column, key in ((1, "similarity"), (2, "regularity")):
                loss = float(step[key])
                table.SetValue(row, column, vtk.vtkVariant(loss if loss > 0 else math.nan))
        table.Modified()
        self.table.Modified()

"""The two losses of a registration as Slicer plots, step by step. No Qt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import slicer
import vtk

from GradProjIOLib.scene.nodes import add_node

STEP = "Step"
COLORS = {"Similarity loss": (0.12, 0.47, 0.71), "Regularity loss": (0.89, 0.45, 0.13)}


class LossPlot:
    """A table of the losses and a chart with both, in the scene.

    The losses differ by orders of magnitude and Slicer's charts have one value axis, so it is logarithmic.
    A loss that is exactly 0 (the identity is perfectly regular) has no place on it and is left out there.
    """

    def __init__(self, scene: slicer.vtkMRMLScene, name: str) -> None:
        self.table = add_node(scene, "vtkMRMLTableNode", f"{name} loss table")
        self.table.SetUseColumnTitleAsColumnHeader(True)
        self.chart = add_node(scene, "vtkMRMLPlotChartNode", f"{name} losses")
        self.chart.SetTitle(name)
        self.chart.SetXAxisTitle(STEP)
        self.chart.SetYAxisTitle("Loss")
        self.chart.SetYAxisLogScale(True)
        for title in (STEP, *COLORS):
            column = vtk.vtkDoubleArray()
            column.SetName(title)
            self.table.AddColumn(column)
        for title, color in COLORS.items():
            series = add_node(scene, "vtkMRMLPlotSeriesNode", title)
            series.SetAndObserveTableNodeID(self.table.GetID())
            series.SetXColumnName(STEP)
            series.SetYColumnName(title)
            series.SetPlotType(series.PlotTypeScatter)
            series.SetLineStyle(series.LineStyleSolid)
            series.SetMarkerStyle(series.MarkerStyleCircle)
            series.SetColor(*color)
            self.chart.AddAndObservePlotSeriesNodeID(series.GetID())

    def add(self, steps: Iterable[Mapping[str, float]]) -> None:
        """Append `steps`, mappings with similarity and regularity as in report.json.

        They are numbered over all stages and levels; their own index begins again at each of these.
        """
        table = self.table.GetTable()
        for step in steps:
            row = table.InsertNextBlankRow()
            losses = (step[key] if step[key] > 0 else math.nan for key in ("similarity", "regularity"))
            for column, value in enumerate((row, *losses)):
                table.SetValue(row, column, vtk.vtkVariant(float(value)))
        table.Modified()
        self.table.Modified()

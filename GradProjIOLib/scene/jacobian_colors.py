"""The colors of Jacobian maps in Slicer's views, and their legend. No Qt.

Slice views reduce a volume linearly to 256 levels before they look up a color, and honor a color that is entirely
transparent, but no partial transparency. The lowest level holds what folds and nothing else; what is nearly 1 is
transparent, so that the anatomy below is seen where nothing changes. A legend shows the colors of a display node with
its own, evenly spaced levels; so that it can be logarithmic, the map has a second display node for it.
"""

from __future__ import annotations

import numpy as np
import slicer

from GradProjIOLib.report.colors import (
    FOLD_COLOR,
    LARGEST_DETERMINANT,
    NEARLY_COLOR,
    NEARLY_FOLDED,
    scale_colors,
    scale_place,
    tick_labels,
)
from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.i18n import tr as _

COLOR_TABLE_NAME = "GradProjIO Jacobian determinant"
LEGEND_NAME = "GradProjIO Jacobian legend"
LEVELS = 256
TRANSPARENT_WITHIN = 0.1
"""How far from 1, as a part of the scale, the map is transparent."""
LEGEND_STEPS = 6
"""Colors of the legend on each side of 1."""
LEGEND_WIDTH, LEGEND_HEIGHT = 0.44, 0.66


def window(largest: float) -> tuple[float, float]:
    """Lower and upper end of the window that puts 0 exactly between the two lowest of Slicer's levels."""
    step = largest / (LEVELS - 2)
    return -step * (1 - 1e-6), largest


def level_colors(largest: float, mark_nearly: bool = False) -> np.ndarray:
    """RGBA [256, 4] of Slicer's levels for a scale that ends at `largest`."""
    lower, upper = window(largest)
    determinant = lower + (np.arange(LEVELS) + 0.5) * (upper - lower) / (LEVELS - 1)
    place = scale_place(determinant, largest)
    colors = np.c_[scale_colors(place), np.abs(place) >= TRANSPARENT_WITHIN]
    if mark_nearly:
        colors[determinant < NEARLY_FOLDED, :3] = NEARLY_COLOR
    colors[0] = (*FOLD_COLOR, 1)
    return colors


def set_range(scene: slicer.vtkMRMLScene, largest: float, mark_nearly: bool = False) -> None:
    """Let the colors of all maps of the scene end at `largest` and its reciprocal."""
    table = _table(scene, COLOR_TABLE_NAME, LEVELS)
    table.GetLookupTable().SetRange(*window(largest))
    for index, color in enumerate(level_colors(largest, mark_nearly)):
        table.SetColor(index, "folded" if index == 0 else f"level {index}", *color)
    nodes.remember(table, range=[largest, mark_nearly])
    legend_table = _fill_legend(scene, largest, mark_nearly)
    # A scene that was loaded into this one has brought tables of its own.
    for volume in nodes.nodes_of_class(scene, "vtkMRMLScalarVolumeNode"):
        display, legend = volume.GetDisplayNode(), legend_of(volume)
        colors = display.GetColorNode() if display is not None else None
        if colors is not None and colors.GetName() == COLOR_TABLE_NAME:
            display.SetAndObserveColorNodeID(table.GetID())
            display.SetWindowLevelMinMax(*window(largest))
            if legend is not None and legend.GetPrimaryDisplayNode() not in (None, display):
                legend.GetPrimaryDisplayNode().SetAndObserveColorNodeID(legend_table.GetID())
            if legend is not None:
                # Slice views look at a legend only when it changes.
                legend.Modified()


def current_range(scene: slicer.vtkMRMLScene) -> tuple[float, bool]:
    """Where the colors of the scene's maps end, and whether they mark what nearly folds."""
    table = scene.GetFirstNode(COLOR_TABLE_NAME, "vtkMRMLColorTableNode")
    largest, mark_nearly = (table is not None and nodes.recall(table, "range")) or (LARGEST_DETERMINANT, False)
    return largest, mark_nearly


def color_jacobian(node: slicer.vtkMRMLScalarVolumeNode) -> None:
    """Show the volume `node` in the colors of the scene's maps, with a legend."""
    scene = node.GetScene()
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.AutoWindowLevelOff()
    display.SetAndObserveColorNodeID(_table(scene, COLOR_TABLE_NAME, LEVELS).GetID())
    display.InterpolateOff()
    legend = legend_of(node) or slicer.vtkSlicerColorLogic.AddDefaultColorLegendDisplayNode(node)
    set_range(scene, *current_range(scene))
    if legend is None:
        # The module of colors is not loaded.
        return
    colors = legend.GetPrimaryDisplayNode()
    if colors is None or colors is display:
        colors = nodes.add_node(scene, "vtkMRMLScalarVolumeDisplayNode", "legend")
        # Nobody looks at the volume through it, so its window need not be computed.
        colors.AutoWindowLevelOff()
        node.AddAndObserveDisplayNodeID(colors.GetID())
    colors.SetAndObserveColorNodeID(scene.GetFirstNode(LEGEND_NAME, "vtkMRMLColorTableNode").GetID())
    legend.SetAndObservePrimaryDisplayNode(colors)
    legend.SetUseColorNamesForLabels(True)
    legend.SetLabelFormat("%s")
    legend.SetTitleText(_("volume in moving / in fixed"))
    legend.SetSize(LEGEND_WIDTH, LEGEND_HEIGHT)
    legend.SetPosition(0.99, 0.5)


def legend_of(node: slicer.vtkMRMLScalarVolumeNode) -> slicer.vtkMRMLColorLegendDisplayNode | None:
    """The legend of a volume. The color logic finds only one that shows the colors of the first display node."""
    displays = [node.GetNthDisplayNode(index) for index in range(node.GetNumberOfDisplayNodes())]
    return next((each for each in displays if each.IsA("vtkMRMLColorLegendDisplayNode")), None)


def _fill_legend(scene: slicer.vtkMRMLScene, largest: float, mark_nearly: bool) -> slicer.vtkMRMLColorTableNode:
    """The table of the legend. From below: what folds, perhaps what nearly does, a gap, the scale with five names."""
    rows = [(_("folded"), FOLD_COLOR)]
    rows += [(_("below {limit}").format(limit=NEARLY_FOLDED), NEARLY_COLOR)] if mark_nearly else []
    rows += [(" ", (0.0, 0.0, 0.0))]
    places = np.linspace(-1, 1, 2 * LEGEND_STEPS + 1)
    ticks = tick_labels(largest)
    ticks[0] += "  " + _("smaller in moving")
    ticks[-1] += "  " + _("larger in moving")
    for number, color in enumerate(scale_colors(places)):
        tick, between = divmod(2 * number, LEGEND_STEPS)
        rows.append((" " if between else ticks[tick], tuple(color)))
    table = _table(scene, LEGEND_NAME, len(rows))
    table.SetNumberOfColors(len(rows))
    for index, (name, color) in enumerate(rows):
        table.SetColor(index, name, *color, 1.0)
    return table


def _table(scene: slicer.vtkMRMLScene, name: str, colors: int) -> slicer.vtkMRMLColorTableNode:
    """The scene's color table of this name; made where there is none yet."""
    node = scene.GetFirstNode(name, "vtkMRMLColorTableNode")
    if node is None:
        node = scene.AddNewNodeByClass("vtkMRMLColorTableNode", name)
        node.SetTypeToUser()
        node.SetNumberOfColors(colors)
    return node

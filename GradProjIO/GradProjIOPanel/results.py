"""The sections Compare and Folding: the chosen result on the panel and in the views."""

import qt
import slicer
from slicer.i18n import tr as _

from GradProjIOLib.errors import InputError
from GradProjIOLib.report.colors import RANGES
from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.compare_view import OPACITY, CompareView
from GradProjIOLib.scene.folding_view import FoldingView, rounded
from GradProjIOLib.scene.jacobian_colors import current_range, set_range
from GradProjIOLib.scene.placement import MOVING, TABLE
from GradProjIOLib.scene.plots import add_histogram
from GradProjIOLib.scene.session import Tone
from GradProjIOLib.scene.structures import fill_statistics, structures_on
from GradProjIOLib.worker.protocol import FOLDING, JACOBIAN, TRANSFORM, WARPED
from GradProjIOPanel.notes import fillTable, setQuietly, showNote

FLICKER_MILLISECONDS = 500
ROWS_SHOWN = 500


class ResultsSection:
    """Shows one result, known by one of its nodes. What its widgets say is read from the scene and its views."""

    def __init__(self, ui, scene):
        self.ui, self.scene = ui, scene
        self._images = {MOVING: ui.beforeButton, WARPED: ui.afterButton, JACOBIAN: ui.mapButton}
        self._flicker = qt.QTimer()
        self._flicker.timeout.connect(self._onFlicker)
        for largest, label in zip(RANGES, ("±25 %", "½ … 2", "¼ … 4"), strict=True):
            ui.rangeComboBox.addItem(label, largest)
        self._connect()
        self.forget()

    def _connect(self):
        ui = self.ui
        for role, button in self._images.items():
            button.clicked.connect(lambda *_, role=role: self._onImage(role))
        ui.fadeSliderWidget.valueChanged.connect(lambda value: self._after(self.compare.fade, value))
        ui.flickerButton.toggled.connect(self._onFlickerToggled)
        ui.gridCheckBox.toggled.connect(lambda on: self._after(self.folding.show_grid, on))
        ui.foldsCheckBox.toggled.connect(lambda on: self._after(self.folding.show_folds, on))
        ui.show3DCheckBox.toggled.connect(lambda on: self._after(self.folding.show_folds_in_3d, on))
        ui.rangeComboBox.currentIndexChanged.connect(self._onRange)
        ui.nearlyCheckBox.toggled.connect(self._onRange)
        ui.worstButton.clicked.connect(lambda *_: self._after(self.folding.go_to, 0))
        ui.previousButton.clicked.connect(lambda *_: self._after(self.folding.go_to, self.folding.number - 1))
        ui.nextButton.clicked.connect(lambda *_: self._after(self.folding.go_to, self.folding.number + 1))
        ui.foldTable.cellClicked.connect(lambda row, column: self._after(self.folding.go_to, row))
        ui.histogramButton.clicked.connect(self._onHistogram)
        ui.statisticsButton.clicked.connect(self._onStatistics)

    def close(self):
        """End what goes on by itself, and leave no mark in the scene."""
        self._flicker.stop()
        self.folding.show(None)

    def forget(self):
        """Show nothing, as at the beginning: the scene is closed or replaced."""
        self.compare, self.folding = CompareView(self.scene), FoldingView(self.scene)
        # What is shown. Showing it changes the scene, after which the panel asks to follow once more.
        self._result = self._segmentation = None
        self._statistics = self._histogram = None
        self._problem = ""
        self._fill()

    def follow(self, result, segmentation):
        """Show what is chosen, where that has changed."""
        if result is not self._result or segmentation is not self._segmentation:
            self._segmentation = segmentation
            self.show(result)
        else:
            self.update()

    def show(self, result):
        """Show a result, also one that is shown already and has been filled anew."""
        self._result = result
        self.compare.choose(result)
        self._statistics = self._histogram = None
        self._problem = ""
        jacobian = nodes.member(result, JACOBIAN)
        if jacobian is not None:
            # Files of color tables do not keep the range, so it is set again for a scene from a file.
            set_range(self.scene, *current_range(self.scene))
        self.folding.show(result, None if jacobian is None else self._structures(jacobian))
        self._fill()

    def _structures(self, jacobian):
        """Those of the chosen segmentation at the voxels of the map; where there are none, `_problem` says why."""
        try:
            return self._segmentation and structures_on(self._segmentation, jacobian)
        except InputError as error:
            self._problem = str(error)

    def showNew(self, results):
        """Show the nodes of a registration that has just ended: the registered image over the fixed one, fitted."""
        self.show(next((results[role] for role in (JACOBIAN, WARPED, TRANSFORM) if role in results), None))
        hasViews = slicer.app.layoutManager() is not None
        self.compare.show(WARPED, OPACITY, slicer.util.resetSliceViews if hasViews else None)
        if self.folding.folds:
            self.ui.foldingCollapsibleButton.collapsed = False
        self.update()

    def showSoFar(self, node):
        """Show what a run has reached on its way in place of the registered image; None: not any more."""
        self.compare.choose(self._result if node is None else node)
        if node is not None:
            self.compare.show(WARPED)
        self.update()

    def update(self):
        """Say what the scene and its views show."""
        ui, folding, compare = self.ui, self.folding, self.compare
        shown = compare.role
        for role, button in self._images.items():
            button.checked = role == shown
            button.setEnabled(compare.can_show(role))
        ui.fadeSliderWidget.setEnabled(bool(shown))
        ui.flickerButton.setEnabled(bool(shown))
        if not shown:
            ui.flickerButton.checked = False
        if not ui.flickerButton.checked:
            self._follow(ui.fadeSliderWidget, "value", compare.opacity)
        for box, on, role in (
            (ui.gridCheckBox, folding.grid_visible, TRANSFORM),
            (ui.foldsCheckBox, folding.folds_visible, FOLDING),
            (ui.show3DCheckBox, folding.folds_in_3d, FOLDING),
        ):
            box.setEnabled(folding.linked(role) is not None and (role != FOLDING or bool(folding.folds)))
            self._follow(box, "checked", on)
        self._updateFolding()

    def _updateFolding(self):
        ui, folding = self.ui, self.folding
        largest, nearly = current_range(self.scene)
        self._follow(ui.rangeComboBox, "currentIndex", ui.rangeComboBox.findData(largest))
        self._follow(ui.nearlyCheckBox, "checked", nearly)
        hasMap = folding.linked(JACOBIAN) is not None
        for widget in (ui.rangeComboBox, ui.nearlyCheckBox, ui.histogramButton):
            widget.setEnabled(hasMap)
        ui.statisticsButton.setEnabled(hasMap and self._segmentation is not None and not self._problem)
        text = " ".join(filter(None, [folding.summary, self._problem]))
        warns = bool(folding.folds) or bool(self._problem)
        showNote(ui.foldingIconLabel, ui.foldingSummaryLabel, text, Tone.WARNING if warns else Tone.PLAIN)
        ui.worstButton.setEnabled(bool(folding.folds))
        ui.previousButton.setEnabled(folding.number > 0)
        ui.nextButton.setEnabled(folding.number + 1 < len(folding.folds))
        ui.foldLabel.setText(folding.position)
        table = self._statistics if self._has(self._statistics) else folding.linked(TABLE)
        if table is not self._table:
            self._table = table
            ui.tableView.setMRMLTableNode(table)
        if folding.number != self._selected:
            self._selected = folding.number
            ui.foldTable.selectRow(folding.number)

    def _fill(self):
        """Fill the table of folds."""
        rows = []
        for fold in self.folding.folds[:ROWS_SHOWN]:
            place = ", ".join(f"{value:.0f}" for value in fold.position)
            where = fold.segment or (_("inside") if fold.inside else _("outside the body"))
            if fold.between:
                where += _(", between voxels")
            rows.append((rounded(fold.volume_mm3), f"{fold.determinant:.3g}", place, where))
        titles = [_("Volume [mm³]"), _("Smallest |J|"), _("R, A, S [mm]"), _("Where")]
        self._items = fillTable(self.ui.foldTable, titles, rows)
        self.ui.foldTable.clearSelection()
        # The table and the row shown last; setting them again would reset the views.
        self._table, self._selected = False, -1
        self.update()

    def _follow(self, widget, name, value):
        """Set a property of a widget that shows how things are."""
        if getattr(widget, name) != value:
            setQuietly(widget, lambda: setattr(widget, name, value))

    def _after(self, change, value):
        change(value)
        self.update()

    def _onImage(self, role):
        """Show an image. If it is already shown, return to the user's own view."""
        self.compare.show("" if role == self.compare.role else role)
        self.update()

    def _onFlickerToggled(self, on):
        if on:
            self._flicker.start(FLICKER_MILLISECONDS)
        else:
            self._flicker.stop()
            self.compare.fade(self.ui.fadeSliderWidget.value)

    def _onFlicker(self):
        if self.compare.role:
            self.compare.fade(0.0 if self.compare.opacity > 0.5 else 1.0)
        else:
            self.update()

    def _onRange(self, *_args):
        largest = self.ui.rangeComboBox.currentData
        if largest:
            set_range(self.scene, largest, self.ui.nearlyCheckBox.checked)

    def _onHistogram(self, *_args):
        jacobian = self.folding.linked(JACOBIAN)
        if not self._has(self._histogram):
            array = slicer.util.arrayFromVolume(jacobian)
            self._histogram = add_histogram(self.scene, jacobian.GetName(), array)
        slicer.modules.plots.logic().ShowChartInLayout(self._histogram)

    def _onStatistics(self, *_args):
        jacobian = self.folding.linked(JACOBIAN)
        structures = self._structures(jacobian)
        if structures is not None:
            if not self._has(self._statistics):
                name = f"Statistics {jacobian.GetName()}"
                self._statistics = nodes.add_node(self.scene, "vtkMRMLTableNode", name)
            fill_statistics(self._statistics, structures, jacobian)
        self.update()

    def _has(self, node):
        """Whether a node that was made here is still in the scene."""
        return node is not None and node.GetScene() is self.scene

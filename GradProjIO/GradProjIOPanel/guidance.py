"""The section Guidance: pairs of landmarks, and segments of both images."""

import json

import qt
import slicer
from slicer.i18n import tr as _

from GradProjIOLib.errors import InputError
from GradProjIOLib.scene import panel_choices
from GradProjIOLib.scene.guidance import structures
from GradProjIOLib.scene.pairs import (
    PairPlacing,
    add_list,
    age,
    conflict_sentence,
    maps_of,
    pairs_of,
    points_in,
    remove_pair,
)
from GradProjIOPanel.notes import fillTable, setQuietly

MISSING = "–"


class GuidanceSection:
    """Shows what guides the registration. `parameters` is set by the panel."""

    def __init__(self, ui, scene):
        self.ui, self.scene, self.parameters = ui, scene, None
        self.placing = PairPlacing(scene)
        self._pairs, self._items, self._segments, self._entries = [], [], {}, []
        # What the table was filled from, and the point on which the views were centered last.
        self._filled, self._centered = None, (-1, False)
        ui.pairTable.cellClicked.connect(lambda row, column: self._onRow(row))
        ui.placePairButton.clicked.connect(self._onPlace)
        ui.removePairButton.clicked.connect(self._onRemove)
        ui.segmentsList.itemChanged.connect(self._onSegment)

    def changed(self, result):
        """Whether the landmarks or the result have changed since the last update."""
        placed = self.placing.poll(lambda: self._maps(result))
        return placed or self._state(result) != self._filled

    def update(self, result):
        """Follow the parameters, the scene and the chosen result."""
        ui, parameters = self.ui, self.parameters
        ready = parameters.fixedVolume is not None and parameters.movingVolume is not None
        ui.placePairButton.setEnabled(ready)
        ui.placePairButton.checked = self.placing.active
        self._fillSegments()
        self._fillPairs(result)

    def _maps(self, result):
        chosen = self.parameters
        return maps_of(chosen.fixedVolume, chosen.movingVolume, chosen.initialTransform, result)

    def _state(self, result):
        """What the table depends on."""
        chosen = self.parameters
        images = [node and node.GetID() for node in (chosen.fixedVolume, chosen.movingVolume, chosen.initialTransform)]
        return images, points_in(chosen.fixedPoints), points_in(chosen.movingPoints), age(result)

    def _fillPairs(self, result):
        ui, state = self.ui, self._state(result)
        if state == self._filled:
            return
        self._filled = state
        maps, note = self._maps(result), ""
        try:
            self._pairs = pairs_of(self.parameters.fixedPoints, self.parameters.movingPoints, maps)
        except InputError as error:
            self._pairs, note = [], str(error)
        note = note or conflict_sentence(maps.report)
        ui.guidanceNoteLabel.setText(note)
        ui.guidanceNoteLabel.setVisible(bool(note))
        ui.removePairButton.setEnabled(bool(self._pairs))
        rows = []
        for pair in self._pairs:
            now = MISSING if pair.now_mm is None else f"{pair.now_mm:.1f}"
            rows.append((pair.name, f"{pair.before_mm:.1f}", now, _("yes") if pair.conflicted else ""))
        titles = [_("Landmark"), _("Before [mm]"), _("Now [mm]"), _("Conflict")]
        self._items = fillTable(ui.pairTable, titles, rows)

    def _fillSegments(self):
        """List the segments that both have, with those checked that guide."""
        found = structures(self.parameters.fixedGuide, self.parameters.movingGuide)
        self.ui.segmentsList.setVisible(bool(found))
        setQuietly(self.ui.segmentsList, lambda: self._listSegments(found))

    def _listSegments(self, found):
        if found != self._segments:
            self._segments = found
            self.ui.segmentsList.clear()
            self._entries = [qt.QListWidgetItem(title) for title in found.values()]
            for entry in self._entries:
                entry.setFlags(qt.Qt.ItemIsUserCheckable | qt.Qt.ItemIsEnabled)
                self.ui.segmentsList.addItem(entry)
        leftOut = panel_choices.left_out_segments(self.parameters)
        for name, entry in zip(found, self._entries, strict=True):
            entry.setCheckState(qt.Qt.Unchecked if name in leftOut else qt.Qt.Checked)

    def _onSegment(self, *_args):
        states = zip(self._segments, self._entries, strict=True)
        leftOut = [name for name, entry in states if entry.checkState() == qt.Qt.Unchecked]
        self.parameters.segmentsLeftOut = json.dumps(leftOut)

    def _onPlace(self, *_args):
        """Place a pair with the next click in a view; a second click on the button ends that."""
        if self.placing.active:
            self.placing.stop()
        else:
            chosen = self.parameters
            if chosen.fixedPoints is None:
                chosen.fixedPoints = add_list(self.scene, "fixed", chosen.fixedVolume)
            if chosen.movingPoints is None:
                chosen.movingPoints = add_list(self.scene, "moving", chosen.movingVolume)
            self.placing.start(chosen.fixedPoints, chosen.movingPoints)
        self.ui.placePairButton.checked = self.placing.active

    def _onRemove(self, *_args):
        """Remove the pair that is selected in the table, else the last one."""
        row = self.ui.pairTable.currentRow()
        remove_pair(self.parameters.fixedPoints, self.parameters.movingPoints, row)

    def _onRow(self, row):
        """Center the views on a landmark; at a second click, on its partner."""
        partner = self._centered == (row, False)
        self._centered = (row, partner)
        point = self._pairs[row].moving if partner else self._pairs[row].fixed
        slicer.vtkMRMLSliceNode.JumpAllSlices(self.scene, *point, slicer.vtkMRMLSliceNode.CenteredJumpSlice)

"""The section Guidance of the panel: pairs are placed, moved, listed and sent; nothing raises."""

import numpy as np
import pytest

slicer_application = pytest.importorskip("slicer_application")

import slicer
import vtk
from panel_tools import finish, open_panel, register_scripted
from PySide6 import QtCore, QtWidgets
from scene.test_scene_guidance import UP, two_segmentations, world
from scene_tools import ScriptedWorker, add_pair, wait_until

from GradProjIOLib.scene import nodes as mrml

pytest_plugins = ["panel_tools"]

HERE = [(36.5, 25.5, 28.0), (20.0, 28.0, 25.0)]


def place(panel, position):
    """Press the button and click at a position of the fixed view."""
    panel.ui.placePairButton.click()
    panel._parameterNode.fixedPoints.AddControlPointWorld(vtk.vtkVector3d(*position))
    # What a view does after a click.
    interaction = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLInteractionNode")
    interaction.SetCurrentInteractionMode(interaction.ViewTransform)
    panel.onTimer()


def table(panel):
    found = panel.ui.pairTable
    rows, columns = QtWidgets.QTableWidget.rowCount(found), QtWidgets.QTableWidget.columnCount(found)
    return [[found.item(row, column).text() for column in range(columns)] for row in range(rows)]


def test_pairs_are_placed_moved_listed_and_removed(scripted):
    ui, parameters = scripted.ui, scripted._parameterNode
    for position in HERE:
        place(scripted, position)
        assert not ui.placePairButton.property("checked")
    lists = parameters.fixedPoints, parameters.movingPoints
    np.testing.assert_allclose(world(lists[1]), HERE)
    assert table(scripted) == [["1", "0.0", "–", ""], ["2", "0.0", "–", ""]]
    lists[1].SetNthControlPointPositionWorld(1, 20.0, 28.0, 29.0)
    scripted.onTimer()
    assert table(scripted)[1] == ["2", "4.0", "–", ""]
    register_scripted(scripted)
    assert table(scripted)[1] == ["2", "4.0", "4.0", ""]
    ui.pairTable.selectRow(0)
    ui.removePairButton.click()
    scripted.onTimer()
    assert [row[0] for row in table(scripted)] == ["2"]
    ui.removePairButton.click()
    scripted.onTimer()
    assert ui.pairTable.isHidden()
    assert not ui.removePairButton.isEnabled()


def test_a_second_click_on_the_button_places_nothing(scripted):
    ui = scripted.ui
    ui.placePairButton.click()
    assert ui.placePairButton.property("checked")
    ui.placePairButton.click()
    assert not ui.placePairButton.property("checked")
    assert not scripted.guidance.placing.active
    # Nor does leaving the panel for another module.
    ui.placePairButton.click()
    scripted.exit()
    assert not scripted.guidance.placing.active


def test_a_click_on_a_row_centers_the_views_on_a_point_then_on_its_partner(scripted):
    place(scripted, HERE[0])
    scripted._parameterNode.movingPoints.SetNthControlPointPositionWorld(0, 1, 2, 3)
    scripted.onTimer()
    (view, *_) = mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLSliceNode")
    for expected in (HERE[0], (1, 2, 3)):
        scripted.ui.pairTable.cellClicked.emit(0, 0)
        found = [view.GetSliceToRAS().GetElement(row, 3) for row in range(3)]
        assert found == pytest.approx(expected)


def test_points_without_partners_get_a_sentence(scripted):
    ui, parameters = scripted.ui, scripted._parameterNode
    place(scripted, HERE[0])
    parameters.fixedPoints.AddControlPointWorld(vtk.vtkVector3d(1, 2, 3))
    scripted.onTimer()
    sentence = "There are 2 fixed and 1 moving landmarks"
    assert ui.guidanceNoteLabel.property("text").startswith(sentence)
    assert not ui.registerButton.isEnabled()
    assert sentence in ui.statusLabel.property("text")
    parameters.movingPoints.AddControlPointWorld(vtk.vtkVector3d(1, 2, 3), "2")
    scripted.onTimer()
    assert ui.registerButton.isEnabled()
    assert ui.guidanceNoteLabel.isHidden()


def test_register_and_go_on_send_what_guides(scripted):
    parameters, client = scripted._parameterNode, scripted.session.client
    for position in HERE:
        place(scripted, position)
    parameters.movingPoints.SetNthControlPointPositionWorld(1, 20.0, 28.0, 29.0)
    drawn = two_segmentations(slicer.mrmlScene, parameters.fixedVolume, parameters.movingVolume)
    parameters.fixedGuide, parameters.movingGuide = drawn
    register_scripted(scripted)
    request = client.requests[-1]
    assert request["inputs"]["fixed_points"]["points"] == pytest.approx(np.array(HERE))
    assert request["inputs"]["moving_points"]["points"][1] == pytest.approx([20, 28, 29])
    assert request["inputs"]["fixed_labels"]["names"] == [(1, "body"), (2, "core")]
    assert request["inputs"]["moving_labels"]["names"] == [(1, "core"), (2, "body")]
    assert request["guiding_labels"] is None
    entries = [scripted.ui.segmentsList.item(row) for row in (0, 1)]
    assert [entry.text() for entry in entries] == ["body", "core"]
    entries[0].setCheckState(QtCore.Qt.Unchecked)
    scripted.ui.toleranceSpinBox.setProperty("value", 3.5)
    scripted.ui.goOnButton.click()
    request = client.requests[-1]
    assert request["settings"] == {"landmark_tolerance": 3.5}
    assert request["earlier"]["steps"] == 20
    assert len(request["inputs"]["moving_points"]["points"]) == 2
    assert request["guiding_labels"] == {"core": 1.0}
    assert request["inputs"]["fixed_labels"]["names"] == [(1, "core")]
    finish(scripted)
    entries[1].setCheckState(QtCore.Qt.Unchecked)
    assert "No segment is chosen" in scripted.ui.statusLabel.property("text")
    assert not scripted.ui.goOnButton.isEnabled()


def test_a_result_of_other_images_goes_on_without_these_landmarks(scripted):
    register_scripted(scripted)
    other = add_pair(slicer.mrmlScene)
    scripted._parameterNode.fixedVolume = other[0]
    place(scripted, HERE[0])
    assert table(scripted)[0][2] == "–"
    scripted.ui.goOnButton.click()
    assert scripted.session.client.requests[-1]["inputs"].get("fixed_points") is None


def test_an_alignment_from_landmarks_asks_for_some(scripted):
    parameters, ui = scripted._parameterNode, scripted.ui
    parameters.align = "landmarks_rigid"
    assert "place pairs under Guidance" in ui.statusLabel.property("text")
    for position in HERE:
        place(scripted, position)
    assert ui.registerButton.isEnabled()
    register_scripted(scripted)
    assert scripted.session.client.requests[-1]["settings"]["align"] == "landmarks_rigid"


def test_the_section_outlives_the_scene(application):
    panel = open_panel(application, ScriptedWorker(), ScriptedWorker())
    add_pair(slicer.mrmlScene)
    panel.initializeParameterNode()
    place(panel, HERE[0])
    panel.ui.placePairButton.click()
    slicer.mrmlScene.Clear(False)
    panel.onTimer()
    assert not panel.guidance.placing.active
    assert panel.ui.pairTable.isHidden()
    assert not panel.ui.placePairButton.isEnabled()
    add_pair(slicer.mrmlScene)
    panel.onTimer()
    place(panel, HERE[1])
    assert [row[:2] for row in table(panel)] == [["1", "0.0"]]
    # A list that is deleted leaves its partners alone, which is said.
    slicer.mrmlScene.RemoveNode(panel._parameterNode.fixedPoints)
    panel.onTimer()
    assert "choose the fixed landmarks, too" in panel.ui.statusLabel.property("text")
    panel.cleanup()


def test_a_real_registration_goes_on_to_where_the_landmarks_are(panel):
    """From the panel to the worker and back: the table's figure falls, and the plot has the landmarks' loss."""
    parameters = panel._parameterNode
    parameters.model, parameters.refineSteps = "none", 6

    def press(button):
        button.click()
        wait_until(lambda: not panel.session.active, QtWidgets.QApplication.processEvents)
        panel.onTimer()

    press(panel.ui.registerButton)
    place(panel, HERE[0])
    proposed = world(parameters.movingPoints)[0]
    assert not np.allclose(proposed, HERE[0], atol=0.1), "the partner is where the result puts it"
    parameters.movingPoints.SetNthControlPointPositionWorld(0, *(proposed + UP))
    panel.onTimer()
    assert table(panel)[0][2] == "4.0"
    parameters.moreSteps = 20
    panel.ui.goOnButton.click()
    panel.ui.plotButton.click()
    said = set()
    wait_until(
        lambda: not panel.session.active,
        lambda: (QtWidgets.QApplication.processEvents(), said.add(panel.ui.statusLabel.property("text"))),
    )
    panel.onTimer()
    assert any("landmarks' loss" in text for text in said)
    chart = panel.session.chart
    series = [chart.GetNthPlotSeriesNode(number) for number in range(chart.GetNumberOfPlotSeriesNodes())]
    assert [one.GetYColumnName() for one in series] == ["Similarity loss", "Regularity loss", "Landmark loss"]
    losses = slicer.util.arrayFromTableColumn(series[-1].GetTableNode(), "Landmark loss")
    assert len(losses) == len(panel.session.steps)
    assert losses[-1] < losses[0]
    assert float(table(panel)[0][2]) < 2
    assert "guided by 1 landmarks" in panel.ui.statusLabel.property("text")

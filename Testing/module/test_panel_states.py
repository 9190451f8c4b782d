"""Anything done with the panel in any order: panel and views agree, nothing raises, nothing is left behind."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

slicer_application = pytest.importorskip("slicer_application")

import slicer
import vtk
from panel_tools import open_panel
from scene_tools import ScriptedWorker, add, add_pair, exchange_folders, image

from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene import panel_choices
from GradProjIOLib.scene.session import State

pytest_plugins = ["panel_tools"]

# As many runs as the environment variable says; the suite has little time.
RUNS = int(os.environ.get("GRADPROJIO_PANEL_RUNS", "8"))
ROLES = {"before": "moving", "after": "warped", "map": "jacobian"}
numbers = st.integers(0, 99)


def one_of(items, number):
    return items[number % len(items)] if items else None


class PanelMachine(RuleBasedStateMachine):
    """The panel with a worker that has results at hand; a tick of its timer is a step like others."""

    saved: Path | None = None

    @initialize()
    def open(self):
        self.raised = []
        self.hook, sys.excepthook = sys.excepthook, lambda *error: self.raised.append(error)
        self.folder = tempfile.mkdtemp()
        self.before, tempfile.tempdir = tempfile.tempdir, self.folder
        self.application = slicer_application.start(slicer.vtkMRMLScene())
        self.application.module = slicer_application.load_module()
        self.application.answer = False
        for kind in ("vtkMRMLSliceCompositeNode", "vtkMRMLSliceNode"):
            for _ in range(2):
                slicer.mrmlScene.AddNewNodeByClass(kind)
        add_pair(slicer.mrmlScene)
        self.open_panel()

    def open_panel(self):
        self.panel = open_panel(self.application, ScriptedWorker(), ScriptedWorker())
        self.panel.download.client = ScriptedWorker()

    @property
    def ui(self):
        return self.panel.ui

    def of_role(self, role):
        volumes = mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLNode")
        return [node for node in volumes if node.GetAttribute("GradProjIO.role") == role]

    @rule(folded=st.sampled_from([0, 0, 3, 6]), works=st.booleans())
    def press_register(self, folded, works):
        worker = self.panel.session.client
        worker.folded, worker.weights_missing = folded, not works
        self.ui.registerButton.click()

    @rule(ticks=st.integers(1, 6))
    def tick(self, ticks):
        for _ in range(ticks):
            self.panel.onTimer()

    @rule()
    def finish(self):
        for _ in range(8):
            self.panel.onTimer()

    @precondition(lambda self: self.panel.session.state is State.OFFERED)
    @rule(keep=st.booleans())
    def keep_or_discard(self, keep):
        (self.ui.keepButton if keep else self.ui.discardButton).click()

    @rule()
    def go_on(self):
        self.ui.goOnButton.click()

    @rule(clicks=st.booleans(), offset=st.floats(-5, 5))
    def place_a_pair(self, clicks, offset):
        self.ui.placePairButton.click()
        placed = self.panel._parameterNode.fixedPoints
        if clicks and placed is not None and self.panel.guidance.placing.active:
            placed.AddControlPointWorld(vtk.vtkVector3d(20 + offset, 25, 25))

    @rule()
    def remove_a_pair(self):
        self.ui.removePairButton.click()

    @rule(number=numbers)
    def move_or_remove_a_point(self, number):
        found = one_of(mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLMarkupsFiducialNode"), number)
        if found is not None and found.GetNumberOfControlPoints():
            if number % 3:
                found.SetNthControlPointPositionWorld(0, number, 2, 3)
            else:
                found.RemoveNthControlPoint(0)

    @rule(number=numbers)
    def choose_result(self, number):
        maps = [*self.of_role("jacobian"), None]
        self.ui.resultSelector.setCurrentNode(one_of(maps, number))

    @rule(name=st.sampled_from(["before", "after", "map", "worst", "previous", "next", "flicker", "plot", "histogram"]))
    def click(self, name):
        getattr(self.ui, f"{name}Button").click()

    @rule(name=st.sampled_from(["grid", "folds", "show3D", "nearly", "overwrite", "jacobian", "warped"]))
    def tick_box(self, name):
        getattr(self.ui, f"{name}CheckBox").click()

    @rule(value=st.floats(0, 1))
    def fade(self, value):
        self.ui.fadeSliderWidget.value = value

    @rule(index=st.integers(0, 2))
    def choose_range(self, index):
        self.ui.rangeComboBox.setCurrentIndex(index)

    @rule(number=numbers)
    def change_the_views_by_hand(self, number):
        volumes = mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLScalarVolumeNode")
        chosen = one_of([*volumes, None], number)
        for node in mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLSliceCompositeNode"):
            node.SetForegroundVolumeID(chosen.GetID() if chosen else None)

    @rule()
    def load_a_volume(self):
        if slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") < 12:
            add(slicer.mrmlScene, image("loaded"))

    @rule(number=numbers)
    def delete_a_node(self, number):
        kinds = ("vtkMRMLVolumeNode", "vtkMRMLTransformNode", "vtkMRMLSegmentationNode", "vtkMRMLTableNode")
        kinds += ("vtkMRMLMarkupsFiducialNode",)
        found = [node for kind in kinds for node in mrml.nodes_of_class(slicer.mrmlScene, kind)]
        if found:
            slicer.mrmlScene.RemoveNode(one_of(found, number))

    @rule()
    def close_the_scene(self):
        slicer.mrmlScene.Clear(False)

    @rule(close=st.booleans())
    def load_a_scene(self, close):
        if PanelMachine.saved is None or slicer.mrmlScene.GetNumberOfNodes() > 150:
            return
        if close:
            slicer.mrmlScene.Clear(False)
        slicer.mrmlScene.SetURL(str(PanelMachine.saved))
        slicer.mrmlScene.Import()

    @rule()
    def visit_another_module(self):
        self.panel.exit()
        self.panel.parent.isEntered = False
        self.panel.onTimer()
        self.panel.parent.isEntered = True
        self.panel.enter()

    @rule()
    def reload_the_module(self):
        self.panel.cleanup()
        self.open_panel()

    @invariant()
    def nothing_raises(self):
        assert self.raised == []
        assert self.application.errors == []

    @invariant()
    def panel_and_views_agree(self):
        self.panel.onTimer()
        ui, parameters = self.ui, self.panel._parameterNode
        # What the panel shows is in the scene.
        assert parameters.parameterNode.GetScene() is slicer.mrmlScene
        for name in ("fixedVolume", "movingVolume", "result"):
            node = getattr(parameters, name)
            assert node is None or node.GetScene() is slicer.mrmlScene
        assert ui.resultSelector.currentNode() is parameters.result
        # The row says what all views show over the fixed image of the result.
        result = self.panel.results.folding.result
        assert result is self.panel._chosenResult(parameters)
        shown = {
            (node.GetBackgroundVolumeID(), node.GetForegroundVolumeID())
            for node in mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLSliceCompositeNode")
            if node.GetBackgroundVolumeID()
        }
        fixed = mrml.member(result, "fixed")
        for mode, role in ROLES.items():
            over = mrml.member(result, role)
            expected = fixed is not None and over is not None and shown == {(fixed.GetID(), over.GetID())}
            assert getattr(ui, f"{mode}Button").property("checked") == expected, mode
            assert getattr(ui, f"{mode}Button").isEnabled() == (fixed is not None and over is not None)
        assert not ui.flickerButton.property("checked") or ui.flickerButton.isEnabled()
        # Grid, folds and marker are those of the result.
        for box, role in ((ui.gridCheckBox, "transform"), (ui.foldsCheckBox, "folding")):
            own = mrml.member(result, role)
            for node in self.of_role(role):
                display = node.GetDisplayNode()
                visible = display is not None and bool(display.GetVisibility())
                assert visible == (box.property("checked") if node is own else False)
        folds = self.panel.results.folding.folds
        assert ui.foldTable.property("rowCount") == len(folds)
        assert ui.worstButton.isEnabled() == bool(folds)
        marked = slicer.mrmlScene.GetFirstNodeByName("GradProjIO fold") is not None
        assert marked == bool(ui.foldLabel.property("text"))

    @invariant()
    def pairs_are_listed_or_a_sentence_says_why_not(self):
        self.panel.onTimer()
        ui, parameters = self.ui, self.panel._parameterNode
        lists = parameters.fixedPoints, parameters.movingPoints
        counts = {node.GetNumberOfDefinedControlPoints() for node in lists if node is not None}
        rows = ui.pairTable.property("rowCount")
        if None not in lists and len(counts) == 1 and not ui.guidanceNoteLabel.property("text").startswith("The fixed"):
            assert {rows} == counts
        else:
            assert rows == 0
        assert ui.placePairButton.property("checked") == self.panel.guidance.placing.active

    @invariant()
    def the_button_says_what_it_does(self):
        ui, session = self.ui, self.panel.session
        problem = panel_choices.problem(self.panel._parameterNode)
        assert ui.registerButton.isEnabled() == (session.active or not problem)
        assert ui.progressBar.isHidden() != session.active
        offered = session.state is State.OFFERED
        assert ui.keepButton.isHidden() != offered
        if not session.active and problem:
            assert ui.statusLabel.property("text").endswith(problem)

    def teardown(self):
        if not hasattr(self, "panel"):
            return
        try:
            self.panel.cleanup()
            assert self.raised == []
            assert exchange_folders(self.folder) == []
            assert not self.panel._timer.isActive()
            assert not self.panel.results._flicker.isActive()
            for client in (self.panel.session.client, self.panel.evaluation.client, self.panel.download.client):
                assert not client.running
        finally:
            sys.excepthook, tempfile.tempdir = self.hook, self.before


@pytest.fixture
def saved(scripted, tmp_path):
    """A scene that was saved with a folded result, its map shown."""
    from panel_tools import register_scripted
    from scene.test_mrml import slicer_save

    register_scripted(scripted, folded=4)
    scripted.ui.mapButton.click()
    assert slicer_save(slicer.mrmlScene, tmp_path)
    PanelMachine.saved = tmp_path / "scene.mrml"
    yield
    PanelMachine.saved = None


def test_panel_and_views_agree_whatever_is_done(saved):
    settings = hypothesis.settings(
        max_examples=RUNS,
        stateful_step_count=20,
        deadline=None,
        derandomize=RUNS < 50,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.stateful.run_state_machine_as_test(PanelMachine, settings=settings)

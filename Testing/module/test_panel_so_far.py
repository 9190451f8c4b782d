"""The panel shows what a run has reached on its way, and gives the views back."""

import pytest

slicer_application = pytest.importorskip("slicer_application")

import slicer
from PySide6 import QtWidgets
from scene_tools import add, image, wait_until

from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.session import State

pytest_plugins = ["panel_tools"]


@pytest.fixture
def views(panel, monkeypatch):
    """The panel without a network, two slice views in which the user has a layer, and no wait between two looks."""
    monkeypatch.setattr("GradProjIOLib.scene.session.SECONDS", 0.0)
    own = add(slicer.mrmlScene, image("own layer"))
    for _ in range(2):
        slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceNode")
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
        node.SetBackgroundVolumeID(panel._parameterNode.fixedVolume.GetID())
        node.SetForegroundVolumeID(own.GetID())
    panel._parameterNode.model, panel._parameterNode.refineSteps = "none", 25
    return panel


def process_events():
    QtWidgets.QApplication.processEvents()


def layers():
    """What all views show over the background."""
    (found,) = {
        node.GetForegroundVolumeID() for node in mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLSliceCompositeNode")
    }
    return slicer.mrmlScene.GetNodeByID(found).GetName() if found else None


def start(panel):
    panel.ui.registerButton.click()
    wait_until(lambda: layers() == "moving so far", process_events)


def end(panel):
    wait_until(lambda: not panel.session.active, process_events)
    panel.onTimer()


def test_the_views_go_from_the_result_so_far_to_the_result(views):
    start(views)
    assert views.ui.afterButton.property("checked")
    end(views)
    assert layers() == "Registered moving to fixed"
    assert slicer.mrmlScene.GetFirstNodeByName("moving so far") is None
    assert slicer.mrmlScene.GetFirstNodeByName("Transform so far") is None
    views.ui.afterButton.click()
    assert layers() == "own layer"


def test_what_the_user_shows_instead_stays(views):
    start(views)
    views.ui.beforeButton.click()
    assert layers() == "moving"
    for _ in range(20):
        process_events()
    assert layers() == "moving"
    end(views)
    assert layers() == "Registered moving to fixed"


def test_a_canceled_run_gives_the_views_back(views):
    views._parameterNode.refineSteps = 300
    start(views)
    views.ui.registerButton.click()
    end(views)
    assert views.session.state is State.OFFERED
    assert layers() == "own layer"
    views.ui.discardButton.click()
    assert slicer.mrmlScene.GetFirstNodeByName("moving so far") is None


def test_it_can_be_switched_off(views):
    views.ui.soFarCheckBox.click()
    views._parameterNode.refineSteps = 5
    views.ui.registerButton.click()
    seen = set()
    wait_until(lambda: not views.session.active, lambda: (process_events(), seen.add(layers())))
    assert seen <= {"own layer", "Registered moving to fixed"}


def test_a_scene_that_is_closed_meanwhile(views):
    views._parameterNode.refineSteps = 300
    start(views)
    slicer.mrmlScene.Clear(False)
    views.onTimer()
    assert not views.session.active
    assert slicer.mrmlScene.GetFirstNodeByName("moving so far") is None


def test_another_module_is_open_at_the_end(views):
    start(views)
    views.exit()
    views.parent.isEntered = False
    end(views)
    assert slicer.mrmlScene.GetFirstNodeByName("moving so far") is None
    assert layers() == "own layer"
    views.parent.isEntered = True
    views.enter()
    assert layers() == "Registered moving to fixed"

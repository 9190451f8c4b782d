"""The module's panel in a Slicer application for tests, with the real worker or with a stand-in."""

import sys

import pytest
import slicer
import slicer_application
from PySide6 import QtWidgets
from scene_tools import ScriptedWorker, add_pair, new_worker


@pytest.fixture
def application(folder):
    application = slicer_application.start(slicer.vtkMRMLScene())
    application.module = slicer_application.load_module()
    # What is raised where Qt or VTK called, is only printed.
    raised, hook = [], sys.excepthook
    sys.excepthook = lambda *error: (raised.append(error), hook(*error))
    yield application
    sys.excepthook = hook
    assert raised == []
    assert application.errors == []


@pytest.fixture
def panel(application, worker):
    """The open panel with a small pair and a quick method chosen; its worker stays for the next test."""
    panel = open_panel(application, worker, new_worker())
    add_pair(slicer.mrmlScene)
    panel.initializeParameterNode()
    panel._parameterNode.model = "compact"
    panel._parameterNode.device = "cpu"
    panel._parameterNode.steps = panel._parameterNode.refineSteps = 2
    yield panel
    if panel.session.active:
        panel.session.stop_now()
    panel.session.client = new_worker()
    panel.cleanup()


@pytest.fixture
def scripted(application):
    """The open panel with a small pair and three slice views; its workers have results at hand."""
    panel = open_panel(application, ScriptedWorker(), ScriptedWorker())
    add_pair(slicer.mrmlScene)
    for _ in range(3):
        slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
        slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceNode")
    panel.initializeParameterNode()
    yield panel
    panel.cleanup()


def open_panel(application, worker, evaluator):
    parent = slicer.qMRMLWidget()
    parent.setLayout(QtWidgets.QVBoxLayout())
    parent.isEntered = True
    panel = application.module.GradProjIOWidget(parent)
    slicer_application.ALIVE.append(panel)
    panel.setup()
    panel.session.client = worker
    panel.evaluation.client = evaluator
    panel.enter()
    # The tests call it themselves, so that what happens between its ticks is up to them.
    if isinstance(worker, ScriptedWorker):
        panel._timer.stop()
    return panel


def finish(panel):
    """Let a stand-in's registration end."""
    for _ in range(20):
        panel.onTimer()
        if not panel.session.active:
            return
    raise AssertionError("the registration does not end")


def register_scripted(panel, folded=0):
    """Press Register and let the stand-in finish; return the result's Jacobian map."""
    panel.session.client.folded = folded
    panel.ui.registerButton.click()
    finish(panel)
    return panel._parameterNode.result

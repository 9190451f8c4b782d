"""The module's panel under PySide6, with real registrations by the real worker."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

slicer_application = pytest.importorskip("slicer_application")

import slicer
from panel_tools import open_panel
from PySide6 import QtWidgets
from scene_tools import add, add_pair, image, is_alive, new_worker, wait_until

from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene import packages, panel_choices
from GradProjIOLib.scene.session import State

pytest_plugins = ["panel_tools"]

FOLDER = Path(__file__).parents[2] / "GradProjIO"
UI = ElementTree.parse(FOLDER / "Resources" / "UI" / "GradProjIO.ui")


def process_events():
    QtWidgets.QApplication.processEvents()


def register(panel):
    panel.ui.registerButton.click()
    wait_until(lambda: not panel.session.active, process_events)


def test_importing_the_module_loads_nothing_heavy():
    code = (
        "import sys, slicer, slicer_application as s; s.start(slicer.vtkMRMLScene()); m = s.load_module();"
        "p = type('P', (), {'path': str(s.MODULE_FILE)})(); m.GradProjIO(p); assert p.title == 'GradProjIO';"
        "print([n for n in ('torch', 'SimpleITK', 'nibabel', 'scipy', 'matplotlib') if n in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_the_module_file_has_no_numerics_and_no_processes():
    for path in (FOLDER / "GradProjIO.py", *(FOLDER / "GradProjIOPanel").glob("*.py")):
        for word in ("numpy", "torch", "subprocess", "vtkImage", "Popen", "threading"):
            assert word not in path.read_text(), path


def test_every_file_of_the_module_is_installed():
    listed = (FOLDER / "CMakeLists.txt").read_text()
    for path in (FOLDER / "GradProjIOPanel").glob("*.py"):
        assert f"GradProjIOPanel/{path.name}" in listed


def test_a_slicer_that_is_too_old_shows_a_sentence(application, monkeypatch):
    """Nothing that Python 3.9 does not understand is imported there."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 10))
    for name in [name for name in sys.modules if name.startswith("GradProjIOPanel")]:
        monkeypatch.delitem(sys.modules, name)
    module = slicer_application.load_module()
    assert {name for name in sys.modules if name.startswith("GradProjIOPanel.")} == {"GradProjIOPanel.too_old"}
    parent = slicer.qMRMLWidget()
    parent.setLayout(QtWidgets.QVBoxLayout())
    panel = module.GradProjIOWidget(parent)
    panel.setup()
    assert "needs Slicer 5.10" in panel.label.property("text")
    for name in ("GradProjIO.py", "GradProjIOPanel/__init__.py", "GradProjIOPanel/too_old.py"):
        ast.parse((FOLDER / name).read_text(), feature_version=(3, 9))


def test_every_widget_that_can_be_used_has_a_tooltip():
    passive = {"qMRMLWidget", "QWidget", "ctkCollapsibleButton"}
    for widget in UI.iter("widget"):
        names = {entry.get("name") for entry in widget.findall("property")}
        if widget.get("class") not in passive and not widget.get("name").endswith("Label"):
            assert "toolTip" in names, widget.get("name")


def test_the_ui_names_only_parameters_there_are_and_all_that_need_a_widget(application):
    named = {
        entry.find("string").text
        for widget in UI.iter("widget")
        for entry in widget.findall("property")
        if entry.get("name") == "SlicerParameterName"
    }
    parameters = set(application.module.GradProjIOParameterNode.__annotations__)
    assert named <= parameters
    # The devices differ from computer to computer and the segments with the images, so the panel fills these lists.
    assert parameters - named == {"device", "segmentsLeftOut"}


def test_every_choice_of_the_panel_is_allowed_and_shown_in_a_box(panel):
    from GradProjIOLib.settings import Settings

    for setting, labels in panel_choices.labels().items():
        for value in labels:
            Settings.from_mapping({setting: value})
        box = getattr(panel.ui, f"{panel_choices.parameter_name(setting)}ComboBox")
        assert [box.itemText(index) for index in range(box.property("count"))] == list(labels.values())


def test_an_untouched_panel_has_the_default_settings(panel):
    from GradProjIOLib.settings import Settings

    parameters = application_defaults(panel)
    assert Settings.from_mapping(panel_choices.settings(parameters)) == Settings()


def test_the_panel_offers_exactly_the_presets_and_custom(panel):
    from GradProjIOLib.settings import PRESETS, Settings, preset_of

    box = panel.ui.presetComboBox
    names = [box.itemData(index) for index in range(box.property("count"))]
    assert names == [*PRESETS, panel_choices.CUSTOM]
    assert preset_of(Settings(steps=7)) == panel_choices.CUSTOM
    assert panel_choices.preset(application_defaults(panel)) == "standard"


def test_choosing_a_preset_sets_its_values_and_others_are_custom(panel):
    from GradProjIOLib.settings import PRESETS, Settings

    box, parameters = panel.ui.presetComboBox, panel._parameterNode
    assert box.property("currentText") == "custom"
    kept = {"model": "compact", "device": "cpu"}
    for name in (*PRESETS, *reversed(PRESETS)):
        parameters.resolution = 2.0
        box.setCurrentIndex(box.findData(name))
        chosen = Settings.from_mapping(panel_choices.settings(parameters))
        assert chosen == Settings.from_mapping({"preset": name} | kept)
        assert box.property("currentData") == name
    for name, value in (("steps", 7), ("refineSteps", 7), ("samples", 5000), ("resolution", 2.5)):
        box.setCurrentIndex(box.findData("quick"))
        setattr(parameters, name, value)
        assert box.property("currentText") == "custom"
    box.setCurrentIndex(box.findData("quick"))
    # Nothing is chosen with "custom", so the box goes on showing what the values are.
    box.setCurrentIndex(box.findData("custom"))
    assert box.property("currentData") == "quick"


def test_the_plot_goes_on_over_both_stages(panel, application):
    panel.ui.registerButton.click()
    panel.ui.plotButton.click()
    formats = set()

    def look():
        process_events()
        formats.add(panel.ui.progressBar.property("format"))

    wait_until(lambda: not panel.session.active, look)
    assert "Refinement, level 3 of 3, step 2 of 2" in formats
    stages = [step["stage"] for step in panel.session.steps]
    assert set(stages) == {"network", "refinement"}
    table = application.shown_charts[0].GetNthPlotSeriesNode(0).GetTableNode().GetTable()
    numbers = [table.GetValueByName(row, "Step").ToDouble() for row in range(table.GetNumberOfRows())]
    assert numbers == list(range(len(stages)))


def test_a_registration_without_a_network(panel):
    panel._parameterNode.model = "none"
    assert panel.ui.modelComboBox.property("currentText") == "none: refinement only"
    assert not panel.ui.stepsSpinBox.isEnabled()
    register(panel)
    assert {step["stage"] for step in panel.session.steps} == {"refinement"}
    assert "· without a network" in panel.ui.statusLabel.property("text")
    assert panel._parameterNode.result is not None


def application_defaults(panel):
    """The parameters of a new parameter node."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")
    return type(panel._parameterNode)(node)


def test_the_panel_suggests_the_first_two_volumes(panel):
    assert panel._parameterNode.fixedVolume.GetName() == "fixed"
    assert panel._parameterNode.movingVolume.GetName() == "moving"
    assert panel.ui.registerButton.isEnabled()
    assert panel.ui.modelComboBox.property("currentText") == "compact"
    panel._parameterNode.model = "auto"
    assert panel.ui.modelComboBox.property("currentText") == "automatic"


def test_the_settings_are_those_of_the_panel(panel):
    from GradProjIOLib.settings import Settings

    parameters = panel._parameterNode
    parameters.steps, parameters.networkLearningRate, parameters.regularityWeight = 0, 2e-4, 2.5
    assert Settings(**panel_choices.settings(parameters)).method == "projected"
    assert panel.ui.methodComboBox.isEnabled()
    parameters.refineSteps = 0
    assert not panel.ui.methodComboBox.isEnabled()
    chosen = panel_choices.settings(parameters)
    settings = Settings(**chosen)
    assert (settings.method, settings.regularity_weight) == ("direct", 2.5)
    assert settings.learning_rate == pytest.approx(2e-4)
    assert settings.resolution is None
    panel.ui.resolutionSpinBox.setProperty("value", 1.5)
    assert Settings(**panel_choices.settings(parameters)).resolution == 1.5
    assert not panel.ui.samplesSpinBox.isEnabled()
    parameters.align = "rigid"
    parameters.initialTransform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    assert panel_choices.settings(parameters)["align"] == "none"
    assert not panel.ui.alignComboBox.isEnabled()


def test_a_registration_from_the_button_to_the_folds(panel, application):
    parameters = panel._parameterNode
    # The refinement after the network would undo the folds that are looked for here.
    parameters.refineSteps = 0
    parameters.steps, parameters.regularityWeight, parameters.networkLearningRate = 4, 0.0, 0.01
    panel.ui.registerButton.click()
    assert panel.ui.registerButton.property("text") == "Cancel"
    panel.ui.plotButton.click()
    assert len(application.shown_charts) == 1
    wait_until(lambda: not panel.session.active, process_events)
    ui = panel.ui
    assert ui.registerButton.property("text") == "Register"
    text = ui.statusLabel.property("text")
    assert text.startswith("Done: similarity loss")
    assert re.search(r"folding: [\d,]+ voxels \([\d.]+ %\) in (one region|\d+ regions)", text)
    assert not ui.statusIconLabel.isHidden()
    jacobian = parameters.result
    assert jacobian.GetName() == "Jacobian moving to fixed"
    assert "voxels fold" in ui.foldingSummaryLabel.property("text")
    assert not ui.foldingCollapsibleButton.property("collapsed")
    assert QtWidgets.QTableWidget.rowCount(ui.tableView) == 9
    assert ui.foldTable.property("rowCount") == len(panel.results.folding.folds)
    table = application.shown_charts[0].GetNthPlotSeriesNode(0).GetTableNode()
    assert table.GetNumberOfRows() == 4


def test_cancel_offers_the_result_so_far(panel):
    panel._parameterNode.steps = 200
    panel.ui.registerButton.click()
    wait_until(lambda: panel.session.steps, process_events)
    assert "Similarity loss" in panel.ui.statusLabel.property("text")
    panel.ui.registerButton.click()
    assert panel.ui.registerButton.property("text") == "Stop now"
    wait_until(lambda: panel.session.state is State.OFFERED, process_events)
    assert not panel.ui.keepButton.isHidden()
    panel.ui.keepButton.click()
    assert panel.ui.keepButton.isHidden()
    assert panel._parameterNode.result is not None


def test_a_killed_worker_leaves_a_message_and_a_button_that_works(panel):
    panel._parameterNode.steps = 200
    panel.ui.registerButton.click()
    wait_until(lambda: panel.session.steps, process_events)
    os.kill(panel.session.client.pid, signal.SIGKILL)
    wait_until(lambda: not panel.session.active, process_events)
    assert "ended unexpectedly" in panel.ui.statusLabel.property("text")
    assert panel.ui.registerButton.property("text") == "Register"
    panel._parameterNode.steps = 1
    register(panel)
    assert panel._parameterNode.result is not None


def test_closing_the_scene_cancels_with_a_message(panel):
    panel._parameterNode.steps = 200
    panel.ui.registerButton.click()
    wait_until(lambda: panel.session.steps, process_events)
    pid = panel.session.client.pid
    slicer.mrmlScene.Clear(False)
    process_events()
    assert not panel.session.active
    assert not is_alive(pid)
    assert "scene was closed" in panel.ui.statusLabel.property("text")
    assert not panel.ui.registerButton.isEnabled()
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLGridTransformNode") == 0


def test_leaving_the_panel_and_ending_slicer_leave_no_process(application):
    panel = open_panel(application, new_worker(), new_worker())
    add_pair(slicer.mrmlScene)
    panel.initializeParameterNode()
    panel._parameterNode.model, panel._parameterNode.steps = "compact", 200
    panel.ui.registerButton.click()
    panel.exit()
    wait_until(lambda: panel.session.steps, process_events)
    pid = panel.session.client.pid
    panel.cleanup()
    assert not is_alive(pid)


def make_bad(broken):
    array, affine = image("my scan").array.copy(), image("my scan").affine
    if broken == "flat":
        array = array[:1]
    elif broken == "NaN":
        array[3, 3, 3] = np.nan
    elif broken == "constant":
        array[:] = 5
    elif broken == "tiny":
        array = array[:4]
    return add(slicer.mrmlScene, Volume(array, affine, "my scan"))


@pytest.mark.parametrize("broken", ["flat", "NaN", "constant", "tiny"])
def test_the_panel_names_bad_volumes(panel, broken):
    panel._parameterNode.fixedVolume = make_bad(broken)
    if panel.ui.registerButton.isEnabled():
        register(panel)
    text = panel.ui.statusLabel.property("text")
    assert "my scan" in text
    assert "Traceback" not in text


def test_a_disabled_button_says_why(panel):
    panel._parameterNode.movingVolume = panel._parameterNode.fixedVolume
    assert not panel.ui.registerButton.isEnabled()
    assert "choose two volumes" in panel.ui.registerButton.property("toolTip")
    assert panel.ui.statusLabel.property("text") == panel.ui.registerButton.property("toolTip")
    panel._parameterNode.movingVolume = None
    assert "No moving image" in panel.ui.registerButton.property("toolTip")


def test_an_output_may_not_be_an_input(panel):
    panel._parameterNode.outputWarped = panel._parameterNode.fixedVolume
    assert "chosen twice" in panel.ui.registerButton.property("toolTip")


def test_a_result_is_measured_with_labels(panel, application):
    ui, parameters = panel.ui, panel._parameterNode
    assert not ui.evaluateButton.isEnabled()
    assert "no result" in ui.evaluationLabel.property("text")
    register(panel)
    assert "No labels or landmarks" in ui.evaluationLabel.property("text")
    for role, node in (("Fixed", parameters.fixedVolume), ("Moving", parameters.movingVolume)):
        volume = mrml.volume_from_node(node)
        labels = Volume((volume.array > 400).astype(np.uint8), volume.affine, f"{role} labels")
        setattr(parameters, f"evaluation{role}Labels", add(slicer.mrmlScene, labels, "vtkMRMLLabelMapVolumeNode"))
    assert ui.evaluateButton.isEnabled()
    ui.evaluateButton.click()
    assert not ui.evaluateButton.isEnabled()
    assert ui.evaluationLabel.property("text") == "Measuring …"
    wait_until(lambda: not panel.evaluation.active, process_events)
    process_events()
    assert ui.evaluationLabel.property("text") == "Measured."
    assert ui.evaluationTableView.item(0, 0).text() == "Dice"
    assert 0.5 < float(ui.evaluationTableView.item(0, 1).text()) <= 1
    slicer.mrmlScene.Clear()
    assert not panel.evaluation.client.running


def test_weights_are_asked_for_once_and_a_no_is_respected(panel, application):
    application.answer = False
    panel._parameterNode.model = "unigradicon"
    register(panel)
    assert len(application.questions) == 1
    assert "283 MB" in application.questions[0]
    assert "weights" in panel.ui.statusLabel.property("text")


def test_missing_packages_are_asked_for_before_anything_runs(panel, application, monkeypatch):
    application.answer = False
    monkeypatch.setattr(packages, "missing", lambda: [packages.TORCH])
    panel.ui.registerButton.click()
    assert len(application.questions) == 1
    assert "torch" in application.questions[0]
    assert not panel.session.active


def test_the_devices_of_this_computer_are_offered(panel):
    panel.session.client.kill()
    panel.session.start_worker()
    wait_until(lambda: panel.session.devices, process_events)
    panel.update()
    texts = [panel.ui.deviceComboBox.itemText(index) for index in range(panel.ui.deviceComboBox.property("count"))]
    assert texts[0] == "automatic"
    assert texts[-1].startswith("processor")


def test_the_console_returns_the_nodes_without_a_panel(application, worker):
    fixed, moving = add_pair(slicer.mrmlScene)
    logic = application.module.GradProjIOLogic()
    logic.session.client = worker
    nodes = logic.register(fixed, moving, model="compact", steps=1, refine_steps=0, device="cpu")
    assert nodes["warped"].GetImageData().GetDimensions() == fixed.GetImageData().GetDimensions()
    with pytest.raises(RuntimeError, match="cuda:9"):
        logic.register(fixed, moving, model="compact", steps=1, device="cuda:9")


def test_the_self_test_passes(application, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    test = application.module.GradProjIOTest()
    test.runTest()


def test_the_panel_shows_a_result_that_is_chosen_again(panel, application, tmp_path):
    register(panel)
    jacobian = panel._parameterNode.result
    assert mrml.recall(jacobian, "settings")["steps"] == 2
    panel._parameterNode.result = None
    assert not panel.ui.worstButton.isEnabled()
    panel._parameterNode.result = jacobian
    assert panel.results.folding.linked("table") is not None

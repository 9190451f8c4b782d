"""The panel says what the scene and its views show, whatever was done before; nothing raises, nothing is lost."""

import gc
import time

import numpy as np
import pytest

slicer_application = pytest.importorskip("slicer_application")

import slicer
from panel_tools import finish, open_panel, register_scripted
from PySide6 import QtWidgets
from scene_tools import ScriptedWorker, add, add_pair, image

from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.jacobian_colors import legend_of
from GradProjIOLib.scene.labels import labels_to_segmentation
from GradProjIOLib.scene.nodes import linked
from GradProjIOLib.scene.session import State

pytest_plugins = ["panel_tools"]


def composites():
    return mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLSliceCompositeNode")


def foreground():
    """The name of what all slice views show over the background."""
    (found,) = {node.GetForegroundVolumeID() for node in composites()}
    return slicer.mrmlScene.GetNodeByID(found).GetName() if found else None


def checked(panel):
    """The buttons of the row Compare that are down."""
    ui = panel.ui
    buttons = {"before": ui.beforeButton, "after": ui.afterButton, "map": ui.mapButton}
    return [name for name, button in buttons.items() if button.property("checked")]


def test_a_fresh_panel_offers_nothing_that_needs_a_result(application):
    panel = open_panel(application, ScriptedWorker(), ScriptedWorker())
    ui = panel.ui
    for name in ("before", "after", "map", "worst", "previous", "next", "flicker", "histogram", "statistics"):
        assert not getattr(ui, f"{name}Button").isEnabled(), name
    for box in (ui.gridCheckBox, ui.foldsCheckBox, ui.show3DCheckBox, ui.rangeComboBox, ui.fadeSliderWidget):
        assert not box.isEnabled()
    panel.cleanup()


def test_the_result_is_shown_when_it_is_done(scripted, application):
    own = add(slicer.mrmlScene, image("my own layer"))
    for node in composites():
        node.SetForegroundVolumeID(own.GetID())
        node.SetForegroundOpacity(0.8)
    register_scripted(scripted, folded=4)
    assert foreground() == "Registered moving to fixed"
    for node in composites():
        assert node.GetBackgroundVolumeID() == scripted._parameterNode.fixedVolume.GetID()
        assert node.GetForegroundOpacity() == 0.5
        assert node.GetLinkedControl()
    assert application.fitted == 1
    assert checked(scripted) == ["after"]
    assert not scripted.ui.foldingCollapsibleButton.property("collapsed")
    assert "folding: 4 voxels (0.065 %) in one region" in scripted.ui.statusLabel.property("text")
    # One click gives the user's own view back.
    scripted.ui.afterButton.click()
    assert (foreground(), composites()[0].GetForegroundOpacity()) == ("my own layer", 0.8)
    assert not composites()[0].GetLinkedControl()
    assert checked(scripted) == []


def test_go_on_takes_more_steps_from_the_result_that_is_shown(scripted):
    ui, client = scripted.ui, scripted.session.client
    assert not ui.goOnButton.isEnabled()
    assert "register first" in ui.goOnButton.toolTip
    result = register_scripted(scripted)
    assert ui.goOnButton.isEnabled()
    count = slicer.mrmlScene.GetNumberOfNodes()
    ui.moreStepsSpinBox.setValue(7)
    client.folded = 4
    ui.goOnButton.click()
    assert client.requests[-1]["earlier"]["steps"] == 7
    assert not ui.goOnButton.isEnabled()
    assert ui.registerButton.property("text") == "Cancel"
    finish(scripted)
    assert scripted._parameterNode.result is result
    assert slicer.mrmlScene.GetNumberOfNodes() == count
    assert "folding: 4 voxels" in ui.statusLabel.property("text")
    assert len(scripted.results.folding.folds) == 1
    assert foreground() == "Registered moving to fixed"


def test_go_on_waits_for_the_answer_about_a_canceled_result(scripted):
    register_scripted(scripted)
    scripted.ui.goOnButton.click()
    scripted.onTimer()
    scripted.ui.registerButton.click()
    finish(scripted)
    assert scripted.session.state is State.OFFERED
    assert not scripted.ui.goOnButton.isEnabled()
    scripted.ui.keepButton.click()
    assert scripted.ui.goOnButton.isEnabled()


def test_go_on_says_why_it_cannot(scripted):
    register_scripted(scripted)
    scripted._parameterNode.movingVolume.SetOrigin(9, 0, 0)
    scripted.ui.goOnButton.click()
    assert "moving has been moved since the registration" in scripted.ui.statusLabel.property("text")
    slicer.mrmlScene.RemoveNode(scripted._parameterNode.movingVolume)
    assert not scripted.ui.goOnButton.isEnabled()
    assert "moving image of this result is not in the scene" in scripted.ui.goOnButton.toolTip


def test_from_two_volumes_to_the_worst_fold_in_two_clicks(scripted):
    scripted.session.client.folded = 4
    scripted.ui.registerButton.click()
    finish(scripted)
    assert foreground() == "Registered moving to fixed"
    assert scripted.ui.worstButton.isEnabled()
    scripted.ui.worstButton.click()
    position = scripted.results.folding.folds[0].position
    for node in mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLSliceNode"):
        matrix = slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS())
        assert np.allclose(matrix[:3, 3], position)


def test_a_click_on_the_table_goes_to_that_fold(scripted):
    register_scripted(scripted, folded=4)
    scripted.ui.foldTable.cellClicked.emit(0, 2)
    assert scripted.ui.foldLabel.property("text").startswith("Fold 1 of 1: ")


def test_folding_stays_closed_where_nothing_folds(scripted):
    register_scripted(scripted)
    assert scripted.ui.foldingCollapsibleButton.property("collapsed")
    assert "no folding" in scripted.ui.statusLabel.property("text")
    assert scripted.ui.statusIconLabel.isHidden()


def test_one_image_at_a_time_and_the_slider_acts_on_it(scripted):
    register_scripted(scripted)
    ui = scripted.ui
    for button, name in ((ui.beforeButton, "moving"), (ui.mapButton, "Jacobian moving to fixed")):
        button.click()
        assert foreground() == name
        assert len(checked(scripted)) == 1
        ui.fadeSliderWidget.setProperty("value", 0.25)
        assert foreground() == name
        assert {node.GetForegroundOpacity() for node in composites()} == {0.25}
    # What the user does in the views is what the panel says.
    for node in composites():
        node.SetForegroundVolumeID(linked(scripted._parameterNode.result, "warped").GetID())
        node.SetForegroundOpacity(0.75)
    scripted.onTimer()
    assert checked(scripted) == ["after"]
    assert ui.fadeSliderWidget.property("value") == 0.75
    composites()[0].SetForegroundVolumeID(None)
    scripted.onTimer()
    assert checked(scripted) == []


def test_flicker_switches_what_is_shown_and_ends_with_it(scripted):
    register_scripted(scripted)
    ui = scripted.ui
    ui.flickerButton.click()
    seen = []
    for _ in range(4):
        scripted.results._onFlicker()
        scripted.onTimer()
        seen.append(composites()[0].GetForegroundOpacity())
    assert seen == [1, 0, 1, 0]
    assert ui.fadeSliderWidget.property("value") == 0.5
    ui.flickerButton.click()
    assert composites()[0].GetForegroundOpacity() == 0.5
    ui.flickerButton.click()
    ui.afterButton.click()
    assert not ui.flickerButton.property("checked")
    assert not scripted.results._flicker.isActive()


def test_with_another_result_the_views_show_that_one(scripted):
    ui = scripted.ui
    first = register_scripted(scripted, folded=5)
    ui.mapButton.click()
    ui.gridCheckBox.click()
    ui.worstButton.click()
    assert slicer.mrmlScene.GetFirstNodeByName("GradProjIO fold") is not None
    second = register_scripted(scripted, folded=2)
    ui.mapButton.click()
    for chosen, other, voxels in ((second, first, 2), (first, second, 5)):
        scripted._parameterNode.result = chosen
        assert foreground() == chosen.GetName()
        assert checked(scripted) == ["map"]
        assert ui.foldingSummaryLabel.property("text").startswith(f"{voxels} voxels fold")
        assert ui.foldTable.property("rowCount") == 1
        for role in ("transform", "folding"):
            assert linked(chosen, role).GetDisplayNode().GetVisibility()
            display = linked(other, role).GetDisplayNode()
            assert display is None or not display.GetVisibility()
        assert slicer.mrmlScene.GetFirstNodeByName("GradProjIO fold") is None
        assert ui.foldLabel.property("text") == ""
    scripted._parameterNode.result = None
    assert (foreground(), checked(scripted)) == (None, [])
    assert not linked(first, "folding").GetDisplayNode().GetVisibility()
    assert not ui.gridCheckBox.property("checked")


def test_a_result_that_is_overwritten_is_shown_anew(scripted):
    first = register_scripted(scripted, folded=5)
    count = slicer.mrmlScene.GetNumberOfNodes()
    scripted._parameterNode.overwrite = True
    second = register_scripted(scripted, folded=2)
    assert second is first
    assert slicer.mrmlScene.GetNumberOfNodes() == count
    assert scripted.ui.foldingSummaryLabel.property("text").startswith("2 voxels fold")


def test_a_result_without_a_map_is_shown_too(scripted):
    scripted._parameterNode.makeJacobian = False
    register_scripted(scripted)
    assert foreground() == "Registered moving to fixed"
    assert checked(scripted) == ["after"]
    assert not scripted.ui.mapButton.isEnabled()
    # The next one, with a map, shows its folds.
    scripted._parameterNode.makeJacobian = True
    register_scripted(scripted, folded=4)
    assert scripted.ui.foldsCheckBox.property("checked")


def test_a_run_that_ends_elsewhere_is_shown_when_the_panel_is_opened_again(scripted):
    scripted.ui.registerButton.click()
    scripted.exit()
    scripted.parent.isEntered = False
    finish(scripted)
    assert foreground() is None
    scripted.parent.isEntered = True
    scripted.enter()
    assert foreground() == "Registered moving to fixed"


def test_a_closed_scene_leaves_no_box_ticked(scripted):
    register_scripted(scripted, folded=5)
    for widget in (scripted.ui.mapButton, scripted.ui.gridCheckBox, scripted.ui.worstButton):
        widget.click()
    slicer.mrmlScene.Clear(False)
    ui = scripted.ui
    for widget in (ui.beforeButton, ui.afterButton, ui.mapButton, ui.gridCheckBox, ui.foldsCheckBox, ui.flickerButton):
        assert not widget.property("checked")
        assert not widget.isEnabled()
    assert ui.foldTable.property("rowCount") == 0


def test_what_was_shown_of_folds_and_grid_is_forgotten_with_the_scene(scripted):
    register_scripted(scripted, folded=5)
    scripted.ui.gridCheckBox.click()
    scripted.ui.foldsCheckBox.click()
    # The next result is shown in the same way; one in another scene is not.
    register_scripted(scripted, folded=5)
    assert scripted.ui.gridCheckBox.property("checked")
    assert not scripted.ui.foldsCheckBox.property("checked")
    slicer.mrmlScene.Clear(False)
    add_pair(slicer.mrmlScene)
    scripted.onTimer()
    scripted._parameterNode.makeTransform = False
    slicer.mrmlScene.RemoveNode(linked(register_scripted(scripted), "folding"))
    scripted._parameterNode.makeTransform = True
    register_scripted(scripted, folded=5)
    assert not scripted.ui.gridCheckBox.property("checked")
    assert scripted.ui.foldsCheckBox.property("checked")


def save_scene(folder):
    """Save the scene with all its data; return the path."""
    from scene.test_mrml import slicer_save

    assert slicer_save(slicer.mrmlScene, folder)
    return folder / "scene.mrml"


@pytest.mark.parametrize("closed_before", [True, False])
def test_a_saved_scene_opened_while_the_panel_is_shown_keeps_its_choices(scripted, tmp_path, closed_before):
    register_scripted(scripted, folded=5)
    scripted._parameterNode.refineSteps = 77
    scripted.ui.mapButton.click()
    scripted.ui.gridCheckBox.click()
    path = save_scene(tmp_path)
    if closed_before:
        slicer.mrmlScene.Clear(False)
        scripted.onTimer()
    slicer.mrmlScene.SetURL(str(path))
    slicer.mrmlScene.Import()
    scripted.onTimer()
    parameters = scripted._parameterNode
    assert parameters.parameterNode.GetScene() is slicer.mrmlScene
    assert parameters.fixedVolume.GetName() == "fixed"
    assert parameters.movingVolume.GetName() == "moving"
    assert parameters.result.GetName() == "Jacobian moving to fixed"
    assert parameters.refineSteps == 77
    ui = scripted.ui
    assert ui.fixedSelector.currentNode() is parameters.fixedVolume
    assert ui.refineStepsSpinBox.property("value") == 77
    assert ui.foldingSummaryLabel.property("text").startswith("5 voxels fold")
    assert ui.mapButton.isEnabled()
    assert ui.gridCheckBox.property("checked")
    assert ui.foldsCheckBox.property("checked")
    colors = legend_of(parameters.result).GetPrimaryDisplayNode().GetColorNode()
    names = [colors.GetColorName(index) for index in range(colors.GetNumberOfColors())]
    assert "½" in names
    assert "¼  smaller in moving" in names


def test_an_old_message_does_not_hide_why_register_is_disabled(scripted):
    register_scripted(scripted)
    assert scripted.ui.statusLabel.property("text").startswith("Done")
    scripted._parameterNode.movingVolume = None
    assert scripted.ui.statusLabel.property("text") == "No moving image is chosen; choose one."
    scripted.session.client._events = []
    slicer.mrmlScene.Clear(False)
    for name in ("new 1", "new 2"):
        add(slicer.mrmlScene, image(name))
    scripted.onTimer()
    assert scripted.ui.statusLabel.property("text") == ""


def test_that_the_scene_was_closed_is_told_until_there_are_new_images(scripted):
    scripted.ui.registerButton.click()
    scripted.onTimer()
    slicer.mrmlScene.Clear(False)
    assert "scene was closed" in scripted.ui.statusLabel.property("text")
    add(slicer.mrmlScene, image("new 1"))
    add(slicer.mrmlScene, image("new 2"))
    scripted.onTimer()
    assert scripted._parameterNode.fixedVolume.GetName() == "new 1"
    assert scripted.ui.statusLabel.property("text") == ""


def test_a_failure_has_another_sign_than_success(scripted, monkeypatch):
    scripted.session.client.change = lambda array: {}["no such voxel"]
    monkeypatch.setattr(scripted.session.client, "_result", lambda: {"warped": {"array": "/nowhere.npy"}})
    scripted.ui.registerButton.click()
    finish(scripted)
    assert "could not be put into the scene" in scripted.ui.statusLabel.property("text")
    assert not scripted.ui.statusIconLabel.isHidden()
    assert scripted.ui.registerButton.isEnabled()


def test_a_result_that_was_kept_early_does_not_say_done(scripted):
    scripted.session.client.total = 300
    scripted.ui.registerButton.click()
    scripted.onTimer()
    scripted.ui.registerButton.click()
    finish(scripted)
    assert scripted.session.state is State.OFFERED
    scripted.ui.keepButton.click()
    assert scripted.ui.statusLabel.property("text").startswith("Stopped after 1 of 300 steps")
    assert foreground() == "Registered moving to fixed"


def test_the_bar_moves_while_the_results_are_computed(scripted):
    scripted.ui.registerButton.click()
    scripted.onTimer()
    assert scripted.ui.progressBar.property("maximum") == 2
    scripted.onTimer()
    assert scripted.ui.statusLabel.property("text") == "Computing the results …"
    assert scripted.ui.progressBar.property("maximum") == 0


def test_a_stored_device_survives_the_list_that_is_filled_later(application):
    panel = open_panel(application, ScriptedWorker(), ScriptedWorker())
    calls = []
    panel.ui.deviceComboBox.currentIndexChanged.connect(calls.append)
    panel._parameterNode.device = "cuda:3"
    assert panel.ui.deviceComboBox.property("currentText") == "cuda:3 (not found yet)"
    panel.session.client.devices = [{"name": "cpu", "label": "processor, 2 threads"}]
    panel.onTimer()
    assert panel._parameterNode.device == "cuda:3"
    box = panel.ui.deviceComboBox
    assert [box.itemText(n) for n in range(box.property("count"))] == ["automatic", "processor, 2 threads", "cuda:3"]
    assert calls == []
    box.setCurrentIndex(1)
    assert panel._parameterNode.device == "cpu"
    panel.cleanup()


def test_a_no_to_the_download_is_final(scripted, application):
    application.answer = False
    scripted.session.client.weights_missing = True
    scripted.ui.registerButton.click()
    finish(scripted)
    scripted.session.client.devices = [{"name": "cpu", "label": "processor"}]
    for _ in range(3):
        scripted.onTimer()
    assert application.questions == ["Download?"]


def test_a_node_that_is_deleted_is_not_replaced_by_another_one(scripted):
    parameters, scene = scripted._parameterNode, slicer.mrmlScene
    precious = add(scene, image("precious"))
    chosen = {
        "outputWarped": add(scene, image("chosen output")),
        "initialTransform": scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "by hand"),
        "fixedMask": scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "mask"),
    }
    scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "another transform")
    scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "another mask")
    for name, node in chosen.items():
        setattr(parameters, name, node)
    for name, node in chosen.items():
        scene.RemoveNode(node)
        assert getattr(parameters, name) is None, name
    scene.RemoveNode(parameters.movingVolume)
    assert parameters.movingVolume is None
    assert scripted.ui.movingSelector.currentNode() is None
    assert precious.GetScene() is scene


def test_what_is_left_of_a_result_is_shown(scripted):
    jacobian = register_scripted(scripted, folded=3)
    slicer.mrmlScene.RemoveNode(linked(jacobian, "warped"))
    assert checked(scripted) == []
    assert not scripted.ui.afterButton.isEnabled()
    slicer.mrmlScene.RemoveNode(jacobian)
    assert scripted._parameterNode.result is None
    assert not scripted.ui.worstButton.isEnabled()


def test_visits_of_the_panel_leave_nothing_behind(scripted):
    kind = type(scripted._parameterNode)

    def wrappers():
        gc.collect()
        return sum(type(each) is kind for each in gc.get_objects())

    before = wrappers()
    calls = []
    for _ in range(20):
        scripted.exit()
        scripted.enter()
    assert wrappers() == before
    update = scripted.choices.update
    scripted.choices.update = lambda *found: (calls.append(1), update(*found))
    scripted._parameterNode.seed = 5
    assert len(calls) == 1


def test_volumes_that_arrive_are_chosen_where_nothing_was(scripted):
    parameters = scripted._parameterNode
    kept = parameters.fixedVolume
    add(slicer.mrmlScene, image("later"))
    scripted.onTimer()
    assert parameters.movingVolume.GetName() == "moving"
    parameters.movingVolume = None
    scripted.onTimer()
    assert parameters.movingVolume is None
    add(slicer.mrmlScene, image("newest"))
    scripted.onTimer()
    assert (parameters.fixedVolume, parameters.movingVolume.GetName()) == (kept, "newest")


def test_an_alignment_is_suggested_where_the_images_lie_apart(scripted):
    label = scripted.ui.alignNoteLabel
    assert label.isHidden()
    moving = mrml.volume_from_node(scripted._parameterNode.movingVolume)
    far = moving.affine.copy()
    far[0, 3] += 45
    scripted._parameterNode.movingVolume = add(slicer.mrmlScene, Volume(moving.array, far, "far"))
    assert not label.isHidden()
    assert "Only 25 % of the fixed image" in label.property("text")
    scripted._parameterNode.align = "rigid"
    assert label.isHidden()


def test_the_range_of_the_map_is_that_of_its_colors(scripted):
    jacobian = register_scripted(scripted, folded=3)
    box = scripted.ui.rangeComboBox
    assert box.property("currentData") == 4.0
    box.setCurrentIndex(box.findData(1.25))
    assert jacobian.GetDisplayNode().GetWindowLevelMax() == pytest.approx(1.25)
    scripted.ui.nearlyCheckBox.click()
    table = jacobian.GetDisplayNode().GetColorNode()
    color = np.zeros(4)
    table.GetColor(5, color)
    assert np.allclose(color, (0.8, 0.2, 0.8, 1))
    register_scripted(scripted)
    assert box.property("currentData") == 1.25
    assert scripted.ui.nearlyCheckBox.property("checked")


MISSING = {"unigradicon": {"there": False, "memory": 5 * 2**30}}
PROCESSOR = [{"name": "cpu", "label": "processor", "memory": 2 * 2**30}]


def find_models(panel, models=MISSING):
    panel.session.client.devices = PROCESSOR
    panel.session.client.models = models
    panel.onTimer()


def test_the_foundation_model_is_one_click_away(scripted, application):
    ui = scripted.ui
    assert ui.downloadButton.isHidden()
    find_models(scripted)
    assert ui.modelNoteLabel.property("text") == "uniGradICON is not on this computer: using compact."
    scripted._parameterNode.similarity = "mind"
    scripted.onTimer()
    assert ui.modelNoteLabel.property("text") == "uniGradICON is not on this computer: using no network."
    scripted._parameterNode.similarity = "lncc"
    assert ui.downloadButton.property("text") == "Download uniGradICON (283 MB)"
    client = scripted.download.client = ScriptedWorker()
    ui.downloadButton.click()
    assert client.requests[-1]["model"] == "unigradicon"
    client._events = [{"event": "download", "received": 50e6, "total": 283e6}, {"event": "downloaded"}]
    scripted.onTimer()
    assert ui.modelNoteLabel.property("text").endswith("Downloading: 50 of 283 MB.")
    assert ui.downloadButton.property("text") == "Cancel"
    scripted.onTimer()
    assert ui.downloadButton.isHidden()
    assert ui.modelNoteLabel.isHidden()
    assert not client.running
    # What was agreed to once is not asked again, and nothing popped up.
    scripted._parameterNode.model = "unigradicon"
    ui.registerButton.click()
    assert scripted.session.client.requests[-1]["allow_download"]
    assert application.questions == []


def test_a_download_that_is_canceled_or_fails_says_so(scripted):
    find_models(scripted)
    client = scripted.download.client = ScriptedWorker()
    scripted.ui.downloadButton.click()
    scripted.ui.downloadButton.click()
    scripted.onTimer()
    assert scripted.ui.modelNoteLabel.property("text").endswith("The download was canceled.")
    assert scripted.ui.downloadButton.property("text") == "Download uniGradICON (283 MB)"
    scripted.ui.downloadButton.click()
    client._events = [{"event": "failed", "kind": "input", "message": "No connection."}]
    scripted.onTimer()
    assert scripted.ui.modelNoteLabel.property("text").endswith("No connection.")


def test_that_the_memory_is_too_small_is_told_before(scripted):
    find_models(scripted)
    scripted._parameterNode.model = "unigradicon"
    assert "GB" not in scripted.ui.modelNoteLabel.property("text")
    scripted._parameterNode.steps = 50
    text = scripted.ui.modelNoteLabel.property("text")
    assert "Steps on uniGradICON take about 5 GB of memory; 2 GB are free." in text


def test_packages_that_cannot_be_installed_are_a_message_not_a_pop_up(scripted, application, monkeypatch):
    from GradProjIOLib.scene import packages

    def install(missing):
        raise RuntimeError("no connection")

    monkeypatch.setattr(packages, "missing", lambda: [packages.TORCH])
    monkeypatch.setattr(packages, "install", install)
    scripted.ui.registerButton.click()
    assert "no connection" in scripted.ui.statusLabel.property("text")
    assert not scripted.ui.statusIconLabel.isHidden()
    assert len(application.questions) == 1


def test_transforms_say_in_slicers_words_what_they_register(scripted):
    parameters = scripted._parameterNode
    jacobian = register_scripted(scripted)
    for role, fixed, moving in (
        ("transform", parameters.fixedVolume, parameters.movingVolume),
        ("inverse", parameters.movingVolume, parameters.fixedVolume),
    ):
        node = linked(jacobian, role)
        assert node.GetNodeReference("spatialRegistrationFixed") is fixed
        assert node.GetNodeReference("spatialRegistrationMoving") is moving


def test_the_console_speaks_slicers_words(application):
    fixed, moving = add_pair(slicer.mrmlScene)
    logic = application.module.GradProjIOLogic()
    logic.session.client = client = ScriptedWorker()
    nodes = logic.register(
        fixedVolume=fixed, movingVolume=moving, movingSegmentation=labels_of(fixed), refineSteps=7, fixedModality="ct"
    )
    assert client.requests[-1]["settings"] == {"refine_steps": 7, "fixed_modality": "ct"}
    assert nodes["warpedLabels"].IsA("vtkMRMLSegmentationNode")
    logic.register(fixed, moving, outputs={"warped": None})
    with pytest.raises(RuntimeError, match="both fixed and moving"):
        logic.register(fixed, fixed)
    with pytest.raises(RuntimeError, match="warpd"):
        logic.register(fixed, moving, outputs={"warpd": None})


def labels_of(node):
    volume = mrml.volume_from_node(node)
    labels = Volume((volume.array > 200).astype(np.uint8), volume.affine, "organs")
    return add(slicer.mrmlScene, labels, "vtkMRMLLabelMapVolumeNode")


@pytest.mark.parametrize("to_folder", [False, True])
def test_a_batch_leaves_the_run_of_the_panel_alone(scripted, application, monkeypatch, tmp_path, to_folder):
    """Also where both are polled by timers at the same time."""
    import GradProjIOPanel.logic

    from GradProjIOLib.scene import batch as scene_batch

    class BatchWorker(ScriptedWorker):
        def submit(self, request):
            if request["request"] != "batch":
                return super().submit(request)
            outcomes = [{"event": "outcome", "case": pair["case"], "message": ""} for pair in request["pairs"]]
            self._number, self._events = 1, [*outcomes, {"event": "done"}]
            self.ends = False
            return 1

    window = QtWidgets.QMainWindow()
    monkeypatch.setattr(slicer.util, "mainWindow", lambda: window)
    monkeypatch.setattr(slicer.util, "showStatusMessage", lambda text: None)
    monkeypatch.setattr(scene_batch, "WorkerClient", lambda command: BatchWorker())
    session = GradProjIOPanel.logic.SceneRegistration
    monkeypatch.setattr(GradProjIOPanel.logic, "SceneRegistration", lambda scene: session(scene, ScriptedWorker()))
    parameters = scripted._parameterNode
    scripted.session.client.total = 10
    scripted.ui.registerButton.click()
    pairs = [(parameters.fixedVolume, parameters.movingVolume)]
    batch = scripted.logic.registerMany(pairs, folder=tmp_path / "out" if to_folder else None)
    end = time.monotonic() + 30
    while batch.active and time.monotonic() < end:
        scripted.onTimer()
        application.processEvents()
        time.sleep(0.01)
    assert [result.message for result in batch.results] == [""]
    assert scripted.session.active or scripted.session.results
    finish(scripted)
    # The batch of nodes may have been first to use the name.
    assert foreground().startswith("Registered moving to fixed")


def test_determinants_of_segments_are_listed(scripted):
    register_scripted(scripted, folded=3)
    ui = scripted.ui
    assert not ui.statisticsButton.isEnabled()
    scripted._parameterNode.foldingSegmentation = labels_of(scripted._parameterNode.fixedVolume)
    assert ui.statisticsButton.isEnabled()
    for _ in range(2):
        ui.statisticsButton.click()
        ui.histogramButton.click()
        assert ui.tableView.horizontalHeaderItem(0).text() == "Segment"
    # Another click shows the same nodes again, unless they were deleted.
    (table,) = [node for node in mrml.nodes_of_class(slicer.mrmlScene, "vtkMRMLTableNode") if "Stat" in node.GetName()]
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLPlotChartNode") == 1
    slicer.mrmlScene.RemoveNode(table)
    assert ui.tableView.horizontalHeaderItem(0).text() == "Jacobian determinant"
    empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "nothing drawn")
    scripted._parameterNode.foldingSegmentation = empty
    assert "nothing drawn has no segments" in ui.foldingSummaryLabel.property("text")
    assert not ui.statisticsButton.isEnabled()
    ui.histogramButton.click()
    slicer.mrmlScene.Clear(False)
    scripted.onTimer()
    assert "nothing drawn" not in ui.foldingSummaryLabel.property("text")


def test_another_result_is_shown_while_a_segmentation_is_chosen_for_its_folds(scripted):
    first = register_scripted(scripted, folded=3)
    second = register_scripted(scripted, folded=2)
    assert first is not second
    labels = labels_of(scripted._parameterNode.fixedVolume)
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organs")
    labels_to_segmentation(mrml.volume_from_node(labels), segmentation, scripted._parameterNode.fixedVolume)
    scripted._parameterNode.foldingSegmentation = segmentation
    # Reading a segmentation adds nodes to the scene for a moment, and takes them away again.
    for result in (first, second, first):
        scripted._parameterNode.result = result
        assert scripted.results.folding.result is result
        assert len(scripted.results.folding.folds) == 1


def test_the_folds_are_shown_in_3d(scripted):
    jacobian = register_scripted(scripted, folded=3)
    box, segmentation = scripted.ui.show3DCheckBox, linked(jacobian, "folding")
    assert box.isEnabled()
    box.click()
    assert segmentation.GetDisplayNode().GetVisibility3D()
    assert segmentation.GetSegmentation().ContainsRepresentation("Closed surface")
    assert box.property("checked")
    box.click()
    assert not box.property("checked")


def test_only_jacobian_maps_can_be_chosen_as_a_result(scripted):
    register_scripted(scripted)
    selector = scripted.ui.resultSelector
    texts = [QtWidgets.QComboBox.itemText(selector, row) for row in range(QtWidgets.QComboBox.count(selector))]
    assert texts[1:] == ["Jacobian moving to fixed"]

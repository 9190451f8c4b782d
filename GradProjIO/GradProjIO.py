import sys
from pathlib import Path
from typing import Annotated, Union

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import Choice, WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

if not (Path(__file__).parent / "GradProjIOLib").is_dir():
    # In the source tree the package lies beside the module's folder.
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from GradProjIOLib.scene import packages, panel_choices, sample_data, self_test
from GradProjIOLib.scene.evaluation import SceneEvaluation
from GradProjIOLib.scene.folding_view import FoldingView
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.nodes import image_nodes
from GradProjIOLib.scene.session import SceneRegistration, State
from GradProjIOLib.settings import Settings

POLL_MILLISECONDS = 100


class GradProjIO(ScriptedLoadableModule):
    """What Slicer shows about the module."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = "GradProjIO"
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        self.parent.contributors = ["GradProjIO contributors"]
        self.parent.helpText = _(
            "Deforms one 3-D image onto another: a registration network gives a first deformation, which is "
            "then refined for this pair, and shows where the deformation folds. "
            'See the <a href="https://github.com/GradProjIO/SlicerGradProjIO">documentation</a>.'
        )
        self.parent.acknowledgementText = _(
            "Method: Zhang, Zhao, Tao: Improving Instance Optimization in Deformable Image Registration with "
            "Gradient Projection (Learn2Reg 2024). Network: uniGradICON (Tian et al., MICCAI 2024)."
        )
        thumbnail = Path(__file__).parent / "Resources" / "Icons" / "GradProjIO.png"
        slicer.app.connect("startupCompleted()", lambda: sample_data.register(thumbnail))


def oneOf(setting):
    """The type of a parameter for a setting that is a choice."""
    return Annotated[str, Choice(panel_choices.choices(setting))]


# Slicer's wrapper wants None named here, though it is what every node is without it.
Labels = Union[slicer.vtkMRMLLabelMapVolumeNode, slicer.vtkMRMLSegmentationNode, None]


@parameterNodeWrapper
class GradProjIOParameterNode:
    """The choices of the panel, kept in the scene."""

    fixedVolume: slicer.vtkMRMLScalarVolumeNode
    movingVolume: slicer.vtkMRMLScalarVolumeNode
    fixedModality: oneOf("fixed_modality") = Settings.fixed_modality
    movingModality: oneOf("moving_modality") = Settings.moving_modality
    align: oneOf("align") = Settings.align
    initialTransform: slicer.vtkMRMLTransformNode
    fixedMask: Labels
    movingMask: Labels
    movingSegmentation: Labels
    model: oneOf("model") = Settings.model
    steps: Annotated[int, WithinRange(0, 300)] = Settings.steps
    refineSteps: Annotated[int, WithinRange(0, 300)] = Settings.refine_steps
    samples: Annotated[int, WithinRange(1000, 100_000_000)] = Settings.samples
    resolution: Annotated[float, WithinRange(0, 20)] = 0
    method: oneOf("method") = Settings.method
    similarity: oneOf("similarity") = Settings.similarity
    regularityWeight: Annotated[float, WithinRange(0, 10)] = Settings.regularity_weight
    learningRate: Annotated[float, WithinRange(0, 1000)] = 0
    projection: oneOf("projection") = Settings.projection
    seed: Annotated[int, WithinRange(0, 999999)] = Settings.seed
    device: str = Settings.device
    makeTransform: bool = True
    makeInverse: bool = True
    makeWarped: bool = True
    makeWarpedLabels: bool = True
    makeJacobian: bool = True
    outputTransform: slicer.vtkMRMLGridTransformNode
    outputInverse: slicer.vtkMRMLGridTransformNode
    outputWarped: slicer.vtkMRMLScalarVolumeNode
    outputWarpedLabels: slicer.vtkMRMLSegmentationNode
    outputJacobian: slicer.vtkMRMLScalarVolumeNode
    result: slicer.vtkMRMLScalarVolumeNode
    evaluationFixedLabels: Labels
    evaluationMovingLabels: Labels
    evaluationFixedPoints: slicer.vtkMRMLMarkupsFiducialNode
    evaluationMovingPoints: slicer.vtkMRMLMarkupsFiducialNode


class GradProjIOWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: shows what the logic's session is doing, and passes on what the user wants."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = self._parameterNode = self._guiTag = self._newest = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/GradProjIO.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.ui.resultSelector.addAttribute("vtkMRMLScalarVolumeNode", "GradProjIO.role", "jacobian")
        self.logic = GradProjIOLogic()
        self.session, self.evaluation = self.logic.session, self.logic.evaluation
        self.folding = FoldingView()
        for name, label in panel_choices.preset_labels().items():
            self.ui.presetComboBox.addItem(label, name)
        self._timer = qt.QTimer()
        self._timer.setInterval(POLL_MILLISECONDS)
        self._connect()
        self.initializeParameterNode()

    def _connect(self):
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self._timer.timeout.connect(self.onTimer)
        ui = self.ui
        ui.registerButton.clicked.connect(self.onRegister)
        ui.plotButton.clicked.connect(self.onPlot)
        ui.keepButton.clicked.connect(self.onKeep)
        ui.discardButton.clicked.connect(self.onDiscard)
        ui.presetComboBox.currentIndexChanged.connect(self.onPreset)
        ui.deviceComboBox.currentIndexChanged.connect(self.onDevice)
        ui.overlayCheckBox.toggled.connect(self.onOverlay)
        ui.opacitySliderWidget.valueChanged.connect(self.onOverlay)
        ui.gridCheckBox.toggled.connect(self.folding.grid)
        ui.beforeButton.clicked.connect(lambda *_: self.folding.compare(after=False))
        ui.afterButton.clicked.connect(lambda *_: self.folding.compare(after=True))
        ui.worstButton.clicked.connect(lambda *_: self.onFold(0))
        ui.previousButton.clicked.connect(lambda *_: self.onFold(self.folding.number - 1))
        ui.nextButton.clicked.connect(lambda *_: self.onFold(self.folding.number + 1))
        ui.evaluateButton.clicked.connect(self.onEvaluate)

    def cleanup(self):
        self._timer.stop()
        self.setParameterNode(None)
        self.removeObservers()
        self.evaluation.abandon()
        self.session.close()

    def enter(self):
        self.initializeParameterNode()
        if not packages.missing():
            self.session.start_worker()
            self._timer.start()

    def exit(self):
        """Another module is opened. A run goes on."""
        self._disconnectGui()

    def onSceneStartClose(self, caller, event):
        """End a run, whose nodes are about to be removed."""
        self.evaluation.abandon()
        self.session.abandon(_("The scene was closed, which canceled the registration."))
        self.setParameterNode(None)
        self.showResult(None)

    def onSceneEndClose(self, caller, event):
        """Show the new scene, where the panel is open."""
        if self.parent.isEntered:
            self.initializeParameterNode()

    def initializeParameterNode(self):
        """Make sure that the parameter node exists; choose the first two volumes for a start."""
        self.setParameterNode(self.logic.getParameterNode())
        parameters, volumes = self._parameterNode, image_nodes(slicer.mrmlScene)
        if not parameters.fixedVolume and not parameters.movingVolume and len(volumes) > 1:
            parameters.fixedVolume, parameters.movingVolume = volumes[:2]

    def setParameterNode(self, parameterNode):
        """Connect the panel to `parameterNode`, or to none."""
        self._disconnectGui()
        self._parameterNode = parameterNode
        if parameterNode:
            self._guiTag = parameterNode.connectGui(self.ui)
            for setting, labels in panel_choices.labels().items():
                box = getattr(self.ui, f"{panel_choices.parameter_name(setting)}ComboBox")
                for index, value in enumerate(panel_choices.choices(setting)):
                    box.setItemText(index, labels[value])
            self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self.update)
        self.update()

    def _disconnectGui(self):
        if self._parameterNode and self._guiTag is not None:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.update)
            self._guiTag = None

    def update(self, caller=None, event=None):
        """Show the state of the session, and why the button is disabled where it is."""
        ui, session, parameters = self.ui, self.session, self._parameterNode
        problem = panel_choices.problem(parameters) if parameters else _("The scene is closed.")
        canceling = session.state is State.CANCELING
        text = _("Stop now") if canceling else _("Cancel") if session.active else _("Register")
        ui.registerButton.setText(text)
        ui.registerButton.setEnabled(session.active or not problem)
        ui.registerButton.setToolTip(
            _("End after the current step; the result so far is offered.")
            if session.active
            else problem or _("Register the moving image to the fixed image.")
        )
        ui.statusLabel.setText(session.status() or problem)
        ui.progressBar.setVisible(session.active)
        ui.progressBar.setMaximum(max(session.total, 0))
        ui.progressBar.setValue(len(session.steps))
        ui.progressBar.setFormat(session.progress())
        for button in (ui.keepButton, ui.discardButton):
            button.setVisible(session.state is State.OFFERED)
        ui.plotButton.setEnabled(session.active or bool(session.steps))
        if parameters:
            self._updateOptions(parameters)

    def _updateOptions(self, parameters):
        ui = self.ui
        ui.alignComboBox.setEnabled(parameters.initialTransform is None)
        ui.presetComboBox.setCurrentIndex(ui.presetComboBox.findData(panel_choices.preset(parameters)))
        ui.stepsSliderWidget.setEnabled(parameters.model != "none")
        ui.methodComboBox.setEnabled(parameters.steps > 0 or parameters.refineSteps > 0)
        ui.samplesSpinBox.setEnabled(parameters.resolution == 0)
        ui.warpedLabelsCheckBox.setEnabled(parameters.movingSegmentation is not None)
        if ui.deviceComboBox.count != len(self.session.devices) + 1:
            chosen = parameters.device
            ui.deviceComboBox.clear()
            for device in ({"label": _("automatic"), "name": "auto"}, *self.session.devices):
                ui.deviceComboBox.addItem(device["label"], device["name"])
            ui.deviceComboBox.setCurrentIndex(max(ui.deviceComboBox.findData(chosen), 0))
        if parameters.result is not self.folding.jacobian:
            self.showResult(parameters.result)
        problem = panel_choices.evaluation_problem(parameters)
        ui.evaluateButton.setEnabled(not problem and not self.evaluation.active)
        ui.evaluateButton.setToolTip(problem or _("Measure the result chosen under Folding."))
        ui.evaluationLabel.setText(problem or self.evaluation.message)

    def onTimer(self):
        """Handle what the worker processes have reported."""
        if self.evaluation.poll():
            self.ui.evaluationTableView.setMRMLTableNode(self.evaluation.table)
            self.update()
        if not self.session.poll():
            return
        self._showNewResult()
        self.update()
        if self.session.question and slicer.util.confirmOkCancelDisplay(self.session.question, "GradProjIO"):
            self._start(allowDownload=True)

    def _showNewResult(self):
        jacobian = self.session.results.get("jacobian")
        if self._parameterNode and jacobian and jacobian is not self._newest:
            self._parameterNode.result = self._newest = jacobian

    def onRegister(self, *_args):
        """Register; while a registration runs, cancel it."""
        if self.session.active:
            self.session.cancel()
            self.update()
        elif self._agreeToPackages():
            self._start()

    def _start(self, allowDownload=False):
        chosen = self._parameterNode
        arguments = panel_choices.inputs(chosen), panel_choices.settings(chosen), panel_choices.outputs(chosen)
        self.session.try_start(*arguments, allow_download=allowDownload)
        self._timer.start()
        self.update()

    def _agreeToPackages(self):
        """Install what is missing after asking; whether everything is there now."""
        missing = packages.missing()
        if not missing:
            return True
        if not slicer.util.confirmOkCancelDisplay(packages.question(missing), "GradProjIO"):
            return False
        with slicer.util.tryWithErrorDisplay(_("The packages could not be installed."), waitCursor=True):
            packages.install(missing)
        return not packages.missing()

    def onKeep(self, *_args):
        self.session.keep()
        self._showNewResult()
        self.update()

    def onDiscard(self, *_args):
        self.session.discard()
        self.update()

    def onPlot(self, *_args):
        chart = self.session.show_plot()
        if chart is not None:
            slicer.modules.plots.logic().ShowChartInLayout(chart)

    def onPreset(self, *_args):
        """Take over the preset's values. The box also follows the values, which changes nothing."""
        name = self.ui.presetComboBox.currentData
        if self._parameterNode and name != panel_choices.preset(self._parameterNode):
            if name != panel_choices.CUSTOM:
                panel_choices.choose_preset(self._parameterNode, name)
            self.update()

    def onDevice(self, *_args):
        """Keep the device by its name, since the list differs from computer to computer."""
        name = self.ui.deviceComboBox.currentData
        if self._parameterNode and name:
            self._parameterNode.device = name

    def showResult(self, jacobian):
        """Show another result in the folding section of the panel."""
        ui, folding = self.ui, self.folding
        folding.show(jacobian)
        self.evaluation.message = ""
        ui.evaluationTableView.setMRMLTableNode(None)
        ui.foldingSummaryLabel.setText(folding.summary)
        ui.tableView.setMRMLTableNode(folding.linked("table"))
        ui.overlayCheckBox.setEnabled(jacobian is not None)
        ui.gridCheckBox.setEnabled(folding.linked("transform") is not None)
        ui.beforeButton.setEnabled(folding.linked("moving") is not None)
        ui.afterButton.setEnabled(folding.linked("warped") is not None)
        self._updateFold()

    def _updateFold(self):
        ui, folding = self.ui, self.folding
        ui.worstButton.setEnabled(bool(folding.folds))
        ui.previousButton.setEnabled(folding.number > 0)
        ui.nextButton.setEnabled(folding.number < len(folding.folds) - 1)
        ui.foldLabel.setText(folding.position)

    def onOverlay(self, *_args):
        if self.folding.jacobian is not None:
            self.folding.overlay(self.ui.overlayCheckBox.isChecked(), self.ui.opacitySliderWidget.value)

    def onFold(self, number):
        self.folding.go_to(number)
        self._updateFold()

    def onEvaluate(self, *_args):
        if self._agreeToPackages():
            self.evaluation.start(panel_choices.evaluation_inputs(self._parameterNode))
            self._timer.start()
            self.update()


class GradProjIOLogic(ScriptedLoadableModuleLogic):
    """Registration of nodes, with or without the panel."""

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        self.session = SceneRegistration(slicer.mrmlScene)
        self.evaluation = SceneEvaluation(slicer.mrmlScene)

    def getParameterNode(self):
        return GradProjIOParameterNode(super().getParameterNode())

    def register(
        self,
        fixedNode,
        movingNode,
        *,
        initialTransform=None,
        fixedMask=None,
        movingMask=None,
        movingSegmentation=None,
        outputs=None,
        allowDownload=False,
        **settings,
    ):
        """Register `movingNode` to `fixedNode` and return the result's nodes by name.

        The names are transform, inverse, warped, warped_labels, jacobian, folding, table. `outputs` maps
        those of the first five that are wanted to the node to fill, or to None for a new one. `settings` are
        those of GradProjIOLib.settings.Settings, or a preset: preset="quick", model="unigradicon" …
        Returns when the registration is done; the application goes on meanwhile. Raises RuntimeError with a
        sentence that says what to change.
        """
        inputs = Inputs(fixedNode, movingNode, initialTransform, fixedMask, movingMask, movingSegmentation)
        return self.session.run(inputs, settings, outputs, allowDownload, meanwhile=slicer.app.processEvents)

    def registerMany(self, pairs, fixed=None, folder=None, allowDownload=False, **settings):
        """Register many pairs one after the other; return the batch, whose `results` has one entry for each.

        `pairs` is a list of (fixed, moving), each a volume node or a file. With `fixed` it is what shall be
        registered to that: a list, a folder, a subject hierarchy item's number or a sequence. With `folder` the
        results are only files in there, else nodes. Returns at once where there is a main window, whose status bar
        then shows the progress, else when all is done. Raises InputError where nothing can start.
        """
        from GradProjIOLib.scene import batch as scene_batch

        pairs = scene_batch.pairs_of(pairs, fixed, slicer.mrmlScene)
        if folder is None:
            batch = scene_batch.NodeBatch(self.session, pairs, settings, allowDownload)
        else:
            batch = scene_batch.FolderBatch(pairs, settings, folder, allowDownload)
        window = slicer.util.mainWindow()
        if window is None:
            scene_batch.wait_with_bar(batch)
            self.session.close()
        else:
            # The window keeps the timer, and that the batch, also when nobody keeps the logic.
            timer = qt.QTimer(window)
            timer.setInterval(POLL_MILLISECONDS)
            timer.timeout.connect(lambda: self._onBatch(batch, timer))
            timer.start()
        return batch

    def _onBatch(self, batch, timer):
        if not batch.poll():
            timer.stop()
            timer.deleteLater()
            self.session.close()
        slicer.util.showStatusMessage(batch.status())


class GradProjIOTest(ScriptedLoadableModuleTest):
    """Registers two small synthetic images inside Slicer, without network access."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_registration()

    def test_registration(self):
        if missing := packages.missing():
            self.skipTest(f"not installed: {', '.join(missing)}")
        self.delayDisplay("Registering two small synthetic images")
        self_test.run(GradProjIOLogic())
        self.delayDisplay("Test passed")

"""The panel of the module: what its buttons do, and when they are enabled."""

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleWidget
from slicer.util import VTKObservationMixin

from GradProjIOLib.scene import packages, panel_choices
from GradProjIOLib.scene.session import State
from GradProjIOLib.worker.protocol import JACOBIAN
from GradProjIOPanel.choices import ChoicesSection
from GradProjIOPanel.guidance import GuidanceSection
from GradProjIOPanel.logic import POLL_MILLISECONDS, GradProjIOLogic
from GradProjIOPanel.notes import showNote
from GradProjIOPanel.results import ResultsSection

# Where Slicer's settings say that weights may be fetched without a further question.
AGREED_KEY = "GradProjIO/DownloadAgreed"


class GradProjIOWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: shows what the logic's session is doing, and passes on what the user wants."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = self._parameterNode = self._guiTag = None
        # The message of the session, and the images that were chosen when it came.
        self._said = ("", None)
        # The results of the session that were shown, and whether there may be new volumes.
        self._shown, self._arrived = {}, False
        # What a run has reached on its way, while the views show it.
        self._soFar = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/GradProjIO.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        for widget in vars(self.ui).values():
            if hasattr(widget, "setMRMLScene"):
                widget.setMRMLScene(slicer.mrmlScene)
        self.ui.resultSelector.addAttribute("vtkMRMLScalarVolumeNode", "GradProjIO.role", JACOBIAN)
        self.logic = GradProjIOLogic()
        self.session, self.evaluation = self.logic.session, self.logic.evaluation
        self.download = self.logic.download
        self.choices = ChoicesSection(self.ui, self.download)
        self.guidance = GuidanceSection(self.ui, slicer.mrmlScene)
        self.results = ResultsSection(self.ui, slicer.mrmlScene)
        self._timer = qt.QTimer()
        self._connect()
        self.initializeParameterNode()
        self._timer.start(POLL_MILLISECONDS)

    def _connect(self):
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.StartImportEvent, self.onSceneStartImport)
        for event in (scene.EndCloseEvent, scene.EndImportEvent):
            self.addObserver(scene, event, self.onSceneEnd)
        self.addObserver(scene, scene.NodeAddedEvent, self.onNodeAdded)
        self.addObserver(scene, scene.NodeAboutToBeRemovedEvent, self.onNodeAboutToBeRemoved)
        self.addObserver(scene, scene.NodeRemovedEvent, self.onNodeRemoved)
        self._timer.timeout.connect(self.onTimer)
        ui = self.ui
        for button, action in (
            (ui.registerButton, self.onRegister),
            (ui.goOnButton, self.onGoOn),
            (ui.plotButton, self.onPlot),
            (ui.keepButton, self.session.keep),
            (ui.discardButton, self.session.discard),
            (ui.evaluateButton, self.onEvaluate),
            (ui.downloadButton, self.onDownload),
        ):
            button.clicked.connect(lambda *_, action=action: self._do(action))

    def cleanup(self):
        self._timer.stop()
        self.setParameterNode(None)
        self.removeObservers()
        self.guidance.placing.stop()
        self._forgetSoFar()
        self.results.close()
        self.evaluation.abandon()
        self.download.close()
        self.session.close()

    def enter(self):
        self.initializeParameterNode()
        if not packages.missing():
            self.session.start_worker()
        self._showNew()

    def exit(self):
        """The user opens another module: stop the flicker. A registration keeps running."""
        self.ui.flickerButton.checked = False
        self.guidance.placing.stop()

    def onSceneStartClose(self, caller, event):
        """End a run, whose nodes are about to be removed."""
        self.evaluation.abandon()
        self.session.abandon(_("The scene was closed, which canceled the registration."))
        self.onSceneStartImport()

    def onSceneStartImport(self, caller=None, event=None):
        """Let go of the parameter node, which a file may replace, and of what the views show."""
        self.setParameterNode(None)
        self.results.forget()

    def onSceneEnd(self, caller, event):
        """Show the new scene, where the panel is open."""
        if self.parent.isEntered:
            self.initializeParameterNode()

    def onNodeAdded(self, caller, event):
        """Look for new volumes at the next tick of the timer, when they have got their voxels."""
        self._arrived = True

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAboutToBeRemoved(self, caller, event, node):
        """Choose none instead of a node that goes; the selectors would choose another one by themselves."""
        for name in self._parameterNode.__annotations__ if self._parameterNode else ():
            if getattr(self._parameterNode, name) is node:
                setattr(self._parameterNode, name, None)

    def onNodeRemoved(self, caller, event):
        """Show what is left of the result."""
        if self._parameterNode and not slicer.mrmlScene.IsBatchProcessing():
            self.update()

    def initializeParameterNode(self):
        """Connect the panel to the scene's parameter node, and choose the first volumes where none are."""
        parameters = self.logic.getParameterNode()
        # While a scene is read, Slicer's wrapper looks the chosen nodes up before they are in it.
        parameters.parameterNode.Modified()
        self.setParameterNode(parameters)
        panel_choices.suggest_volumes(self._parameterNode)

    def setParameterNode(self, parameterNode):
        """Connect the panel to `parameterNode`, or to none; it stays connected while other modules are open."""
        if parameterNode is not self._parameterNode:
            if self._parameterNode:
                self._parameterNode.disconnectGui(self._guiTag)
                self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.update)
            self._parameterNode = self.choices.parameters = self.guidance.parameters = parameterNode
            if parameterNode:
                widgets = {widget.property("SlicerParameterName"): widget for widget in vars(self.ui).values()}
                # Not connectGui, which returns no tag to disconnect with in Slicer 5.10 and 5.12.
                named = {name: widget for name, widget in widgets.items() if name}
                self._guiTag = parameterNode.connectParametersToGui(named)
                self.choices.name()
                self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self.update)
        self.update()

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
        self._forgetOldMessage(parameters)
        lines = [session.status(), "" if session.active else problem]
        showNote(ui.statusIconLabel, ui.statusLabel, "\n".join(filter(None, lines)), session.tone)
        ui.progressBar.setVisible(session.active)
        # A range of nothing shows that something goes on.
        ui.progressBar.setMaximum(0 if session.finishing else session.total)
        ui.progressBar.setValue(len(session.steps))
        ui.progressBar.setFormat(session.progress())
        for button in (ui.keepButton, ui.discardButton):
            button.setVisible(session.state is State.OFFERED)
        ui.plotButton.setEnabled(session.active or bool(session.steps))
        self._updateGoOn(parameters)
        if parameters:
            self.choices.update(session.devices, session.models)
            self.guidance.update(self._chosenResult(parameters))
            self.results.follow(self._chosenResult(parameters), parameters.foldingSegmentation)
            self._updateEvaluation(parameters)

    def _forgetOldMessage(self, parameters):
        """Clear the message when other images are chosen; it was about the earlier ones."""
        chosen = (parameters.fixedVolume, parameters.movingVolume) if parameters else (None, None)
        if self._said[0] == self.session.message and chosen != self._said[1] and self.session.state is State.IDLE:
            self.session.forget_message()
        if self._said[0] != self.session.message:
            self._said = (self.session.message, chosen)

    def _updateGoOn(self, parameters):
        """Enable Go on where the result that is shown can take more steps; otherwise say why not."""
        ready = bool(parameters) and self.session.state is State.IDLE
        problem = panel_choices.go_on_problem(parameters, self._chosenResult(parameters)) if ready else ""
        for widget in (self.ui.goOnButton, self.ui.moreStepsSpinBox):
            widget.setEnabled(ready and not problem)
        self.ui.goOnButton.setToolTip(
            problem or _("Take more steps from the result chosen under Compare, with its own settings.")
        )

    def _chosenResult(self, parameters):
        """A node of the result that is shown: the chosen one, or the last result, where it has no Jacobian map."""
        results = self.session.results
        return parameters.result or (None if JACOBIAN in results else next(iter(results.values()), None))

    def _updateEvaluation(self, parameters):
        ui = self.ui
        problem = panel_choices.refusal(panel_choices.evaluation_inputs(parameters))
        ui.evaluateButton.setEnabled(not problem and not self.evaluation.active)
        ui.evaluateButton.setToolTip(problem or _("Measure the result chosen under Compare."))
        ui.evaluationLabel.setText(problem or self.evaluation.message_about(parameters.result))
        ui.evaluationTableView.setMRMLTableNode(self.evaluation.table_about(parameters.result))

    def onTimer(self):
        """Handle what the worker processes have reported, and what happened in the scene and its views."""
        if self._arrived and self._parameterNode:
            self._arrived = False
            panel_choices.suggest_volumes(self._parameterNode, arrived=True)
        if self.evaluation.poll() | self.session.poll() | self.download.poll():
            self._showNew()
        elif self._parameterNode and self.guidance.changed(self._chosenResult(self._parameterNode)):
            self.update()
        elif self.parent.isEntered:
            self.results.update()
        question = self.session.take_question()
        if question and slicer.util.confirmOkCancelDisplay(question, "GradProjIO"):
            slicer.app.userSettings().setValue(AGREED_KEY, True)
            self._do(self._start)

    def _showNew(self):
        """Show what has happened: what a run reaches, and its nodes when it has ended, or the panel is opened again."""
        soFar = self.session.so_far and self.session.so_far.node
        if self.session.active and soFar is not None and soFar is not self._soFar and self.parent.isEntered:
            # Once, when it first arrives; what the user chooses to see afterwards stays.
            self._soFar = soFar
            self.results.showSoFar(soFar)
        results = self.session.results
        if results is not self._shown and self._parameterNode and self.parent.isEntered:
            self._shown = results
            if results:
                self.results.showNew(results)
                self._parameterNode.result = results.get(JACOBIAN)
        if not self.session.active:
            self._forgetSoFar()
        self.update()

    def _forgetSoFar(self):
        if self._soFar is not None and self.results.compare.result is self._soFar:
            self.results.showSoFar(None)
        self._soFar = None
        self.session.forget_so_far()

    def _do(self, action):
        """Call what a button does, and show what came of it."""
        action()
        self._showNew()

    def onRegister(self):
        """Register; while a registration runs, cancel it."""
        if self.session.active:
            self.session.cancel()
        elif self._agreeToPackages():
            self._start()

    def onGoOn(self):
        if self._agreeToPackages():
            chosen = self._parameterNode
            result = self._chosenResult(chosen)
            guides = panel_choices.guides_to_go_on(chosen, result)
            self.session.attempt(self.session.go_on, result, chosen.moreSteps, guides, so_far=chosen.showSoFar)

    def _start(self):
        chosen = self._parameterNode
        arguments = panel_choices.inputs(chosen), panel_choices.settings(chosen), panel_choices.outputs(chosen)
        agreed = slicer.util.settingsValue(AGREED_KEY, False, converter=slicer.util.toBool)
        self.session.attempt(self.session.start, *arguments, allow_download=agreed, so_far=chosen.showSoFar)

    def onDownload(self):
        """Fetch the weights of the model; a second click ends that."""
        if self.download.active:
            self.download.cancel()
        elif self._agreeToPackages():
            slicer.app.userSettings().setValue(AGREED_KEY, True)
            self.download.start(self.choices.modelToFetch())

    def _agreeToPackages(self):
        """Install what is missing after asking; whether everything is there now."""
        missing = packages.missing()
        if not missing:
            return True
        if not slicer.util.confirmOkCancelDisplay(packages.question(missing), "GradProjIO"):
            return False
        try:
            with slicer.util.WaitCursor():
                packages.install(missing)
        except Exception as error:
            self.session.fail(_("The packages could not be installed: {error}").format(error=error))
        return not packages.missing()

    def onPlot(self):
        chart = self.session.show_plot()
        if chart is not None:
            slicer.modules.plots.logic().ShowChartInLayout(chart)

    def onEvaluate(self):
        if self._agreeToPackages():
            self.evaluation.start(panel_choices.evaluation_inputs(self._parameterNode))

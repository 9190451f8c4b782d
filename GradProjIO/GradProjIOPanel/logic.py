"""Registration from the console and for the panel."""

import qt
import slicer
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleLogic

from GradProjIOLib.scene import panel_choices
from GradProjIOLib.scene.download import ModelDownload
from GradProjIOLib.scene.evaluation import SceneEvaluation
from GradProjIOLib.scene.guidance import Guides
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.session import SceneRegistration
from GradProjIOPanel.parameters import GradProjIOParameterNode

POLL_MILLISECONDS = 100


class GradProjIOLogic(ScriptedLoadableModuleLogic):
    """Registration of nodes, with or without the panel."""

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        self.session = SceneRegistration(slicer.mrmlScene)
        self.evaluation = SceneEvaluation(slicer.mrmlScene)
        self.download = ModelDownload()
        self._parameters = None

    def getParameterNode(self):
        """The parameters in the scene. The wrapper is reused, because a wrapper never stops observing its node."""
        node = super().getParameterNode()
        if self._parameters is None or self._parameters.parameterNode is not node:
            self._parameters = GradProjIOParameterNode(node)
        return self._parameters

    def register(
        self,
        fixedVolume,
        movingVolume,
        *,
        initialTransform=None,
        fixedMask=None,
        movingMask=None,
        movingSegmentation=None,
        fixedPoints=None,
        movingPoints=None,
        fixedGuide=None,
        movingGuide=None,
        outputs=None,
        allowDownload=False,
        **settings,
    ):
        """Register `movingVolume` to `fixedVolume` and return the result's nodes by name.

        fixedPoints and movingPoints are landmarks that guide it, fixedGuide and movingGuide two segmentations, whose
        segments of equal name do, or two label maps, whose equal values do.

        The names are transform, inverse, warped, warpedLabels, jacobian, folding, table. `outputs` maps
        those of the first five that are wanted to the node to fill, or to None for a new one. `settings` are
        those of GradProjIOLib.settings.Settings, or a preset: preset="quick", refineSteps=40, model="unigradicon" …
        Returns when the registration is done; the application goes on meanwhile. Raises RuntimeError with a
        sentence that says what to change.
        """
        guides = Guides(fixedPoints, movingPoints, fixedGuide, movingGuide)
        inputs = Inputs(fixedVolume, movingVolume, initialTransform, fixedMask, movingMask, movingSegmentation, guides)
        wanted = None if outputs is None else panel_choices.python_names(outputs)
        settings = panel_choices.python_names(settings)
        nodes = self.session.run(inputs, settings, wanted, allowDownload, meanwhile=slicer.app.processEvents)
        return {panel_choices.parameter_name(role): node for role, node in nodes.items()}

    def goOn(self, result, steps=20, fixedPoints=None, movingPoints=None, fixedGuide=None, movingGuide=None):
        """Take so many more steps from a result, known by one of its nodes; return its nodes, which are filled anew.

        Its settings, images and masks stay, and what guided it unless something else is given, as for `register`.
        Returns when it is done; the application goes on meanwhile. Raises RuntimeError with a sentence that says what
        to change.
        """
        guides = Guides(fixedPoints, movingPoints, fixedGuide, movingGuide)
        nodes = self.session.run_on(result, steps, guides, meanwhile=slicer.app.processEvents)
        return {panel_choices.parameter_name(role): node for role, node in nodes.items()}

    def registerMany(self, pairs, fixed=None, folder=None, allowDownload=False, **settings):
        """Register many pairs one after the other; return the batch, whose `results` has one entry for each.

        `pairs` is a list of (fixed, moving), each a volume node or a file. With `fixed`, `pairs` names the moving
        images: a list, a folder, the number of a subject hierarchy item, or a sequence. With `folder` the results are
        files in that folder only, else nodes. Returns at once where there is a main window, whose status bar then shows
        the progress, else when all is done. Raises InputError where nothing can start.
        """
        from GradProjIOLib.scene import batch as scene_batch

        settings = panel_choices.python_names(settings)
        pairs = scene_batch.pairs_of(pairs, fixed, slicer.mrmlScene)
        # Not the logic's own session, which the panel may be using.
        session = SceneRegistration(slicer.mrmlScene)
        if folder is None:
            batch = scene_batch.NodeBatch(session, pairs, settings, allowDownload)
        else:
            batch = scene_batch.FolderBatch(pairs, settings, folder, allowDownload)
        window = slicer.util.mainWindow()
        if window is None:
            scene_batch.wait_with_bar(batch)
            session.close()
        else:
            # The window keeps the timer, and that the batch, also when nobody keeps the logic.
            timer = qt.QTimer(window)
            timer.timeout.connect(lambda: self._onBatch(batch, session, timer))
            timer.start(POLL_MILLISECONDS)
        return batch

    def _onBatch(self, batch, session, timer):
        if not batch.poll():
            timer.stop()
            timer.deleteLater()
            session.close()
        slicer.util.showStatusMessage(batch.status())

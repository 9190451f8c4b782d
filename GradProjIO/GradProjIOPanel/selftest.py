"""The test that Slicer offers to run inside itself."""

import slicer
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleTest

from GradProjIOLib.scene import packages, self_test
from GradProjIOPanel.logic import GradProjIOLogic


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

"""What the module shows in a Slicer that is too old for it. It must run in Python 3.9."""

import qt
from slicer.i18n import tr as _
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleWidget


class GradProjIOWidget(ScriptedLoadableModuleWidget):
    """One sentence instead of the panel."""

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        self.label = qt.QLabel(_("GradProjIO needs Slicer 5.10 or later; install a newer Slicer from slicer.org."))
        self.label.setWordWrap(True)
        self.layout.addWidget(self.label)

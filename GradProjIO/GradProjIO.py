import sys
from pathlib import Path

from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import ScriptedLoadableModule

for folder in Path(__file__).resolve().parents[:2]:
    # In the source tree the package GradProjIOLib lies beside the module's folder, else in it.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

OLDEST_PYTHON = (3, 11)

if sys.version_info >= OLDEST_PYTHON:
    from GradProjIOPanel.logic import GradProjIOLogic
    from GradProjIOPanel.parameters import GradProjIOParameterNode
    from GradProjIOPanel.selftest import GradProjIOTest
    from GradProjIOPanel.widget import GradProjIOWidget

    __all__ = ["GradProjIO", "GradProjIOLogic", "GradProjIOParameterNode", "GradProjIOTest", "GradProjIOWidget"]
else:
    # Slicer 5.8 and older.
    from GradProjIOPanel.too_old import GradProjIOWidget


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

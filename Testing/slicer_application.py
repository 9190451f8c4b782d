"""A Slicer application for tests: PySide6 and slicer-core, with stand-ins for what slicer-core lacks.

Real are MRML, its logic, `slicer.util` and Qt's widgets. Stand-ins are PythonQt's `qt` and `ctk`,
`slicer.app`, the qMRML widgets, and Slicer's Python files for scripted modules. Where the environment
variable SLICER_PYTHON names the folder Base/Python/slicer of Slicer's sources, those files are used instead,
so that the module can be tried against them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import types
import typing
from pathlib import Path

import slicer
import slicer.util
import vtk
from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

MODULE_FILE = Path(__file__).parents[1] / "GradProjIO" / "GradProjIO.py"
# Qt calls these from C++ by name, so they must stay methods.
VIRTUAL = {"sizeHint", "minimumSizeHint", "inputMethodHints"}


def with_properties(qt_class: type) -> type:
    """A subclass whose Qt properties are attributes, as in PythonQt."""
    meta = qt_class.staticMetaObject
    names = {meta.property(index).name() for index in range(meta.propertyCount())} - VIRTUAL
    names -= {"text"} if qt_class is QtWidgets.QProgressBar else set()
    # Properties that a class below declares are attributes already.
    names -= {name for name, member in vars(qt_class).items() if isinstance(member, QtCore.Property)}
    members = {name: _qt_property(name) for name in names} | {"name": _qt_property("objectName")}
    return type(qt_class.__name__, (qt_class,), members)


def _qt_property(name: str) -> property:
    return property(
        lambda self: QtCore.QObject.property(self, name),
        lambda self, value: QtCore.QObject.setProperty(self, name, value),
    )


def _make_qt() -> types.ModuleType:
    qt = types.ModuleType("qt")
    qt.__getattr__ = _from_pyside
    for name in WIDGETS:
        setattr(qt, name, with_properties(getattr(QtWidgets, name)))
    qt.QUiLoader = UiLoader
    return qt


def _from_pyside(name: str) -> type:
    for source in (QtCore, QtGui, QtWidgets):
        if hasattr(source, name):
            return getattr(source, name)
    raise AttributeError(name)


WIDGETS = (
    "QWidget",
    "QLabel",
    "QPushButton",
    "QCheckBox",
    "QComboBox",
    "QSpinBox",
    "QDoubleSpinBox",
    "QSlider",
    "QProgressBar",
    "QLineEdit",
    "QToolButton",
    "QRadioButton",
    "QTableWidget",
    "QListWidget",
)


class CollapsibleButton(QtWidgets.QGroupBox):
    """A titled box that can be closed."""

    def __init__(self, parent=None):
        super().__init__(parent)
        self._collapsed, self._hidden = False, []

    text = QtCore.Property(str, lambda self: self.title(), lambda self, text: self.setTitle(text))

    def _collapse(self, collapsed):
        """Hide what is inside; when it is opened again, only that appears which was not hidden by itself."""
        children = self.findChildren(QtWidgets.QWidget, options=QtCore.Qt.FindDirectChildrenOnly)
        if collapsed:
            shown = [child for child in children if not child.isHidden()]
            self._hidden += [child for child in shown if child not in self._hidden]
            for child in shown:
                child.hide()
        elif self._collapsed and not collapsed:
            for child in self._hidden:
                child.show()
            self._hidden = []
        self._collapsed = collapsed
        self.setFlat(collapsed)

    def showEvent(self, event):
        if self._collapsed:
            # The file of the panel has closed it before there was anything inside.
            self._collapse(True)
        super().showEvent(event)

    collapsed = QtCore.Property(bool, lambda self: self._collapsed, _collapse)


def _box_property(kind, name):
    """A property of a SliderWidget that is one of its number box."""
    return QtCore.Property(
        kind,
        lambda self: self._box.property(name),
        lambda self, value: (self._box.setProperty(name, value), self._follow(self._box.value()))[0],
    )


class SliderWidget(QtWidgets.QWidget):
    """A slider with a number beside it."""

    valueChanged = QtCore.Signal(float)

    def __init__(self, parent=None):
        super().__init__(parent)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._slider = QtWidgets.QSlider(QtCore.Qt.Horizontal)
        self._slider.setRange(0, 1000)
        self._box = QtWidgets.QDoubleSpinBox()
        layout.addWidget(self._slider)
        layout.addWidget(self._box)
        self._box.valueChanged.connect(self._follow)
        self._box.valueChanged.connect(self.valueChanged)
        self._slider.sliderMoved.connect(self._lead)

    def _follow(self, value):
        span = self._box.maximum() - self._box.minimum()
        self._slider.setValue(round(1000 * (value - self._box.minimum()) / span) if span else 0)

    def _lead(self, position):
        span = self._box.maximum() - self._box.minimum()
        self._box.setValue(self._box.minimum() + span * position / 1000)

    value = _box_property(float, "value")
    minimum = _box_property(float, "minimum")
    maximum = _box_property(float, "maximum")
    singleStep = _box_property(float, "singleStep")
    decimals = _box_property(int, "decimals")


class NodeComboBox(QtWidgets.QComboBox):
    """The nodes of some classes in the scene, perhaps with one entry for none."""

    currentNodeChanged = QtCore.Signal(object)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._scene, self._tags, self._filters, self._types = None, [], {}, []
        self.currentIndexChanged.connect(lambda index: self.currentNodeChanged.emit(self.currentNode()))

    nodeTypes = QtCore.Property("QStringList", lambda self: self._types, lambda self, t: self._set_types(t))

    def _set_types(self, node_types):
        self._types = list(node_types)
        self._refresh()

    def setMRMLScene(self, scene):
        for tag in self._tags:
            self._scene.RemoveObserver(tag)
        self._scene, self._tags = scene, []
        for event in (scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.EndCloseEvent):
            self._tags.append(scene.AddObserver(event, lambda caller, event: self._refresh()))
        self._refresh()

    def addAttribute(self, node_type, name, value=None):
        # As in Slicer, an attribute of a kind of node that is not listed is ignored.
        if node_type in self._types:
            self._filters[node_type] = (name, value)
            self._refresh()

    def _shown(self, node):
        attribute, value = self._filters.get(node.GetClassName(), (None, None))
        return (
            self._fits(node)
            and not node.GetHideFromEditors()
            and (attribute is None or node.GetAttribute(attribute) == value)
        )

    def _fits(self, node):
        if self.property("showChildNodeTypes"):
            return any(node.IsA(kind) for kind in self._types)
        return node.GetClassName() in self._types

    def _refresh(self):
        if self._scene is None:
            return
        before = QtWidgets.QComboBox.currentData(self)
        self.blockSignals(True)
        self.clear()
        self.addItem(self.property("noneDisplay") or "None", None)
        nodes = [self._scene.GetNthNode(index) for index in range(self._scene.GetNumberOfNodes())]
        for node in filter(self._shown, nodes):
            self.addItem(node.GetName(), node.GetID())
        found = self.findData(before) if before else 0
        # As in Slicer, a neighbor is chosen where the chosen node is gone.
        self.setCurrentIndex(found if found >= 0 else QtWidgets.QComboBox.count(self) - 1)
        self.blockSignals(False)
        if found < 0:
            self.currentNodeChanged.emit(self.currentNode())

    def currentNode(self):
        identifier = QtWidgets.QComboBox.currentData(self)
        return self._scene.GetNodeByID(identifier) if identifier and self._scene else None

    def setCurrentNode(self, node):
        if node is not None and self.findData(node.GetID()) < 0:
            self._refresh()
        self.setCurrentIndex(max(self.findData(node.GetID()), 0) if node is not None else 0)


class TableView(QtWidgets.QTableWidget):
    """The columns of a table node."""

    def setMRMLScene(self, scene):
        pass

    def setMRMLTableNode(self, node):
        self.clear()
        columns = node.GetNumberOfColumns() if node is not None else 0
        self.setColumnCount(columns)
        self.setRowCount(node.GetNumberOfRows() if node is not None else 0)
        for column in range(columns):
            self.setHorizontalHeaderItem(column, QtWidgets.QTableWidgetItem(node.GetColumnName(column)))
            for row in range(node.GetNumberOfRows()):
                self.setItem(row, column, QtWidgets.QTableWidgetItem(node.GetCellText(row, column)))
        self.resizeColumnsToContents()
        self.verticalHeader().hide()


class MrmlWidget(QtWidgets.QWidget):
    """A widget around others. It hands the scene to none of them, since the file of the panel connects none."""

    def setMRMLScene(self, scene):
        pass


STAND_INS = {
    "ctkCollapsibleButton": with_properties(CollapsibleButton),
    "ctkSliderWidget": with_properties(SliderWidget),
    "qMRMLNodeComboBox": with_properties(NodeComboBox),
    "qMRMLTableView": with_properties(TableView),
    "qMRMLWidget": with_properties(MrmlWidget),
}


ALIVE: list[object] = []


class UiLoader(QtUiTools.QUiLoader):
    """Builds the widgets of a .ui file from the classes above."""

    def createWidget(self, class_name, parent=None, name=""):
        kind = STAND_INS.get(class_name) or (getattr(sys.modules["qt"], class_name) if class_name in WIDGETS else None)
        if kind is None:
            return super().createWidget(class_name, parent, name)
        widget = kind(parent)
        widget.setObjectName(name)
        # PySide6 may free the Python side of a widget before Qt is done with it.
        ALIVE.append(widget)
        return widget


class Application:
    """What the module asks of `slicer.app`."""

    def __init__(self):
        self.questions, self.errors, self.answer, self.shown_charts = [], [], True, []
        self.fitted, self.settings = 0, {}

    def connect(self, signal, slot):
        pass

    disconnect = connect

    def processEvents(self):
        QtWidgets.QApplication.processEvents()

    def style(self):
        return QtWidgets.QApplication.style()

    def userSettings(self):
        return types.SimpleNamespace(setValue=self.settings.__setitem__)

    def layoutManager(self):
        return self

    def fit(self):
        self.fitted += 1

    def moduleManager(self):
        return self

    def translate(self, context, text):
        return text

    def testingEnabled(self):
        return True

    def ask(self, text, *args, **kwargs):
        self.questions.append(text)
        return self.answer

    def show_error(self, text, *args, **kwargs):
        self.errors.append(text)


def start(scene: slicer.vtkMRMLScene) -> Application:
    """Start the application with `scene` as Slicer's scene; later calls in a process change the scene."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    _keep_singletons_alive()
    QtWidgets.QApplication.instance() or QtWidgets.QApplication([])
    application = Application()
    slicer.app, slicer.mrmlScene = application, scene
    scene.RegisterNodeClass(slicer.vtkMRMLColorLegendDisplayNode())
    # What Slicer's Segmentations module does when the application starts.
    converters = slicer.vtkSegmentationConverterFactory.GetInstance()
    converters.RegisterConverterRule(slicer.vtkBinaryLabelmapToClosedSurfaceConversionRule())
    slicer.util.confirmOkCancelDisplay = application.ask
    slicer.util.errorDisplay = application.show_error
    slicer.util.resetSliceViews = application.fit
    slicer.util.settingsValue = lambda key, default, converter=None: application.settings.get(key, default)
    plots = types.SimpleNamespace(ShowChartInLayout=application.shown_charts.append)
    slicer.modules = types.SimpleNamespace(
        gradprojio=types.SimpleNamespace(path=str(MODULE_FILE)),
        plots=types.SimpleNamespace(logic=lambda: plots),
    )
    if "qt" not in sys.modules:
        _install_modules()
    return application


def _keep_singletons_alive() -> None:
    """Before Python 3.12 PySide6 6.12 uses up references to None, True and False until they are freed."""
    for singleton in (None, True, False):
        ctypes.c_ssize_t.from_address(id(singleton)).value += 1 << 30


def _install_modules() -> None:
    sys.modules["qt"] = _make_qt()
    ctk = types.ModuleType("ctk")
    # Slicer's connectors name widget classes the panel does not use; any class will do for them.
    ctk.__getattr__ = lambda name: STAND_INS.get(name) or _any_widget(name, "ctk")
    sys.modules["ctk"] = ctk
    for name, widget in STAND_INS.items():
        setattr(slicer, name, widget)
    sources = os.environ.get("SLICER_PYTHON")
    if sources:
        slicer.__path__.append(sources)
        slicer.__getattr__ = lambda name: _any_widget(name, ("qMRML", "qSlicer"))
        return
    for name in ("i18n", "ScriptedLoadableModule", "parameterNodeWrapper"):
        module = types.ModuleType(f"slicer.{name}")
        sys.modules[module.__name__] = module
        setattr(slicer, name, module)
    slicer.i18n.tr, slicer.i18n.translate = (lambda text: text), (lambda context, text: text)
    for kind in (ModuleBase, WidgetBase, LogicBase, TestBase):
        setattr(slicer.ScriptedLoadableModule, f"ScriptedLoadableModule{kind.suffix}", kind)
    slicer.parameterNodeWrapper.parameterNodeWrapper = wrap_parameter_node
    slicer.parameterNodeWrapper.Choice = Choice
    slicer.parameterNodeWrapper.WithinRange = WithinRange


def _any_widget(name: str, prefixes: str | tuple[str, ...]) -> type:
    if not name.startswith(prefixes):
        raise AttributeError(name)
    return type(name, (QtWidgets.QWidget,), {})


def load_module() -> types.ModuleType:
    """Import the module's file as Slicer does: by its path, with its folder on the module search path."""
    if str(MODULE_FILE.parent) not in sys.path:
        sys.path.append(str(MODULE_FILE.parent))
    specification = importlib.util.spec_from_file_location("GradProjIO", MODULE_FILE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["GradProjIO"] = module
    specification.loader.exec_module(module)
    return module


class ModuleBase:
    suffix = ""

    def __init__(self, parent):
        self.parent = parent


class WidgetBase:
    suffix = "Widget"

    def __init__(self, parent=None):
        self.parent = parent
        self.layout = parent.layout()

    def setup(self):
        pass

    def resourcePath(self, name):
        return str(MODULE_FILE.parent / "Resources" / name)


class LogicBase:
    suffix = "Logic"

    def getParameterNode(self):
        node = slicer.mrmlScene.GetSingletonNode("GradProjIO", "vtkMRMLScriptedModuleNode")
        if node is None:
            node = slicer.vtkMRMLScriptedModuleNode()
            node.SetSingletonTag("GradProjIO")
            node = slicer.mrmlScene.AddNode(node)
        return node


class TestBase:
    suffix = "Test"

    def delayDisplay(self, text):
        pass

    def skipTest(self, reason):
        raise AssertionError(reason)


class Choice:
    def __init__(self, choices):
        self.choices = choices


class WithinRange:
    def __init__(self, minimum, maximum):
        self.minimum, self.maximum = minimum, maximum


def wrap_parameter_node(described):
    """A class whose attributes are kept in a vtkMRMLScriptedModuleNode, nodes as references."""
    hints = typing.get_type_hints(described, include_extras=True)
    for name, hint in hints.items():
        setattr(described, name, _parameter(name, hint, getattr(described, name, None)))
    described.__init__ = _begin
    described.connectGui, described.disconnectGui = _connect_gui, _disconnect_gui
    described.connectParametersToGui = _connect_parameters_to_gui
    described.AddObserver = lambda self, *arguments: self.parameterNode.AddObserver(*arguments)
    described.RemoveObserver = lambda self, tag: self.parameterNode.RemoveObserver(tag)
    described.hints = hints
    return described


def _begin(self, node):
    self.parameterNode, self._connections, self._nodes = node, {}, {}
    _read_nodes(self)
    node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: _read_nodes(self))


def _read_nodes(self):
    """As in Slicer, nodes are looked up when the parameter node has changed, and not when somebody asks."""
    for name, hint in self.hints.items():
        if not _is_plain(hint):
            self._nodes[name] = self.parameterNode.GetNodeReference(name)


def _is_plain(hint):
    return _plain_type(hint) in (str, int, float, bool)


def _plain_type(hint):
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def _parameter(name, hint, default):
    kind = _plain_type(hint)
    if not _is_plain(hint):

        def write_node(self, node):
            # As in Slicer, those who observe the change already get the new node.
            with slicer.util.NodeModify(self.parameterNode):
                self.parameterNode.SetNodeReferenceID(name, node.GetID() if node else None)
                self._nodes[name] = self.parameterNode.GetNodeReference(name)

        return property(lambda self: self._nodes[name], write_node)

    def read(self):
        text = self.parameterNode.GetParameter(name)
        if not text:
            return default
        return text == "True" if kind is bool else kind(text)

    return property(read, lambda self, value: self.parameterNode.SetParameter(name, str(kind(value))))


def _connect_gui(self, ui):
    """As in Slicer 5.10 and 5.12, the tag is lost, so that nothing can be disconnected."""
    widgets = {w.property("SlicerParameterName"): w for w in vars(ui).values()}
    _connect_parameters_to_gui(self, {name: widget for name, widget in widgets.items() if name})


def _connect_parameters_to_gui(self, widgets):
    tag = len(self._connections)
    self._connections[tag] = [_Connection(self, name, widget) for name, widget in widgets.items()]
    # Nobody removes this observer, which keeps the wrapper alive as long as the node.
    self.parameterNode.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: _show(self))
    return tag


def _show(self):
    for connections in self._connections.values():
        for connection in connections:
            connection.show()


def _disconnect_gui(self, tag):
    for connection in self._connections.pop(tag, ()):
        connection.end()


class _Connection:
    """One parameter and its widget."""

    def __init__(self, parameters, name, widget):
        self.parameters, self.name, self.widget, self.busy = parameters, name, widget, False
        hint = parameters.hints[name]
        notes = getattr(hint, "__metadata__", ())
        self.choices = next((note.choices for note in notes if isinstance(note, Choice)), None)
        for bounds in (note for note in notes if isinstance(note, WithinRange)):
            widget.setProperty("minimum", bounds.minimum)
            widget.setProperty("maximum", bounds.maximum)
        if isinstance(widget, NodeComboBox):
            kinds = typing.get_args(hint) or (hint,)
            widget.nodeTypes = [kind.__name__ for kind in kinds if kind is not type(None)]
            self.signal = widget.currentNodeChanged
        elif isinstance(widget, QtWidgets.QComboBox):
            widget.clear()
            widget.addItems(self.choices)
            self.signal = widget.currentIndexChanged
        elif isinstance(widget, QtWidgets.QCheckBox):
            self.signal = widget.toggled
        else:
            self.signal = widget.valueChanged
        self.show()
        self.signal.connect(self.store)

    def show(self):
        if self.busy:
            return
        self.busy = True
        value = getattr(self.parameters, self.name)
        if isinstance(self.widget, NodeComboBox):
            self.widget.setCurrentNode(value)
        elif self.choices:
            self.widget.setCurrentIndex(self.choices.index(value))
        elif isinstance(value, bool):
            self.widget.setChecked(value)
        else:
            self.widget.setProperty("value", value)
        self.busy = False

    def store(self, *_arguments):
        if self.busy:
            return
        if isinstance(self.widget, NodeComboBox):
            value = self.widget.currentNode()
        elif self.choices:
            value = self.choices[self.widget.property("currentIndex")]
        else:
            name = "checked" if isinstance(self.widget, QtWidgets.QCheckBox) else "value"
            value = self.widget.property(name)
        setattr(self.parameters, self.name, value)

    def end(self):
        self.signal.disconnect(self.store)

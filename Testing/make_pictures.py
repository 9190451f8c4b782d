"""Draw the pictures of the documentation: `python Testing/make_pictures.py Docs/pictures`.

With `guidance` behind it, only those of that page are drawn. The images are phantoms; the registration, the panel and
the slice views are the real ones.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import slicer
import slicer_application
import vtk
from PIL import Image
from PySide6 import QtGui, QtWidgets
from scene_tools import add
from slice_view import SliceView

from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.report.canvas import new_figure
from GradProjIOLib.scene.nodes import nodes_of_class
from GradProjIOLib.scene.pairs import maps_of
from GradProjIOLib.synthetic.pairs import synthetic_pair
from GradProjIOLib.synthetic.phantom import make_pair

STEPS, REFINE_STEPS, FOLDING_STEPS = 6, 10, 12
PANEL_WIDTH, VIEW_SIZE = 430, (600, 380)
COLORS = 192
GUIDANCE_STEPS, LANDMARKS_APART = 2, 35.0


def main(folder: Path) -> None:
    """Draw synthetic pairs; register a phantom pair through the panel and draw what there is to see."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_synthetic_pairs(folder / "synthetic_pairs.png")
    scene = slicer.vtkMRMLScene()
    application = slicer_application.start(scene)
    window = Window(application, scene)
    pair = make_pair(seed=3, shape=(62, 70, 62), spacing=3.1, mean_displacement=7.0, noise=2.0)
    fixed = add(scene, pair.fixed)
    fixed.SetName("MRBrain1")
    moving = add(scene, pair.moving)
    moving.SetName("MRBrain2")
    for node in (fixed, moving):
        node.GetDisplayNode().SetAutoWindowLevel(True)
    labels = [add(scene, volume, "vtkMRMLLabelMapVolumeNode") for volume in (pair.fixed_labels, pair.moving_labels)]
    panel = window.panel
    wait(application)
    panel.onTimer()
    parameters = panel._parameterNode
    save_panel(panel, folder / "panel_ready.png")
    parameters.model, parameters.steps, parameters.refineSteps = "compact", STEPS, REFINE_STEPS
    register(panel, application, folder / "panel_running.png")

    window.save(folder / "window_done.png")
    panel.ui.beforeButton.click()
    window.views["Red"].save(folder / "before.png")
    panel.ui.afterButton.click()
    window.views["Red"].save(folder / "after.png")
    panel.ui.mapButton.click()
    panel.ui.rangeComboBox.setCurrentIndex(0)
    window.save(folder / "window_map_narrow.png")
    panel.ui.rangeComboBox.setCurrentIndex(2)
    parameters.evaluationFixedLabels, parameters.evaluationMovingLabels = labels
    panel.ui.evaluateButton.click()
    while panel.evaluation.active:
        wait(application)
    save_panel(panel, folder / "panel_evaluation.png", "evaluation")

    # Large steps without smoothness, so that there is something to find; a refinement would undo the folds.
    parameters.networkLearningRate, parameters.regularityWeight, parameters.steps = 250e-5, 0.0, FOLDING_STEPS
    parameters.refineSteps = 0
    register(panel, application)
    panel.ui.mapButton.click()
    panel.ui.fadeSliderWidget.value = 0.6
    window.save(folder / "folding.png", "folding")
    panel.ui.gridCheckBox.click()
    window.views["Red"].save(folder / "grid.png")
    panel.ui.gridCheckBox.click()
    parameters.foldingSegmentation = labels[0]
    panel.ui.worstButton.click()
    window.save(folder / "window_fold.png", "folding")
    panel.cleanup()
    draw_guidance(folder)


def draw_guidance(folder: Path) -> None:
    """Place pairs of landmarks on a result of few steps, and go on."""
    scene = slicer.vtkMRMLScene()
    application = slicer_application.start(scene)
    window = Window(application, scene)
    panel, parameters = window.panel, window.panel._parameterNode
    pair = make_pair(seed=3, shape=(62, 70, 62), spacing=3.1, mean_displacement=7.0, noise=2.0)
    for name, volume in (("MRBrain1", pair.fixed), ("MRBrain2", pair.moving)):
        node = add(scene, volume)
        node.SetName(name)
        node.GetDisplayNode().SetAutoWindowLevel(True)
    wait(application)
    panel.onTimer()
    parameters.model, parameters.refineSteps, parameters.moreSteps = "none", GUIDANCE_STEPS, REFINE_STEPS
    register(panel, application)
    # Where this map is farthest off, in the middle slice, some way apart from each other.
    here = landmarks_far_off(pair, panel)
    for point in here:
        panel.ui.placePairButton.click()
        parameters.fixedPoints.AddControlPointWorld(vtk.vtkVector3d(*point))
        panel.guidance.placing.poll(lambda: panel.guidance._maps(parameters.result))
        panel.guidance.placing.stop()
    for number, point in enumerate(pair.deformation.map_points(here)):
        parameters.movingPoints.SetNthControlPointPositionWorld(number, *point)
    panel.ui.beforeButton.click()
    look_at(scene, here[0])
    window.save(folder / "guidance_placed.png", "guidance")
    panel.ui.goOnButton.click()
    while panel.session.active:
        wait(application)
    wait(application)
    print(panel.ui.statusLabel.property("text"))
    look_at(scene, here[0])
    window.save(folder / "guidance_done.png", "guidance")
    panel.cleanup()


def look_at(scene, point) -> None:
    """Show the slices through a point in the world."""
    for node in nodes_of_class(scene, "vtkMRMLSliceNode"):
        node.JumpSliceByOffsetting(*point)


def landmarks_far_off(pair, panel) -> np.ndarray:
    """Three points [n, 3] of labels in the middle slice where the result is farthest from the true deformation."""
    found = maps_of(
        panel._parameterNode.fixedVolume, panel._parameterNode.movingVolume, None, panel._parameterNode.result
    )
    slices = pair.fixed_labels.array[len(pair.fixed_labels.array) // 2]
    j, i = np.nonzero(slices)
    index = np.stack([i, j, np.full_like(i, len(pair.fixed_labels.array) // 2)], axis=1)
    points = apply_matrix(pair.fixed.affine, index)
    off = np.linalg.norm(found.proposing(points) - pair.deformation.map_points(points), axis=1)
    chosen: list[int] = []
    for number in np.argsort(-off):
        if all(np.linalg.norm(points[number] - points[other]) > LANDMARKS_APART for other in chosen):
            chosen.append(int(number))
    return points[chosen[:3]]


class Window:
    """The module's panel beside three slice views, as in Slicer's window."""

    def __init__(self, application, scene):
        self.application = application
        self.panel = open_panel(application)
        self.views = {name: SliceView(scene, name, VIEW_SIZE) for name in ("Red", "Green", "Yellow")}
        slicer.util.resetSliceViews = self.fit

    def fit(self):
        """Show all of the fixed image."""
        for view in self.views.values():
            view.fit(self.panel._parameterNode.fixedVolume)

    def save(self, path: Path, *opened: str) -> None:
        """Draw the panel, with some of its lower sections open, and the views beside it."""
        self.panel.onTimer()
        panel = picture_of(self.panel, opened)
        width, height = VIEW_SIZE
        whole = Image.new("RGB", (PANEL_WIDTH + width + 5, max(panel.height, 3 * height + 10)), "#efefef")
        whole.paste(panel, (0, 0))
        for number, view in enumerate(self.views.values()):
            whole.paste(Image.fromarray(view.pixels()), (PANEL_WIDTH + 5, number * (height + 5)))
        # Few colors make small files.
        whole.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def register(panel, application, picture: Path | None = None) -> None:
    """Press Register and wait; halfway draw the panel."""
    panel.ui.registerButton.click()
    while panel.session.active:
        wait(application)
        if picture and len(panel.session.steps) > panel.session.total // 2:
            save_panel(panel, picture)
            picture = None
    wait(application)
    print(panel.ui.statusLabel.property("text"), panel.ui.foldingSummaryLabel.property("text"))


def open_panel(application):
    """The module's panel with the first two volumes chosen."""
    parent = slicer.qMRMLWidget()
    parent.setLayout(QtWidgets.QVBoxLayout())
    parent.isEntered = True
    panel = slicer_application.load_module().GradProjIOWidget(parent)
    panel.setup()
    panel.enter()
    return panel


def wait(application) -> None:
    application.processEvents()
    time.sleep(0.02)


def picture_of(panel, opened=()) -> Image.Image:
    """The panel with those of its lower sections open that are named."""
    for name in ("guidance", "folding", "evaluation"):
        box = getattr(panel.ui, f"{name}CollapsibleButton")
        box.collapsed = False
        box.collapsed = name not in opened
    for name in ("inputs", "registration"):
        getattr(panel.ui, f"{name}CollapsibleButton").collapsed = bool(opened)
    panel.parent.resize(PANEL_WIDTH, 100)
    panel.parent.show()
    QtWidgets.QApplication.processEvents()
    panel.parent.adjustSize()
    panel.parent.resize(PANEL_WIDTH, panel.parent.sizeHint().height())
    QtWidgets.QApplication.processEvents()
    for name in ("guidance", "folding", "evaluation"):
        # Slicer's own boxes do not show what becomes visible while they are closed.
        getattr(panel.ui, f"{name}CollapsibleButton").collapsed = name not in opened
    image = panel.parent.grab().toImage().convertToFormat(QtGui.QImage.Format_RGB888)
    pixels = np.frombuffer(image.constBits(), np.uint8).reshape(image.height(), image.bytesPerLine())
    return Image.fromarray(pixels[:, : 3 * image.width()].reshape(image.height(), image.width(), 3).copy())


def save_panel(panel, path: Path, *opened: str) -> None:
    picture_of(panel, opened).save(path)


def draw_synthetic_pairs(path: Path) -> None:
    """Draw some of the synthetic pairs for training, one per row, with slices in radiological convention."""
    pairs = [tuple(tensor[0].numpy() for tensor in synthetic_pair(seed)) for seed in (0, 2, 3, 5, 6, 7)]
    figure = new_figure(figsize=(10, 0.25 + 1.45 * len(pairs)), dpi=75, facecolor="white", layout="constrained")
    panels = figure.subplots(len(pairs), 8, squeeze=False)
    for row, (fixed, moving, fixed_labels, moving_labels) in zip(panels, pairs, strict=True):
        middle = [size // 2 for size in fixed.shape]
        planes = []
        for image, labels in ((fixed, fixed_labels), (moving, moving_labels)):
            planes += [image[middle[0], :, ::-1], image[:, middle[1], ::-1]]
            planes += [image[:, ::-1, round(0.45 * image.shape[2])]]
            planes += [_label_colors(labels[:, middle[1], ::-1])]
        for axes, plane in zip(row, planes, strict=True):
            axes.imshow(plane, origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
            axes.set_axis_off()
    for start, name in ((0, "Fixed"), (4, "Moving")):
        for offset, view in enumerate(("axial", "coronal", "sagittal", "labels")):
            panels[0][start + offset].set_title(f"{name}: {view}", fontsize=9)
    figure.savefig(path)


def _label_colors(labels: np.ndarray) -> np.ndarray:
    """RGB [..., 3]: black for 0, neighboring labels far apart on the color circle."""
    hue = np.arange(256) * 0.618034 * 2 * np.pi
    table = 0.5 + 0.45 * np.cos(hue[:, None] + np.array([0, 2.1, 4.2]))
    table[0] = 0
    return table[labels]


if __name__ == "__main__":
    (draw_guidance if sys.argv[2:] == ["guidance"] else main)(Path(sys.argv[1]))

"""Measuring a result in the scene: labels, segmentations and landmarks against the same figures computed here."""

import numpy as np
import pytest

slicer = pytest.importorskip("slicer")

from conftest import oblique_affine
from scene_tools import OBLIQUE, QUICK, add, image, new_worker, right_angled, wait_until

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import metrics
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.evaluation import EvaluationInputs, SceneEvaluation
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.labels import add_segment
from GradProjIOLib.scene.session import SceneRegistration
from GradProjIOLib.scene.transforms import deformation_from_result, deformation_to_node
from GradProjIOLib.spatial.deformation import Deformation


@pytest.fixture(scope="module")
def result(worker):
    """A registered pair of oblique, anisotropic images, the moving one below a parent transform."""
    scene = slicer.vtkMRMLScene()
    affine = right_angled(OBLIQUE)
    fixed = add(scene, image("fixed", affine=affine))
    parent = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "parent")
    parent.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(oblique_affine((1, 1, 1), (3, -2, 4), (2, 1, -3))))
    moving = add(scene, image("moving", shift=2.0, affine=affine), parent=parent)
    nodes = SceneRegistration(scene, worker).run(Inputs(fixed, moving), QUICK)
    return scene, fixed, moving, nodes


def labels_of(volume: Volume, name: str) -> Volume:
    array = (volume.array > 300).astype(np.uint8) + (volume.array > 700)
    return Volume(array, volume.affine, name)


def measure(scene, worker, measured) -> SceneEvaluation:
    found = SceneEvaluation(scene, worker)
    found.start(measured)
    assert found.active
    wait_until(lambda: not found.active, found.poll)
    return found


def table(node) -> dict[str, float]:
    return {node.GetCellText(row, 0): float(node.GetCellText(row, 1)) for row in range(node.GetNumberOfRows())}


def deformation_of(nodes) -> Deformation:
    return Deformation(*deformation_from_result(nodes["transform"]))


def test_a_grid_comes_back_as_it_was_put_into_a_node():
    scene = slicer.vtkMRMLScene()
    displacement = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)
    node = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "grid")
    deformation_to_node(displacement, right_angled(OBLIQUE), np.eye(4), node)
    found, affine, matrix = deformation_from_result(node)
    np.testing.assert_array_equal(matrix, np.eye(4))
    np.testing.assert_allclose(found, displacement)
    np.testing.assert_allclose(affine, right_angled(OBLIQUE), atol=1e-9)
    node.Inverse()
    with pytest.raises(InputError, match="grid is not as"):
        deformation_from_result(node)


def test_label_maps_and_landmarks(result, worker, folder):
    scene, fixed, moving, nodes = result
    volumes = [labels_of(mrml.volume_from_node(node), node.GetName()) for node in (fixed, moving)]
    # Some programs write whole numbers as floats.
    labels = [add(scene, Volume(volume.array.astype(np.float32), volume.affine, volume.name),
                  "vtkMRMLLabelMapVolumeNode") for volume in volumes]  # fmt: skip
    points = []
    for name, shift in (("fixed points", 0.0), ("moving points", 4.0)):
        node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name)
        for label, position in (("one", (-10.0, -5.0, 0.0)), ("two", (5.0, 10.0, 8.0))):
            node.AddControlPoint([position[0] + shift, *position[1:]], label)
        points.append(node)
    found = measure(scene, worker, EvaluationInputs(nodes["jacobian"], *labels, *points))
    assert found.message == "Measured."
    deformation = deformation_of(nodes)
    expected = metrics.evaluate_labels(deformation, *volumes)
    shown = table(found.table)
    assert shown["Dice"] == pytest.approx(expected["dice"], abs=1e-4)
    assert shown["Dice before registration"] == pytest.approx(expected["dice_before"], abs=1e-4)
    assert 0.3 < shown["Dice before registration"] < 1
    assert shown["HD95 [mm], 2"] == pytest.approx(expected["structures"][1]["hd95_mm"], abs=1e-3)
    fixed_points = np.array([[-10.0, -5, 0], [5, 10, 8]])
    errors = np.linalg.norm(deformation.map_points(fixed_points) - fixed_points - [4, 0, 0], axis=1)
    assert shown["TRE [mm]"] == pytest.approx(errors.mean(), abs=1e-3)
    assert shown["TRE before registration [mm]"] == pytest.approx(4)
    assert shown["TRE [mm], two"] == pytest.approx(errors[1], abs=1e-3)
    report = mrml.recall(nodes["jacobian"], "report")["jacobian"]
    assert shown["Folded voxels"] == report["folded_voxels"]
    assert shown["Non-diffeomorphic volume [%]"] == pytest.approx(report["ndv_percent"], abs=1e-6)
    assert mrml.recall(found.table, "evaluation")["dice"] == pytest.approx(expected["dice"])


def test_segments_correspond_by_name(result, worker):
    """The moving segmentation has its segments in another order, and one more."""
    scene, fixed, moving, nodes = result
    volumes = [labels_of(mrml.volume_from_node(node), node.GetName()) for node in (fixed, moving)]
    names = (("shell", "core"), ("extra", "core", "shell"))
    segmentations = []
    for volume, image_node, own in zip(volumes, (fixed, moving), names, strict=True):
        node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "segmentation")
        node.SetReferenceImageGeometryParameterFromVolumeNode(image_node)
        for name in own:
            inside = volume.array == {"shell": 1, "core": 2, "extra": 9}[name]
            if name == "extra":
                inside[0, 0, 0] = True
            add_segment(node, Volume(inside.astype(np.uint8), volume.affine, name), (1, 0, 0))
        segmentations.append(node)
    shown = table(measure(scene, worker, EvaluationInputs(nodes["jacobian"], *segmentations)).table)
    expected = metrics.evaluate_labels(deformation_of(nodes), *volumes)
    for name, structure in zip(("shell", "core"), expected["structures"], strict=True):
        assert shown[f"Dice, {name}"] == pytest.approx(structure["dice"], abs=0.02)
    assert not any("extra" in title for title in shown)


def test_a_choice_that_cannot_be_measured_is_explained(result, worker):
    scene, fixed, _moving, nodes = result
    labels = add(scene, labels_of(mrml.volume_from_node(fixed), "labels"), "vtkMRMLLabelMapVolumeNode")
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "segmentation")
    points = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    jacobian = nodes["jacobian"]
    for measured, words in (
        (EvaluationInputs(None, labels, labels), "no result"),
        (EvaluationInputs(fixed, labels, labels), "no result"),
        (EvaluationInputs(jacobian), "No labels or landmarks"),
        (EvaluationInputs(jacobian, labels), "moving labels"),
        (EvaluationInputs(jacobian, None, None, None, points), "fixed landmarks"),
        (EvaluationInputs(jacobian, labels, segmentation), "two of one kind"),
        (EvaluationInputs(jacobian, None, None, points, points), "no point"),
        (EvaluationInputs(jacobian, segmentation, segmentation), "no segments"),
    ):
        found = SceneEvaluation(scene, worker)
        found.start(measured)
        assert not found.active
        assert words in found.message


def test_what_was_moved_since_the_registration_is_not_measured(result, worker):
    scene, fixed, moving, nodes = result
    jacobian, transform = nodes["jacobian"], nodes["transform"]
    labels = [add(scene, labels_of(mrml.volume_from_node(node), "labels"), "vtkMRMLLabelMapVolumeNode")
              for node in (fixed, moving)]  # fmt: skip
    EvaluationInputs(jacobian, *labels).check()
    points = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    with_points = EvaluationInputs(jacobian, None, None, points, points)
    for node, measured in ((labels[1], EvaluationInputs(jacobian, *labels)), (points, with_points)):
        node.SetAndObserveTransformNodeID(transform.GetID())
        with pytest.raises(InputError, match="count twice"):
            measured.check()
        node.SetAndObserveTransformNodeID(None)
    parent = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "shift")
    parent.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(oblique_affine((1, 1, 1), (0, 0, 0), (0, 5, 0))))
    jacobian.SetAndObserveTransformNodeID(parent.GetID())
    with pytest.raises(InputError, match="has been moved"):
        EvaluationInputs(jacobian, *labels).check()
    jacobian.SetAndObserveTransformNodeID(None)


def test_an_evaluation_ends_with_its_worker_and_with_its_scene(result, folder):
    scene, fixed, _moving, nodes = result
    labels = add(scene, labels_of(mrml.volume_from_node(fixed), "labels"), "vtkMRMLLabelMapVolumeNode")
    found = SceneEvaluation(scene, new_worker())
    found.start(EvaluationInputs(nodes["jacobian"], labels, labels))
    wait_until(lambda: found.client.pid is not None, found.client.poll)
    found.client._process.kill()
    wait_until(lambda: not found.active, found.poll)
    assert "ended unexpectedly" in found.message
    found.start(EvaluationInputs(nodes["jacobian"], labels, labels))
    found.abandon()
    assert not found.active
    assert not found.client.running

"""Landmarks and segments of the scene guide a registration: by the real worker, in slicer-core's real scene."""

import numpy as np
import pytest
import slicer
import vtk
from scene_tools import OBLIQUE, ScriptedWorker, add, add_pair, image, right_angled, sessions

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.guidance import Guides, structures
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.labels import add_segment
from GradProjIOLib.scene.pairs import PairPlacing, add_list, conflict_sentence, maps_of, pairs_of, remove_pair
from GradProjIOLib.scene.transforms import deformation_from_result, deformation_to_node
from GradProjIOLib.spatial.deformation import Deformation

REFINED = {"model": "none", "refine_steps": 6, "device": "cpu"}
TURNED = np.array([[0.8, -0.6, 0, 12], [0.6, 0.8, 0, -7], [0, 0, 1, 5], [0, 0, 0, 1.0]])
UP = np.array([0, 0, 4.0])


@pytest.fixture
def session(worker, folder):
    yield from sessions(worker)


@pytest.fixture
def scripted(folder):
    yield from sessions(ScriptedWorker())


def points(scene, positions, names=None, parent=None):
    """A list of points at `positions` in the world, below `parent`."""
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    if parent is not None:
        node.SetAndObserveTransformNodeID(parent.GetID())
    for number, position in enumerate(positions):
        node.AddControlPointWorld(vtk.vtkVector3d(*position), str(number) if names is None else names[number])
    return node


def world(node):
    return slicer.util.arrayFromMarkupsControlPoints(node, world=True)


def linear(scene, matrix, name="turned"):
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    node.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    return node


def a_result(scene, fixed, moving, matrix):
    """A bent deformation with a linear part as the result of these images, and the same as a Deformation."""
    rng = np.random.default_rng(0)
    affine = right_angled(OBLIQUE)
    deformation = Deformation(rng.normal(0, 2, (14, 15, 16, 3)).astype(np.float32), affine, matrix)
    node = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "Transform")
    deformation_to_node(deformation.displacement, affine, matrix, node)
    node.SetAttribute("GradProjIO.role", "transform")
    for role, linked in (("fixed", fixed), ("moving", moving)):
        node.SetNodeReferenceID(f"GradProjIO.{role}", linked.GetID())
    mrml.remember(node, report={"initial_transform": TURNED.tolist(), "settings": {}})
    return node, deformation


def test_a_partner_lies_where_the_map_puts_it_whatever_the_lists_lie_under(scripted):
    """An oblique result, and a moving image and its landmarks below an oblique transform of their own."""
    scene = scripted.scene
    fixed = add(scene, image("fixed"))
    parent = linear(scene, TURNED)
    moving = add(scene, image("moving"), parent=parent)
    result, deformation = a_result(scene, fixed, moving, TURNED)
    first, second = add_list(scene, "fixed", fixed), add_list(scene, "moving", moving)
    assert second.GetParentTransformNode() is parent
    placing = PairPlacing(scene)
    for position in ([3.0, -4, 6], [-10, 2, 1]):
        placing.start(first, second)
        assert placing.active
        assert not placing.poll(lambda: maps_of(fixed, moving, None, result))
        first.AddControlPointWorld(vtk.vtkVector3d(*position))
        assert placing.poll(lambda: maps_of(fixed, moving, None, result))
        placing.stop()
    np.testing.assert_allclose(world(second), deformation.map_points(world(first)), atol=1e-4)
    assert [second.GetNthControlPointLabel(number) for number in (0, 1)] == ["1", "2"]
    pairs = pairs_of(first, second, maps_of(fixed, moving, None, result))
    assert [pair.now_mm for pair in pairs] == pytest.approx([0, 0], abs=1e-4)


def test_without_a_result_of_these_images_the_initial_transform_counts_or_none(scripted):
    scene = scripted.scene
    fixed, moving = add_pair(scene)
    result, _ = a_result(scene, fixed, moving, np.eye(4))
    other = add(scene, image("other"))
    start = linear(scene, np.linalg.inv(TURNED))
    some = np.array([[3.0, -4, 6]])
    np.testing.assert_allclose(maps_of(fixed, other, None, result).proposing(some), some)
    proposed = maps_of(fixed, other, start, result).proposing(some)
    np.testing.assert_allclose(proposed, some @ TURNED[:3, :3].T + TURNED[:3, 3], atol=1e-6)
    assert maps_of(fixed, moving, start, result).now is not None
    mrml.remember(result, report=mrml.recall(result, "report") | {"inputs": {"moving": {"affine": TURNED.tolist()}}})
    assert maps_of(fixed, moving, start, result).now is None, "the moving image has been moved since"


def test_the_figures_are_those_of_the_deformation(scripted):
    scene = scripted.scene
    fixed, moving = add_pair(scene)
    result, deformation = a_result(scene, fixed, moving, TURNED)
    rng = np.random.default_rng(1)
    here, there = rng.uniform(-20, 20, (4, 3)), rng.uniform(-20, 20, (4, 3))
    # Partners in another order, below a transform.
    names = ["a", "b", "c", "d"]
    lists = points(scene, here, names), points(scene, there[::-1], names[::-1], linear(scene, TURNED))
    pairs = pairs_of(*lists, maps_of(fixed, moving, None, result))
    assert [pair.name for pair in pairs] == names
    before, now = Deformation.from_linear(TURNED), deformation
    for map_, figure in ((before, "before_mm"), (now, "now_mm")):
        expected = np.linalg.norm(map_.map_points(here) - there, axis=1)
        assert [getattr(pair, figure) for pair in pairs] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_conflict_is_that_of_a_pair_that_was_left_apart(scripted):
    scene = scripted.scene
    fixed, moving = add_pair(scene)
    result, _ = a_result(scene, fixed, moving, TURNED)
    here, there = np.zeros((2, 3)), np.array([[0.0, 0, 5], [1, 1, 1]])
    reported = [
        {"name": name, "fixed": one.tolist(), "moving": other.tolist(), "after_mm": after}
        for name, one, other, after in zip("ab", here, there, (5.0, 0.4), strict=True)
    ]
    steps = [{"conflicts": ["regularity–landmarks"]}, {"conflicts": ["similarity–landmarks"]}, {"conflicts": []}]
    report = {"initial_transform": TURNED.tolist(), "landmarks": reported, "steps": steps, "continued_after": [1]}
    mrml.remember(result, report=report)
    lists = points(scene, here, "ab"), points(scene, there, "ab")
    maps = maps_of(fixed, moving, None, result)
    assert [pair.conflicted for pair in pairs_of(*lists, maps)] == [True, False]
    assert conflict_sentence(maps.report) == "The landmarks conflicted with the images in 1 of 2 steps."
    lists[1].SetNthControlPointPositionWorld(0, 3, 3, 3)
    assert not any(pair.conflicted for pair in pairs_of(*lists, maps)), "it is another pair now"


def test_removing_a_pair_removes_both_its_points(scripted):
    scene = scripted.scene
    lists = points(scene, np.zeros((3, 3)), "abc"), points(scene, np.zeros((3, 3)), "cab")
    remove_pair(*lists, 1)
    assert [[node.GetNthControlPointLabel(one) for one in (0, 1)] for node in lists] == [["a", "c"], ["c", "a"]]


class TestRefusals:
    def guides(self, scripted, first=2, second=2):
        scene = scripted.scene
        return Guides(points(scene, np.zeros((first, 3))), points(scene, np.zeros((second, 3))))

    @pytest.mark.parametrize("counts", [(2, 1), (0, 1), (1, 0)])
    def test_points_without_partners(self, scripted, counts):
        guides = self.guides(scripted, *counts)
        fixed, moving = add_pair(scripted.scene)
        with pytest.raises(InputError, match=r"There are . fixed and . moving landmarks"):
            Inputs(fixed, moving, guides=guides).check()
        with pytest.raises(InputError, match=r"There are . fixed and . moving landmarks"):
            pairs_of(guides.fixed_points, guides.moving_points, maps_of(fixed, moving))

    def test_empty_lists_guide_nothing(self, scripted):
        guides = self.guides(scripted, 0, 0)
        guides.check()
        assert not guides.has_landmarks
        assert pairs_of(guides.fixed_points, guides.moving_points, maps_of(None, None)) == []

    def test_one_list_or_the_same_twice(self, scripted):
        guides = self.guides(scripted)
        with pytest.raises(InputError, match="choose the moving landmarks, too"):
            Guides(guides.fixed_points).check()
        with pytest.raises(InputError, match="as fixed and as moving landmarks"):
            Guides(guides.fixed_points, guides.fixed_points).check()

    def test_landmarks_under_the_initial_transform_would_count_twice(self, scripted):
        guides, start = self.guides(scripted), linear(scripted.scene, TURNED)
        guides.moving_points.SetAndObserveTransformNodeID(start.GetID())
        with pytest.raises(InputError, match="points lies under turned, which would count twice"):
            guides.check(start)


def test_landmarks_guide_where_the_images_lie_under_an_oblique_transform(session):
    """What is moved together gives the same figures, so that points and images are taken from the same space."""
    scene = session.scene
    parent = linear(scene, TURNED)
    fixed, moving = add_pair(scene)
    middle = np.array([28.5, 25.5, 28.0])
    here = middle + np.array([[8.0, 0, 0], [-8, 3, 2]])
    there = here + UP
    found = []
    for above in (None, parent):
        for node in (fixed, moving):
            node.SetAndObserveTransformNodeID(above.GetID() if above else None)
        guides = Guides(points(scene, here), points(scene, there))
        for node in (guides.fixed_points, guides.moving_points):
            node.SetAndObserveTransformNodeID(above.GetID() if above else None)
        result = session.run(Inputs(fixed, moving, guides=guides), REFINED)
        report = mrml.recall(result["transform"], "report")
        found.append([pair["after_mm"] for pair in report["landmarks"]])
        assert [pair["before_mm"] for pair in report["landmarks"]] == pytest.approx([4, 4])
        shown = pairs_of(guides.fixed_points, guides.moving_points, maps_of(fixed, moving, None, result["transform"]))
        assert [pair.now_mm for pair in shown] == pytest.approx(found[-1], abs=1e-3)
        assert max(found[-1]) < 3
    assert found[0] == pytest.approx(found[1], abs=0.3)


def test_a_result_goes_on_with_landmarks_and_keeps_them(session):
    scene = session.scene
    fixed, moving = add_pair(scene)
    first = session.run(Inputs(fixed, moving), REFINED)
    here = np.array([[36.5, 25.5, 28.0]])
    where = Deformation(*deformation_from_result(first["transform"])).map_points(here) + UP
    guides = Guides(points(scene, here), points(scene, where))
    found = session.run_on(first["transform"], 4, guides)
    (pair,) = mrml.recall(found["transform"], "report")["landmarks"]
    assert pair["after_mm"] < 3
    assert mrml.linked(found["warped"], "fixed_points") is guides.fixed_points
    # Without new ones they still guide, also where the lists are gone.
    for node in (guides.fixed_points, guides.moving_points):
        scene.RemoveNode(node)
    (again,) = mrml.recall(session.run_on(first["transform"], 4)["transform"], "report")["landmarks"]
    assert again["fixed"] == pair["fixed"]
    assert again["after_mm"] < 1


def segmentation(scene, name, node, masks, parent=None):
    """A segmentation with a segment for each mask."""
    found = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
    found.CreateDefaultDisplayNodes()
    affine = mrml.volume_from_node(node).affine
    for title, mask in masks.items():
        add_segment(found, Volume(mask.astype(np.uint8), affine, title), (1, 0, 0))
    return found


def two_segmentations(scene, fixed, moving):
    """In both images the body, and in it a core; the moving one has them in the other order, and one more."""
    masks = []
    for node in (fixed, moving):
        array = slicer.util.arrayFromVolume(node)
        masks.append({"body": array > 200, "core": array > 800})
    masks[1] = {"other": masks[1]["body"], "core": masks[1]["core"], "body": masks[1]["body"]}
    return [segmentation(scene, "segments", node, mask) for node, mask in zip((fixed, moving), masks, strict=True)]


def test_segments_guide_by_their_names(session):
    scene = session.scene
    fixed, moving = add_pair(scene)
    drawn = two_segmentations(scene, fixed, moving)
    assert structures(*drawn) == {"body": "body", "core": "core"}
    guides = Guides(None, None, *drawn, weights={"core": 1.0})
    result = session.run(Inputs(fixed, moving, guides=guides), REFINED)
    (label,) = mrml.recall(result["transform"], "report")["labels"]
    assert (label["name"], label["weight"]) == ("core", 1)
    assert label["dice_after"] > label["dice_before"] + 0.05
    # What is not said anew holds still, and only the finest level is run.
    again = mrml.recall(session.run_on(result["transform"], 3)["transform"], "report")
    assert [one["name"] for one in again["labels"]] == ["core"]
    assert len(session.steps) == 3
    scene.RemoveNode(drawn[1])
    with pytest.raises(RuntimeError, match="The moving guiding segmentation of this result is not in the scene"):
        session.run_on(result["transform"], 3)


def test_label_maps_guide_by_their_values(session):
    scene = session.scene
    fixed, moving = add_pair(scene)
    maps = []
    for node in (fixed, moving):
        volume = mrml.volume_from_node(node)
        array = (volume.array > 200).astype(np.uint8) + (volume.array > 800)
        maps.append(add(scene, Volume(array * 3, volume.affine, "labels"), "vtkMRMLLabelMapVolumeNode"))
    assert list(structures(*maps)) == ["3", "6"]
    result = session.run(Inputs(fixed, moving, guides=Guides(None, None, *maps, weights={"6": 1.0})), REFINED)
    (label,) = mrml.recall(result["transform"], "report")["labels"]
    assert label["value"] == 6
    assert session.run_on(result["transform"], 2)


def test_segments_that_cannot_guide(scripted):
    scene = scripted.scene
    fixed, moving = add_pair(scene)
    drawn = two_segmentations(scene, fixed, moving)
    alone = segmentation(scene, "alone", moving, {"liver": slicer.util.arrayFromVolume(moving) > 200})
    label_map = add(scene, Volume(np.ones((5, 5, 5), np.uint8), np.eye(4), "map"), "vtkMRMLLabelMapVolumeNode")
    for guides, problem in (
        (Guides(None, None, drawn[0], alone), "no segment name in common"),
        (Guides(None, None, drawn[0], label_map), "choose two of one kind"),
        (Guides(None, None, drawn[0]), "choose the moving guiding segments, too"),
        (Guides(None, None, *drawn, weights={}), "No segment is chosen"),
    ):
        with pytest.raises(InputError, match=problem):
            Inputs(fixed, moving, guides=guides).check()
